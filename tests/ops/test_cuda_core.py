"""The CUDA core without a GPU: its algorithm emulated on the host, the machine code's registers, the reasons given."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pyunictokens as uct
from pyunictokens.ops import MaskgitStep, philox
from pyunictokens.ops.backends import cpu as _native
from pyunictokens.ops.backends import cuda as _native_cuda

from .test_maskgit_step import SHAPES, _arguments, _hold_against_float64, _noise

CORE = _native.core()
pytestmark = pytest.mark.skipif(CORE is None, reason="the compiled core is not built")
TEAMS = [(1, True), (3, False), (32, True), (256, True), (256, False)]  # threads of a block, row kept in shared memory


def _emulated(
    a: dict[str, Any],
    threads: int = 256,
    cached: bool = True,
    token_gumbel: Tensor | None = None,
    rank_gumbel: Tensor | None = None,
) -> MaskgitStep:
    """maskgit_step as the CUDA kernel does it, a block's threads one after the other."""
    per_sample = tuple(a[name] for name in ("mask_len", "temperature", "sample_ids", "step"))
    call = _native._StepCall(
        a["logits"], a["codes"], per_sample, a["seed"], token_gumbel, rank_gumbel, philox.STREAM_TOKEN
    )
    keys = torch.full(a["codes"].shape, -7, dtype=torch.int32)
    CORE.maskgit_step_emulated(call.fields, call.strides, keys.data_ptr(), threads, cached)
    return MaskgitStep(*call.results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("threads", "cached"), TEAMS)
@pytest.mark.parametrize(("batch", "positions", "entries", "scale"), [*SHAPES, (2, 301, 77, 2.0), (1, 2, 60001, 3.0)])
def test_the_same_choices_as_the_other_backends(
    threads: int, cached: bool, batch: int, positions: int, entries: int, scale: float, dtype: torch.dtype
) -> None:
    a = _arguments(batch, positions, entries, scale)
    a["logits"] = a["logits"].to(dtype)
    out = _emulated(a, threads, cached)
    token, rank = _noise(a)
    _hold_against_float64(out, a, token, rank)
    core = uct.ops.maskgit_step(**a, backend="cpu")
    assert torch.allclose(out.logp[out.chosen == core.chosen], core.logp[out.chosen == core.chosen], atol=1e-5)
    score = torch.log_softmax(a["logits"].double(), -1) + token.double()
    for b, n in (out.chosen != core.chosen).nonzero().tolist():
        first, second = score[b, n].topk(2).values
        assert first - second < 1e-5


def test_the_size_of_the_block_changes_no_choice() -> None:
    a = _arguments(2, 40, 3001, 5.0)
    wanted = _emulated(a, 1)
    for threads in (2, 7, 31, 256, 1024):
        for cached in (True, False):
            assert torch.equal(_emulated(a, threads, cached).chosen, wanted.chosen)


@pytest.mark.parametrize(("threads", "cached"), TEAMS)
def test_explicit_noise(threads: int, cached: bool) -> None:
    a = _arguments(3, 17, 101)
    token = -torch.log(-torch.log(torch.rand(3, 17, 101).clamp(1e-9, 1 - 1e-6)))
    rank = -torch.log(-torch.log(torch.rand(3, 17).clamp(1e-9, 1 - 1e-6)))
    generated_token, generated_rank = _noise(a)
    for t, r in ((token, rank), (token, None), (None, rank)):
        out = _emulated(a, threads, cached, t, r)
        _hold_against_float64(out, a, generated_token if t is None else t, generated_rank if r is None else r)
    shut = torch.full_like(token, -torch.inf)
    assert torch.equal(
        _emulated(a, threads, cached, shut).chosen[a["codes"] < 0], a["logits"].argmax(-1)[a["codes"] < 0]
    )


