"""What learns, and what it is compared with: concept rows, LoRA adapters or all weights, and the reference policy.

The reference is the policy with its trained part switched off, so no second model is held: concept rows are swapped for
a copy of 25 rows, adapters are disabled, and full weights are read from a memory-mapped file written when the run
begins.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..config.settings import from_mapping
from ..config.training import LoraConfig
from ..models import ConceptTokens, MaskedModel, owning_rows
from ..models.four_bit import is_quantised, quantise_base, unpacked
from ..utils.errors import UserError, needs
from ..utils.files import (
    named_errors,
    read_json,
    read_safetensors,
    save_safetensors_atomic,
    write_bytes_atomic,
    write_json,
)
from .checkpoint.tensors import write_tensors
from .microbatch import is_spread

if TYPE_CHECKING:
    from peft import LoraConfig as PeftLora
    from peft.tuners.tuners_utils import BaseTunerLayer

log = logging.getLogger(__name__)

_FREE = {"base_model_name_or_path", "inference_mode", "init_lora_weights", "lora_dropout", "peft_version", "task_type"}
"""What an adapter's configuration may say without changing what the adapter computes here."""


class Policy:
    """The trained part of a model.

    kind: "concept", "lora" or "full"; with the latter two `train_concept` says whether the rows of an attached concept
    learn too.
    `reference_file` is where kind "full" keeps the weights the run began with; without `write_reference` another
    process has seen to it.
    """

    def __init__(
        self,
        model: MaskedModel,
        kind: str = "concept",
        *,
        train_concept: bool = True,
        lora: LoraConfig | None = None,
        reference_file: str | os.PathLike[str] | None = None,
        seed: int = 0,
        write_reference: bool = True,
    ):
        if model.concept is None and kind == "concept":
            raise UserError(
                "trainable='concept', and this model has no concept attached: load or learn its tokens first "
                "(train_concept_tokens), or train without one (trainable=lora or full)"
            )
        if kind not in ("concept", "lora", "full"):
            raise UserError(f"trainable={kind!r}: must be concept, lora or full")
        if kind == "full" and reference_file is None:
            raise UserError("trainable='full' needs a file for the starting weights: give reference_file")
        self.model, self.kind = model, kind
        self.concept: ConceptTokens | None = model.concept
        self.lora = lora or LoraConfig()
        model.requires_grad_(False)
        if self.concept is not None:
            self.concept.requires_grad_(kind == "concept" or train_concept)
        self._adapters: list[BaseTunerLayer] = []
        self._reference_file = Path(reference_file) if reference_file is not None else None
        if kind == "lora":
            self.lora = _fitting(model, self.lora)
            if self.lora.base == "nf4":
                quantise_base(model)
            self._adapters = add_adapters(model, self.lora, seed)
        elif kind == "full":
            model.requires_grad_(True)
            assert self._reference_file is not None
            if write_reference and not _holds(self._reference_file, dict(model.named_parameters())):
                write_tensors(self._reference_file, dict(model.named_parameters()))
        self._concept_start = {name: value.detach().clone() for name, value in self._rows().items()}
        self._adapter_start = {
            name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name
        }
        """Whole, also where layers are spread over ranks later."""

    def _rows(self) -> dict[str, nn.Parameter]:
        return dict(self.concept.named_parameters()) if self.concept is not None else {}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters that learn, by name; the concept's begin with "concept."."""
        named = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        for name, value in self._rows().items():
            if value.requires_grad:
                named[f"concept.{name}"] = value
        return named

    @property
    def trains_concept(self) -> bool:
        return self.concept is not None and self.concept.embed.requires_grad

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside this context the model is the reference policy. No graph may be alive across its borders."""
        with ExitStack() as undo, torch.no_grad():
            if self.trains_concept:
                undo.enter_context(_swapped(self._rows(), self._concept_start))
            if self.kind == "lora":
                undo.callback(self._enable_adapters)
                for layer in self._adapters:
                    layer.enable_adapters(False)
            elif self.kind == "full":
                assert self._reference_file is not None
                undo.enter_context(
                    _swapped(dict(self.model.named_parameters()), read_safetensors(self._reference_file))
                )
            yield

    def _enable_adapters(self) -> None:
        for layer in self._adapters:
            layer.enable_adapters(True)
        for name, value in self.model.named_parameters():
            if "lora_" in name:
                value.requires_grad_(True)

    @torch.no_grad()
    def changed(self) -> float:
        """The part of the trained numbers, in 0…1, that the model computes with another value than when the run began:
        what a step moves by less than the rounding of a weight is lost. Of numbers that are spread over ranks this
        rank's are looked at."""
        start = {f"concept.{name}": value for name, value in self._concept_start.items()}
        if self.kind == "full":
            assert self._reference_file is not None
            start |= read_safetensors(self._reference_file)
        other = total = 0
        for name, value in self.named_parameters().items():
            before = start.get(name, self._adapter_start.get(name))
            if before is None:
                continue
            mine = _own_part(value)
            moved = mine.to(self.model.dtype) != _own_part(before, value).to(mine.device).to(self.model.dtype)
            other, total = other + int(moved.sum()), total + mine.numel()
        return other / max(total, 1)

    def state_dict(self) -> dict[str, Tensor]:
        """The trained tensors alone, by the names of :meth:`named_parameters`."""
        return {name: value.detach() for name, value in self.named_parameters().items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor], origin: object = "checkpoint") -> None:
        """Put what :meth:`state_dict` gave back. Raises UserError for a missing tensor or another shape."""
        named = self.named_parameters()
        absent = sorted(named.keys() - tensors.keys())
        if absent:
            raise UserError(f"{origin}: {len(absent)} trained tensors are missing ({', '.join(absent[:3])})")
        for name, parameter in named.items():
            if tensors[name].shape != parameter.shape:
                found, wanted = tuple(tensors[name].shape), tuple(parameter.shape)
                raise UserError(f"{origin}: {name} has shape {found}, this model's has {wanted}")
        with torch.no_grad():
            for name, parameter in named.items():
                _own_part(parameter).copy_(_own_part(tensors[name], parameter))

    def merge(self) -> MaskedModel:
        """Fold adapters into the weights and take them off; the model is then a plain one. Returns it."""
        if self._adapters:
            _merge_adapters(self.model)
            self._adapters = []
        return self.model

    def export(self, folder: str | os.PathLike[str]) -> Path:
        """Write what was learned: concept/ where there is one, and an adapter or a whole model/. :func:`load_policy`
        reads it.

        The adapter is PEFT's own: ``PeftModel.from_pretrained(model, folder)`` loads it onto the base model.
        """
        folder = Path(folder)
        if self.concept is not None:
            self.concept.save(folder / "concept")
        if self.kind == "lora":
            learned = {_peft_name(k): v for k, v in self.state_dict().items() if "lora_" in k}
            save_safetensors_atomic(folder / "adapter_model.safetensors", learned, {"format": "pt"})
            _save_adapter_config(folder / "adapter_config.json", self.lora)
        elif self.kind == "full":
            self.model.save_pretrained(folder / "model")
        write_json(folder / "policy.json", {"trainable": self.kind})
        return folder


