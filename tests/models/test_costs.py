"""The cost model against what is counted: `torch.utils.flop_counter` on tiny models, and parameters one by one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baselines import showo_plain
from pyunictokens import MASK
from pyunictokens.models import MagvitConfig, MagvitV2, Showo, ShowoConfig
from pyunictokens.models.showo import costs as cost
from pyunictokens.models.showo import prompting
from pyunictokens.models.showo.attention import DecodeAttention
from pyunictokens.train.update import LossSettings, streamed_backward
from tests.rollout.tiny import CONFIG, MAX_TEXT, tiny_model
from tests.train.test_update import fake_images
from tests.train.test_update import tiny_model as trained_model


def counted(call) -> float:
    """Operations of the products in `call`; attention by plain products, which the counter knows on a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def prompts_of(model: Showo, lengths: list[int]):
    return model.prefill([model.prompt_ids(list(range(n - 3))) for n in lengths])


@pytest.mark.parametrize("layers", [1, 3])
def test_parameters(layers):
    for config in (
        dataclasses.replace(CONFIG, num_hidden_layers=layers),
        dataclasses.replace(CONFIG, num_hidden_layers=layers, qk_layernorm=False),
    ):
        assert cost.parameters(config) == sum(p.numel() for p in Showo(config).parameters())
    assert cost.parameters(ShowoConfig()) == pytest.approx(1.45e9, rel=0.01)


@torch.no_grad()
def test_prefill_and_image_steps():
    model = tiny_model(dtype=torch.float32)
    assert counted(lambda: prompts_of(model, [9])) == cost.prefill(CONFIG, 9).flops
    for rows, count in ((1, 9), (4, 15)):
        prompts = prompts_of(model, [9, 9])
        codes = torch.full((2 * rows, count), MASK)

        def step(codes=codes, prompts=prompts, rows=rows):
            hidden = model.image_hidden(codes, prompts, [0] * rows + [1] * rows)[:rows]
            torch.nn.functional.linear(hidden, *model.image_head())

        assert counted(step) == cost.image_step(CONFIG, rows, 9, count).flops
        plain = cost.plain_image_step(CONFIG, rows, MAX_TEXT, count).flops
        found = counted(lambda: showo_plain.guided_logits(model, [[1, 2]] * rows, codes[:rows], MAX_TEXT, 2.0))  # noqa: B023
        assert found == plain and plain > cost.image_step(CONFIG, rows, 9, count).flops


@torch.no_grad()
def test_answers():
    model = tiny_model(dtype=torch.float32)
    prompts = prompts_of(model, [9])
    attend = DecodeAttention(prompts, [0, 0, 0], 4)

    def decode():
        for step in range(3):
            if step:
                model.encode(torch.zeros(3, 1, CONFIG.hidden_size), torch.tensor([20 + step]), attend)
                attend.advance()
            torch.nn.functional.linear(torch.zeros(3, CONFIG.hidden_size), *model.text_head())

    found = counted(decode) + cost.prefill(CONFIG, 9).flops
    assert found == cost.answers(CONFIG, 3, 9, 3).flops
    codes, question = torch.zeros(1, 9, dtype=torch.int64), [1, 2, 3]
    plain = counted(lambda: showo_plain.generate_text(model, codes, [question], max_new_tokens=4))
    context = len(prompting.mmu_prefix(codes[0].tolist(), question, prompting.SpecialIds.of(model)))
    assert plain == cost.plain_answers(CONFIG, 1, context, 4).flops


@pytest.mark.parametrize(("checkpoint", "scale"), [(False, 2.0), (True, 2.0), (False, 0.0)])
def test_update(checkpoint, scale):
    """Heads are fused ops that the counter does not see into; prompts are counted apart."""
    model = trained_model().requires_grad_(True)
    model.checkpoint_layers = checkpoint
    images = fake_images(model, steps=3, rows=4, scale=scale)
    images.prompts, images.prompt_of_row = [images.prompts[0]], [0] * 4
    advantages, settings = torch.tensor([0.5, -0.5, 0.2, -0.2]), LossSettings(micro_rows=2, micro_timesteps=3)
    found = counted(lambda: streamed_backward(model, advantages, settings, images))
    config, prompt, empty = model.config, len(images.prompts[0]), len(images.empty_prompt)
    halves = [(prompt, 1.0), (empty, 1.0)] if scale else [(prompt, 1.0)]
    wanted = 0.0
    for length, _ in halves:
        one = cost.update(config, 4, 3, length, guided=False, recompute=checkpoint)
        forward = cost.prefill(config, length)
        again = 0.75 if checkpoint else 0.0  # with I = 2 D the product left out is a quarter of a block
        wanted += one.dense + one.attention + (3 + again) * forward.dense + (3 + bool(again)) * forward.attention
    assert found == pytest.approx(wanted, rel=0.02)  # the last block's queries of a prompt get no gradient


