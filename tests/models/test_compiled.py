"""Compiled blocks of image steps: the rollout of eager blocks, one compilation for all layers, rows and weights, and
what cannot be compiled said before anything is drawn.

Most tests take torch.compile's tracing and guards without its code generator, which needs a minute of a C++ compiler;
`test_generated_code` (slow) takes all of it.
"""

from __future__ import annotations

import logging

import pytest
import torch
from torch._dynamo.utils import counters

from pyunictokens import RolloutEngine
from pyunictokens.config.training import GrpoConfig, LoraConfig
from pyunictokens.models import adjoining, fused_gelu
from pyunictokens.models.showo import compiled
from pyunictokens.train.policy import Policy
from pyunictokens.utils.errors import UserError
from tests.models.second_model import SecondModel
from tests.models.test_fused_gelu import calls, epilogue
from tests.rollout.test_captured import same
from tests.rollout.tiny import tiny_model

PROMPTS = [[5, 6], [7, 8, 9]]
LAYERS = 4
SETTINGS = {"samples": 2, "steps": 3, "seed": 1, "decode": False}


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without its code generator."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")


def graphs():
    return counters["stats"]["unique_graphs"]


def model_of(dtype=torch.float64):
    return tiny_model(dtype=dtype, num_hidden_layers=LAYERS)


@pytest.mark.parametrize("capture", ["off", "eager"])
def test_the_same_images_from_one_compilation(traced, capture):
    """Run by the host, and as the step that is captured: over buffers that stay, prompts padded."""
    model, before = model_of(), graphs()
    plain, engine = RolloutEngine(model, capture=capture), RolloutEngine(model, capture=capture, blocks="compiled")
    same(engine.generate_images(PROMPTS, **SETTINGS), plain.generate_images(PROMPTS, **SETTINGS))
    assert graphs() - before == 3, "begin, between and end: one for all layers"
    same(engine.generate_images(PROMPTS, **SETTINGS), plain.generate_images(PROMPTS, **SETTINGS))
    for samples in (1, 3):
        options = {**SETTINGS, "samples": samples}
        same(engine.generate_images(PROMPTS, **options), plain.generate_images(PROMPTS, **options))
    model.showo.model.layers[2].mlp.fc1.weight.mul_(1.5)
    model.showo.model.layers[3].self_attn.k_proj.bias.add_(0.5)
    same(engine.generate_images(PROMPTS, **SETTINGS), plain.generate_images(PROMPTS, **SETTINGS))
    alone = {**SETTINGS, "samples": 1, "guidance_scale": 0.0}
    same(engine.generate_images(PROMPTS[:1], **alone), plain.generate_images(PROMPTS[:1], **alone))
    assert graphs() - before == 3, "no other rows, weights or calls compile again"
    assert model.compiled is None


@pytest.mark.slow
def test_adapters_that_learn(traced, tmp_path):
    model = model_of()
    Policy(model, "lora", lora=LoraConfig(rank=2), reference_file=tmp_path / "start.safetensors")
    learning = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert learning and all(parameter.requires_grad for parameter in learning)
    plain, engine = RolloutEngine(model), RolloutEngine(model, blocks="compiled")
    before, drawn = graphs(), []
    for _ in range(3):
        drawn.append(engine.generate_images(PROMPTS, **SETTINGS))
        same(drawn[-1], plain.generate_images(PROMPTS, **SETTINGS))
        with torch.no_grad():
            for parameter in learning:
                parameter.add_(0.3)
    assert graphs() - before == 3 and not torch.equal(drawn[0].logp, drawn[1].logp)


def test_gradients_prompts_and_answers_stay_eager(traced):
    model, before = model_of().requires_grad_(True), graphs()
    prompts = model.prefill([model.prompt_ids(text) for text in PROMPTS])
    codes = torch.zeros(2, 9, dtype=torch.int64)
    with model.compiled_blocks():
        model.image_hidden(codes, prompts, [0, 1]).sum().backward()
    RolloutEngine(model, blocks="compiled").generate_text(codes[:1], [[4, 5]], samples=2, max_new_tokens=3)
    assert graphs() == before and model.showo.model.layers[0].mlp.fc1.weight.grad is not None


