"""The files of one concept, each read tolerantly into the :class:`Concept`, each problem noted with file and field.

Fields and files are those of docs/data-format.md. Folders in the wild differ from it and from each other: whatever can
be understood is taken, what cannot is noted and left out, and nothing on disk is changed. Decodes no image.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeGuard

from .concept import FACT_PROMPTS, KINDS, PURE_PROMPTS, QA, Concept, Recognition, held_out
from .image_files import ImageFolder, is_file, look_into
from .parse import (
    WARNING,
    ImageFinder,
    Ledger,
    TextFix,
    kind_of,
    parts_of,
    printable,
    questions_of,
    show,
    text_of,
    texts_of,
)

_PROMPT_ALIASES = {
    "dense_prompt_generation": "dense_generation",
    "personalized_dense_prompt_generation": "personalized_dense_generation",
    "explicit_personalized_dense_prompt_generation": "explicit_personalized_dense_generation",
}
_COMMON = frozenset(
    {"and", "are", "for", "has", "her", "his", "its", "not", "that", "the", "their", "they", "this", "was"}
)
_KNOWN_FOLDERS = frozenset({"negative_example", "negative", "cropped"})
_PEOPLE = frozenset({"human", "person", "people", "man", "woman", "boy", "girl", "child", "baby", "actor", "actress"})
_KNOWN_INFO = {"class", "info", "extra_info", "conversation_type"}


class ConceptReader:
    """Fills one Concept, file after file."""

    def __init__(self, concept: Concept) -> None:
        self.concept = concept
        self.train, self.test = concept.train_folder, concept.test_folder
        self.ledger = Ledger(concept.root)
        self.finder = ImageFinder(self.ledger, concept.root)
        self.fix = TextFix(concept.name)

    def read(self) -> None:
        concept = self.concept
        if not self.finder.inside(self.train, "", self.train):
            return
        self._info()
        self._train_images()
        self._negatives()
        loose: list[QA] = []
        path = self.train / "conversations.json"
        value = self.ledger.read(path, "the understanding stage has no questions with answers to learn from", WARNING)
        concept.conversations, concept.text_only = self._questions(path, value, concept.train_images, self.train)
        self._recognitions("positive_recognitions.json", concept.train_images, positive=True)
        self._recognitions("random_recognitions.json", concept.negatives, positive=False)
        if not self.test.is_dir():
            self.ledger.warn(self.test, "", "no test half: evaluation of this concept is not possible")
        elif self.finder.inside(self.test, "", self.test):
            concept.test_images = self._images(self.test)
            if not concept.test_images:
                self.ledger.warn(self.test, "", "no test images: likeness and recognition cannot be measured")
            path = self.test / "vqa.json"
            value = self.ledger.read(path, "no visual questions to test with", WARNING)
            concept.vqa, loose = self._questions(path, value, concept.test_images, self.test)
            path = self.test / "text_only.json"
            value = self.ledger.read(path, "no questions without an image to test with", WARNING)
            value = {"text_only": value} if isinstance(value, list) else value
            about, concept.test_text_only = self._questions(path, value, concept.test_images, self.test)
            concept.test_text_only = loose + about + concept.test_text_only
        self._prompts()
        self._text_answers()

    def _info(self) -> None:
        path, concept = self.train / "info.json", self.concept
        value = self.ledger.read(path, "it says what the concept is: {class, info, extra_info, conversation_type}")
        if value is None:
            return
        if not isinstance(value, dict):
            self.ledger.add(path, "", f"must be an object, is {kind_of(value)}")
            return
        if "class" not in value:
            self.ledger.add(path, "class", "is missing: add the word for what it is, such as dog")
        elif isinstance(value["class"], str) and not value["class"].strip():
            self.ledger.add(path, "class", "is empty: write the word for what it is, such as dog")
        else:
            concept.class_word = text_of(self.ledger, path, "class", value["class"], self.fix) or ""
        kind = value.get("conversation_type")
        if isinstance(kind, str) and kind.strip().casefold() in KINDS:
            concept.kind = kind.strip().casefold()
        elif "conversation_type" not in value and (meant := _kind_of(value)):
            concept.kind = meant
            message = f"is missing: read as {meant}, by generation_type and class (one of {', '.join(KINDS)})"
            self.ledger.warn(path, "conversation_type", message)
        else:
            found = "is missing" if "conversation_type" not in value else f"is {show(kind)}"
            self.ledger.add(path, "conversation_type", f"{found}: must be one of {', '.join(KINDS)}")
        if "info" in value:
            concept.info = text_of(self.ledger, path, "info", value["info"], self.fix) or ""
        else:
            self.ledger.warn(path, "info", "is missing: one sentence on what the concept looks like helps")
        if value.get("extra_info"):
            concept.extra_info = texts_of(self.ledger, path, "extra_info", value["extra_info"], self.fix)
        if not concept.extra_info:
            self.ledger.warn(path, "extra_info", "holds no facts: text-only reasoning cannot be trained")
        first: dict[str, int] = {}
        for index, fact in enumerate(concept.extra_info):
            same = first.setdefault(_plain(fact), index)
            if same != index:
                message = f"repeats item {same}, {show(fact)}: the two cannot be told apart as answers"
                self.ledger.warn(path, f"extra_info[{index}]", message)
        concept.extra = {key: item for key, item in value.items() if key not in _KNOWN_INFO}

    def _train_images(self) -> None:
        path, concept = self.concept.root / "concept" / "train" / "train_images.json", self.concept
        inside = look_into(self.train, _KNOWN_FOLDERS)
        value = self.ledger.read(path)
        listed = self.ledger.entry(path, value, concept.name) if isinstance(value, dict) else None
        if value is not None and not isinstance(value, dict):
            self.ledger.add(path, "", f"must be an object {{concept: [file, …]}}, is {kind_of(value)}")
        elif isinstance(value, dict) and listed is None and concept.name not in value:
            self.ledger.warn(path, concept.name, "is not listed: the images in its folder are used")
        elif isinstance(value, dict) and not _is_texts(listed):
            self.ledger.add(path, concept.name, f"must be a list of file names, is {kind_of(listed)} {show(listed)}")
        if _is_texts(listed):
            bases = [self.train]
            found = [self.finder.find(path, f"{concept.name}[{i}]", item, bases, True) for i, item in enumerate(listed)]
            concept.train_images = list(dict.fromkeys(image for image in found if image is not None))
            unused = [image.name for image in inside.images if image not in concept.train_images]
            if unused:
                self.ledger.warn(path, concept.name, f"does not list {', '.join(unused)}: not used for training")
        else:
            concept.train_images = self._existing(inside)
        self._left_out(self.train, inside)
        if not concept.train_images:
            there = f"; {len(inside.images)} in the folder are not listed in train_images.json" if inside.images else ""
            message = f"no training images{there if listed else ''}: put a few images of the concept there"
            self.ledger.add(self.train, "", message)

    def _images(self, folder: Path) -> list[Path]:
        """The images of a folder, with a warning for those that are not used."""
        inside = look_into(folder, _KNOWN_FOLDERS)
        self._left_out(folder, inside)
        return self._existing(inside)

    def _left_out(self, folder: Path, inside: ImageFolder) -> None:
        for note in inside.notes():
            self.ledger.warn(folder, "", note)

    def _existing(self, inside: ImageFolder) -> list[Path]:
        return [path for path in inside.images if self.finder.inside(path, "", path)]

    def _negatives(self) -> None:
        folders = (self.train / "negative_example", self.train / "negative", self.concept.root / "random_images")
        self.concept.negatives = [path for folder in folders for path in self._images(folder)]
        if not self.concept.negatives:
            message = "no negative examples here or in random_images/: the model may learn to answer yes to everything"
            self.ledger.warn(folders[0], "", message)

    def _questions(self, path: Path, value: object, images: list[Path], home: Path) -> tuple[list[QA], list[QA]]:
        """(questions about images, questions about none) of conversations.json, vqa.json or text_only.json."""
        about: list[QA] = []
        loose: list[QA] = []
        if value is None:
            return about, loose
        if isinstance(value, list):
            value = {"": value}
        if not isinstance(value, dict):
            self.ledger.add(path, "", f"must be an object {{image: [question, …]}}, is {kind_of(value)}")
            return about, loose
        nameless: list[str] = []
        for key, items in value.items():
            found = questions_of(self.ledger, path, printable(key) or "list", items, self.fix)
            nameless += [qa.query for qa in found if self.fix.token not in f"{qa.query} {qa.answer}"]
            if key == "text_only":
                loose += [QA(None, qa.query, qa.answer, qa.extra) for qa in found]
                continue
            meant = self._of_key(path, key, images)
            if key and not meant and any(qa.image is None for qa in found):
                names = ", ".join(image.name for image in images[:5]) or "there are none"
                self.ledger.warn(path, key, f"matches no image ({names}): its {len(found)} questions are left out")
                continue
            for index, qa in enumerate(found):
                shown = meant
                if qa.image is not None:
                    bases = [home, self.concept.root]
                    one = self.finder.find(path, f"{printable(key) or 'list'}[{index}].image", qa.image, bases)
                    shown = [] if one is None else [one]
                elif not key:
                    loose.append(QA(None, qa.query, qa.answer, qa.extra))
                about += [QA(image, qa.query, qa.answer, dict(qa.extra)) for image in shown]
        self._nameless(path, nameless)
        return about, loose

    def _nameless(self, path: Path, questions: list[str]) -> None:
        """Warn of questions that name the concept neither in themselves nor in their answers."""
        if questions:
            which = f"{show(questions[0])}" + (f" and {len(questions) - 1} more" if len(questions) > 1 else "")
            message = f"{which}: {self.fix.token} is neither in the question nor in its answer"
            self.ledger.warn(path, "", f"{message}, so nothing is learned or asked about it")

    def _of_key(self, path: Path, key: str, images: list[Path]) -> list[Path]:
        """The images that `key` means, with a warning where it fits more than one and names none of them in full."""
        found = images_for_key(key, images) if key else []
        if len(found) > 1:
            names = ", ".join(image.name for image in found)
            self.ledger.warn(path, key, f"fits {len(found)} images ({names}): its questions go to each of them")
        return found

    def _recognitions(self, file: str, images: list[Path], positive: bool) -> None:
        """Entries that name no image are templates: they are dealt out over `images` until each of both was used."""
        path = self.train / file
        lost = f"no {'yes' if positive else 'no'}-questions about images to learn from"
        value = self.ledger.read(path, lost, WARNING)
        if value is None:
            return
        groups = value.items() if isinstance(value, dict) and "conversations" not in value else [("", value)]
        if isinstance(value, dict) and {"query", "question"} & set(value):
            groups = [("", value)]
        bases = [self.concept.root, self.train, self.test, self.train / "negative_example"]
        bases.append(self.concept.root / "random_images")
        found: list[Recognition] = []
        templates: list[tuple[str, str]] = []
        nameless: list[str] = []
        for key, items in groups:
            where = printable(key) or "list"
            at_key = self._of_key(path, key, images)
            questions = questions_of(self.ledger, path, where, items, self.fix)
            nameless += [qa.query for qa in questions if self.fix.token not in f"{qa.query} {qa.answer}"]
            for index, qa in enumerate(questions):
                if qa.image is not None:
                    image = self.finder.find(path, f"{where}[{index}].image", qa.image, bases)
                    found += [] if image is None else [Recognition(image, qa.query, qa.answer, positive)]
                elif at_key:
                    found += [Recognition(image, qa.query, qa.answer, positive) for image in at_key]
                else:
                    templates.append((qa.query, qa.answer))
        for index in range(max(len(templates), len(images)) if templates and images else 0):
            query, answer = templates[index % len(templates)]
            found.append(Recognition(images[index % len(images)], query, answer, positive))
        self.concept.recognitions += found
        self._nameless(path, nameless)

    def _prompts(self) -> None:
        """t2i_conditions.json of the test half (some folders keep it in the train half), and the fact pairs."""
        concept = self.concept
        path = self.ledger.on_disk(self.test / "t2i_conditions.json")
        if not is_file(path) and is_file(self.ledger.on_disk(self.train / path.name)):
            path = self.train / path.name
        value = self.ledger.read(path, "no prompts to draw from, and no text-only reasoning", WARNING)
        if isinstance(value, list):
            value = self._plain_list(path, value)
        if value is None or not isinstance(value, dict):
            if value is not None:
                self.ledger.add(path, "", f"must be an object {{name: [prompt, …]}}, is {kind_of(value)}")
            return
        for key, items in value.items():
            where = printable(key)
            if key == FACT_PROMPTS and isinstance(items, list):
                items = self._fact_pairs(path, items)
            prompts = texts_of(self.ledger, path, where, items, self.fix)
            for index, prompt in enumerate(prompts):
                if concept.sks not in prompt and not key.startswith("explicit_"):
                    message = f"{show(prompt)} does not contain {concept.sks}: it asks for nothing of this concept"
                    self.ledger.warn(path, f"{where}[{index}]", message)
            concept.generation_prompts.setdefault(str(_PROMPT_ALIASES.get(key, key)), []).extend(prompts)

    def _plain_list(self, path: Path, prompts: list[object]) -> dict[str, list[object]]:
        """The older layout, a list without names: as long as extra_info it is the reasoning prompts, item r of one for
        item r of the other; of any other length it is prompts that need no fact."""
        facts = len(self.concept.extra_info)
        if prompts and len(prompts) == facts:
            message = f"is a plain list, as long as extra_info: prompt r is taken to ask for item r ({FACT_PROMPTS})"
            self.ledger.warn(path, "", message)
            return {FACT_PROMPTS: prompts}
        message = "is a plain list: no prompt is paired with a fact, so text-only reasoning cannot be trained"
        self.ledger.warn(path, "", f"{message}; name the paired ones {FACT_PROMPTS}")
        return {PURE_PROMPTS: prompts}

    def _fact_pairs(self, path: Path, items: list[object]) -> list[object]:
        """Note which fact each prompt asks for, by position or by `answer` in {prompt, answer}; return the prompts."""
        concept = self.concept
        facts = {_plain(fact): index for index, fact in reversed(list(enumerate(concept.extra_info)))}
        prompts: list[object] = []
        by_position = 0
        for index, item in enumerate(items):
            where, fact = f"{FACT_PROMPTS}[{index}]", index
            prompt = item.get("prompt") if isinstance(item, dict) else item
            answer = item.get("answer", item.get("fact")) if isinstance(item, dict) else None
            if answer is not None:
                known = facts.get(_plain(self.fix(answer))) if isinstance(answer, str) else None
                if known is None:
                    message = f"{show(answer)} matches none of the {len(facts)} items of extra_info in info.json"
                    self.ledger.add(path, f"{where}.answer", f"{message}: repeat one of them word for word")
                    continue
                fact = known
            else:
                by_position += 1
            prompts.append(prompt)
            if isinstance(prompt, str) and self.fix(prompt) and fact < len(concept.extra_info):
                concept.fact_pairs.append((self.fix(prompt), fact))
        if by_position and len(items) != len(concept.extra_info):
            message = f"has {len(items)} prompts for {len(concept.extra_info)} items of extra_info"
            self.ledger.add(
                path, FACT_PROMPTS, f"{message}: prompt r must ask for item r, so give both the same length"
            )
        concept.num_test_facts = held_out(concept.extra, len(concept.fact_pairs))
        return prompts

    def _text_answers(self) -> None:
        """Warn of text-only answers that repeat nothing the folder says about the concept."""
        concept = self.concept
        known = [set(_words(text)) for text in (*concept.extra_info, concept.info, concept.class_word)]
        halves = {self.train / "conversations.json": concept.text_only}
        halves[self.test / "text_only.json"] = concept.test_text_only
        for path, questions in halves.items() if concept.extra_info else ():
            for index, qa in enumerate(questions):
                words = set(_words(qa.answer)) - {"yes", "no", concept.name.casefold()}
                if words and not any(words & facts for facts in known):
                    message = f"no fact contains the answer {show(qa.answer)}: add one to extra_info in info.json"
                    self.ledger.warn(path, f"text_only[{index}].answer", message)


def images_for_key(key: str, images: list[Path]) -> list[Path]:
    """The images a key of conversations.json means: by whole file name, stem, part of the stem, or substring.

    Of a path the last part counts. Numbers are compared as numbers (`0` is `00.jpg`) and never as parts of longer ones.
    """
    low = (parts_of(key) or [key])[-1].casefold()
    number = _number(low)
    for match in (
        lambda image: image.name.casefold() == low,
        lambda image: image.stem.casefold() == low,
        lambda image: number is not None and _number(image.stem) == number,
        lambda image: (
            low in (words := re.findall(r"[0-9]+|[^\W\d_]+", image.stem.casefold()))
            or (number is not None and number in map(_number, words))
        ),
        lambda image: number is None and low in image.name.casefold(),
    ):
        found = [image for image in images if match(image)]
        if found:
            return found
    return []


def _kind_of(info: dict[str, object]) -> str:
    """What `generation_type` (live_subject or object) and the class word say of the kind; "" where they do not."""
    said = str(info.get("generation_type", "")).strip().casefold().replace("-", "_").replace(" ", "_")
    if said in ("object", "objects"):
        return "object"
    if said not in ("live", "live_subject"):
        return ""
    return "human" if set(str(info.get("class", "")).casefold().split()) & _PEOPLE else "animal"


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 300 else None


def _is_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".!?。")


def _words(text: str) -> list[str]:
    """Words that carry meaning: three letters or more without the commonest ones, numbers, any of other scripts."""
    words = re.findall(r"[^\W_]+", text.casefold())
    return [word for word in words if word not in _COMMON and (len(word) > 2 or not word.isascii() or word.isdigit())]
