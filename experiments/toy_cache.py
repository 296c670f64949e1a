"""Stage `cache` of the toy's build: draw the pre-training scenes once and keep them as uint8.

Writes WORK/cache/{images.npy, labels.npy}; the last `HOLD` scenes are never trained on, they are what the report is
measured on. A second pair of files holds scenes whose subjects are held out from training altogether.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from pyunictokens.toy.drawing import render
from pyunictokens.toy.scene import random_scene
from pyunictokens.utils.signals import end_with_parent_process

HOLD = 2000
_CHUNK = 1000


def _draw(job: tuple[int, int, bool | None]) -> tuple[np.ndarray, np.ndarray]:
    seed, count, held_out = job
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng, held_out=held_out) for _ in range(count)]
    return np.stack([render(scene) for scene in scenes]), np.stack([scene.labels() for scene in scenes])


def build_cache(work: Path, *, count: int, seed: int) -> None:
    """Draw `count` training scenes (+ HOLD for measuring) and HOLD scenes of held-out subjects."""
    folder = work / "cache"
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(os.cpu_count(), initializer=end_with_parent_process) as pool:
        for name, total, held_out in (("", count + HOLD, False), ("held_out_", HOLD, True)):
            jobs = [(seed * 100_000 + 5_000 * bool(held_out) + k, _CHUNK, held_out) for k in range(total // _CHUNK)]
            images, labels = zip(*pool.map(_draw, jobs), strict=True)
            np.save(folder / f"{name}images.npy", np.concatenate(images))
            np.save(folder / f"{name}labels.npy", np.concatenate(labels))


def load_cache(work: Path, prefix: str = "") -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [n, 64, 64, 3], labels int64 [n, 9])."""
    folder = work / "cache"
    return np.load(folder / f"{prefix}images.npy"), np.load(folder / f"{prefix}labels.npy")
