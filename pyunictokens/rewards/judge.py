"""A remote judge: a model behind an OpenAI-compatible endpoint looks at images and texts and gives a score.

Used for the GPT metrics of the evaluation and, as :class:`JudgeReward`, as one more reward model. Here are the
question's form, the strict reading of the answer and the cache on disk; endpoint.py has the key and the counters.

**Scale.** The model is asked for a number from `low` to `high` (0 to 10 unless configured); `JudgeScore.value` is that
number brought to 0..1, ``(score − low) / (high − low)``. A number outside the scale is an error, never clipped.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.limits import at_least
from ..utils.errors import UserError, needs
from ..utils.files import write_json
from .base import RewardBatch, check_pixels
from .endpoint import Counters, Endpoint, EndpointConfig, EndpointError
from .registry import register

_LONG = 300
"""Longest line in which a score is looked for: what the pattern takes grows with the square of the line."""
_LINE = re.compile(r"^\W*score\W*?[:=]\W*?(-?\d+(?:\.\d+)?)(?:\s*/\s*(\d+(?:\.\d+)?))?\W*$", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


Message = dict[str, object]
"""A turn of a chat, as the endpoint wants it."""


@dataclass(frozen=True)
class JudgeConfig(EndpointConfig):
    """An endpoint that is asked for scores."""

    RETIRED = EndpointConfig.RETIRED
    low: float = 0.0
    """The worst score the model may give."""
    high: float = 10.0
    """The best score the model may give."""
    levels: tuple[float, ...] = ()
    """The only scores the model may give, such as [0, 0.5, 1]; none named means any number of the scale."""
    answers: int = 2
    """How often a model is asked before an answer without a readable score is given up."""
    cache: str | None = None
    """Folder in which answers are kept, keyed by all that was asked; None keeps none."""
    image_side: int = 768
    """Images are made smaller until their longer side has at most this many pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise UserError(f"low={self.low}, high={self.high}: must be finite, low below high")
        outside = [level for level in self.levels if not self.low <= level <= self.high]
        if outside:
            raise UserError(f"levels={list(self.levels)}: must be from {self.low:g} to {self.high:g}")
        at_least(1, answers=self.answers, image_side=self.image_side)


@dataclass(frozen=True)
class JudgeItem:
    """One question. What counts as good belongs into `question`; the form of the answer is asked for by the judge."""

    question: str
    images: Sequence[Tensor] = ()
    """Images [3, H, W] in [-1, 1], shown in this order before the question."""
    name: str = ""
    """What the item is called in error lists; not sent."""


@dataclass(frozen=True)
class JudgeScore:
    """What the judge said of one item."""

    value: float | None
    """The score brought to 0..1; None where there is none, and then `error` says why."""
    reason: str = ""
    """The model's own words for it."""
    raw: str = ""
    """The last answer as it came."""
    error: str | None = None
    cached: bool = False
    seconds: float = 0.0
    """Time the answer took; 0 from the cache."""


