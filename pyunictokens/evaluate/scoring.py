"""The one place that scores: arithmetic on answers, CLIP on images, a judge on both, rewards, attributes of the toy.

Which measures a task has stands in tasks.py; here is what each does. CLIP-T takes the prompt with its details spelled
out, for long prompts the mean over its parts. What cannot be scored (no judge, no weights, a judge that answers out of
range) is left out of the record and listed; an empty answer is worth 0 and no judge is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..rewards.base import EnsembleScore, RewardBatch, plain_text
from ..rewards.judge import JudgeItem, JudgeScore
from ..utils.errors import MissingExtra, UserError
from . import judge_prompts as prompts
from . import metrics as m
from .clip import Embeddings
from .protocol import OURS, BenchProtocol
from .sample_cache import Record
from .tasks import TASKS, Item, Subject

_CLIP = ("clip_t", "clip_i")
_HERE = "\ue000"
"""Where the subject is named while a prompt is cut at its punctuation: its own words may have some."""


class Judge(Protocol):
    """What is asked of a judge (`rewards.Judge` has it)."""

    def score(self, items: Sequence[JudgeItem]) -> Sequence[JudgeScore]:
        """One score an item: `value` in 0…1, or None with `error`."""
        ...


class Reward(Protocol):
    """What is asked of a reward (`rewards.Ensemble` has it)."""

    def score(self, batch: RewardBatch) -> EnsembleScore:
        """The reward of every image of the batch."""
        ...


class AttributeReader(Protocol):
    """What is asked of a network that reads images of a world whose truth is known."""

    def attributes(self, pixels: Tensor) -> list[dict[str, str]]:
        """What is seen in each image [B, 3, H, W], as words by slot."""
        ...


@dataclass(frozen=True)
class RewardOf:
    """A reward with what it has to know of the concept."""

    reward: Reward
    references: Tensor
    """[M, 3, H, W]: images of the concept."""
    words: str
    """What stands for `<name>` in the prompts that it reads."""


@dataclass(frozen=True)
class AttributesOf:
    """A reader with the truth: attributes of the subject, and of what a prompt asks for."""

    reader: AttributeReader
    subject: Mapping[str, str]
    prompts: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Failure:
    """Something that could not be answered, generated or scored; the evaluation went on."""

    model: str
    concept: str
    task: str
    what: str
    why: str
    text: str = ""

    @classmethod
    def of(cls, record: Record, what: str, why: object) -> Failure:
        return cls(record.model, record.concept, record.task, what, str(why), record.text)

    def __str__(self) -> str:
        where = f" of {self.text!r}" if self.text else ""
        return f"{self.model}, {self.concept}, {self.task}: {self.what}{where}: {self.why}"


@dataclass
class _Question:
    """One question to the judge, and whose score the answer goes into."""

    record: Record
    image: int
    part: str
    item: JudgeItem


def judge_calls(item: Item, protocol: BenchProtocol, samples: int) -> int:
    """The most questions that a judge is asked for one record of `item` with `samples` images (0: an answer); for an
    empty answer none is."""
    if "judge" not in TASKS[item.task].measures:
        return 0
    return samples * len(set(_parts(item.meant, protocol, _HERE))) if samples else 1


def _parts(meant: str, protocol: BenchProtocol, words: str) -> list[str]:
    """The parts of a prompt that the judge is asked about, `words` for `<name>`."""
    return [part.replace(_HERE, words) for part in protocol.parts(plain_text(meant, _HERE))]


class Scorer:
    """Fills in the scores that records lack.

    Args:
        embeddings: CLIP; None leaves CLIP-T and CLIP-I out.
        judge, judge_name: a judge and what it is called where scores are kept; None leaves the judge's columns out.
        protocol: which reading of the measures.
        judged_as: what the judge reads for `<name>` of images: the class word, or what info says it is. CLIP-T always
            takes the class word.
        reward: of images of held-out facts, each judged by the prompt with the true fact.
        attributes: attribute accuracy of all images.
    """

    def __init__(
        self,
        embeddings: Embeddings | None = None,
        judge: Judge | None = None,
        judge_name: str = "judge",
        *,
        protocol: BenchProtocol = OURS,
        judged_as: str = "class",
        reward: RewardOf | None = None,
        attributes: AttributesOf | None = None,
    ):
        self.embeddings, self.judge, self.judge_name, self.protocol = embeddings, judge, judge_name, protocol
        self.judged_as = judged_as
        self.reward, self.attributes = reward, attributes
        self.notes: list[str] = []
        if embeddings is None:
            self.notes.append("CLIP-T and CLIP-I: no CLIP model was given (--clip): not measured")
        if judge is None:
            self.notes.append(
                "judge: none was given (--judge-url): Dense Rea., Dense Gen. and GPT columns not measured"
            )

    def lacking(self, record: Record) -> list[str]:
        """Measures that `record` wants and does not have from what is at hand now."""
        names = [*TASKS[record.task].measures]
        if TASKS[record.task].images:
            names += ["attributes"] if self.attributes else []
            names += ["reward"] if self.reward and record.task == "reasoning_generation" else []
        by = {name: self._by(name, record.task) for name in names}
        return [
            name
            for name, who in by.items()
            if who is not None and (name not in record.scores or record.by.get(name, "") != who)
        ]

    def _by(self, measure: str, task: str) -> str | None:
        """What gives a measure of a task; None where it cannot be had."""
        if measure == "judge":
            if self.judge is None:
                return None
            other = TASKS[task].images and self.judged_as != "class"
            return self.judge_name + (f", told {self.judged_as}" if other else "") + self.protocol.tag
        if measure in _CLIP:
            return None if self.embeddings is None else self.embeddings.name + self.protocol.tag
        return self.protocol.tag.removeprefix(", ") if measure == "weight" else ""

    def score(self, pairs: Sequence[tuple[Record, Item]], subject: Subject) -> list[Failure]:
        """Score records of one concept in place, all of the judge's questions together. Returns what was not scored."""
        failures: list[Failure] = []
        asked: list[_Question] = []
        for record, item in pairs:
            try:
                asked += self.measure(record, item, subject)
            except (UserError, MissingExtra) as error:
                failures.append(Failure.of(record, "scores", error))
        return failures + self._judge(asked)

    def measure(self, record: Record, item: Item, subject: Subject) -> list[_Question]:
        """All but the judge's scores of one record; returns what the judge is to be asked. Raises UserError for what
        cannot be scored."""
        lacking = self.lacking(record)
        if not TASKS[record.task].images:
            answer = record.answer or ""
            self._keep(record, {n: [_of_answer(n, item, answer, self.protocol)] for n in lacking if n != "judge"})
            return self._about_answer(record, item) if "judge" in lacking else []
        if not lacking:
            return []
        pixels = record.looks()
        plain = plain_text(record.meant, subject.class_word)
        if self.embeddings and any(name in _CLIP for name in lacking):
            rows = self.embeddings.samples(pixels)
            if "clip_t" in lacking:
                long = self.protocol.long_by_parts and record.task.startswith("dense")
                texts = m.segments(plain) if long else [plain]
                self._keep(record, {"clip_t": self.embeddings.clip_t(rows, texts)})
            if "clip_i" in lacking:
                self._keep(record, {"clip_i": self.embeddings.clip_i(rows, pixels, subject.references)})
        if self.reward and "reward" in lacking:
            self._keep(record, _rewards(self.reward, record, item, subject, pixels))
        if self.attributes and "attributes" in lacking:
            seen = self.attributes.reader.attributes(pixels)
            self._keep(record, _shown(self.attributes, seen, item.text))
            record.seen = seen
        return self._about_images(record, subject, pixels) if "judge" in lacking else []

    def _keep(self, record: Record, scores: Mapping[str, list[float]]) -> None:
        for name, values in scores.items():
            record.scores[name] = values
            record.by[name] = self._by(name, record.task) or ""

    # --- the judge -------------------------------------------------------------------------------------------------

    def _about_answer(self, record: Record, item: Item) -> list[_Question]:
        answer = m.clean(record.answer or "")
        if not answer:
            self._keep(record, {"judge": [0.0]})
            record.details["judge"] = "an empty answer: 0 without asking"
            return []
        return [
            _Question(record, 0, "", JudgeItem(prompts.answer_question(item.text, item.truth, answer), (), item.digest))
        ]

    def _about_images(self, record: Record, subject: Subject, pixels: Tensor) -> list[_Question]:
        words = subject.in_words(self.judged_as)
        parts = _parts(record.meant, self.protocol, words)
        asked = {part: prompts.segment_question(part, words) for part in parts}
        return [
            _Question(record, place, part, JudgeItem(question, (one,), f"{record.item}/{place}"))
            for place, one in enumerate(pixels)
            for part, question in asked.items()
        ]

    def _judge(self, asked: Sequence[_Question]) -> list[Failure]:
        if not asked:
            return []
        assert self.judge is not None
        by_record: dict[int, list[tuple[_Question, JudgeScore]]] = {}
        try:
            given = self.judge.score([question.item for question in asked])
        except (UserError, MissingExtra) as error:
            records = {id(question.record): question.record for question in asked}
            return [Failure.of(record, "judge", error) for record in records.values()]
        for question, score in zip(asked, given, strict=True):
            by_record.setdefault(id(question.record), []).append((question, score))
        failures = []
        for pairs in by_record.values():
            record = pairs[0][0].record
            errors = [score.error or "no score" for _, score in pairs if score.value is None]
            if errors:
                failures.append(Failure.of(record, "judge", errors[0]))
                continue
            by_image: dict[int, list[float]] = {}
            for question, score in pairs:
                by_image.setdefault(question.image, []).append(float(score.value or 0.0))
            self._keep(record, {"judge": [sum(values) / len(values) for _, values in sorted(by_image.items())]})
            record.details["judge"] = [
                {"drawing": q.image, "part": q.part, "score": s.value, "reason": s.reason} for q, s in pairs
            ]
        return failures


