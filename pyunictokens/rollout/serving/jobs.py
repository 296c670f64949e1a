"""A request, checked and brought to what the steps need: ids, known codes, numbers, the context of an answer.

Whatever cannot be used is refused here with a `UserError`, before the request waits for a slot.

Letters: N image codes, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...models import Prefix, answering
from ...utils.errors import UserError
from .. import checks
from ..answers import contexts
from ..engine import RolloutEngine
from ..sampler import wanted_masks
from .images import RowNumbers
from .queue import Ticket
from .requests import AnswerRequest, ImageRequest, Request


@dataclass(eq=False)
class Job:
    """A request with all that is known of it."""

    ticket: Ticket
    engine: RolloutEngine
    request: Request
    ids: list[int]
    """Text ids of the prompt, or of the question."""
    grid: tuple[int, int] = (0, 0)
    known: Tensor | None = None
    """int64 [N]: codes an image begins with."""
    numbers: RowNumbers | None = None
    prefix: Prefix | None = None
    last_hidden: Tensor | None = None
    look: int = 0
    """Equal where rows begin with the same known codes: 0 where all is unknown."""
    left: int = 0
    """Rows that have not ended."""


class WantedMasks:
    """Codes that stay masked after each step, by schedule, steps and number of codes."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int], list[int]] = {}

    def __call__(self, schedule: str, steps: int, count: int) -> list[int]:
        key = (schedule, steps, count)
        if key not in self._known:
            if len(self._known) >= 64:
                self._known.clear()
            self._known[key] = wanted_masks(schedule, steps, count).tolist()
        return self._known[key]


def image_job(ticket: Ticket, engine: RolloutEngine, request: ImageRequest, wanted: WantedMasks) -> Job:
    """What is drawn. The ticket learns what a row costs and whether it gains from a small batch."""
    model, rule = engine.model, engine.model.rule
    steps = checks.count("steps", rule.steps if request.steps is None else request.steps, 1, checks.MAX_STEPS)
    strength = rule.strength(rule.guidance_scale if request.guidance_scale is None else request.guidance_scale)
    temperature = rule.temperature if request.temperature is None else request.temperature
    checks.number("temperature", temperature, "0 re-masks without noise")
    checks.count("first_sample", request.first_sample, 0, checks.MAX_SAMPLE_ID - request.samples)
    checks.count("previews", request.previews, 0, steps)
    if engine.vq is None:
        raise UserError("this model has no image tokenizer: nothing can be drawn with it")
    ids = engine.residents.read("prompt", [request.prompt], [request.concept])[0][0]
    if model.cut_ids(ids):
        most = len(ids) - model.cut_ids(ids)
        raise UserError(f"the prompt has {len(ids)} tokens: this model reads {most}; make it shorter")
    known, grid = checks.known_codes(_known(engine, request), request.grid, 1, 1, model)
    model.check_grid(grid)
    numbers = RowNumbers(
        steps,
        strength,
        rule.temperatures(temperature, steps),
        wanted(engine.schedule, steps, known.shape[1]),
        request.seed,
    )
    ticket.cost, ticket.in_turn = steps, model.device.type == "cpu"
    look = 0 if request.image is None else 1 + ticket.number
    return Job(ticket, engine, request, ids, grid, known[0], numbers, look=look, left=request.samples)


def _known(engine: RolloutEngine, request: ImageRequest) -> Tensor | None:
    """Codes int64 [N] of the image that is painted into, −1 where it is painted; None for a new image."""
    if (request.image is None) != (request.unknown is None):
        raise UserError("image and mask belong together")
    if request.image is None or request.unknown is None:
        return None
    codes = checks.images(request.image[None], engine.model, engine.vq)[0]
    if codes.shape != request.unknown.shape:
        raise UserError(f"the mask covers {request.unknown.numel()} codes, the image has {codes.numel()}")
    return codes.masked_fill(request.unknown.to(codes.device), -1)


def answer_job(ticket: Ticket, engine: RolloutEngine, request: AnswerRequest) -> Job:
    """What is answered. The picture and the question are read here: what is wrong with them is told at once."""
    model = answering(engine.model)
    most = checks.count("max_tokens", request.max_new_tokens, 1, checks.MAX_STEPS)
    checks.number("temperature", request.temperature, "0 takes the likeliest token")
    checks.count("top_k", request.top_k, 0)
    wrap = None if request.raw else model.question_text
    ids = engine.residents.read("question", [request.question], [request.concept], wrap)[0][0]
    _check_end(len(ids) + most, model.max_positions)
    seen = checks.looks(request.image[None], model, engine.vq)
    prefix, last, _ = contexts(model, engine.residents, seen, [ids], [request.concept])
    _check_end(prefix.next_position[0] + most, model.max_positions)
    ticket.cost = most
    return Job(ticket, engine, request, ids, prefix=prefix, last_hidden=last[0], left=request.samples)


def _check_end(end: int, positions: int) -> None:
    if end > positions:
        raise UserError(
            f"picture, question and max_tokens reach position {end}: this model has {positions}; ask for fewer tokens "
            "or a shorter question"
        )