def test_products_keep_the_forms_they_have_on_a_gpu(traced, monkeypatch):
    """Queries, keys and values from one product, GELU within the other: stood in for as their own tests do."""
    monkeypatch.setattr(torch, "_addmm_activation", epilogue)
    monkeypatch.setattr(fused_gelu, "_fused", lambda device, dtype: True)
    monkeypatch.setattr(adjoining, "DEVICES", ("cpu",))
    model, parts = model_of(), []
    plain = RolloutEngine(model).generate_images(PROMPTS, **SETTINGS)
    whole = adjoining.in_one
    monkeypatch.setattr(
        "pyunictokens.models.showo.layers.in_one",
        lambda *a: (parts.append(torch.compiler.is_compiling()), whole(*a))[1],
    )
    calls.clear()
    monkeypatch.setattr(compiled, "_compiled", lambda function: function)  # Python sees what is called
    same(RolloutEngine(model, blocks="compiled").generate_images(PROMPTS, **SETTINGS), plain)
    assert len(parts) == 3 * LAYERS, "one product a layer and step"
    assert len(calls) == (3 + 3) * LAYERS, "and one of the prompts' three lengths"
    monkeypatch.undo()
    layer, x = model.showo.model.layers[0].mlp.fc1, torch.randn(3, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        traced_as = torch.compile(fused_gelu.linear_gelu, backend="eager", fullgraph=True)(layer, x, True)
        rows = torch._addmm_activation(layer.bias, x.flatten(0, 1), layer.weight.t(), use_gelu=True)
    assert torch.equal(traced_as.flatten(0, 1), rows), "torch's function, as one operation"


def test_a_few_sizes_are_compiled_and_others_stay_eager(traced, monkeypatch, caplog):
    monkeypatch.setattr(compiled, "MOST_SIZES", 1)
    model = model_of()
    plain, engine = RolloutEngine(model), RolloutEngine(model, blocks="compiled")
    engine.generate_images(PROMPTS, **SETTINGS)
    before, wide = graphs(), {**SETTINGS, "grid": (3, 4)}
    with caplog.at_level(logging.WARNING):
        same(engine.generate_images(PROMPTS, **wide), plain.generate_images(PROMPTS, **wide))
    assert graphs() == before and caplog.text.count("14 positions stay eager") == 1


def test_what_cannot_be_compiled_is_said(monkeypatch):
    model = model_of()

    def draw():
        RolloutEngine(model, blocks="compiled").generate_images(PROMPTS, **SETTINGS)

    missing = r"blocks=compiled: torch.compile needs a C\+\+ compiler.*use blocks=eager"
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(UserError, match=missing):
        draw()
    with monkeypatch.context() as patch:
        patch.setattr(torch._dynamo, "is_dynamo_supported", lambda: False)
        with pytest.raises(UserError, match=r"has no torch\.compile for Python"):
            draw()

    def broken(*_):
        raise ValueError("a machine that is too small")

    with monkeypatch.context() as patch:
        patch.setattr(compiled, "BACKEND", broken)
        with pytest.raises(UserError, match=r"torch\.compile failed .*a machine that is too small.*use blocks=eager"):
            draw()
    assert model.compiled is None
    hook = model.showo.model.layers[1].register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match="layers with hooks"):
        draw()
    hook.remove()
    assert compiled.objection(torch.device("cpu")) == ""
    with pytest.raises(UserError, match="must be eager or compiled"):
        RolloutEngine(model, blocks="fast")
    with pytest.raises(UserError, match="products=fp8"):
        RolloutEngine(model, blocks="compiled", products="fp8")
    with pytest.raises(UserError, match="has no compiled blocks"):
        RolloutEngine(SecondModel(), blocks="compiled")
    for other in ({"shard": "full"}, {"rollout_products": "fp8"}):
        with pytest.raises(UserError, match="rollout_blocks=compiled with"):
            GrpoConfig(rollout_blocks="compiled", **other)


@pytest.mark.slow
def test_generated_code():
    """All of torch.compile: float32 log-probs as close as other orders of sums are."""
    model = model_of(torch.float32)
    for capture in ("off", "eager"):
        plain = RolloutEngine(model, capture=capture).generate_images(PROMPTS, **SETTINGS)
        engine = RolloutEngine(model, capture=capture, blocks="compiled")
        found, before = engine.generate_images(PROMPTS, **SETTINGS), graphs()
        assert torch.equal(found.codes, plain.codes) and (found.logp - plain.logp).abs().max() < 1e-4
        engine.generate_images(PROMPTS, **SETTINGS)
        assert graphs() == before
