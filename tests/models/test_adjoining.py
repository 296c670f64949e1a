"""Queries, keys and values from one product: the numbers of three, whatever writes into the parameters, and where a
layer is more than its weights, three."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pyunictokens.config.training import LoraConfig
from pyunictokens.models import Showo, adjoining
from pyunictokens.models.adjoining import adjoin, all_of, together
from pyunictokens.models.four_bit import quantise_base
from pyunictokens.models.fp8 import Fp8Products
from pyunictokens.rollout.cuda_graphs.device_step import GuidedHidden
from pyunictokens.train.policy import Policy, load_policy
from tests.rollout.tiny import CONFIG, tiny_engine, tiny_model

IDS = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the weights of joint products that were computed, on a CPU as on a GPU."""
    done: list[int] = []
    linear = adjoining.F.linear

    class Spy:
        @staticmethod
        def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            done.append(len(weight))
            return linear(x, weight, bias)

    monkeypatch.setattr(adjoining, "F", Spy)
    monkeypatch.setattr(adjoining, "DEVICES", ("cuda", "cpu"))
    return done


def three(layer):
    return layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj


def by_three(model: Showo) -> torch.Tensor:
    """The logits of three products a layer, of parameters that are nowhere near one another."""
    twin = tiny_model()
    twin.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    for layer in twin.showo.model.layers:
        for each in three(layer):
            each.weight.data = each.weight.data.clone()
        assert together(three(layer)) is None
    return twin(IDS)


@torch.no_grad()
def check(model: Showo, products: list[int]) -> None:
    products.clear()
    found = model(IDS)
    assert products == [3 * CONFIG.hidden_size] * CONFIG.num_hidden_layers
    assert (found - by_three(model)).abs().max() < 1e-12


@torch.no_grad()
def test_any_sizes_are_the_layers_own_numbers(products: list[int]) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(5, size).double() for size in (3, 1, 7)]
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    wanted = [layer(x) for layer in layers]
    kept = [parameter for layer in layers for parameter in layer.parameters()]
    assert together(layers) is None
    all_of(layers, x)
    assert not products, "layers that do not adjoin multiply one by one"
    adjoin(layers)
    assert all(
        one is other for one, other in zip(kept, [p for layer in layers for p in layer.parameters()], strict=True)
    )
    found = all_of(layers, x)
    assert products == [11]
    assert all((mine - theirs).abs().max() < 1e-15 for mine, theirs in zip(found, wanted, strict=True))


@torch.no_grad()
def test_moves_casts_and_files_leave_them_adjoining(tmp_path: Path, products: list[int]) -> None:
    model = tiny_model()
    check(model, products)
    for layer in copy.deepcopy(model).float().double().showo.model.layers:
        assert together(three(layer)) is not None
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    again = Showo.from_pretrained(tmp_path, dtype=torch.float64)
    check(again, products)
    assert torch.equal(again(IDS), model(IDS))


def test_gradients_come_from_three_products(products: list[int]) -> None:
    model = tiny_model().requires_grad_(True)
    model(IDS).square().mean().backward()
    assert not products
    assert all(part.grad is not None for layer in three(model.showo.model.layers[0]) for part in layer.parameters())


@torch.no_grad()
def test_what_is_written_into_parameters_is_seen(tmp_path: Path, products: list[int]) -> None:
    """By an optimizer, a moving average that is swapped in, and a policy that is loaded; in a step made before, too."""
    model = tiny_model()
    prompts = model.prefill([model.prompt_ids([1, 2])])
    step = GuidedHidden(model, prompts, [0], 0.0, 9)
    codes, at = torch.full((1, 9), -1), torch.zeros(1)
    seen = [step(codes, at).cond_BND]

    def written() -> None:
        check(model, products)
        products.clear()
        step.load(model.prefill([model.prompt_ids([1, 2])]))
        seen.append(step(codes, at).cond_BND)
        assert set(products) == {3 * CONFIG.hidden_size}
        host = tiny_model()
        host.load_state_dict(model.state_dict())
        wanted = host.image_hidden(codes, host.prefill([host.prompt_ids([1, 2])]), [0])
        assert (seen[-1] - wanted).abs().max() < 1e-12 and (seen[-1] - seen[-2]).abs().max() > 1e-6

    optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), lr=1e-2)
    with torch.enable_grad():
        model(IDS).square().mean().backward()
    optimizer.step()
    written()
    average = {name: value.clone() * 0.9 for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        kept = parameter.clone()
        parameter.copy_(average[name])
        average[name] = kept
    written()
    Policy(tiny_model(seed=7), "full", reference_file=tmp_path / "reference.safetensors").export(tmp_path)
    load_policy(model, tmp_path)
    written()


@torch.no_grad()
def test_adapters_multiply_by_themselves_and_merged_ones_together(products: list[int]) -> None:
    model = tiny_model()
    before = model(IDS)
    policy = Policy(model, "lora", lora=LoraConfig(rank=2))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    products.clear()
    adapted = model(IDS)
    assert not products and (adapted - before).abs().max() > 1e-3
    with policy.reference():
        assert (model(IDS) - before).abs().max() < 1e-12
    policy.merge()
    check(model, products)
    assert (model(IDS) - adapted).abs().max() < 1e-5


@torch.no_grad()
def test_layers_that_are_more_than_their_weights_multiply_by_themselves(products: list[int]) -> None:
    model = tiny_model(dtype=torch.float32)
    exact = model(IDS)
    products.clear()
    with Fp8Products(model):
        eight = model(IDS)
    assert not products and 0 < (eight - exact).abs().max() < exact.abs().max()
    handle = model.showo.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    assert torch.equal(model(IDS), model(IDS)) and len(products) == 2 * (CONFIG.num_hidden_layers - 1)
    handle.remove()
    model.requires_grad_(False)
    products.clear()
    quantise_base(model)
    four = model(IDS)
    assert not products and torch.isfinite(four).all()


@torch.no_grad()
def test_a_cache_of_prompts_does_not_keep_the_product(products: list[int]) -> None:
    model = tiny_model()
    for tensor in model.prefill([model.prompt_ids([1, 2, 3]), model.prompt_ids([4])]).tensors():
        assert tensor.untyped_storage().nbytes() <= tensor.nbytes * 2
    assert products


@torch.no_grad()
def test_rollouts_are_those_of_three_products(products: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(samples=2, steps=4, guidance_scale=2.0, seed=3)
    for capture in ("off", "eager"):
        products.clear()
        found = tiny_engine(tiny_model(), capture=capture).generate_images([[1, 2], [3]], **options)
        assert products
        with monkeypatch.context() as patch:
            patch.setattr(adjoining, "DEVICES", ())
            wanted = tiny_engine(tiny_model(), capture=capture).generate_images([[1, 2], [3]], **options)
        assert torch.equal(found.codes, wanted.codes) and (found.logp - wanted.logp).abs().max() < 1e-6