def test_guided_halves_of_the_update():
    config = ShowoConfig()
    guided, single = (cost.update(config, 9, 50, 130, guided=g) for g in (True, False))
    assert guided.dense == 2 * single.dense and guided.head == single.head
    rows = cost.update(config, 9, 50, 130, trainable="concept")
    assert rows.dense == single.dense, "two products of the half that learns, one of the other"
    assert cost.update(config, 9, 50, 130).flops == pytest.approx(7.2e15, rel=0.05)
    assert 50 * cost.image_step(config, 9, 130).flops == pytest.approx(2.4e15, rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(2, 3), (4, 4)])
def test_decode(grid):
    config = MagvitConfig(8, (1, 2, 2), (1, 1, 2), (1, 1, 1), (2, 1, 1), 4, 4)
    vq = MagvitV2(config)
    codes = torch.zeros(2, grid[0] * grid[1], dtype=torch.int64)
    assert counted(lambda: vq.decode(codes, grid)) == cost.decode_pixels(config, 2, grid).flops


def test_costs_add_up():
    one, two = cost.Cost(1, 2, 3, 4, 5), cost.Cost(10, 20, 30, 40, 50)
    assert one + two == cost.Cost(11, 22, 33, 44, 55) and 2 * one == cost.Cost(2, 4, 6, 8, 10)
    assert (one + two).flops == 66


@pytest.mark.parametrize("checkpointed", [0, 3])
def test_memory_of_a_packed_row(checkpointed):
    """What autograd saves, tensor by tensor, is what the model of memory says."""
    model = trained_model(width=64, layers=3).requires_grad_(True)
    model.checkpoint_layers = bool(checkpointed)
    prompts, count = model.prefill([[1, 2, 3, 4, 5, 6]]), model.config.num_vq_tokens
    prompts = prompts.with_tensors([tensor.detach().requires_grad_() for tensor in prompts.tensors()])
    codes = torch.full((4, count), MASK)
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    weights |= {t.untyped_storage().data_ptr() for t in prompts.tensors()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model.image_hidden(codes, prompts, [0] * 4)
    assert hidden.requires_grad
    wanted = 4 * cost.activation_bytes(
        model.config, 6, count, guided=False, checkpointed_layers=3 if checkpointed else 0, itemsize=4
    )
    wanted -= 4 * 12 * count * 64  # there is no head here
    if checkpointed:
        wanted -= 4 * 4 * ((count + 2) * (7 * 64 + 2 * 128) + (6 + count + 2) * 2 * 64)  # nothing is recomputed yet
    assert sum(kept.values()) == pytest.approx(wanted, rel=0.06)


def test_the_page_is_what_the_arithmetic_says():
    from experiments import cost_tables

    text = cost_tables.FILE.read_text(encoding="utf-8")
    assert cost_tables.updated(text) == text, "run python -m experiments.cost_tables"
    with pytest.raises(SystemExit, match="markers of phases"):
        cost_tables.updated("no markers")


def test_predictions_read_both_sides_alike():
    from experiments.cost_tables import GPU, Span, ours, ratio, seconds

    work = cost.Cost(dense=2.0, attention=3.0, head=5.0, bytes=7.0 * GPU.bandwidth, launches=100 / GPU.launch)
    assert seconds(work, 2.0, 3.0, 5.0, eager=False) == Span(7.0, 10.0)
    assert seconds(work, 2.0, 3.0, 5.0, eager=True) == Span(100.0, 100.0)
    assert ratio(Span(1.0, 4.0), Span(8.0, 12.0)) == (3.0, 8.0)
    assert ours(cost.Cost(dense=GPU.matrix)) == Span(1.0, 1.0)
