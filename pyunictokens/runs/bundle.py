"""The model of a run with its tokenizers (published folders or the toy), and the reward models that go with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..models.bundle import ModelBundle, Sources
from ..utils.devices import pick_device, pick_dtype
from ..utils.errors import UserError

if TYPE_CHECKING:
    import torch

    from ..evaluate.scoring import AttributeReader
    from ..rewards.base import FaceEmbedding, ImageTextEncoder, PreviewJudge, Rewards


PAPER_REWARDS = "paper"
"""The word for the reward models of the paper, whose settings come with the package (assets/rewards.yaml)."""


def resolved_dtype(sources: Sources, device: str | torch.device, dtype: str) -> str:
    """The name of the precision that `dtype` asks for: auto is bfloat16 on a GPU that computes in it, and float32 for
    the toy, whose numbers were all taken in it, and elsewhere. Raises UserError."""
    if dtype == "auto" and sources.is_toy:
        return "float32"
    return str(pick_dtype(dtype, pick_device(str(device)))).removeprefix("torch.")


def open_bundle(sources: Sources, device: str, dtype: str, max_text: int | None = None) -> ModelBundle:
    """The parts that `sources` names, or the embedded toy. `max_text` is given to the model, where a run or a config
    holds one."""
    from ..models import registry
    from ..toy.model import load_toy

    place, kind = pick_device(device), pick_dtype(resolved_dtype(sources, device, dtype))
    if sources.is_toy:
        bundle = load_toy(kind, place)
    else:
        assert sources.model is not None
        bundle = registry.load(
            sources.model, kind, place, vq=sources.vq, tokenizer=sources.tokenizer, vision=sources.vision
        )
    if max_text is not None:
        bundle.model.max_text = max_text
    return bundle


@dataclass
class Scorers:
    """What scores a run: its rewards, and the encoders that evaluation measures with. None: not measured."""

    ensemble: Rewards | None
    preview_scorer: PreviewJudge | None = None
    """``preview_scorer(prompts)``: the judge of early previews (DSOG)."""
    image_text: ImageTextEncoder | None = None
    """Measures CLIP-I and CLIP-T."""
    reader: AttributeReader | None = None
    """Reads attributes off images of a world whose truth is known."""
    face_embedding: FaceEmbedding | None = None
    """Where a person's tokens start from."""


def load_scorers(
    sources: Sources, device: torch.device | str, own: str | Mapping[str, object] | None = None, *, trust: bool = False
) -> Scorers | None:
    """The toy's reward models for the toy; for other models those of `own`, or None.

    own: the `rewards:` settings of docs/rewards.md, ``http://HOST:PORT`` of served reward models (the toy is still
    measured with its own encoders), or ``module:function``. The function takes a device and returns an ensemble
    (``score(batch)``), :class:`Scorers`, or any object that has some of its fields. trust: whether `own` may name code
    to import and servers to ask (:func:`choose_rewards` decides).
    """
    if isinstance(own, Mapping):
        from ..rewards.load import load_rewards

        if sources.is_toy:
            from ..toy.rewards import offer_features

            offer_features()
        rewards = load_rewards(own, device, trust=trust)
        return Scorers(rewards, rewards.preview_scorer, face_embedding=rewards.face_embedding)
    if own is not None and not trust:
        raise UserError(f"rewards={own!r}: names code or a server, and is not trusted: pass trust=True")
    if own is not None and own.startswith(("http://", "https://", "tcp://")):
        from ..rewards.served.client import RemoteRewards

        remote = RemoteRewards.open(own)
        measuring = load_scorers(sources, device) or Scorers(None)
        return replace(
            measuring,
            ensemble=remote,
            preview_scorer=remote.preview_scorer,
            face_embedding=remote.face_embedding,
        )
    if own is not None:
        from ..rewards.ensemble import as_rewards
        from ..rewards.names import imported

        if not own.rpartition(":")[2].isidentifier() or ":" not in own:
            raise UserError(
                f"rewards={own!r}: must be FILE.yaml, http://HOST:PORT, or MODULE:FUNCTION, as in my_rewards:load"
            )
        made = imported(own, "rewards", trust)(device)
        if isinstance(made, Scorers):
            return made
        if hasattr(made, "ensemble"):
            others = [getattr(made, part.name, None) for part in fields(Scorers)[1:]]
            return Scorers(as_rewards(made.ensemble), *others)
        return Scorers(as_rewards(made))
    if not sources.is_toy:
        return None
    from ..toy.rewards import load_toy_rewards

    toy = load_toy_rewards(device=device)
    return Scorers(
        toy.ensemble,
        toy.preview_scorer,
        toy.nets.image_text,
        toy.nets.reader,
        toy.ensemble.face_embedding,
    )


