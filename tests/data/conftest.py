"""A small, correct concept folder for the data tests, written by hand: no code under test takes part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

FACTS = [
    "<bo>'s favourite toy is a red ball.",
    "<bo>'s bed is a blue basket.",
    "<bo> is afraid of the vacuum cleaner.",
]


class Folder:
    """The data folder at `root` with the one concept `bo`: three pictures to train, two to test, two negatives."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.train = root / "concept" / "train" / "bo"
        self.test = root / "concept" / "test" / "bo"
        for index in range(3):
            self.image(self.train / f"{index}.png", seed=index)
        for index in range(2):
            self.image(self.test / f"{index}.png", seed=10 + index)
            self.image(self.train / "negative_example" / f"{index}.png", seed=20 + index)
        self.image(root / "black_512x512.png", seed=30)
        self.image(root / "random_images" / "0.png", seed=31)
        self.json(root / "concepts_list.json", ["bo"])
        self.json(root / "concept" / "train" / "train_images.json", {"bo": ["0.png", "1.png", "2.png"]})
        self.info()
        answers = [{"query": "What is <bo>?", "answer": "<bo> is a dog."}]
        toy = [{"query": "What is <bo>'s favourite toy?", "answer": "A red ball."}]
        self.json(self.train / "conversations.json", {"0": answers, "1": answers, "2": answers, "text_only": toy})
        yes = [{"image": "concept/train/bo/0.png", "query": "Is <bo> here?", "answer": "Yes."}]
        no = [{"image": "concept/train/bo/negative_example/0.png", "query": "Is <bo> here?", "answer": "No."}]
        self.json(self.train / "positive_recognitions.json", yes)
        self.json(self.train / "random_recognitions.json", no)
        self.json(self.test / "vqa.json", {"0": answers, "1": answers})
        self.json(self.test / "text_only.json", toy)
        self.prompts(["<bo> with its toy", "<bo> asleep in its bed", "<bo> hiding from what it fears"])

    def image(self, path: Path, seed: int = 0, size: tuple[int, int] = (72, 64)) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(levels).save(path)

    def json(self, path: Path, value: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")

    def info(self, **changes: Any) -> None:
        value = {"class": "dog", "info": "<bo> is a small dog.", "extra_info": FACTS, "conversation_type": "animal"}
        value.update(changes)
        self.json(self.train / "info.json", {key: each for key, each in value.items() if each is not ...})

    def prompts(self, value: Any, **others: Any) -> None:
        self.json(self.test / "t2i_conditions.json", {"personalized_driven_generation": value, **others})

    def snapshot(self) -> dict[str, bytes]:
        return {str(path.relative_to(self.root)): path.read_bytes() for path in self.root.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "data")
