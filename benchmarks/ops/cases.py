"""The workloads: shapes, inputs and what each must cost at least.

Cost model. A head over M tokens is a product of M×D with D×K, 2·M·D·K operations. Forward needs one product; forward
and backward need three (logits, gradient of the hidden states, gradient of the weight), whoever does it and however.
Tokens outside a mask need none. `grpo_loss` reads three numbers a token and writes one gradient; `maskgit_step` reads
every logit once; `qk_norm_rotary` reads and writes q and k, and its backward reads them and two gradients and writes
two. The time of a case on a machine is bounded by operations over its matrix rate and by bytes over its copy bandwidth;
`bound` names the larger.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import pyunictokens as uct

OPERATIONS = ("selected_logprob", "grpo_loss", "maskgit_grpo_loss", "maskgit_step", "qk_norm_rotary")
ALPHA, CLIP, BETA = 0.6, 0.2, 0.01
QK = ("q", "k", "q_weight", "q_bias", "k_weight", "k_bias")
UNKNOWN = 0.7
"""Share of unknown codes in a step."""
TEXT_HEAD = 58523


@dataclass(frozen=True)
class Case:
    """One workload. `sizes` holds R, T, N, D, K for heads, R, T, N for grpo_loss, B, N, K for maskgit_step, B, H, N, E
    for qk_norm_rotary (heads H of width E, the first half of which turns)."""

    operation: str
    shape: str
    sizes: dict[str, int]
    scope: str = "all"
    """Tokens that count: all, masked or newly_unmasked, as under the cosine schedule."""
    guidance: float = 0.0
    spread: float = 1.0
    """Standard deviation of the logits of a step: 1 is a random model, 8 a trained one under guidance."""
    bias: bool = False
    """The head has a bias, whose gradient is wanted too."""

    @property
    def tokens(self) -> int:
        return math.prod(self.sizes[key] for key in "BRTN" if key in self.sizes)

    @property
    def phases(self) -> tuple[str, ...]:
        return ("forward",) if self.operation == "maskgit_step" else ("forward", "backward", "both")

    @property
    def bound(self) -> str:
        return "matrix" if "D" in self.sizes else "copy"

    def kept(self) -> float:
        """Share of tokens that count."""
        if self.scope == "all":
            return 1.0
        shape = self.sizes["T"], self.sizes["N"]
        return sum(scope_counts(self.scope, *shape)) / math.prod(shape)

    def flops(self) -> dict[str, float]:
        """By phase. Backward alone has no floor: what forward left for it is the implementation's choice."""
        if "D" not in self.sizes:
            return {}
        product = 2.0 * self.tokens * self.kept() * self.sizes["D"] * self.sizes["K"]
        return {"forward": product, "both": 3 * product}

    def bytes(self, dtype: torch.dtype) -> dict[str, float]:
        """By phase: inputs once and outputs once."""
        item = torch.empty((), dtype=dtype).element_size()
        if self.operation == "maskgit_step":
            return {"forward": float(self.tokens * (self.sizes["K"] * item + 8 + 8 + 8 + 4 + 1))}
        if self.operation == "grpo_loss":
            return {"forward": 12.0 * self.tokens, "both": 16.0 * self.tokens}
        if self.operation == "qk_norm_rotary":
            tensor = float(self.tokens * self.sizes["H"] * self.sizes["E"] * item)
            return {"forward": 4 * tensor, "both": 10 * tensor}
        states = (2 if self.guidance else 1) * self.tokens * self.kept() * self.sizes["D"] * item
        weight = self.sizes["D"] * self.sizes["K"] * item
        return {"forward": states + weight, "both": 2.0 * (states + weight)}


