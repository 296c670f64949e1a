"""Options that several commands take together, written down once: a dataclass a group, spread over a command's own.

@spread
def table(suite: str, machine: Machine) -> None: ...      # has --device and --dtype, gets them as one object
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from .shell import DeviceOption, DtypeOption, ModelOption, TokenizerOption, VisionOption, VqOption
from .table_options import (
    JUDGE_KEY,
    RATE,
    JudgeKeyOption,
    JudgeModelOption,
    JudgeUrlOption,
    ProtocolOption,
    TableClipOption,
    key_variable,
)

if TYPE_CHECKING:
    from ..evaluate.protocol import BenchProtocol
    from ..evaluate.scoring import Scorer
    from ..models.bundle import Sources

R = TypeVar("R")


@dataclass(frozen=True)
class Models:
    """Which masked model, with its tokenizers."""

    model: ModelOption = None
    vq: VqOption = None
    tokenizer: TokenizerOption = None
    vision: VisionOption = None

    @property
    def sources(self) -> Sources:
        """They as they were given."""
        from ..models.bundle import Sources

        return Sources(self.model, self.vq, self.tokenizer, self.vision)

    @property
    def given(self) -> dict[str, str | None]:
        """They by the options that they were given with."""
        return {f"--{each.name}": getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True)
class Scoring:
    """How a table is asked and scored."""

    protocol: ProtocolOption = None
    clip: TableClipOption = None
    judge_url: JudgeUrlOption = None
    judge_model: JudgeModelOption = None
    judge_key: JudgeKeyOption = JUDGE_KEY

    def clip_for(self, sources: Sources) -> str | None:
        """The CLIP model to score with: the toy's own where the model is the toy and none was named."""
        from ..runs.baselines import TOY_CLIP

        return TOY_CLIP if self.clip is None and sources.is_toy else self.clip

    def scorer(
        self, clip: str | None, cache: Path, machine: Machine, judged_as: str, protocol: BenchProtocol
    ) -> Scorer:
        """What scores a table; the judge's answers are kept in `cache`."""
        from ..runs.baselines import make_scorer

        return make_scorer(
            clip,
            self.judge_url,
            self.judge_model,
            key_variable(self.judge_key),
            cache,
            machine.device,
            judged_as=judged_as,
            protocol=protocol,
        )


@dataclass(frozen=True)
class Machine:
    """Where it runs, and in which precision."""

    device: DeviceOption = "auto"
    dtype: DtypeOption = "auto"


MODELS, SCORING, MACHINE = Models(), Scoring(), Machine()
"""The groups as they are where nothing is given: the defaults of parameters."""


def spread(command: Callable[..., R]) -> Callable[..., R]:
    """`command` with the fields of its parameters of a group in their place, as options of the command line."""
    hints = get_type_hints(command, include_extras=True)
    signature = inspect.signature(command)
    groups = {name: kind for name, kind in hints.items() if isinstance(kind, type) and is_dataclass(kind)}
    own: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name not in groups:
            own.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        kinds = get_type_hints(groups[name], include_extras=True)
        for each in fields(groups[name]):
            assert each.default is not MISSING
            own.append(
                inspect.Parameter(
                    each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=kinds[each.name]
                )
            )

    @functools.wraps(command)
    def called(**given: Any) -> R:
        made = {
            name: kind(**{each.name: given.pop(each.name, each.default) for each in fields(kind)})
            for name, kind in groups.items()
        }
        return command(**given, **made)

    called.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    called.__annotations__ = {each.name: each.annotation for each in own} | {"return": hints.get("return")}
    return called


def useful_rate(given: float | None, machine: Machine) -> tuple[float, str]:
    """(operations a second that a plan counts with, in words): what was given in TFLOP/s, else a quarter of the matrix
    rate that a CPU is measured at, else :data:`RATE` of a GPU."""
    from ..utils.devices import pick_device, pick_dtype
    from ..utils.profiling import matrix_rate

    device = pick_device(machine.device)
    if given is None and device.type == "cpu":
        rate = matrix_rate(device, pick_dtype(machine.dtype, device)) / 4
        return rate, f"on this CPU at a quarter of its matrix rate, {rate / 1e12:.2g} TFLOP/s"
    rate = RATE if given is None else given
    return rate * 1e12, f"on one device at {rate:g} TFLOP/s"
