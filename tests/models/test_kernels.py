"""Which attention kernel is taken, by what is installed, what the device is, and what is asked for; and that one which
computes something else is left out. Packages and GPUs are stood in for; values are the CPU kernel's."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import pytest
import torch

from pyunictokens.models.showo import kernels
from pyunictokens.models.showo.attention import PromptAttention
from pyunictokens.models.showo.kernels import (
    SWITCH,
    TOGETHER,
    CpuKernel,
    CudaKernel,
    CudnnKernel,
    FlashAttn3Kernel,
    FlashAttnKernel,
    attention_way,
    choose,
    kernel_for,
)
from pyunictokens.utils.errors import UserError
from tests.models.test_shared_prefix import plain, problem

HOPPER, AMPERE, BLACKWELL = (9, 0), (8, 0), (10, 0)
CUDA = torch.device("cuda")
MODULES = {"flash3": "flash_attn_interface", "flash2": "flash_attn"}


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_found", {})
    monkeypatch.setattr(kernels, "_chosen", {})
    monkeypatch.delenv(SWITCH, raising=False)
    kernels._package.cache_clear()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says what is installed, of flash3, flash2 and cudnn."""

    def install(*names: str) -> None:
        def load(module: str) -> object:
            if module in (MODULES[name] for name in names if name in MODULES):
                return types.SimpleNamespace()
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)

        monkeypatch.setattr("importlib.import_module", load)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: "cudnn" in names)
        kernels._package.cache_clear()

    return install


@pytest.mark.parametrize(
    ("capability", "names", "taken", "reasons"),
    [
        (HOPPER, ("flash3", "flash2", "cudnn"), "flash3", []),
        (HOPPER, ("flash2", "cudnn"), "cudnn", ["flash-attn 3 is not installed"]),
        (HOPPER, ("flash2",), "flash2", ["flash-attn 3 is not installed", "this torch has no cuDNN"]),
        (HOPPER, (), "torch", ["flash-attn 3 is not installed", "this torch has no cuDNN", "flash-attn 2 is not inst"]),
        (BLACKWELL, ("flash3", "flash2", "cudnn"), "cudnn", []),
        (BLACKWELL, ("flash3",), "torch", ["this torch has no cuDNN", "flash-attn 2 is not installed"]),
        (AMPERE, ("flash3", "flash2", "cudnn"), "flash2", []),
        (AMPERE, ("cudnn",), "torch", ["flash-attn 2 is not installed"]),
    ],
)
def test_the_best_that_is_there(installed, capability, names, taken, reasons):
    installed(*names)
    found, why = choose(capability)
    assert found == taken and len(why) == len(reasons)
    assert all(start in reason for start, reason in zip(reasons, why, strict=True))


def test_by_hand(installed, monkeypatch):
    installed("flash2", "cudnn")
    for name in ("cudnn", "flash2", "torch"):
        monkeypatch.setenv(SWITCH, name)
        assert choose(HOPPER) == (name, [f"{SWITCH}={name}"])
    for value, capability, error in (
        ("flash3", HOPPER, "flash-attn 3 is not installed"),
        ("flash3", AMPERE, "for compute capability 9.x, this GPU has 8.0"),
        ("cudnn", (7, 5), "needs compute capability 8.0"),
        ("flash4", HOPPER, "must be auto, cudnn, flash3, flash2, torch"),
    ):
        monkeypatch.setenv(SWITCH, value)
        with pytest.raises(UserError, match=error):
            choose(capability)
    monkeypatch.setenv(SWITCH, "torch")
    assert f"{SWITCH}=torch" in attention_way(torch.device("cpu"))[1]


def test_a_package_that_does_not_load_is_told_apart(monkeypatch):
    def load(module: str) -> object:
        raise ImportError("undefined symbol: _ZN3c104")

    monkeypatch.setattr("importlib.import_module", load)
    assert "flash-attn 2 does not load: undefined symbol" in choose(AMPERE)[1][0]


def on_a_gpu(monkeypatch, capability):
    """A GPU whose tensors lie on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
    distance = kernels._distance
    monkeypatch.setattr(kernels, "_distance", lambda kernel, _, dtype: distance(kernel, torch.device("cpu"), dtype))


def with_kvcache(q, k_cache, v_cache, *, cache_seqlens=None, softmax_scale=None, causal=False, **more):
    """flash-attn's, row by row on the CPU."""
    outs, lses = [], []
    for row in range(len(q)):
        used = k_cache.shape[1] if cache_seqlens is None else int(cache_seqlens[row])
        parts = (q[row : row + 1], k_cache[row : row + 1, :used], v_cache[row : row + 1, :used])
        out, lse, _ = CpuKernel().forward(*(part.transpose(1, 2) for part in parts), causal, softmax_scale)
        outs.append(out.transpose(1, 2))
        lses.append(lse)
    return (torch.cat(outs), torch.cat(lses)) if more.get("return_softmax_lse") else torch.cat(outs)