def load_policy(model: MaskedModel, folder: str | os.PathLike[str]) -> MaskedModel:
    """Bring `model` (the base) to the state that :meth:`Policy.export` wrote into `folder`: weights and concept."""
    folder = Path(folder)
    about = read_json(folder / "policy.json")
    kind = about.get("trainable") if isinstance(about, dict) else None
    with_concept = kind == "concept" or (folder / "concept").is_dir()
    concept = ConceptTokens.load(folder / "concept") if with_concept else None
    if kind == "lora":
        settings, tensors = _read_adapter(folder, about)
        add_adapters(model, _fitting(model, settings), seed=0)
        named = {_peft_name(name): value for name, value in model.named_parameters() if "lora_" in name}
        wrong = [k for k, v in named.items() if k not in tensors or tensors[k].shape != v.shape]
        wrong += sorted(tensors.keys() - named.keys())
        if wrong or not tensors:
            raise UserError(f"{folder}: the adapter does not fit this model ({', '.join(wrong[:3]) or 'it is empty'})")
        with torch.no_grad():
            for name, value in named.items():
                value.copy_(tensors[name])
        _merge_adapters(model)
    elif kind == "full":
        trained = type(model).from_pretrained(folder / "model", dtype=model.dtype, device=model.device)
        if trained.identity() != model.identity():
            raise UserError(f"{folder / 'model'}: {trained.identity()} does not fit the base model {model.identity()}")
        model.load_state_dict(trained.state_dict())
    elif kind != "concept":
        raise UserError(f"{folder / 'policy.json'}: trainable={kind!r}: must be concept, lora or full")
    model.requires_grad_(False)
    return model if concept is None else owning_rows(model).attach(concept.to(model.device).requires_grad_(False))


def copy_adapter(model: MaskedModel, learned: Path, folder: Path, base: str | None) -> None:
    """Write the adapter in `learned` (of any version) into `folder` in PEFT's format; `base` is the model it belongs
    to."""
    settings, tensors = _read_adapter(learned, read_json(learned / "policy.json"))
    save_safetensors_atomic(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    file = folder / "adapter_config.json"
    _save_adapter_config(file, _fitting(model, settings))
    write_json(file, {**read_json(file), "base_model_name_or_path": base})


def add_adapters(model: MaskedModel, config: LoraConfig, seed: int) -> list[BaseTunerLayer]:
    """Put fresh float32 adapters on the model's linear layers; returns the adapted layers."""
    with needs("train"):
        from peft import inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_peft_config(config), model)
    layers: list[BaseTunerLayer] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for name, value in model.named_parameters():
        value.requires_grad_("lora_" in name)
        if "lora_" in name:
            value.data = value.data.float()
    return layers