class Judge:
    """Scores items, several at once; an item that cannot be judged has an `error` and does not stop the others."""

    def __init__(self, config: JudgeConfig, endpoint: Endpoint | None = None):
        self.config = config
        self.endpoint = endpoint or Endpoint(config)
        self._cache = Path(config.cache) if config.cache else None

    @property
    def counters(self) -> Counters:
        """Requests, tokens, cost and latency so far."""
        return self.endpoint.counters

    def score(self, items: Sequence[JudgeItem]) -> list[JudgeScore]:
        """One score an item, in order. Equal items are asked once.

        Raises UserError for an item that is no question (no text, no image tensor) and where the key is missing;
        whatever the endpoint does ends in `JudgeScore.error`.
        """
        asked = [self._messages(item) for item in items]
        keys = [self._key(messages) for messages in asked]
        first = {key: messages for key, messages in zip(keys, asked, strict=True)}
        found = dict(zip(first, self.endpoint.map(self._one, list(first.items())), strict=True))
        return [found[key] for key in keys]

    def _one(self, question: tuple[str, list[Message]]) -> JudgeScore:
        key, messages = question
        kept = self._read(key)
        if kept is not None:
            self.endpoint.counters.add(cached=1)
            return kept
        seconds, raw, why = 0.0, "", ""
        turns = list(messages)
        for _ in range(self.config.answers):
            try:
                reply = self.endpoint.chat(turns)
            except EndpointError as error:
                return JudgeScore(None, raw=raw, error=str(error), seconds=seconds)
            seconds, raw = seconds + reply.seconds, reply.text
            try:
                score, reason = parse_score(raw, self.config.low, self.config.high, self.config.levels)
            except UserError as error:
                why = str(error)
                again = f"That cannot be used: {why}. {self._form()}"
                turns = [*messages, {"role": "assistant", "content": raw}, {"role": "user", "content": again}]
                continue
            self._keep(key, raw)
            return JudgeScore(self._unit(score), reason, raw, seconds=seconds)
        return JudgeScore(None, raw=raw, error=f"{why} (asked {self.config.answers} times)", seconds=seconds)

    def _unit(self, score: float) -> float:
        return (score - self.config.low) / (self.config.high - self.config.low)

    def _form(self) -> str:
        low, high = f"{self.config.low:g}", f"{self.config.high:g}"
        allowed = ", ".join(f"{level:g}" for level in self.config.levels)
        number = f"one of {allowed}, from" if allowed else "a number from"
        return (
            f"Answer with one JSON object and nothing else: "
            f'{{"reason": "one short sentence", "score": {number} {low} (worst) to {high} (best)}}'
        )

    def _messages(self, item: JudgeItem) -> list[Message]:
        if not item.question.strip():
            raise UserError(f"{item.name or 'an item'}: the question is empty: say what is to be judged")
        text = {"type": "text", "text": f"{item.question.strip()}\n\n{self._form()}"}
        images = [data_url(image, self.config.image_side) for image in item.images]
        return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": u}} for u in images] + [text]}]

    # --- the cache: one small file an answer, named by a digest of the whole request -------------------------------

    def _key(self, messages: list[Message]) -> str:
        request = {"at": self.endpoint.address, **self.endpoint.request(messages)}
        return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def _read(self, key: str) -> JudgeScore | None:
        """The kept answer; None where there is none or what is there cannot be read (it is asked for again)."""
        if self._cache is None:
            return None
        try:
            kept = json.loads((self._cache / key[:2] / f"{key}.json").read_text(encoding="utf-8"))
            score, reason = parse_score(str(kept["raw"]), self.config.low, self.config.high, self.config.levels)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return JudgeScore(self._unit(score), reason, kept["raw"], cached=True)

    def _keep(self, key: str, raw: str) -> None:
        if self._cache is not None:
            write_json(self._cache / key[:2] / f"{key}.json", {"model": self.config.model, "raw": raw})


def parse_score(text: str, low: float, high: float, levels: Sequence[float] = ()) -> tuple[float, str]:
    """(score, reason) of a judge's answer. Raises UserError for anything but one score within the scale, and of
    `levels` where some are named.

    Taken are a JSON object with a number under "score" (also inside a code fence), exactly one line "Score: 7" or
    "Score: 7/10", or an answer that is a number alone. Nothing is guessed from prose.
    """
    body, reason = unfenced(text.strip()), ""
    if body.startswith("{"):
        try:
            made: dict[str, object] = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the answer is no valid JSON: {str(error)[:200]}") from None
        found_score, reason = made.get("score"), str(made.get("reason", ""))
        if isinstance(found_score, bool) or not isinstance(found_score, (int, float)):
            raise UserError(f"the answer's score is {found_score!r:.80}: must be a number")
        score = float(found_score) if abs(found_score) < 1e300 else math.inf
    elif len(body) <= _LONG and _NUMBER.fullmatch(body):
        score = float(body)
    else:
        lines = (line.strip() for line in body.splitlines())
        found = [match for line in lines if len(line) <= _LONG and (match := _LINE.match(line))]
        if len(found) != 1:
            shown = body if len(body) <= 80 else body[:77] + "…"
            raise UserError(f"the answer holds {len(found)} scores, must hold one: {shown!r}")
        if found[0][2] is not None and float(found[0][2]) != high:
            raise UserError(f"the answer's score is out of {found[0][2]}: the scale ends at {high:g}")
        score, reason = float(found[0][1]), body
    if not low <= score <= high:  # NaN fails too
        raise UserError(f"the answer's score is {score:g}: must be from {low:g} to {high:g}")
    if levels and score not in levels:
        raise UserError(f"the answer's score is {score:g}: must be one of {', '.join(f'{each:g}' for each in levels)}")
    return float(score), reason


