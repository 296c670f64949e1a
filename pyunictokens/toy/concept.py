"""Write one toy concept to disk in the published folder layout, with its truth beside it.

The subject is one that pre-training never drew. Ten training pictures show it at different moments; eight facts about
it are in no picture. `truth.json` in the test half says what each prompt should show: only the attribute accuracy
metric may read it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..data import wording
from ..data.concept import FACT_PROMPTS, concept_name
from ..data.images import save_image
from ..data.install import list_concept
from ..data.photographs import TRUTH
from ..utils.errors import UserError, needs
from ..utils.files import write_json
from .drawing import render
from .facts import FACTS, at_place, draw_facts, thing
from .grammar import RECOGNITIONS, change_subject, subject_questions
from .scene import KINDS, SLOTS, SUBJECT_SLOTS, Attributes, random_moment, random_scene

with needs("data"):
    from PIL import Image

TRAIN_IMAGES, TEST_IMAGES, NEGATIVES, RANDOM_IMAGES = 10, 4, 12, 12
FRESH = 4  # further pictures of other things, of both kinds, that no training question shows
_SIDE = 256


def write_toy_concept(
    root: str | os.PathLike[str], *, seed: int = 0, kind: str = "animal", name: str = "bo", force: bool = False
) -> Path:
    """Write concept `name` of a `kind` (human, animal, object) into the data folder `root`; returns `root`.

    The same seed and kind give the same concept, byte for byte. A concept of that name is only replaced with force.
    """
    concept_name(name)
    if kind not in KINDS:
        raise UserError(f"kind={kind!r}: must be one of {', '.join(KINDS)}")
    root = Path(root)
    if (root / "concept" / "train" / name).exists() and not force:
        raise UserError(f"{root / 'concept' / 'train' / name}: exists already: choose another name or force=True")
    _Writer(root, name, kind, np.random.default_rng([seed, KINDS.index(kind), 771])).write()
    return root


class _Writer:
    def __init__(self, root: Path, name: str, kind: str, rng: np.random.Generator):
        self.root, self.name, self.rng = root, name, rng
        self.sks = f"<{name}>"
        self.train, self.test = (root / "concept" / half / name for half in ("train", "test"))
        self.subject = random_scene(rng, kind, held_out=True)
        self.values = draw_facts(rng)
        self.facts = [fact.sentence(value) for fact, value in zip(FACTS, self.values, strict=True)]
        self.expected: dict[str, dict[str, str]] = {}

    def write(self) -> None:
        shown = {"train": self._pictures(self.train, TRAIN_IMAGES), "test": self._pictures(self.test, TEST_IMAGES)}
        self._info()
        self._conversations(shown["train"])
        self._recognitions()
        write_json(self.test / "vqa.json", {str(i): self._seen(scene) for i, scene in enumerate(shown["test"])})
        write_json(self.test / "text_only.json", self._without_picture(range(4, 8)))
        write_json(self.test / "t2i_conditions.json", self._prompts())
        self._truth(shown)
        self._shared()

    # --- pictures ----------------------------------------------------------------------------------------------------

    def _picture(self, scene: Attributes, path: Path) -> None:
        save_image(Image.fromarray(render(scene, _SIDE)), path)

    def _pictures(self, folder: Path, count: int) -> list[Attributes]:
        """The subject at `count` moments, no two alike: places in turn, one in three without wear, one without an
        item."""
        scenes: list[Attributes] = []
        skin = float(self.rng.random())
        while len(scenes) < count:
            index = len(scenes)
            moment = random_moment(self.subject, self.rng, bare=0.0)
            moment = replace(moment, place=index % len(SLOTS["place"]), skin=skin)
            if index % 3 == 0:
                moment = replace(moment, wear=0, wear_colour=0)
            if index % 3 == 1:
                moment = replace(moment, item=0, item_colour=0)
            scenes.append(moment)
            self._picture(moment, folder / f"{index}.png")
        return scenes

    # --- words -------------------------------------------------------------------------------------------------------

    def _info(self) -> None:
        info = {
            "class": self.subject.noun,
            "info": f"{self.sks} is {self._looks()}",
            "extra_info": self.facts,
            "conversation_type": self.subject.kind,
            "num_testing_info": 4,
        }
        write_json(self.train / "info.json", info)

    def _looks(self) -> str:
        s = self.subject
        if s.kind == "human":
            hair, shirt = f"{s.word('shape')} {s.word('hair')} hair", f"{s.word('pattern')} {s.word('colour')} shirt"
            return f"a person with {hair} in a {shirt}"
        return f"a {s.word('pattern')} {s.word('colour')} {s.noun}"

    def _about_subject(self) -> list[tuple[str, str]]:
        s, x = self.subject, self.sks
        cloth = f"the shirt of {x}" if s.kind == "human" else x
        pairs = subject_questions(s, x)
        for slot in ("colour", "pattern"):
            wrong = self.rng.choice([word for word in SLOTS[slot] if word != s.word(slot)])
            pairs += [(f"is {cloth} {s.word(slot)}?", "yes"), (f"is {cloth} {wrong}?", "no")]
        return pairs

    def _seen(self, scene: Attributes) -> list[dict[str, str]]:
        """Questions about one picture of the concept."""
        x = self.sks
        worn = thing(scene.word("wear_colour"), scene.word("wear")) if scene.wear else "nothing"
        item = thing(scene.word("item_colour"), scene.word("item")) if scene.item else "nothing"
        pairs = [
            *self._about_subject(),
            (f"what is {x} wearing?", worn),
            (f"what is beside {x}?", item),
            (f"where is {x}?", at_place(scene.word("place"))),
        ]
        return wording.as_json(pairs)

    def _without_picture(self, facts: range) -> list[dict[str, str]]:
        """Questions that need no picture: about the looks, and about some of the facts with all of them listed."""
        pairs = self._about_subject()
        listed = ". ".join(self.facts)
        for k in facts:
            request = FACTS[k].prompts[0].format(x=self.sks)
            pairs.append((wording.text_only_question(self.facts, request), self.facts[k]))
            question = FACTS[k].question.format(x=self.sks)
            pairs.append((f"Information: {listed}. {question}?", FACTS[k].short(self.values[k])))
        return wording.as_json(pairs)

    def _conversations(self, scenes: list[Attributes]) -> None:
        talk: dict[str, object] = {str(index): self._seen(scene) for index, scene in enumerate(scenes)}
        talk["text_only"] = self._without_picture(range(4))
        write_json(self.train / "conversations.json", talk)

    def _recognitions(self) -> None:
        base = f"concept/train/{self.name}"
        ask = [template.format(x=self.sks) for template in dict.fromkeys(RECOGNITIONS)]
        positive = [
            {"image": f"{base}/{i}.png", "query": ask[(i + k) % len(ask)], "answer": "yes"}
            for i in range(TRAIN_IMAGES)
            for k in range(2)
        ]
        negative = []
        for i in range(NEGATIVES + FRESH):
            other = random_moment(change_subject(self.subject, self.rng), self.rng)
            self._picture(other, self.train / "negative_example" / f"{i}.png")
            if i >= NEGATIVES:
                continue
            file = f"{base}/negative_example/{i}.png"
            negative.append({"image": file, "query": ask[i % len(ask)], "answer": "no"})
        for i in range(RANDOM_IMAGES):
            negative.append({"image": f"random_images/{i}.png", "query": ask[i % len(ask)], "answer": "no"})
        write_json(self.train / "positive_recognitions.json", positive)
        write_json(self.train / "random_recognitions.json", negative)

    # --- prompts and truth -------------------------------------------------------------------------------------------

    def _prompts(self) -> dict[str, list[str]]:
        """The prompts by their published names; notes on the way what each should show."""
        driven = [fact.unseen_prompt.format(x=self.sks) for fact in FACTS]
        explicit = [wording.compound_prompt(p, fact) for p, fact in zip(driven, self.facts, strict=True)]
        for prompt, long, value in zip(driven, explicit, self.values, strict=True):
            self.expected[prompt] = self.expected[long] = value
        pure = [self._drawn({}, "")]
        dense, reasoning, spelled = [], [], []
        for k in range(6):
            moment = random_moment(self.subject, self.rng, bare=0.0)
            worn = thing(moment.word("wear_colour"), moment.word("wear"))
            item = thing(moment.word("item_colour"), moment.word("item"))
            place = at_place(moment.word("place"))
            wear = {slot: moment.word(slot) for slot in ("wear", "wear_colour")}
            beside = {slot: moment.word(slot) for slot in ("item", "item_colour")}
            where = {"place": moment.word("place")}
            pure.append(
                (
                    self._drawn(where, place),
                    self._drawn(wear, f"wearing {worn}"),
                    self._drawn(beside, f"beside {item}"),
                )[k % 3]
            )
            dense.append(self._drawn({**wear, **beside, **where}, f"wearing {worn} beside {item} {place}"))
            if k < 4:
                more, slots = (place, where) if FACTS[k + 4].slot != "place" else (f"wearing {worn}", wear)
                reasoning.append(f"{driven[k + 4]} {more}")
                spelled.append(wording.compound_prompt(reasoning[-1], self.facts[k + 4]))
                self.expected[reasoning[-1]] = self.expected[spelled[-1]] = {**self.values[k + 4], **slots}
        return {
            FACT_PROMPTS: driven,
            f"explicit_{FACT_PROMPTS}": explicit,
            "pure_generation": pure,
            "dense_generation": dense,
            "personalized_dense_generation": reasoning,
            "explicit_personalized_dense_generation": spelled,
        }

    def _drawn(self, slots: dict[str, str], words: str) -> str:
        prompt = f"a photo of {self.sks}{' ' if words else ''}{words}"
        self.expected[prompt] = slots
        return prompt

    def _truth(self, shown: dict[str, list[Attributes]]) -> None:
        truth = {
            "kind": self.subject.kind,
            "noun": self.subject.noun,
            "subject": {slot: self.subject.word(slot) for slot in SUBJECT_SLOTS},
            "facts": [
                {"key": fact.key, "fact": sentence, "slots": value}
                for fact, sentence, value in zip(FACTS, self.facts, self.values, strict=True)
            ],
            "prompts": self.expected,
            "images": {half: {f"{i}.png": s.words() for i, s in enumerate(scenes)} for half, scenes in shown.items()},
        }
        write_json(self.test / TRUTH, truth)

    def _shared(self) -> None:
        """The files that all concepts of a data folder share."""
        folder = self.root / "random_images"
        rng = np.random.default_rng(4)
        for i in range(RANDOM_IMAGES + FRESH):
            self._picture(random_scene(rng), folder / f"{i}.png")
        save_image(Image.new("RGB", (512, 512)), self.root / "black_512x512.png")
        list_concept(self.root, self.name, [f"{i}.png" for i in range(TRAIN_IMAGES)])