def _fitting(model: MaskedModel, config: LoraConfig) -> LoraConfig:
    """`config` with the model's own targets where they are left at their default. Raises UserError for a target that is
    none of them: heads and embeddings are read as plain tensors."""
    targets = model.lora_targets if config.targets == LoraConfig().targets else config.targets
    if not targets or not set(targets) <= set(model.lora_targets):
        known = ", ".join(model.lora_targets) or f"none: {model.family} takes no adapters"
        raise UserError(f"lora.targets={list(targets)}: must be some of {known}")
    return replace(config, targets=tuple(targets))


def _peft_config(config: LoraConfig) -> PeftLora:
    with needs("train"):
        from peft import LoraConfig as PeftLora

    made = PeftLora(r=config.rank, target_modules=list(config.targets))
    made.lora_alpha = config.alpha  # type: ignore[assignment]  # annotated as a whole number, used as a factor
    return made


def _save_adapter_config(file: Path, config: LoraConfig) -> None:
    """What PEFT itself writes, whole or not at all."""
    with named_errors(file), TemporaryDirectory() as aside:
        _peft_config(config).save_pretrained(aside)
        data = Path(aside, file.name).read_bytes()
    write_bytes_atomic(file, data)


def _peft_name(name: str) -> str:
    """What PEFT calls a parameter of an adapter in its files."""
    return "base_model.model." + name.replace(".default.", ".")


def _read_adapter(folder: Path, about: Mapping[str, object]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Settings and tensors of the adapter in `folder`, by PEFT's names: PEFT's files, or those of version 0.1."""
    if (folder / "adapter.safetensors").is_file():
        settings = from_mapping(LoraConfig, about.get("lora"), origin=f"{folder / 'policy.json'}: lora")
        old = read_safetensors(folder / "adapter.safetensors")
        return settings, {_peft_name(name): value for name, value in old.items()}
    file = folder / "adapter_config.json"
    found = read_json(file)
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        raise UserError(f"{file}: is not the configuration of a LoRA adapter")
    ours = {"rank": "r", "alpha": "lora_alpha", "targets": "target_modules"}
    given = {name: found[key] for name, key in ours.items() if key in found}
    settings = from_mapping(LoraConfig, given, origin=str(file))
    plain = _peft_config(settings).to_dict()
    for key in found.keys() & plain.keys() - set(ours.values()) - _FREE:
        if found[key] != plain[key]:
            raise UserError(
                f"{file}: {key}={found[key]!r}: plain LoRA alone is read here; load it with PEFT and merge it"
            )
    return settings, read_safetensors(folder / "adapter_model.safetensors")


def _merge_adapters(model: MaskedModel) -> None:
    with needs("train"):
        from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                setattr(parent, name, _merged(child))
    model.__dict__.pop("is_loaded_in_4bit", None)


def _merged(layer: BaseTunerLayer) -> nn.Module:
    """The layer below an adapter with the adapter's change in it; one of four bits becomes a plain one."""
    below = layer.get_base_layer()
    if not is_quantised(below):
        layer.merge()
        return layer.get_base_layer()
    assert isinstance(below, nn.Linear)
    plain = unpacked(below)
    for name in layer.active_adapters:
        change = layer.get_delta_weight(name)  # type: ignore[attr-defined]  # LoRA's layers have it, peft's base has not
        plain.weight.data += change.to(plain.weight.dtype)
    return plain


def _holds(file: Path, wanted: Mapping[str, Tensor]) -> bool:
    """Whether `file` holds exactly these tensors; one that is damaged is reported, and will be written anew."""
    if not file.exists():
        return False
    try:
        found = read_safetensors(file)
    except UserError as error:
        log.warning("written anew: %s", error)
        return False
    whole = found.keys() == wanted.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value.detach().cpu())
        for name, value in wanted.items()
    )
    if not whole:
        log.warning("%s: is not the model this run begins with; written anew", file)
    return whole


@contextmanager
def _swapped(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let each parameter point at other numbers for a while; nothing is copied where device and dtype agree."""
    spread = {name for name, parameter in parameters.items() if is_spread(parameter)}
    mine = {name: parameter.data for name, parameter in parameters.items() if name not in spread}
    kept = {name: _own_part(parameters[name]).clone() for name in spread}  # what is gathered lies where it lies
    try:
        for name, parameter in parameters.items():
            if name in spread:
                _own_part(parameter).copy_(_own_part(values[name], parameter))
            else:
                parameter.data = values[name].to(device=parameter.device, dtype=parameter.dtype)
        yield
    finally:
        for name, parameter in parameters.items():
            if name in spread:
                _own_part(parameter).copy_(kept[name])
            else:
                parameter.data = mine[name]


def _own_part(value: Tensor, like: Tensor | None = None) -> Tensor:
    """What this rank holds of `value`, or would hold if it were spread over ranks as `like` is."""
    if not is_spread(value if like is None else like):
        return value
    from .distributed.sharded_layers import local, part_like

    return local(value.detach()) if like is None else part_like(value, like)
