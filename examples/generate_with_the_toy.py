"""Draw with the embedded toy model from Python: load the parts, make an engine, save a grid.

python examples/generate_with_the_toy.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyunictokens as uct
from pyunictokens.data import make_grid, save_image
from pyunictokens.toy.model import load_toy

PROMPTS = ["A photo of a striped red cat wearing a blue hat in the snow.", "A photo of a yellow mug on the beach."]


def main(out: Path = Path("toy.png"), samples: int = 4) -> Path:
    """Draw `samples` pictures of each prompt side by side; returns the file."""
    toy = load_toy()
    engine = uct.RolloutEngine(toy.model, toy.vq, toy.tokenizer)
    rollout = engine.generate_images(PROMPTS, samples=samples, steps=12, guidance_scale=3.0, seed=0, record=False)
    assert rollout.pixels is not None
    captions = [PROMPTS[index] for index in rollout.prompt_index.tolist()]
    save_image(make_grid(rollout.pixels, samples, captions), out)
    answers = engine.generate_text(rollout.pixels[:1], "What colour is the cat?", temperature=0.0, max_new_tokens=24)
    print(f"{out}; asked what colour the first cat is, the model says: {answers.texts[0]}")
    return out


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
