"""How well BER tells the right drawing from a wrong one, under each text that may stand for the concept's token.

    python experiments/judged_as.py                # ten toy concepts, seeds 11 to 20

Every fact of every concept is drawn rightly, with one slot of the fact wrong, and with the subject's colour or pattern
wrong; the toy's image–text expert scores the drawings against the prompt with the fact. Printed is its score of right
drawings and how much less it gives the wrong ones: a negative number is a reward for drawing something else. Uses the
drawn world alone, no model draws. It says nothing about BLIP-2.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pyunictokens.data.folder import load_concept
from pyunictokens.models.bundle import Sources
from pyunictokens.rewards.base import RewardBatch, plain_text
from pyunictokens.runs.bundle import load_scorers
from pyunictokens.toy import world as toyworld
from pyunictokens.toy.concept import write_toy_concept
from pyunictokens.toy.scene import SLOTS, Attributes, random_moment, random_scene

DRAWINGS = 8
"""Scenes of each fact and of each way to be wrong."""


def pixels(scenes: list[Attributes]) -> torch.Tensor:
    """[B, 3, 64, 64] in [-1, 1]."""
    return torch.stack([torch.tensor(toyworld.render(s)).permute(2, 0, 1).float() / 127.5 - 1 for s in scenes])


def wrong(scene: Attributes, slots: list[str], rng: np.random.Generator) -> Attributes:
    """The scene with another value in one of `slots`."""
    slot = str(rng.choice(slots))
    first = 0 if slot in ("place", "pattern", "colour") else 1  # value 0 of the others is "none"
    return replace(
        scene, **{slot: int(rng.choice([i for i in range(first, len(SLOTS[slot])) if i != getattr(scene, slot)]))}
    )


def gaps(seed: int, folder: Path) -> dict[str, list[list[float]]]:
    """[score of right, right − wrong fact, right − wrong subject] of every fact, by `judged_as`."""
    write_toy_concept(folder, seed=seed, kind="animal", name="bo")
    concept = load_concept(folder, "bo")
    truth = json.loads((concept.test_folder / "truth.json").read_text(encoding="utf-8"))
    ber = load_scorers(Sources(), torch.device("cpu")).ensemble.experts["ber"]
    rng = np.random.default_rng(seed)

    def values(names: dict[str, str]) -> dict[str, int]:
        return {slot: SLOTS[slot].index(value) for slot, value in names.items()}

    bare = {"wear": 0, "wear_colour": 0, "item": 0, "item_colour": 0}
    subject = replace(random_scene(rng, "animal"), **values(truth["subject"]), **bare)
    found: dict[str, list[list[float]]] = {"class": [], "info": []}
    for fact in truth["facts"]:
        prompt = next(text for text in truth["prompts"] if fact["fact"] in text)
        right = [replace(random_moment(subject, rng, bare=1.0), **values(fact["slots"])) for _ in range(DRAWINGS)]
        sets = (
            right,
            [wrong(scene, list(fact["slots"]), rng) for scene in right],
            [wrong(scene, ["colour", "pattern"], rng) for scene in right],
        )
        for judged_as, rows in found.items():
            text = plain_text(prompt, concept.in_words(judged_as))
            means = [
                float(ber.score(RewardBatch(pixels(scenes), [text] * DRAWINGS, kind=concept.kind)).mean())
                for scenes in sets
            ]
            rows.append([means[0], means[0] - means[1], means[0] - means[2]])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(11, 21)))
    options = parser.parse_args()
    total: dict[str, list[list[float]]] = {"class": [], "info": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            for judged_as, rows in gaps(seed, Path(folder) / str(seed)).items():
                total[judged_as] += rows
    print(f"{len(options.seeds)} concepts, {len(total['class'])} facts, {DRAWINGS} drawings each\n")
    print("| judged_as | right | less for a wrong fact | less for a wrong subject |\n|---|---|---|---|")
    for judged_as, rows in total.items():
        print(f"| {judged_as} | " + " | ".join(f"{value:.3f}" for value in np.mean(rows, axis=0)) + " |")


if __name__ == "__main__":
    main()
