"""Scores of cells: arithmetic on answers, CLIP on drawings, a judge on both. Every column of Tables 1, 2, 3 and 5.

    rec                     weight                       right "yes" or "no"
    rea                     bleu, word_bleu, accuracy    against the right fact; accuracy: the nearest of all facts
    dense_rea               judge, bleu, accuracy
    vqa, qa                 bleu, judge, word_bleu, accuracy
    pure, rea_gen           clip_t, clip_i               CLIP-T by the prompt with its details spelled out
    dense, dense_rea_gen    judge, clip_i, clip_t        judge: mean over the parts of the spelled-out prompt

What cannot be scored (no judge, no weights, a judge that answers out of range) is left out of the cell and listed; an
empty answer is worth 0 and no judge is asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..rewards.base import plain_text
from ..utils.errors import MissingExtra, UserError
from . import judge_prompts as judging
from . import metrics as m
from .clip import Embeddings
from .sample_cache import Cell
from .subject import DRAWING, Item, Subject

METRICS: dict[str, tuple[str, ...]] = {
    "rec": ("weight",),
    "rea": ("bleu", "word_bleu", "accuracy"),
    "dense_rea": ("judge", "bleu", "accuracy"),
    "vqa": ("bleu", "judge", "word_bleu", "accuracy"),
    "qa": ("bleu", "judge", "word_bleu", "accuracy"),
    "pure": ("clip_t", "clip_i"),
    "dense": ("judge", "clip_i", "clip_t"),
    "rea_gen": ("clip_t", "clip_i"),
    "dense_rea_gen": ("judge", "clip_i", "clip_t"),
}
"""Measures by task."""

_CLIP = ("clip_t", "clip_i")
_LETTER = re.compile(r"^\W*\(?([A-H])(?:[.):]|\W*$)")


class AnyJudge(Protocol):
    """What is asked of a judge (`rewards.Judge` has it)."""

    def score(self, items: Sequence[Any]) -> Sequence[Any]:
        """One score an item: `value` in 0…1, or None with `error`."""
        ...


@dataclass(frozen=True)
class Failure:
    """Something that could not be answered, drawn or scored; the evaluation went on."""

    model: str
    concept: str
    task: str
    what: str
    why: str
    text: str = ""

    def __str__(self) -> str:
        where = f" of {self.text!r}" if self.text else ""
        return f"{self.model}, {self.concept}, {self.task}: {self.what}{where}: {self.why}"


class Scorer:
    """Fills in the scores that cells lack.

    Args:
        embeddings: CLIP; None leaves CLIP-T and CLIP-I out.
        judge, judge_name: a judge and what it is called where scores are kept; None leaves the judge's columns out.
    """

    def __init__(self, embeddings: Embeddings | None = None, judge: AnyJudge | None = None, judge_name: str = "judge"):
        self.embeddings, self.judge, self.judge_name = embeddings, judge, judge_name
        self.notes: list[str] = []
        if embeddings is None:
            self.notes.append("CLIP-T and CLIP-I: no CLIP model was given (--clip): not measured")
        if judge is None:
            self.notes.append(
                "judge: none was given (--judge-url): Dense Rea., Dense Gen. and GPT columns not measured"
            )

    def lacking(self, cell: Cell) -> list[str]:
        """Measures that `cell` wants and does not have from the present encoder and judge."""
        by = {name: self._by(name) for name in METRICS[cell.task]}
        return [n for n, who in by.items() if who is not None and (n not in cell.scores or cell.by.get(n, "") != who)]

    def _by(self, metric: str) -> str | None:
        if metric == "judge":
            return None if self.judge is None else self.judge_name
        if metric in _CLIP:
            return None if self.embeddings is None else self.embeddings.name
        return ""

    def score(self, pairs: Sequence[tuple[Cell, Item]], subject: Subject) -> list[Failure]:
        """Score cells of one concept in place, all of the judge's questions together. Returns what was not scored."""
        failures: list[Failure] = []
        asked: list[tuple[Cell, int, str, Any]] = []
        for cell, item in pairs:
            lacking = self.lacking(cell)
            try:
                if cell.task not in DRAWING:
                    self._keep(cell, {n: [_arithmetic(n, item, cell.answer or "")] for n in lacking if n != "judge"})
                if any(name in _CLIP for name in lacking):
                    self._keep(cell, self._clip(cell, subject, [name for name in lacking if name in _CLIP]))
                if "judge" in lacking:
                    asked += self._questions(cell, item, subject)
            except (UserError, MissingExtra) as error:
                failures.append(Failure(cell.model, cell.concept, cell.task, "scores", str(error), cell.text))
        return failures + self._judge(asked)

    def _keep(self, cell: Cell, scores: dict[str, list[float]]) -> None:
        for name, values in scores.items():
            cell.scores[name] = values
            cell.by[name] = self._by(name) or ""

    # --- drawings by CLIP ------------------------------------------------------------------------------------------

    def _clip(self, cell: Cell, subject: Subject, names: list[str]) -> dict[str, list[float]]:
        assert self.embeddings is not None
        pixels = cell.drawings().float() / 127.5 - 1.0
        drawn_SD = self.embeddings.drawings(pixels)
        scores = {}
        if "clip_t" in names:
            plain = plain_text(cell.meant, subject.class_word)
            parts = m.segments(plain) if cell.task.startswith("dense") else [plain]
            scores["clip_t"] = (drawn_SD @ self.embeddings.texts(parts).T).mean(dim=1).tolist()
        if "clip_i" in names:
            if not subject.photos:
                raise UserError("CLIP-I: the concept has no photos to compare with")
            similar_SM = drawn_SD @ self.embeddings.photos(subject.photos).T
            other_SM = ~self.embeddings.same_picture(pixels, subject.photos)
            other_SM[~other_SM.any(dim=1)] = True
            scores["clip_i"] = ((similar_SM * other_SM).sum(dim=1) / other_SM.sum(dim=1)).tolist()
        return scores

    # --- the judge -------------------------------------------------------------------------------------------------

    def _questions(self, cell: Cell, item: Item, subject: Subject) -> list[tuple[Cell, int, str, Any]]:
        """(cell, drawing, part, question) of all the judge has to say about `cell`."""
        from ..rewards.judge import JudgeItem

        if cell.task not in DRAWING:
            answer = m.clean(cell.answer or "")
            if not answer:
                self._keep(cell, {"judge": [0.0]})
                cell.details["judge"] = "an empty answer: 0 without asking"
                return []
            return [(cell, 0, "", JudgeItem(judging.answer_question(item.text, item.truth, answer), (), cell.item))]
        pixels = cell.drawings().float() / 127.5 - 1.0
        parts = m.segments(plain_text(cell.meant, subject.class_word))
        texts = {part: judging.segment_question(part, subject.class_word) for part in parts}
        return [
            (cell, row, part, JudgeItem(texts[part], (one,), f"{cell.item}/{row}"))
            for row, one in enumerate(pixels)
            for part in parts
        ]

    def _judge(self, asked: Sequence[tuple[Cell, int, str, Any]]) -> list[Failure]:
        if not asked:
            return []
        assert self.judge is not None
        cells = {id(cell): cell for cell, *_ in asked}
        try:
            given = self.judge.score([question for *_, question in asked])
        except (UserError, MissingExtra) as error:
            return [Failure(c.model, c.concept, c.task, "judge", str(error), c.text) for c in cells.values()]
        values: dict[int, dict[int, list[float]]] = {key: {} for key in cells}
        said: dict[int, list[dict[str, Any]]] = {key: [] for key in cells}
        failed: dict[int, str] = {}
        for (cell, row, part, _), score in zip(asked, given, strict=True):
            said[id(cell)].append({"drawing": row, "part": part, "score": score.value, "reason": score.reason})
            if score.value is None:
                failed.setdefault(id(cell), score.error or "no score")
            else:
                values[id(cell)].setdefault(row, []).append(float(score.value))
        for key, cell in cells.items():
            if key not in failed:
                self._keep(cell, {"judge": [sum(row) / len(row) for _, row in sorted(values[key].items())]})
                cell.details["judge"] = said[key]
        return [
            Failure(cells[key].model, cells[key].concept, cells[key].task, "judge", why, cells[key].text)
            for key, why in failed.items()
        ]


def _arithmetic(metric: str, item: Item, answer: str) -> float:
    """A measure of an answer that needs no network."""
    answer = m.clean(answer)
    if metric == "weight":
        return float(m.says_yes(answer) is (item.truth == "yes"))
    if metric == "bleu":
        return m.character_bleu(item.truth, answer)
    if metric == "word_bleu":
        return m.word_bleu(item.truth, answer)
    if item.facts:
        return float(bool(answer) and m.nearest(answer, item.facts) == item.facts.index(item.truth))
    if item.options:
        return float(picked(answer, item.options) == item.truth)
    return m.same_answer(item.truth, answer)


def picked(answer: str, options: Sequence[str]) -> str | None:
    """The option an answer names, by its letter (``B``, ``(B)``, ``B. grey``) or by its words; None where it names none
    or several."""
    letter = _LETTER.match(answer)
    if letter and ord(letter[1]) - ord("A") < len(options):
        return options[ord(letter[1]) - ord("A")]
    said = f" {m.normalise(answer)} "
    named = [option for option in options if f" {m.normalise(option)} " in said]
    whole = [option for option in named if not any(option != other and option in other for other in named)]
    return whole[0] if len(whole) == 1 else None
