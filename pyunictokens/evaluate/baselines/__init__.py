"""Models to compare, one file each, behind the two methods of `evaluate.core`; and the words that name them.

    ours[:RUN]                      what a run learned; {name} in RUN is the concept
    showo-tp, showo-ip              the bare model, told about the concept in words, by a reference
    transformers:PATH[+ip]          an image-text-to-text model of transformers
    diffusers:PATH[,KEY=VALUE]…     a pipeline of diffusers with its DreamBooth or textual-inversion weights
    endpoint:URL,model=NAME[,KEY=VALUE]…[+ip]
    real                            real images
    METHOD:DIR                      what `pyunictokens baseline train METHOD … --out DIR` left; {name} as above

This file parses those words and makes the baselines that need no engine; those that do are made by whoever owns one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch

from ...utils import fingerprint
from ...utils.errors import UserError
from ..core import Baseline, Model
from ..tasks import Subject

KINDS = ("ours", "showo-tp", "showo-ip", "transformers", "diffusers", "endpoint", "real")
_NEED = {"transformers": "a folder or hub id", "diffusers": "a folder or hub id", "endpoint": "a URL up to /v1"}
_PLAIN = ("showo-tp", "showo-ip", "real")


@dataclass(frozen=True)
class Spec:
    """A model as it was named."""

    kind: str
    where: str = ""
    options: dict[str, str] = field(default_factory=dict)
    image: bool = False
    """An image prompt instead of a text prompt."""
    trained: bool = False
    """A baseline that was trained here: `kind` is its method, `where` its folder."""

    @property
    def name(self) -> str:
        """What its row is called."""
        last = self.where.rstrip("/").rpartition("/")[2] or self.where
        if self.kind == "ours":
            return "ours" if not self.where else f"ours ({self.where})"
        if self.kind == "endpoint":
            last = self.options.get("model", last)
        if self.kind == "diffusers":
            more = [
                f"{key} {value.rstrip('/').rpartition('/')[2]}" for key, value in self.options.items() if key != "token"
            ]
            return " ".join([last, *([f"({', '.join(more)})"] if more else [])])
        if self.trained:
            return f"{self.kind} ({self.where})"
        if self.kind in ("transformers", "endpoint"):
            return f"{last} + {'IP' if self.image else 'TP'}"
        return {"showo-tp": "Show-o + TP", "showo-ip": "Show-o + IP", "real": "Real images"}[self.kind]


def parse(text: str, methods: Collection[str] = ()) -> Spec:
    """A model's name as it stands on a command line; `methods` are the baselines that can be trained. Raises UserError
    naming what is wrong with it."""
    kind, colon, rest = text.strip().partition(":")
    if kind in methods and rest:
        return Spec(kind, rest, trained=True)
    if kind not in KINDS:
        if kind in methods:
            raise UserError(f"model {text!r}: needs the folder that it was trained in, as in {kind}:DIR")
        known = [*KINDS, *(f"{method}:DIR" for method in methods if method not in KINDS)]
        raise UserError(f"model {text!r}: must begin with one of {', '.join(known)}")
    if kind in _PLAIN and colon:
        raise UserError(f"model {text!r}: {kind} takes nothing after it")
    if kind in _NEED and not rest:
        raise UserError(f"model {text!r}: needs {_NEED[kind]}, as in {kind}:…")
    image = rest.endswith("+ip") and kind in ("transformers", "endpoint")
    rest = rest.removesuffix("+ip").removesuffix("+tp") if kind in ("transformers", "endpoint") else rest
    if kind in ("ours", "transformers"):
        return Spec(kind, rest, image=image)
    where, *words = rest.split(",")
    options = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not value:
            raise UserError(f"model {text!r}: {word!r} must be KEY=VALUE")
        options[key.strip()] = value
    return Spec(kind, where, options, image)


def baseline(
    spec: Spec,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    max_new_tokens: int = 100,
) -> Baseline:
    """The baseline of a spec that needs no engine. Raises UserError for an option it does not know."""
    weights = " ".join(fingerprint.of_files(place) for place in (spec.where, *spec.options.values()))
    options = sorted(spec.options.items())
    identity = f"{spec.kind} {spec.where} {weights} {options} image={spec.image} {dtype} {max_new_tokens}"
    if spec.kind == "real":
        from .real import RealImages

        return Baseline(spec.name, identity, RealImages, answers=False)
    if spec.kind == "transformers":
        from .vlm import Backbone, Vlm

        backbone = functools.cache(lambda: Backbone(spec.where, device, dtype))
        return Baseline(
            spec.name,
            identity,
            lambda subject: Vlm(backbone(), subject, int(spec.image), max_new_tokens),
            generates=False,
            release=backbone.cache_clear,
        )
    if spec.kind == "diffusers":
        from .diffusion import Diffusion, Pipeline, parse_source

        source = parse_source([spec.where, *(f"{key}={value}" for key, value in spec.options.items())])
        pipeline = functools.cache(lambda: Pipeline(source, device, dtype))
        return Baseline(
            spec.name,
            identity,
            lambda subject: Diffusion(pipeline(), subject),
            answers=False,
            release=pipeline.cache_clear,
        )
    if spec.kind == "endpoint":
        generates = bool(spec.options.get("draw"))
        return Baseline(spec.name, identity, _remote(spec, max_new_tokens), generates=generates)
    raise UserError(f"model {spec.kind!r}: needs an engine")


def _remote(spec: Spec, max_new_tokens: int) -> Callable[[Subject], Model]:
    from ...rewards.endpoint import Endpoint
    from .endpoint import Remote, RemoteConfig

    known = {"model", "draw", "key", "references", "size", "quality", "timeout"}
    if not {"model"} <= set(spec.options) <= known | {"photos"}:
        got = ", ".join(spec.options) or "nothing"
        raise UserError(f"endpoint {spec.where}: needs model=NAME and knows {', '.join(sorted(known))}; got {got}")
    key = spec.options.get("key", "OPENAI_API_KEY")
    shown = spec.options.get("references", spec.options.get("photos", "1"))  # as it was called before
    if not shown.isdigit() or not 1 <= int(shown) <= 20:
        raise UserError(f"endpoint {spec.where}: references={shown}: must be from 1 to 20")
    waits = spec.options.get("timeout", "180" if spec.options.get("draw") else "60")
    if not waits.isdigit() or not 1 <= int(waits) <= 3600:
        raise UserError(f"endpoint {spec.where}: timeout={waits}: must be from 1 to 3600 seconds")
    config = RemoteConfig(
        spec.options["model"],
        spec.where,
        None if key == "none" else key,
        max_tokens=max_new_tokens,
        image_model=spec.options.get("draw", ""),
        size=spec.options.get("size", ""),
        quality=spec.options.get("quality", ""),
        timeout=float(waits),
        shown=int(shown) if spec.image else 0,
    )
    endpoint = Endpoint(config)
    return lambda subject: Remote(endpoint, config, subject)
