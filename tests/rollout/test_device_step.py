"""The step on the device, value by value against the loop on the host: rows at mixed steps, looks, refills, buckets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyunictokens import MASK, ConceptTokens
from pyunictokens.models import PromptKV, Showo
from pyunictokens.models.showo.attention import FullAttention
from pyunictokens.models.showo.buffers import BufferedAttention
from pyunictokens.rollout.cuda_graphs.device_step import (
    DeviceLoop,
    GuidedHidden,
    StepState,
    advance,
    image_head,
    read_by,
)
from pyunictokens.rollout.loop import ImageLoop
from pyunictokens.rollout.sampler import EagerSlots, LoopSettings
from pyunictokens.rollout.scheduler import Scheduler
from pyunictokens.utils.errors import UserError

from .tiny import CONFIG, tiny_model

aten = torch.ops.aten
PROMPTS = [[1, 2, 3], [4], list(range(9)), [1, 2, 7]]


def prefixes(model: Showo, texts: list[list[int]], guided: bool) -> PromptKV:
    every = [*texts, []] if guided else texts
    return model.prefill([model.prompt_ids(text) for text in every])


def numbers(
    steps: int = 5, scale: float = 2.0, seed: int = 3, schedule: str = "cosine", **more: object
) -> LoopSettings:
    return LoopSettings(steps, scale, 1.3, schedule, seed, True, 64, **more)  # type: ignore[arg-type]


def on_host(
    model: Showo, of_row: list[int], known: torch.Tensor, ids: list[int], n: LoopSettings, texts: list[list[int]]
) -> ImageLoop:
    kinds = list(range(len(of_row)))
    prompts = prefixes(model, texts, n.guidance_scale > 0)
    slots = EagerSlots(model, prompts, of_row, kinds, len(of_row), known.shape[1], n)
    loop = ImageLoop(slots, Scheduler(ids, kinds, len(of_row), n.steps), known)
    loop.run()
    assert slots.finite
    return loop


def on_device(
    model: Showo, of_row: list[int], count: int, n: LoopSettings, texts: list[list[int]], bucket: int | None = None
) -> DeviceLoop:
    rows = bucket or len(of_row)
    padded = of_row + [of_row[0]] * (rows - len(of_row))
    hidden = GuidedHidden(model, prefixes(model, texts, n.guidance_scale > 0), padded, n.guidance_scale, count)
    state = StepState.make(model, rows, count, n)
    return DeviceLoop(hidden, image_head(model), state, n.seed)


def same(state: StepState, slots: list[int], host: ImageLoop, rows: list[int]) -> None:
    assert torch.equal(state.chosen[slots], host.codes[rows])
    inputs, chosen, logp = host.records
    assert torch.equal(state.inputs[slots], inputs[rows])
    assert torch.equal(state.picked[slots], chosen[rows])
    assert (state.logp[slots] - logp[rows]).abs().max() < 1e-6
    assert not bool(state.broken)


@settings(max_examples=15, deadline=None)
@given(
    grid=st.integers(2, 15),
    scale=st.sampled_from([0.0, 1.0, 5.0]),
    steps=st.integers(1, 6),
    holes=st.sampled_from([1.0, 0.5, 0.0]),
    schedule=st.sampled_from(["cosine", "linear", "pow2", "sigmoid"]),
    rows=st.integers(1, 5),
    idle=st.integers(0, 2),
    seed=st.integers(0, 2**31 - 1),
)
@torch.no_grad()
def test_equals_the_loop_on_the_host(grid, scale, steps, holes, schedule, rows, idle, seed):
    model, n = tiny_model(), numbers(steps, scale, seed, schedule)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, CONFIG.codebook_size, (rows, grid), generator=generator)
    known = torch.where(torch.rand(rows, grid, generator=generator) < holes, MASK, codes)
    of_row, ids = [row % 4 for row in range(rows)], [7 + 3 * row for row in range(rows)]
    host = on_host(model, of_row, known, ids, n, PROMPTS)
    loop = on_device(model, of_row, grid, n, PROMPTS, bucket=rows + idle)
    loop.state.start(list(range(rows)), known, ids, stop_at=steps, urgent=False)
    assert loop.run() == steps
    same(loop.state, list(range(rows)), host, list(range(rows)))
    assert loop.run() == 0, "nothing is left to do"


@torch.no_grad()
def test_a_run_ends_at_a_preview_and_goes_on_with_fresh_rows_beside_old_ones():
    model, n = tiny_model(), numbers(6)
    known = torch.full((4, 9), MASK)
    of_row, ids = [0, 1, 2, 3], [5, 6, 7, 8]
    host = on_host(model, of_row, known, ids, n, PROMPTS)
    again = on_host(model, [1, 3], known[:2], [106, 208], n, [PROMPTS[i] for i in range(4)])
    loop, state = on_device(model, of_row, 9, n, PROMPTS), None
    state = loop.state
    state.start([0, 1, 2, 3], known, ids, stop_at=2, urgent=True)
    assert loop.run() == 2 and int(state.keep_going) == 0
    assert torch.equal(state.chosen, host.records[1][:, 1].long()), "the preview of every row"
    state.let_go([0, 2], 6)
    state.start([1], known[:1], [106], stop_at=2, urgent=True)
    state.let_go([3], 0)
    assert loop.run() == 2, "the fresh row's preview ends the run"
    assert state.step.tolist() == [4, 2, 4, 2]
    state.let_go([1], 6)
    state.start([3], known[:1], [208], stop_at=6, urgent=False)
    assert loop.run() == 6, "the youngest row's last step ends the run; the others stood still when they were done"
    assert state.step.tolist() == [6, 6, 6, 6]
    same(state, [0, 2], host, [0, 2])
    same(state, [1, 3], again, [0, 1])


@torch.no_grad()
def test_nothing_moves_while_keep_going_is_0():
    model, n = tiny_model(), numbers(3)
    loop = on_device(model, [0, 1], 9, n, PROMPTS)
    loop.state.start([0, 1], torch.full((2, 9), MASK), [1, 2], stop_at=3, urgent=False)
    before = {name: value.clone() for name, value in vars(loop.state).items()}
    advance(loop.state, loop.hidden_of, image_head(model), n.seed)
    for name, value in vars(loop.state).items():
        if name != "keep_going":
            assert torch.equal(value, before[name]), name


@torch.no_grad()
def test_rows_taken_through_the_head_in_parts_are_the_same(monkeypatch):
    model, n = tiny_model(), numbers(4)
    known = torch.full((5, 9), MASK)
    of_row, ids = [0, 1, 2, 3, 0], [1, 2, 3, 4, 5]
    host = on_host(model, of_row, known, ids, n, PROMPTS)
    monkeypatch.setattr("pyunictokens.rollout.cuda_graphs.device_step.LOGITS_BYTES", 2 * 9 * 24 * 4)
    loop = on_device(model, of_row, 9, n, PROMPTS)
    loop.state.start(list(range(5)), known, ids, stop_at=4, urgent=False)
    loop.run()
    same(loop.state, list(range(5)), host, list(range(5)))


@torch.no_grad()
def test_other_prompts_of_the_same_lengths_and_new_weights_are_seen():
    model, n = tiny_model(), numbers(3)
    known = torch.full((2, 9), MASK)
    loop = on_device(model, [0, 1], 9, n, [[1, 2, 3], [4]])
    others = [[9, 8, 7], [11]]
    for parameter in read_by(model):
        parameter.mul_(1.05)  # in place, as an optimizer does it
    loop.hidden_of.load(prefixes(model, others, True))
    loop.state.start([0, 1], known, [3, 4], stop_at=3, urgent=False)
    loop.run()
    same(loop.state, [0, 1], on_host(model, [0, 1], known, [3, 4], n, others), [0, 1])
    with pytest.raises(UserError, match="were made for"):
        loop.hidden_of.load(prefixes(model, [[1, 2], [3]], True))


class OnlyOnTheGpu(TorchDispatchMode):
    """No operation may look at a tensor of the host, bring one over, or read one back: a capture would refuse it."""

    seen = 0

    def __init__(self) -> None:
        super().__init__()
        self.overloads: list[object] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique2"), (
            f"{name} waits for the device"
        )
        for value in tree_leaves((args, kwargs)):
            where = value if isinstance(value, torch.device) else getattr(value, "device", None)
            assert where is None or where.type == "cuda", f"{name} works on the {where.type}"
        self.seen += 1
        self.overloads.append(function)
        if function is torch.ops.aten.addmm.dtype_out:  # torch's fake of it takes no beta
            return kwargs["out"]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("guidance", [0.0, 2.0])
@pytest.mark.parametrize("free", [None, 0])
@torch.no_grad()
def test_the_step_can_be_captured_on_a_gpu(monkeypatch, guidance, free):
    """On fake tensors of a GPU, which need none: devices and shapes are followed, nothing is computed. With memory for
    buffers of keys in each layer, and without."""
    monkeypatch.setattr("pyunictokens.models.showo.buffers.free_bytes", lambda _: free)
    n = numbers(4, guidance)
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda"):
                model = Showo(CONFIG)
        finally:
            torch.set_default_dtype(torch.float32)
        concept = ConceptTokens("bo", CONFIG.hidden_size, 2, 1)
        for name, value in list(concept.named_parameters()):
            setattr(concept, name, torch.nn.Parameter(value.detach().to("cuda")))
        model.attach(concept)
        hidden = GuidedHidden(model, prefixes(model, PROMPTS, guidance > 0), [0, 1, 2, 0], guidance, 9)
        state = StepState.make(model, 4, 9, n)
        x = torch.zeros(1, 1, CONFIG.hidden_size, dtype=torch.bfloat16, device="cuda")
        model.encode(x, state.step[:1], FullAttention())  # makes the rotary tables, as the warm-up does
        with OnlyOnTheGpu() as watch:
            advance(state, hidden, image_head(model), n.seed)
        assert watch.seen > 100 and isinstance(hidden._step._attend, BufferedAttention)
        products = [watch.overloads.count(kind) for kind in (aten.mm.dtype, aten.addmm.dtype_out)]
        assert products == [1, int(guidance > 0)], (
            "the head: 16-bit products with float32 results, guided in the second"
        )
        with pytest.raises(AssertionError, match="waits for the device"), OnlyOnTheGpu():
            state.codes.nonzero()
        with pytest.raises(AssertionError, match="works on the cpu"), OnlyOnTheGpu():
            state.codes + torch.ones(9, dtype=torch.int64)


@torch.no_grad()
def test_bad_log_probs_are_told_of():
    model, n = tiny_model(), numbers(2)
    loop = on_device(model, [0], 9, n, PROMPTS)
    loop.state.start([0], torch.full((1, 9), MASK), [1], stop_at=2, urgent=False)
    model.showo.lm_head.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="no distribution to sample from"):  # on a CPU the op itself looks
        loop.run()
    with pytest.raises(UserError, match="stop_at=3"):
        loop.state.let_go([0], 3)
    with pytest.raises(UserError, match="positions"):
        GuidedHidden(model, prefixes(model, PROMPTS, True), [0], 1.0, 200)
