"""Whether a text ends with the right answer to a task of mathematics: 1 or 0, by the prompt's column `answer`.

    {"prompt": "What is 12 · 4?", "answer": "48"}

The answer of a text is what stands in its last ``\\boxed{…}``, behind its last ``####`` (as GSM8K writes it) or in its
last ``<answer>…</answer>``; without any of these its last number. Numbers are compared by value (1,000 = 1000.0,
1/2 = 0.5, 50% = 0.5), anything else letter by letter without spaces. It knows no algebra: x+1 and 1+x differ.
"""

from __future__ import annotations

import re
from fractions import Fraction

import torch
from torch import Tensor

from ...utils.errors import UserError
from ..base import RewardBatch
from ..registry import register

_NUMBER = re.compile(r"[-+−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?\s*%?")
_MARKED = (re.compile(r"####\s*([^\n]+)"), re.compile(r"<answer>(.*?)</answer>", re.DOTALL))
_LONGEST = 200
"""Characters of an answer; a longer one is no number."""


@register("maths", label="Maths: the right answer")
class Maths:
    """1 where the text's answer is that of the column `answer`, else 0."""

    columns = ("answer",)

    def score(self, batch: RewardBatch) -> Tensor:
        if not batch.completions:
            raise UserError("maths reads texts: use it with a model that writes (llada, mmada)")
        wanted = batch.columns.get("answer")
        if wanted is None:
            raise UserError('maths needs the column answer: {"prompt": "What is 12 · 4?", "answer": "48"}')
        pairs = zip(batch.completions, wanted, strict=True)
        return torch.tensor([float(same(answer_of(text), answer_of(str(true)) or str(true))) for text, true in pairs])


def answer_of(text: str) -> str | None:
    """The answer that `text` ends with; None where it has none."""
    found = _boxed(text)
    if found is not None:
        return found
    for mark in _MARKED:
        marked = mark.findall(text)
        if marked:
            return str(marked[-1]).strip()
    numbers = _NUMBER.findall(text)
    return numbers[-1].strip() if numbers else None


def _boxed(text: str) -> str | None:
    """What stands in the last whole box; boxes may hold braces."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin + 1 : place].strip()
    return None


def same(given: str | None, true: str) -> bool:
    """Whether two answers are one: by value where both are numbers, else by their letters."""
    if given is None:
        return False
    one, other = _value(given), _value(true)
    if one is not None and other is not None:
        return one == other
    return _letters(given) == _letters(true)


def _value(text: str) -> Fraction | None:
    text = text.strip().strip("$").replace("\\!", "").replace("−", "-").rstrip(".")
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text).replace("\\%", "%")
    text = text.lstrip("$").replace(" ", "")
    whole = _NUMBER.fullmatch(text)
    if whole is None or len(text) > _LONGEST:
        return None
    number, _, below = text.rstrip("%").replace(",", "").partition("/")
    if below and int(below) == 0:
        return None
    value = Fraction(number) / (Fraction(below) if below else 1)
    return value / 100 if text.endswith("%") else value


def _letters(text: str) -> str:
    return re.sub(r"[\s$]|\\[,!;]", "", text).rstrip(".").lower()