@pytest.mark.parametrize(("name", "kind"), [("flash3", FlashAttn3Kernel), ("flash2", FlashAttnKernel)])
def test_a_package_is_asked_and_used_where_no_gradient_is_wanted(monkeypatch, name, kind):
    calls = []

    def counted(*args, **more):
        calls.append(more.get("cache_seqlens") is not None)
        return with_kvcache(*args, **more)

    monkeypatch.setitem(sys.modules, MODULES[name], types.SimpleNamespace(flash_attn_with_kvcache=counted))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    kernels._package.cache_clear()
    on_a_gpu(monkeypatch, HOPPER)
    kernel = kernel_for(torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device="meta"), "cuda")
    assert type(kernel) is kind and calls == [False, True]
    assert attention_way(CUDA)[0] == kind.name
    calls.clear()
    monkeypatch.setattr("pyunictokens.models.showo.shared_prefix.kernel_for", lambda q: kernel)
    q, k, v, prompts = problem(3, [5], [0, 0])
    with torch.no_grad():
        ours = PromptAttention(prompts, [0, 0], joined=True)(0, q, k, v)
    assert calls == [False, False]
    assert (ours - plain(q, k, v, prompts, [0, 0], False)).abs().max() < 1e-12
    kernels._package.cache_clear()


def test_one_that_raises_or_gives_other_values_is_left_out(monkeypatch, caplog):
    on_a_gpu(monkeypatch, AMPERE)
    for number, (spoil, why) in enumerate(
        (
            (lambda *args, **more: 1 / 0, "ZeroDivisionError"),
            (lambda *args, **more: with_kvcache(*args, **{**more, "cache_seqlens": None}), "its values are"),
        )
    ):
        kernels._found.clear()
        kernels._chosen.clear()
        monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_with_kvcache=spoil))
        kernels._package.cache_clear()
        way, reason = attention_way(CUDA)
        assert way == CudaKernel.name and f"flash-attn 2 cannot be used on cuda: {why}" in reason
        attention_way(CUDA)
        assert len(caplog.records) == number + 1, "it is asked once"
    kernels._package.cache_clear()


def test_nothing_is_asked_while_waiting_is_forbidden(monkeypatch):
    on_a_gpu(monkeypatch, AMPERE)
    fake = types.SimpleNamespace(flash_attn_with_kvcache=with_kvcache)
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    q = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device="meta")
    assert type(kernel_for(q, "cuda")) is CudaKernel and not kernels._found
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    assert type(kernel_for(q, "cuda")) is FlashAttnKernel
    kernels._package.cache_clear()


def test_cudnn_takes_many_queries_over_keys_of_their_own(monkeypatch):
    seen = []
    monkeypatch.setattr(CudaKernel, "forward", lambda _, q, *more: seen.append("torch") or (q, q[..., 0], ()))

    class Aten:
        @staticmethod
        def _scaled_dot_product_cudnn_attention(q, k, v, bias, lse, dropout, causal, debug, *, scale):
            assert bias is None and lse and dropout == 0.0 and not debug
            out, stats, _ = CpuKernel().forward(q, k, v, causal, scale)
            seen.append("cudnn")
            return out, stats[..., None], None

    monkeypatch.setattr(kernels, "_aten", Aten)
    monkeypatch.setattr(CpuKernel, "forward", lambda _, q, *more: (q, q[..., 0], ()))
    many, few = torch.zeros(2, 3, 80, 16), torch.zeros(2, 3, 9, 16)
    with torch.no_grad():
        assert CudnnKernel().forward(many, many, many, False)[1].shape == (2, 3, 80)
        CudnnKernel().forward(many, few[:1].expand(2, -1, -1, -1), few, False)
        CudnnKernel().forward(few, many, many, False)
    CudnnKernel().forward(many, many, many, False)
    assert seen == ["cudnn", "torch", "torch", "torch"]


def test_on_a_cpu_keys_are_put_together():
    assert attention_way(torch.device("cpu"))[0] == TOGETHER