def unfenced(text: str) -> str:
    """The inside of a code fence, where the whole text is one."""
    first, _, rest = text.partition("\n")
    if first.strip() not in {"```", "```json"} or not rest.endswith("```"):
        return text
    return rest[:-3].strip()


def data_url(pixels: Tensor, longest: int = 768) -> str:
    """An image [3, H, W] in [-1, 1] as a data URL (PNG), made smaller to `longest` pixels where it is larger."""
    with needs("judge"):
        from PIL import Image

    if not isinstance(pixels, Tensor) or pixels.ndim != 3:
        found = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise UserError(f"a judge's image: {found}: must be a tensor [3, H, W]")
    image = pixels.detach()[None].float()
    check_pixels(image, "a judge's image")
    high, wide = image.shape[-2:]
    if max(high, wide) > longest:
        size = (max(1, round(high * longest / max(high, wide))), max(1, round(wide * longest / max(high, wide))))
        image = F.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False)
    values = ((image[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(values).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


@dataclass(frozen=True)
class JudgeRewardConfig(JudgeConfig):
    """A judge as a reward model."""

    RETIRED = EndpointConfig.RETIRED
    question: str | None = None
    """What is asked; ``{prompt}`` stands for the image's prompt."""
    photos: int = 1
    """Reference images shown before the image."""


@register("judge", label="Judge", settings=JudgeRewardConfig, asks_others=True)
class JudgeReward:
    """The judge as a reward model: how well does the image show its prompt (and the concept of the references)?

    photos: how many reference images are shown before the image. One that cannot be judged ends the run: a number made
    up in its place would be trained on.
    """

    def __init__(self, judge: Judge, question: str | None = None, photos: int = 1):
        self.judge = judge
        self.question = question or (
            "The last picture was drawn for this prompt: {prompt}\nHow well does it show what the prompt says"
            ", and is its subject the one in the pictures before it (if there are any)?"
        )
        if "{prompt}" not in self.question:
            raise UserError(f"question={self.question!r}: must hold {{prompt}}, where the image's prompt goes")
        if isinstance(photos, bool) or not isinstance(photos, int) or photos < 0:
            raise UserError(f"photos={photos!r}: must be a whole number ≥ 0")
        self.photos = photos

    @classmethod
    def from_settings(cls, settings: JudgeRewardConfig, device: object) -> JudgeReward:
        return cls(Judge(settings), settings.question, settings.photos)

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores [R] in [0, 1]. Raises UserError naming the first row without a score.

        A prompt is one line of the question: an answer of the model in it cannot pretend to be another part.
        """
        shown = list(batch.references[: self.photos])
        items = [
            JudgeItem(self.question.replace("{prompt}", " ".join(prompt.split())), [*shown, image], f"image {row}")
            for row, (image, prompt) in enumerate(zip(batch.images, batch.prompts, strict=True))
        ]
        values: list[float] = []
        for item, score in zip(items, self.judge.score(items), strict=True):
            if score.value is None:
                raise UserError(f"the judge gave no score for {item.name}: {score.error}")
            values.append(score.value)
        return torch.tensor(values, dtype=torch.float32, device=batch.images.device)
