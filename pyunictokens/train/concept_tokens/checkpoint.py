"""Where a stage stands, in one file: a stage that was cut off goes on from it and ends as if nothing had happened.

    stage.safetensors    the rows, those that the stage began with, AdamW's moments, the generator's state, and as bytes
                         of JSON: stage, step, sizes of the rows, states of both samplers

The file is written aside, flushed and renamed; its checksum covers all of it. One that was damaged is left out with a
warning, and the stage is begun anew.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...models import ConceptTokens
from ...models.checkpoint import load_tensors
from ...utils.errors import UserError
from ...utils.files import save_safetensors_atomic

log = logging.getLogger(__name__)

FILE = "stage.safetensors"
_SIZES = ("num_understanding", "num_generation", "num_extra")


@dataclass
class StageCheckpoint:
    """A stage after `step` of its steps."""

    stage: str
    step: int
    steps_done: int
    """Steps of all stages up to here."""
    concept: ConceptTokens
    begin: Mapping[str, Tensor]
    """The rows as the stage found them, by parameter."""
    optimizer: Mapping[str, Tensor]
    generator: Tensor
    """State of the generator of masks, crops and dropped prompts."""
    questions: Mapping[str, int]
    prompts: Mapping[str, int]
    """States of the samplers (`EpochSampler.state_dict`)."""

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all, in the place of the one before. Raises OSError, as on a full disk."""
        state = {
            "stage": self.stage,
            "step": self.step,
            "steps_done": self.steps_done,
            "name": self.concept.name,
            "width": self.concept.width,
            "sizes": {name: getattr(self.concept, name) for name in _SIZES},
            "questions": dict(self.questions),
            "prompts": dict(self.prompts),
        }
        tensors: dict[str, Tensor] = {f"rows.{name}": value for name, value in self.concept.named_parameters()}
        tensors |= {f"begin.{name}": value for name, value in self.begin.items()}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.items()}
        tensors["generator"] = self.generator
        tensors["state"] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        save_safetensors_atomic(folder / FILE, tensors)

    @classmethod
    def load(cls, folder: Path) -> StageCheckpoint | None:
        """The one in `folder`; None where there is none or, with a warning, where it is damaged."""
        file = folder / FILE
        if not file.exists():
            return None
        try:
            return cls._read(file)
        except (UserError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            log.warning("%s is left out, its stage is begun anew: %s", file, error)
            return None

    @classmethod
    def _read(cls, file: Path) -> StageCheckpoint:
        tensors = load_tensors(file)
        state = json.loads(tensors["state"].numpy().tobytes())

        def part(prefix: str) -> dict[str, Tensor]:
            found = {name: value for name, value in tensors.items() if name.startswith(prefix)}
            return {name.removeprefix(prefix): value for name, value in found.items()}

        sizes, rows = state["sizes"], part("rows.")
        if rows["embed"].shape != (1 + sum(sizes.values()), state["width"]):  # ahead of making any number of rows
            raise UserError(f"its rows have the shape {tuple(rows['embed'].shape)}")
        concept, begin = ConceptTokens(state["name"], state["width"], **sizes), part("begin.")
        concept.load_state_dict(begin)  # of another shape, or not all: an error
        concept.load_state_dict(rows)
        torch.Generator().set_state(tensors["generator"])
        samplers = [{str(key): int(value) for key, value in state[name].items()} for name in ("questions", "prompts")]
        step, steps_done = int(state["step"]), int(state["steps_done"])
        return cls(
            str(state["stage"]), step, steps_done, concept, begin, part("optimizer."), tensors["generator"], *samplers
        )


def remove(folder: Path) -> None:
    """Take the file away: the stage is finished, or the file is of one that is."""
    (folder / FILE).unlink(missing_ok=True)
