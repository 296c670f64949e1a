"""What a concept is, as plain data: names, texts and paths, the same however it came to be.

Item r of `personalized_driven_generation` asks for item r of `extra_info`; the first half of these pairs trains, the
second half tests (paper, Appendix C).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..utils.errors import UserError
from ..utils.files import safe_name
from ..utils.spelling import spelled

KINDS = ("human", "animal", "object")
FACT_PROMPTS = "personalized_driven_generation"
PURE_PROMPTS = "pure_generation"

_RESERVED_NAME = re.compile(r"sks|image|token_\d+", re.IGNORECASE)


@dataclass
class QA:
    """A question and its answer; `image` is None where it is about no image, `extra` keeps unknown fields."""

    image: Path | None
    query: str
    answer: str
    extra: dict[str, object] = field(default_factory=dict)


@dataclass
class Recognition:
    """A "is it in this image?" question. `positive` says which answer is true."""

    image: Path
    query: str
    answer: str
    positive: bool = True


@dataclass
class Concept:
    """One concept as read from disk. All texts carry its token as `<name>`; all paths exist and lie inside `root`."""

    name: str
    root: Path
    kind: str = ""
    class_word: str = ""
    info: str = ""
    extra_info: list[str] = field(default_factory=list)
    train_images: list[Path] = field(default_factory=list)
    test_images: list[Path] = field(default_factory=list)
    negatives: list[Path] = field(default_factory=list)
    """Images of other things: negative_example/ of this concept, then random_images/ of the data folder."""
    conversations: list[QA] = field(default_factory=list)
    text_only: list[QA] = field(default_factory=list)
    recognitions: list[Recognition] = field(default_factory=list)
    generation_prompts: dict[str, list[str]] = field(default_factory=dict)
    vqa: list[QA] = field(default_factory=list)
    test_text_only: list[QA] = field(default_factory=list)
    fact_pairs: list[tuple[str, int]] = field(default_factory=list)
    """(reasoning prompt, index of the item of extra_info it asks for), in the order of the file."""
    num_test_facts: int = 0
    extra: dict[str, object] = field(default_factory=dict)
    """Fields of info.json beside class, info, extra_info and conversation_type, as found."""

    @property
    def sks(self) -> str:
        """The concept's token, `<name>`."""
        return f"<{self.name}>"

    def in_words(self, judged_as: str = "class") -> str:
        """What stands for `<name>` in a text that a reader without the concept's tokens is given.

        ``"class"``: the class word (`cat`). ``"info"``: what info says it is (`a striped pink cat`, from "<name> is a
        striped pink cat."), so that a drawing has to show *this* cat; the class word where info does not say "is".
        """
        return in_words(self.sks, self.class_word, self.info, judged_as)

    @property
    def fact_pairs_train(self) -> list[tuple[str, int]]:
        return self.fact_pairs[: len(self.fact_pairs) - self.num_test_facts]

    @property
    def fact_pairs_test(self) -> list[tuple[str, int]]:
        return self.fact_pairs[len(self.fact_pairs) - self.num_test_facts :]

    @property
    def train_folder(self) -> Path:
        return self.root / "concept" / "train" / self.name

    @property
    def test_folder(self) -> Path:
        return spelled(self.root / "concept" / "test" / self.name)


def held_out(info: Mapping[str, object], total: int) -> int:
    """How many of `total` facts, the last ones, test: what `num_testing_info` of info.json says, else one half."""
    wanted = str(info.get("num_testing_info", "")).strip()
    usable = re.fullmatch(r"[0-9]{1,6}", wanted) is not None and 0 < int(wanted) < total
    return int(wanted) if usable else total // 2


def in_words(sks: str, class_word: str, info: str, judged_as: str) -> str:
    """:meth:`Concept.in_words` of a concept's token, class word and info. Raises UserError for another `judged_as`."""
    if judged_as == "class":
        return class_word
    if judged_as != "info":
        raise UserError(f"judged_as={judged_as!r}: must be class or info")
    said = re.match(rf"\s*{re.escape(sks)}\s+is\s+([^.!?]+)", info)
    return " ".join(said[1].split()) if said else class_word


def concept_name(name: str) -> str:
    """Return `name` if it can name a concept: one path part, and `<name>` no token of the method. Else UserError."""
    safe_name(name, "concept name")
    if _RESERVED_NAME.fullmatch(name):
        raise UserError(f"concept name {name!r}: <{name}> is a token of the method itself: choose another name")
    return name
