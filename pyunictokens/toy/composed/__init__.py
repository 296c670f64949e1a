"""The composed world: several things in a picture, so that following a prompt is hard and there is something to gain.

scene.py draws scenes by lot, prompts.py says what is in them, spotter.py reads pictures, model.py has the models.
"""

from __future__ import annotations