@pytest.mark.parametrize(("threads", "cached"), TEAMS)
def test_ties_go_to_the_lowest_index(threads: int, cached: bool) -> None:
    a = _arguments(2, 600, 150)
    a.update(
        logits=torch.zeros(2, 600, 150),
        codes=torch.full((2, 600), uct.MASK),
        mask_len=torch.tensor([300, 299]),
        temperature=torch.tensor([2.0, 0.0]),
    )
    a["logits"][0, :, [40, 90, 149]] = 5.0
    a["codes"][1, :3] = 7
    out = _emulated(a, threads, cached, torch.zeros(2, 600, 150), torch.zeros(2, 600))
    assert (out.chosen[0] == 40).all()
    assert out.chosen[1].tolist() == [7] * 3 + [0] * 597
    assert out.masked[0].tolist() == [True] * 300 + [False] * 300
    assert out.masked[1].tolist() == [False] * 3 + [True] * 299 + [False] * 298
    assert torch.equal(out.codes, torch.where(out.masked, uct.MASK, out.chosen))


@pytest.mark.parametrize("wanted", [0, 1, 7, 2**40])
def test_any_number_to_mask(wanted: int) -> None:
    a = _arguments(5, 23, 20, unknown=0.5)
    a["codes"][2] = 3  # nothing unknown
    a["mask_len"] = torch.tensor(wanted).expand(5)  # one number for all: stride 0
    out = _emulated(a)
    unknown = a["codes"] < 0
    assert out.masked.sum(-1).tolist() == [min(wanted, int(row.sum())) for row in unknown]
    assert not (out.masked & ~unknown).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_and_rows_that_are_not_aligned(dtype: torch.dtype) -> None:
    a = _arguments(3, 10, 53)
    a["logits"] = a["logits"].to(dtype)
    wanted = _emulated(a)
    wide = torch.randn(3, 14, 61).to(dtype)
    wide[:, 3:13, 5:58] = a["logits"]
    turned = a["logits"].transpose(0, 1).contiguous().transpose(0, 1)
    for logits in (wide[:, 3:13, 5:58], turned):
        assert all(torch.equal(x, y) for x, y in zip(_emulated({**a, "logits": logits}), wanted, strict=True))


def test_excluded_entries_and_rows_without_a_distribution() -> None:
    a = _arguments(2, 30, 100, unknown=1.0)
    a["logits"][..., ::2] = -torch.inf
    assert (_emulated(a).chosen % 2 == 1).all()
    a["logits"][0, 3] = -torch.inf
    a["logits"][1, 4, 7] = torch.nan
    a["logits"][1, 5, 7] = torch.inf
    out = _emulated(a)
    assert ((out.chosen >= 0) & (out.chosen < 100)).all()
    assert out.logp.isnan().nonzero().tolist() == [[0, 3], [1, 4], [1, 5]]


def test_a_code_beyond_the_codebook_reads_nothing_beyond_the_row() -> None:
    a = _arguments(1, 4, 9)
    a["codes"][0, 2] = 10**12
    assert _emulated(a).logp[0, 2].isnan()


def test_why_the_backend_cannot_run() -> None:
    device = {"device_count": 1, "error": ""}
    assert "build it" in _native_cuda.objection({})
    assert "no CUDA part" in _native_cuda.objection({"cuda": None})
    assert "no driver" in _native_cuda.objection({"cuda": {"device_count": 0, "error": "no driver"}})
    assert bool(_native_cuda.objection({"cuda": device})) == (torch.version.cuda is None)
    report = uct.ops.capabilities()["cuda"]
    assert report["available"] == (not _native_cuda.objection(uct.ops.build_info()))


def _cuobjdump() -> str | None:
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    beside = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(beside) if beside.exists() else shutil.which("cuobjdump")


def test_no_kernel_spills() -> None:
    if uct.ops.build_info()["cuda"] is None:
        pytest.skip("built without nvcc")
    tool = _cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump here")
    done = subprocess.run([tool, "--dump-resource-usage", CORE.__file__], capture_output=True, text=True, check=True)
    found = re.findall(r"Function (\S*step_kernel\S*):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", done.stdout)
    assert len(found) >= 6  # three dtypes, with and without the cache, per architecture
    for name, registers, stack, shared, local in found:  # a spill shows as stack
        cached = "Lb1E" in name
        assert int(registers) <= (64 if cached else 80)  # four blocks of 256 threads a multiprocessor, or three
        assert (stack, local) == ("0", "0")
        assert int(shared) <= 4096