def with_clip(scorers: Scorers | None, clip: str | None, device: torch.device) -> Scorers | None:
    """`scorers` with a CLIP model of open_clip for CLIP-T and CLIP-I (what `OpenClip` takes); None leaves them."""
    if clip is None:
        return scorers
    from ..evaluate.clip import OpenClip

    return replace(scorers or Scorers(None), image_text=OpenClip(clip, device))


def paper_rewards(kind: str | None = None) -> dict[str, object]:
    """The settings of the paper's reward models, for concepts of `kind` (None: of any): faces are of people alone."""
    file = Path(__file__).parent.parent / "assets" / "rewards.yaml"
    settings = dict(cast("Mapping[str, object]", read_rewards(str(file))))
    models = cast("Mapping[str, object]", settings["models"])
    if kind not in (None, "human"):
        settings["models"] = {name: its for name, its in models.items() if name != "fer"}
    return settings


def read_rewards(
    given: str | Mapping[str, object] | None, kind: str | None = None
) -> str | Mapping[str, object] | None:
    """`given` as :func:`load_scorers` takes it: a FILE.yaml becomes the settings in it (under `rewards:`, or all), the
    word `paper` those that come with the package, for concepts of `kind`."""
    from ..config.settings import load_yaml
    from ..utils.yaml_text import settled

    if given == PAPER_REWARDS:
        return paper_rewards(kind)
    if isinstance(given, str) and given.lower().endswith((".yaml", ".yml")):
        values = load_yaml(given)
        found = values.get("rewards", values)
        if not isinstance(found, Mapping) or not {"models", "experts"} & set(found):
            raise UserError(f"{given}: holds no reward models: give rewards: {{models: …}}, see docs/rewards.md")
        given = found
    return cast("Mapping[str, object]", settled(given)) if isinstance(given, Mapping) else given


def choose_rewards(
    given: str | None,
    stored: str | Mapping[str, object] | None,
    folder: str | os.PathLike[str],
    *,
    trust: bool = False,
    kind: str | None = None,
) -> tuple[str | Mapping[str, object] | None, bool]:
    """(the rewards of a command, whether they may name code and servers): those `given` to it, else those `stored`.

    What was given on the command line is trusted. What a folder's settings hold is data: where it names code to import
    or a server to ask, it is taken with `trust`, or where the same settings of this folder were trusted before. `kind`:
    of the concept, for the word `paper`. Raises UserError that names what would be run.
    """
    from ..rewards.load import reaches_out
    from ..utils.trust import remember, trusted

    chosen = read_rewards(given if given is not None else stored, kind)
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


def check_objective(
    objective: str, words: Iterable[str], folder: str | os.PathLike[str], *, trust: bool = False
) -> None:
    """Raise UserError where settings of a folder name an objective of somebody's own (MODULE:CLASS), which would be
    imported, and nobody has said that they may: by a word of the command line, by `trust`, or by either before."""
    from ..utils.trust import remember, trusted

    if ":" not in objective:
        return
    about = {"objective": objective}
    if trust or any(word.partition("=")[0].strip().rpartition(".")[2] == "objective" for word in words):
        remember(folder, about)
    elif not trusted(folder, about):
        raise UserError(
            f"{folder}: its settings name grpo.objective={objective}, which would be imported and run: if you know "
            f"where it comes from, say --trust; or name it yourself: grpo.objective={objective}"
        )