def scope_counts(scope: str, timesteps: int, positions: int) -> list[int]:
    """Tokens that count at each timestep under the cosine schedule."""
    unknown = [positions]
    for step in range(timesteps):
        rate = uct.ops.mask_schedule("cosine", step, timesteps)
        unknown.append(0 if step == timesteps - 1 else max(1, min(unknown[-1] - 1, math.floor(positions * rate))))
    if scope == "masked":
        return unknown[:-1]
    return [before - after for before, after in itertools.pairwise(unknown)]


@dataclass
class Inputs:
    """The tensors of a case. Peers view them in other shapes; the numbers are the same for all."""

    case: Case
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["tensors"][name]
        except KeyError:
            raise AttributeError(name) from None

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors whose gradients are wanted."""
        names = ("hidden", "hidden_uncond", "weight", "bias") if "weight" in self.tensors else ("logp", *QK)
        return tuple(self.tensors[name] for name in names if name in self.tensors)

    def double(self) -> Inputs:
        """The same numbers in float64 on the CPU: what the truth is computed from."""
        made = {}
        for name, tensor in self.tensors.items():
            value = tensor.detach().cpu()
            made[name] = value.double() if value.is_floating_point() else value
            made[name].requires_grad_(tensor.requires_grad)
        return Inputs(self.case, made)


def _mask(case: Case, generator: torch.Generator, device: torch.device) -> Tensor:
    """[R, T, N] bool: each rollout reveals its positions in an order of its own."""
    rollouts, steps, positions = (case.sizes[key] for key in "RTN")
    order = torch.rand(rollouts, positions, generator=generator, device=device).argsort(-1)
    counts = torch.tensor(scope_counts("newly_unmasked", steps, positions), device=device)
    shown_at = torch.repeat_interleave(torch.arange(steps, device=device), counts)[order]
    now = torch.arange(steps, device=device)[None, :, None]
    return shown_at[:, None] == now if case.scope == "newly_unmasked" else shown_at[:, None] >= now


def make(case: Case, device: str, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Fresh random inputs. Old and reference log-probs lie near the policy's own, as in training."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=kind).mul_(scale)

    made = Inputs(case)
    sizes, at = case.sizes, torch.device(device)
    if case.operation == "maskgit_step":
        batch, positions, entries = (sizes[key] for key in "BNK")
        made.tensors["logits"] = normal(batch, positions, entries, scale=case.spread)
        given = torch.randint(0, entries, (batch, positions), generator=generator, device=device)
        known = torch.rand(batch, positions, generator=generator, device=device) >= UNKNOWN
        made.tensors["codes"] = torch.where(known, given, uct.MASK)
        made.tensors["mask_len"] = torch.full((batch,), positions // 3, device=device)
        made.tensors["sample_ids"] = torch.arange(batch, device=device)
        return made
    if case.operation == "qk_norm_rotary":
        batch, heads, positions, width = (sizes[key] for key in "BHNE")
        for name in "qk":  # as a layer's products leave them: the heads of a position side by side
            made.tensors[name] = normal(batch, positions, heads, width).transpose(1, 2)
            made.tensors[f"{name}_weight"], made.tensors[f"{name}_bias"] = normal(width) + 1, normal(width)
            made.tensors[f"upstream_{name}"] = normal(batch, heads, positions, width)
        angle = normal(positions, max(2, width // 4 * 2), scale=3.0, kind=torch.float32)
        made.tensors["cos"], made.tensors["sin"] = angle.cos().to(dtype), angle.sin().to(dtype)
        for leaf in made.leaves:
            leaf.requires_grad_()
        return made
    shape = tuple(sizes[key] for key in "RTN")
    made.tensors["advantages"] = normal(shape[0], kind=torch.float32)
    if case.operation == "grpo_loss":
        logp = normal(*shape, kind=torch.float32).abs_().neg_()
        made.tensors["old_logp"] = logp + normal(*shape, scale=0.1, kind=torch.float32)
        made.tensors["ref_logp"] = logp + normal(*shape, scale=0.1, kind=torch.float32)
        made.tensors["logp"] = logp.requires_grad_()
        return made
    made.tensors["hidden"] = normal(*shape, sizes["D"])
    if case.guidance:
        made.tensors["hidden_uncond"] = made.hidden + normal(*shape, sizes["D"], scale=0.1)
    made.tensors["weight"] = normal(sizes["K"], sizes["D"], scale=2.0 / math.sqrt(sizes["D"]))
    made.tensors["target"] = torch.randint(0, sizes["K"], shape, generator=generator, device=device)
    if case.bias:
        made.tensors["bias"] = normal(sizes["K"])
    if case.operation == "maskgit_grpo_loss":
        logp = uct.ops.selected_logprob(
            made.hidden,
            made.weight,
            made.target,
            made.get("bias"),
            hidden_uncond=made.get("hidden_uncond"),
            guidance_scale=case.guidance,
            backend="reference",
        )
        made.tensors["old_logp"] = logp + normal(*shape, scale=0.1, kind=torch.float32)
        made.tensors["ref_logp"] = logp + normal(*shape, scale=0.1, kind=torch.float32)
        if case.scope != "all":
            made.tensors["mask"] = _mask(case, generator, at)
    else:
        made.tensors["upstream"] = normal(*shape, kind=torch.float32)
    for leaf in made.leaves:
        leaf.requires_grad_()
    return made


def _head(operation: str, shape: str, sizes: tuple[int, int, int, int, int], **more: Any) -> Case:
    return Case(operation, shape, dict(zip("RTNDK", sizes, strict=True)), **more)


def _step(shape: str, sizes: tuple[int, int, int], spread: float = 1.0) -> Case:
    return Case("maskgit_step", shape, dict(zip("BNK", sizes, strict=True)), spread=spread)


def _loss(shape: str, sizes: tuple[int, int, int]) -> Case:
    return Case("grpo_loss", shape, dict(zip("RTN", sizes, strict=True)))


def _rotary(shape: str, sizes: tuple[int, int, int, int]) -> Case:
    return Case("qk_norm_rotary", shape, dict(zip("BHNE", sizes, strict=True)))


TOY = (9, 12, 64, 192, 1024)
"""R, T, N, D, K of a training step of the embedded toy."""


def suite(device: str, smoke: bool = False) -> list[Case]:
    """The cases of a device, those that the goals speak of first: a time budget may cut the tail."""
    heads = ("maskgit_grpo_loss", "selected_logprob")
    if smoke:
        return [
            *(_head(operation, "smoke", (3, 2, 8, 16, 40)) for operation in heads),
            _head(heads[0], "smoke newly_unmasked", (3, 2, 8, 16, 40), scope="newly_unmasked"),
            _head(heads[0], "smoke guided", (3, 2, 8, 16, 40), guidance=5.0, bias=True),
            _step("smoke", (2, 16, 40)),
            _loss("smoke", (3, 2, 64)),
            _rotary("smoke", (2, 3, 16, 8)),
        ]
    toy = [*(_head(operation, "toy", TOY) for operation in heads), _step("toy", (18, 64, 1024))]
    if device == "cpu":
        return [
            _head("selected_logprob", "4096×512×4096", (4, 4, 256, 512, 4096)),
            _step("B18 N256 K4096", (18, 256, 4096)),
            _step("B18 N256 K4096 peaked", (18, 256, 4096), spread=8.0),
            _step("B9 N1024 K8192", (9, 1024, 8192)),
            _step("B9 N1024 K8192 peaked", (9, 1024, 8192), spread=8.0),
            _loss("1.8 M tokens", (36, 50, 1024)),
            _loss("8.2 M tokens", (160, 50, 1024)),
            _head("maskgit_grpo_loss", "4096×512×4096", (4, 4, 256, 512, 4096)),
            _head("maskgit_grpo_loss", "4096×512×4096 newly_unmasked", (4, 4, 256, 512, 4096), scope="newly_unmasked"),
            _rotary("B18 H6 N64 E32", (18, 6, 64, 32)),
            *toy,
        ]
    show = {
        f"Show-o {side}² R {rows}": (rows, 50, codes, 2048, 8192)
        for side, codes in ((512, 1024), (256, 256))
        for rows in (9, 1, 36)
    }
    first, largest = "Show-o 512² R 9", "Show-o 512² R 36"
    lighter = sorted(set(show) - {first, largest}, key=lambda shape: show[shape][0] * show[shape][2])
    return [
        _head(heads[0], first, show[first]),
        _step("B18 N1024 K8192", (18, 1024, 8192)),
        _loss("8.2 M tokens", (160, 50, 1024)),
        _head(heads[0], f"{first} guided, bias", show[first], guidance=5.0, bias=True),
        _head(heads[0], f"{first} newly_unmasked", show[first], scope="newly_unmasked"),
        _head(heads[0], f"{first} masked", show[first], scope="masked"),
        _head(heads[0], f"{first} guided", show[first], guidance=5.0),
        _rotary("B18 H32 N1026 E64", (18, 32, 1026, 64)),
        _head(heads[1], first, show[first]),
        _head(heads[1], "text head K 58523", (9, 1, 1024, 2048, TEXT_HEAD)),
        *toy,
        *(_head(operation, shape, show[shape]) for shape in lighter for operation in heads),
        *(_step(f"B{rows} N{codes} K8192", (rows, codes, 8192)) for rows, codes in ((1, 1024), (36, 1024), (18, 256))),
        _step("B18 N1024 K8192 peaked", (18, 1024, 8192), spread=8.0),
        _loss("0.46 M tokens", (9, 50, 1024)),
        _head(heads[0], "text head K 58523", (9, 1, 1024, 2048, TEXT_HEAD)),
        *(_head(operation, largest, show[largest]) for operation in heads),
    ]


_SIZES = {
    "selected_logprob": "RTNDK",
    "grpo_loss": "RTN",
    "maskgit_grpo_loss": "RTNDK",
    "maskgit_step": "BNK",
    "qk_norm_rotary": "BHNE",
}


def own(text: str) -> Case:
    """A case of the caller's: ``OPERATION:R=9,T=50,…``, with scope=, guidance= and spread= where wanted.

    Raises:
        ValueError: an unknown operation or key, a size that is missing or no positive number.
    """
    operation, _, rest = text.partition(":")
    if operation not in _SIZES:
        raise ValueError(f"{text}: the operation must be one of {', '.join(OPERATIONS)}")
    given = dict(part.partition("=")[::2] for part in rest.split(",") if part)
    more: dict[str, Any] = {"bias": bool(int(given.pop("bias", 0)))}
    try:
        more |= {key: float(given.pop(key)) for key in ("guidance", "spread") if key in given}
        sizes = {key: int(given[key]) for key in _SIZES[operation]}
    except (KeyError, ValueError):
        sizes = {}
    scope = given.pop("scope", "all")
    if not sizes or min(sizes.values()) < 1 or given.keys() - sizes.keys():
        wanted = ",".join(f"{key}=N" for key in _SIZES[operation])
        raise ValueError(
            f"{text}: must be {operation}:{wanted}, each a positive number; also scope, guidance, spread, bias"
        )
    if scope not in ("all", "masked", "newly_unmasked"):
        raise ValueError(f"{text}: scope must be all, masked or newly_unmasked")
    return Case(operation, rest.replace(",", " "), sizes, scope, **more)


def small(case: Case) -> Case:
    """The same kind of case, small enough for float64: what a side is checked on before it is timed."""
    tiny = {"B": 2, "R": 3, "T": 2, "N": 16, "D": 64, "K": 160, "H": 3, "E": 64}
    sizes = {key: min(size, tiny[key]) for key, size in case.sizes.items()}
    return Case(case.operation, "check", sizes, case.scope, case.guidance, case.spread, case.bias)
