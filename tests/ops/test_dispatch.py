"""Which backend runs, what is said when one cannot, and what capabilities() reports."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import pyunictokens as uct
from pyunictokens.ops import registry as _dispatch
from pyunictokens.ops.registry import Entry, choose
from pyunictokens.utils.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Entry]]:
    """A table of one operation with three backends, none of them real."""
    table = {
        "op": {
            "reference": Entry(lambda: "reference"),
            "cpu": Entry(lambda: "cpu", devices=("cpu",), dtypes=(torch.float32,)),
            "triton": Entry(lambda: "triton", devices=("cuda",), dtypes=(torch.bfloat16,)),
        }
    }
    monkeypatch.setattr(_dispatch, "_table", table)
    monkeypatch.setattr(_dispatch, "_unavailable", {})
    return table


def test_the_best_that_takes_device_and_dtype(table: dict[str, Any]) -> None:
    assert choose("op", None, CPU, torch.float32) == "cpu"
    assert choose("op", None, CPU, torch.bfloat16) == "reference"
    assert choose("op", None, CUDA, torch.bfloat16) == "triton"
    assert choose("op", None, CUDA, torch.float32) == "reference"
    assert choose("op", None, torch.device("meta"), torch.float32) == "reference"
    _dispatch.mark_unavailable("triton", "no GPU")
    assert choose("op", None, CUDA, torch.bfloat16) == "reference"


def test_a_backend_asked_for_is_used_or_refused_with_the_way_out(table: dict[str, Any]) -> None:
    assert choose("op", "reference", CPU, torch.float32) == "reference"
    with pytest.raises(UserError, match=r"backend='fast'.*reference, cpu, triton, cuda"):
        choose("op", "fast", CPU, torch.float32)
    with pytest.raises(UserError, match=r"does not take tensors on cpu, only on cuda; use backend='reference'"):
        choose("op", "triton", CPU, torch.bfloat16)
    with pytest.raises(UserError, match="does not take float64, only float32"):
        choose("op", "cpu", CPU, torch.float64)
    with pytest.raises(UserError, match="backend 'cuda' is not offered for op; use backend='reference'"):
        choose("op", "cuda", CUDA, torch.float32)
    _dispatch.mark_unavailable("cpu", "the core is missing")
    with pytest.raises(UserError, match="backend 'cpu' cannot run here: the core is missing"):
        choose("op", "cpu", CPU, torch.float32)


def test_a_new_backend_is_its_entries_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file calls `offer`, the line says where it is the best: it is chosen, can be asked for and is reported."""
    calls: list[str] = []

    def forward(*arguments: Any) -> Any:
        calls.append("mine")
        return _dispatch.entry("selected_logprob", "reference").forward(*arguments)

    definition = _dispatch.entry("selected_logprob", "reference")
    monkeypatch.setattr(_dispatch, "_table", {name: dict(offered) for name, offered in _dispatch._table.items()})
    monkeypatch.setattr(_dispatch, "BACKENDS", {**_dispatch.BACKENDS, "mine": ("cpu",)})
    _dispatch.offer("selected_logprob", "mine", Entry(forward, definition.backward, dtypes=(torch.float32,)))
    hidden, weight = torch.randn(5, 7, requires_grad=True), torch.randn(11, 7)
    target = torch.randint(11, (5,))
    wanted = (hidden @ weight.T).log_softmax(-1)[torch.arange(5), target]
    for backend in (None, "mine"):
        torch.testing.assert_close(uct.ops.selected_logprob(hidden, weight, target, backend=backend), wanted)
    assert calls == ["mine", "mine"]
    assert uct.ops.capabilities()["mine"] == {"available": True, "ops": ["selected_logprob"], "reason": ""}
    uct.ops.selected_logprob(hidden.double(), weight.double(), target)  # not its dtype: the definition runs
    assert len(calls) == 2


def test_capabilities_of_the_table(table: dict[str, Any]) -> None:
    _dispatch.mark_unavailable("triton", "no GPU")
    report = uct.ops.capabilities()
    assert report["reference"] == {"available": True, "ops": ["op"], "reason": ""}
    assert report["triton"] == {"available": False, "ops": [], "reason": "no GPU"}
    assert report["cuda"]["available"] is False
    assert "no cuda implementation" in report["cuda"]["reason"]


def test_capabilities_of_this_build() -> None:
    report = uct.ops.capabilities()
    public = ["grpo_loss", "maskgit_grpo_loss", "maskgit_step", "selected_logprob"]
    of_models = ["qk_norm_rotary", "tanh_gelu"]
    assert report["reference"]["ops"] == sorted([*public, *of_models])
    assert report["cpu"]["available"] == bool(uct.ops.build_info())
    if report["cpu"]["available"]:
        assert report["cpu"]["ops"] == sorted([*public, *of_models])


def test_cpu_is_refused_where_it_is_not_offered() -> None:
    hidden, weight, target = torch.randn(3, 4).double(), torch.randn(5, 4).double(), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(UserError, match="backend 'cpu' of selected_logprob does not take float64"):
        uct.ops.selected_logprob(hidden, weight, target, backend="cpu")
    with pytest.raises(UserError, match="backend 'cpu' of maskgit_step does not take float64"):
        uct.ops.maskgit_step(
            torch.randn(1, 2, 3, dtype=torch.float64),
            torch.zeros(1, 2, dtype=torch.int64),
            mask_len=1,
            temperature=1.0,
            seed=0,
            sample_ids=torch.zeros(1, dtype=torch.int64),
            step=0,
            backend="cpu",
        )


def test_a_reason_is_asked_for_when_the_backend_is_wanted(table: dict[str, Any]) -> None:
    asked: list[str] = []

    def reason() -> str:
        asked.append("triton")
        return "no GPU"

    _dispatch.mark_unavailable("triton", reason)
    assert choose("op", None, CPU, torch.float32) == "cpu" and not asked
    assert choose("op", None, CUDA, torch.bfloat16) == "reference" and asked
    with pytest.raises(UserError, match="backend 'triton' cannot run here: no GPU"):
        choose("op", "triton", CUDA, torch.bfloat16)
    _dispatch.mark_unavailable("triton", lambda: "")
    assert choose("op", "triton", CUDA, torch.bfloat16) == "triton"


def test_import_does_not_look_for_gpus() -> None:
    """cudaGetDeviceCount starts CUDA, and a child forked after that cannot use it."""
    code = """
import torch, sys
def asked(*_, **__):
    raise SystemExit("somebody asked for GPUs")
torch.cuda.device_count = torch.cuda.is_available = torch._C._cuda_getDeviceCount = asked
try:
    import pyunictokens._core as core
    core_info = core.build_info
    core.build_info = asked
except ImportError:
    pass
import pyunictokens as uct
import pyunictokens.kernels
codes = torch.full((2, 9), -1)
out = uct.ops.maskgit_step(torch.randn(2, 9, 70), codes, mask_len=4, temperature=1.0, seed=1,
                           sample_ids=torch.arange(2), step=0)
logp = torch.randn(2, 9, requires_grad=True)
uct.ops.grpo_loss(logp, logp.detach(), None, torch.ones(2), beta=0.0)[0].backward()
print("nobody asked")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=240)
    assert done.stdout.strip() == "nobody asked", done.stderr[-2000:]
