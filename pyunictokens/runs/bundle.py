"""Model, image tokenizer and text tokenizer that belong together, ready on one device: published folders or the toy.

Also finds the reward experts that go with them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

from ..utils.devices import pick_device, pick_dtype
from ..utils.errors import UserError

if TYPE_CHECKING:
    import torch

    from ..models.concept_tokens import ConceptTokens
    from ..models.magvit import MagvitV2
    from ..models.showo.model import Showo
    from ..models.tokenizer import TextTokenizer
    from ..rollout.engine import RolloutEngine


class HasSources(Protocol):
    """Whatever names the three parts, or some of them."""

    @property
    def model(self) -> str | None: ...
    @property
    def vq(self) -> str | None: ...
    @property
    def tokenizer(self) -> str | None: ...


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
    def choose(cls, *candidates: HasSources) -> Sources:
        """The first value given for each part. Raises UserError when some are named and others are not."""
        chosen: dict[str, str | None] = {}
        for part in ("model", "vq", "tokenizer"):
            values = (getattr(candidate, part) for candidate in candidates)
            chosen[part] = next((value for value in values if value is not None), None)
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
    sources: Sources = field(default_factory=Sources)

    @property
    def concept(self) -> ConceptTokens | None:
        return self.model.concept

    @property
    def size(self) -> int:
        """Pixels along one side of a square picture."""
        return self.model.grid[0] * self.vq.downsampling

    @property
    def device(self) -> torch.device:
        return self.model.device

    def engine(self, schedule: str | None = None) -> RolloutEngine:
        """A rollout engine over the parts as they are now, an attached concept included."""
        from ..rollout.engine import RolloutEngine

        tokenizer = self.tokenizer
        if self.concept is not None:
            tokenizer = tokenizer.with_concept(self.concept.tokens)
        return RolloutEngine(self.model, self.vq, tokenizer, schedule=schedule)


def open_workbench(sources: Sources, device: str, dtype: str, max_text: int | None = None) -> Workbench:
    """Load the parts. The image tokenizer stays in float32: it is small, and its signs are the codes. `max_text` is
    given to the model, where a run or a config holds one."""
    import torch

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    place, kind = pick_device(device), pick_dtype(dtype)
    if sources.is_toy:
        from ..toy.model import load_toy

        toy = load_toy(kind, place)
        toy.model.max_text = max_text or toy.model.max_text
        return Workbench(toy.model, toy.vq, toy.tokenizer)
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
    if vq.codebook_size != model.codebook_size:
        raise UserError(
            f"the image tokenizer {sources.vq} has {vq.codebook_size} codes, the model {model.codebook_size}"
        )
    model.max_text = max_text or model.max_text
    return Workbench(model, vq, tokenizer, sources)


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


def load_experts(
    sources: Sources, device: Any, own: str | Mapping[str, Any] | None = None, *, trust: bool = False
) -> Experts | None:
    """The toy's reward models for the toy; for other models those of `own`, or None.

    own: the `rewards:` settings of docs/rewards.md, ``http://HOST:PORT`` of served reward models (the toy is still
    measured with its own encoders), or ``module:function``. The function takes a device and returns an ensemble
    (``score(batch)``), or anything with the fields of :class:`Experts`. trust: whether `own` may name code
    to import and servers to ask (:func:`choose_rewards` decides).
    """
    if isinstance(own, Mapping):
        from ..rewards.load import load_rewards

        rewards = load_rewards(own, device, trust=trust)
        return Experts(rewards, rewards.preview_scorer, face_embedding=rewards.face_embedding)
    if own is not None and not trust:
        raise UserError(f"rewards={own!r}: names code or a server, and is not trusted: pass trust=True")
    if own is not None and own.startswith(("http://", "https://", "tcp://")):
        from ..rewards.served.client import RemoteRewards

        remote = RemoteRewards.open(own)
        measuring = load_experts(sources, device) or Experts(None)
        return replace(
            measuring,
            ensemble=remote,
            preview_scorer=remote.preview_scorer,
            face_embedding=remote.face_embedding,
        )
    if own is not None:
        from ..rewards.load import imported

        if not own.rpartition(":")[2].isidentifier() or ":" not in own:
            raise UserError(
                f"rewards={own!r}: must be FILE.yaml, http://HOST:PORT, or MODULE:FUNCTION, as in my_rewards:load"
            )
        made = imported(own, "rewards", trust)(device)
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
        toy.ensemble.face_embedding,
    )


def read_rewards(given: str | Mapping[str, Any] | None) -> str | Mapping[str, Any] | None:
    """`given` as :func:`load_experts` takes it: a FILE.yaml becomes the settings in it (under `rewards:`, or all)."""
    from ..config.settings import load_yaml
    from ..utils.yaml_text import settled

    if isinstance(given, str) and given.lower().endswith((".yaml", ".yml")):
        values = load_yaml(given)
        found = values.get("rewards", values)
        if not isinstance(found, Mapping) or not {"models", "experts"} & set(found):
            raise UserError(f"{given}: holds no reward models: give rewards: {{models: …}}, see docs/rewards.md")
        given = found
    return cast("Mapping[str, Any]", settled(given)) if isinstance(given, Mapping) else given


def choose_rewards(
    given: str | None, stored: Any, folder: str | os.PathLike[str], *, trust: bool = False
) -> tuple[str | Mapping[str, Any] | None, bool]:
    """(the rewards of a command, whether they may name code and servers): those `given` to it, else those `stored`.

    What was given on the command line is trusted. What a folder's settings hold is data: where it names code to import
    or a server to ask, it is taken with `trust`, or where the same settings of this folder were trusted before. Raises
    UserError that names what would be run.
    """
    from ..rewards.load import reaches_out
    from ..utils.trust import remember, trusted

    chosen = read_rewards(given if given is not None else stored)
    named = reaches_out(chosen)
    if not named:
        return chosen, False
    if given is not None or trust:
        remember(folder, chosen)
    elif not trusted(folder, chosen):
        raise UserError(
            f"{folder}: its settings name {', '.join(named)} as rewards, which would run code or send images to a "
            "server: if you know where they come from, say --trust; or name rewards yourself with --rewards"
        )
    return chosen, True
