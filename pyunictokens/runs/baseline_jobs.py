"""What a baseline is handed: its job, made of a concept and the models named on a command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from ..baselines.base import Job, Method, S
from ..config.settings import from_mapping, with_overrides
from ..data.concept import Concept
from ..models.bundle import Sources
from ..toy.model import toy_folder
from ..train.costs import sizes_of
from ..utils.devices import check_training_dtype, pick_device, pick_dtype
from ..utils.errors import UserError
from .baselines import TOY_CLIP, embeddings_of
from .bundle import load_scorers, open_bundle, resolved_dtype


def settings_of(
    method: Method[S],
    named: Sources,
    words: Iterable[str] = (),
    values: Mapping[str, object] | None = None,
    origin: str = "settings",
) -> S:
    """The settings of a method: its defaults, those of a file over them, words over those."""
    base = method.defaults(method.masked and named.is_toy)
    if values is not None:
        base = from_mapping(type(base), values, base=base, origin=origin)
    return with_overrides(base, words)


def make_job(
    method: Method[S],
    concept: Concept,
    folder: Path,
    named: Sources,
    settings: S,
    *,
    device: str = "auto",
    dtype: str = "auto",
    clip: str | None = None,
    resume: bool = False,
) -> Job[S]:
    """The job of `method` on `concept`; `named` are the models as they were given, `clip` as for tables.

    Raises UserError for a tokenizer given to a method that takes none, and for a dtype that cannot be trained in.
    """
    given = [flag for flag, part in (("--vq", named.vq), ("--tokenizer", named.tokenizer)) if part is not None]
    if given and not method.masked:
        raise UserError(f"{' and '.join(given)}: {method.name} trains no masked model, it takes --model alone")
    place = pick_device(device)
    dtype = resolved_dtype(Sources.choose(named), device, dtype) if method.masked else dtype
    kind = pick_dtype(dtype, place)
    check_training_dtype(kind, resume)
    job = Job(concept, folder, settings, named, place, kind, resume=resume)
    if method.masked:
        sources = job.sources = Sources.choose(named)
        job.costs = sizes_of(str(toy_folder() / "showo") if sources.is_toy else sources.model)
        job.open_bundle = lambda: open_bundle(sources, str(place), dtype)
        job.find_faces = lambda: _faces(sources, str(place))
        clip = TOY_CLIP if clip is None and sources.is_toy else clip
    if clip is not None:
        job.embeddings = partial(embeddings_of, clip, str(place))
    return job


def _faces(sources: Sources, device: str) -> Callable[[Tensor], Tensor] | None:
    """The face embedding that the toy brings; None for other models."""
    scorers = load_scorers(sources, device)
    return scorers.face_embedding if scorers is not None else None
