"""Model, image tokenizer and text tokenizer that belong together, ready on one device: published folders or the toy.

Also finds the reward experts that go with them.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from math import isqrt
from typing import TYPE_CHECKING, Any

from ..utils.devices import pick_device, pick_dtype
from ..utils.errors import UserError

if TYPE_CHECKING:
    import torch

    from ..models.concept_tokens import ConceptTokens
    from ..models.magvit import MagvitV2
    from ..models.showo.model import Showo
    from ..models.tokenizer import TextTokenizer
    from ..rollout.engine import RolloutEngine

PUBLISHED_MAX_TEXT = 128
"""Text positions of a drawing prompt in published checkpoints."""


@dataclass(frozen=True)
class Sources:
    """Where the three parts come from: folders or hub ids; all None is the embedded toy."""

    model: str | None = None
    vq: str | None = None
    tokenizer: str | None = None

    @property
    def is_toy(self) -> bool:
        return self.model is None

    @classmethod
    def choose(cls, *candidates: Mapping[str, Any] | Sources) -> Sources:
        """The first value given for each part. Raises UserError when some are named and others are not."""
        chosen: dict[str, str | None] = {}
        for part in ("model", "vq", "tokenizer"):
            values = [c.get(part) if isinstance(c, Mapping) else getattr(c, part) for c in candidates]
            chosen[part] = next((str(value) for value in values if value is not None), None)
        missing = [f"--{part}" for part, value in chosen.items() if value is None]
        if 0 < len(missing) < 3:
            raise UserError(f"{' and '.join(missing)} missing: name all three parts, or none for the embedded toy")
        return cls(**chosen)


@dataclass
class Workbench:
    """Model, image tokenizer and text tokenizer that belong together, ready on one device."""

    model: Showo
    vq: MagvitV2
    tokenizer: TextTokenizer
    """The plain one; what an attached concept adds comes in :meth:`engine`."""
    max_text: int
    sources: Sources = field(default_factory=Sources)

    @property
    def concept(self) -> ConceptTokens | None:
        return self.model.concept

    @property
    def size(self) -> int:
        """Pixels along one side of a square picture."""
        return isqrt(self.model.config.num_vq_tokens) * self.vq.downsampling

    @property
    def device(self) -> torch.device:
        return self.model.device

    def engine(self, schedule: str = "cosine") -> RolloutEngine:
        """A rollout engine over the parts as they are now, an attached concept included."""
        from ..rollout.engine import RolloutEngine

        tokenizer = self.tokenizer
        if self.concept is not None:
            tokenizer = tokenizer.with_concept(self.concept.tokens)
        return RolloutEngine(self.model, self.vq, tokenizer, max_text=self.max_text, schedule=schedule)


def open_workbench(sources: Sources, device: str, dtype: str, max_text: int | None = None) -> Workbench:
    """Load the parts. The image tokenizer stays in float32: it is small, and its signs are the codes."""
    import torch

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    place, kind = pick_device(device), pick_dtype(dtype)
    if sources.is_toy:
        from ..toy.model import load_toy

        toy = load_toy(kind, place)
        return Workbench(toy.model, toy.vq, toy.tokenizer, toy.max_text)
    from ..models.magvit import MagvitV2
    from ..models.showo.model import Showo
    from ..models.tokenizer import TextTokenizer

    assert sources.model and sources.vq and sources.tokenizer
    tokenizer = TextTokenizer.from_pretrained(sources.tokenizer)
    model = Showo.from_pretrained(sources.model, dtype=kind, device=place).eval()
    if tokenizer.text_size != model.config.llm_vocab_size:
        raise UserError(
            f"the tokenizer {sources.tokenizer} has {tokenizer.text_size} text ids, the model {sources.model} expects "
            f"{model.config.llm_vocab_size}: give the tokenizer of the model's own language model"
        )
    vq = MagvitV2.from_pretrained(sources.vq, dtype=torch.float32, device=place)
    if vq.codebook_size != model.config.codebook_size:
        raise UserError(
            f"the image tokenizer {sources.vq} has {vq.codebook_size} codes, the model {model.config.codebook_size}"
        )
    return Workbench(model, vq, tokenizer, max_text or PUBLISHED_MAX_TEXT, sources)


@dataclass
class Experts:
    """What judges a run: the reward ensemble, and the encoders that evaluation measures with. None: not measured."""

    ensemble: Any
    preview_scorer: Any = None
    """``preview_scorer(prompts)``: the judge of early previews (DSOG)."""
    image_text: Any = None
    reader: Any = None
    face_embedding: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Where a person's tokens start from."""


def load_experts(sources: Sources, device: Any, own: str | Mapping[str, Any] | None = None) -> Experts | None:
    """The toy's experts for the toy; for other models those of `own`, or None.

    own: the `rewards:` settings of docs/rewards.md, ``tcp://HOST:PORT`` of experts that are served (the toy is still
    measured with its own encoders), or ``module:function``. The function takes a device and returns an ensemble
    (``score(batch)``), or anything with the fields of :class:`Experts`.
    """
    if isinstance(own, Mapping):
        from ..rewards.registry import load_rewards

        rewards = load_rewards(own, device)
        return Experts(rewards.ensemble, rewards.preview_scorer, face_embedding=rewards.face_embedding)
    if own is not None and own.startswith("tcp://"):
        from ..rewards.served.client import RemoteExperts

        remote = RemoteExperts.open(own)
        measuring = load_experts(sources, device) or Experts(None)
        return replace(
            measuring,
            ensemble=remote,
            preview_scorer=remote.preview_scorer,
            face_embedding=remote.face_embedding,
        )
    if own is not None:
        module_name, colon, name = own.partition(":")
        if not colon or not name.isidentifier():
            raise UserError(
                f"rewards={own!r}: must be FILE.yaml, tcp://HOST:PORT, or MODULE:FUNCTION, as in my_rewards:load"
            )
        try:
            function = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError) as error:
            raise UserError(f"rewards={own!r}: {error}") from error
        made = function(device)
        names = [part.name for part in fields(Experts)]
        if hasattr(made, "ensemble"):
            return Experts(**{part: getattr(made, part, None) for part in names})
        return Experts(made)
    if not sources.is_toy:
        return None
    from ..toy.rewards import load_toy_experts

    toy = load_toy_experts(device=device)
    return Experts(
        toy.ensemble,
        toy.preview_scorer,
        toy.nets.image_text,
        toy.nets.reader,
        lambda pixels: toy.nets.face(pixels)[1],
    )


def read_rewards(given: str | Mapping[str, Any] | None) -> str | Mapping[str, Any] | None:
    """`given` as :func:`load_experts` takes it: a FILE.yaml becomes the settings in it (under `rewards:`, or all)."""
    if not isinstance(given, str) or not given.endswith((".yaml", ".yml")):
        return given
    from ..config.settings import load_yaml

    values = load_yaml(given)
    found = values.get("rewards", values)
    if not isinstance(found, Mapping) or "experts" not in found:
        raise UserError(f"{given}: holds no experts: give rewards: {{experts: …}}, see docs/rewards.md")
    return found