def _of_answer(measure: str, item: Item, answer: str, protocol: BenchProtocol = OURS) -> float:
    """A measure of an answer that needs no network."""
    answer = m.clean(answer)
    plain: dict[str, Callable[[str, str], float]] = {
        "bleu": m.character_bleu,
        "word_bleu": m.word_bleu,
        "exact": m.exact,
        "accuracy": m.same_answer,
    }
    if measure == "weight":
        return float(protocol.recognised(answer, item.truth))
    if measure == "accuracy" and item.facts:
        meant = item.facts.index(item.truth) if item.correct is None else item.correct
        return float(bool(answer) and m.nearest(answer, item.facts) == meant)
    if measure == "accuracy" and item.options:
        return float(m.picked(answer, item.options) == item.truth)
    return plain[measure](item.truth, answer)


def _rewards(of: RewardOf, record: Record, item: Item, subject: Subject, pixels: Tensor) -> dict[str, list[float]]:
    """The reward of each image and its parts, by the prompt with the true fact, in words that any reader knows."""
    if item.correct is None:
        raise UserError(f"{item.text!r}: no fact is known to be meant: its reward cannot be measured")
    answer = plain_text(record.answer or "", subject.class_word)
    batch = RewardBatch(
        pixels,
        [plain_text(item.meant, of.words)] * len(pixels),
        [answer] * len(pixels),
        [plain_text(fact, subject.class_word) for fact in item.facts],
        item.correct,
        of.references.to(pixels.device),
        subject.kind,
    )
    score = of.reward.score(batch).require_finite()
    return {"reward": score.total.tolist(), **{name: part.tolist() for name, part in score.parts.items()}}


def _shown(of: AttributesOf, seen: Sequence[Mapping[str, str]], prompt: str) -> dict[str, list[float]]:
    """Attribute accuracy of each image: of the subject, of what the prompt asks for, of both."""
    asked = of.prompts.get(prompt) or {}
    wanted = {"attributes": {**of.subject, **asked}, "subject": of.subject, **({"prompted": asked} if asked else {})}
    return {name: [m.attribute_accuracy(one, slots) for one in seen] for name, slots in wanted.items()}
