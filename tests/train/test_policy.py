"""Policies: what learns, what the reference is, and that what is written down draws the same again."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pyunictokens.models import ConceptTokens, Showo
from pyunictokens.models.showo import prompting
from pyunictokens.train import LoraConfig, Policy, load_policy
from pyunictokens.train.logprobs import Leaves
from pyunictokens.train.optimizer import Optimizer
from pyunictokens.utils.errors import MissingExtra, UserError
from tests.train.world import tiny_concept, tiny_model

KINDS = ("concept", "lora", "full")


def policy_of(kind: str, tmp_path: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Policy:
    model = tiny_model(seed).to(dtype)
    model.attach(tiny_concept())
    return Policy(model, kind, reference_file=tmp_path / "start.safetensors")


def logits(model: Showo) -> torch.Tensor:
    ids = prompting.SpecialIds.of(model)
    first = model.config.first_code_id
    sequence = prompting.t2i([5, first, first + 2, 9], None, ids, 10, 16)[None]
    with torch.no_grad():
        return model(sequence, prompting.attention_allowed(sequence, "t2i", ids))[:, 4:]


def push(policy: Policy, steps: int = 2, lr: float = 0.05) -> None:
    """A few optimizer steps on an arbitrary loss."""
    optimizer = Optimizer(policy.named_parameters(), lr=lr)
    ids = prompting.SpecialIds.of(policy.model)
    first = policy.model.config.first_code_id
    sequence = prompting.t2i([5, first, first + 2, 9], None, ids, 10, 16)[None]
    for _ in range(steps):
        optimizer.zero_grad()
        out = policy.model(sequence, prompting.attention_allowed(sequence, "t2i", ids))[:, 4:]
        out.float().log_softmax(-1)[..., 3].mean().neg().backward()
        optimizer.step(lr)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_beginning_and_goes_away_again(kind: str, tmp_path: Path) -> None:
    policy = policy_of(kind, tmp_path)
    before = logits(policy.model)
    push(policy)
    after = logits(policy.model)
    assert (after - before).abs().max() > 0.05
    with policy.reference():
        assert torch.equal(logits(policy.model), before)
    assert torch.equal(logits(policy.model), after)
    with pytest.raises(KeyError), policy.reference():
        raise KeyError("an error inside must not leave the reference in place")
    assert torch.equal(logits(policy.model), after)
    push(policy, steps=1)  # and learning goes on
    assert not torch.equal(logits(policy.model), after)


def test_only_what_is_named_learns(tmp_path: Path) -> None:
    expected = {"concept": {"concept"}, "lora": {"concept", "lora"}, "full": {"concept", "weight"}}
    for kind in KINDS:
        named = policy_of(kind, tmp_path).named_parameters()
        groups = {"concept" if n.startswith("concept.") else "lora" if "lora_" in n else "weight" for n in named}
        assert groups == expected[kind]
    model = tiny_model()
    model.attach(tiny_concept())
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    policy = Policy(model, "concept")
    push(policy)
    assert all(torch.equal(value, frozen[name]) for name, value in model.state_dict().items())
    assert sum(value.numel() for value in policy.named_parameters().values()) == 6 * 32 + 6 * 32 + 6
    lora = Policy(model, "lora", train_concept=False, lora=LoraConfig(rank=2, targets=("q_proj",)))
    assert {name.rpartition(".lora")[0] for name in lora.named_parameters()} == {
        f"showo.model.layers.{layer}.self_attn.q_proj" for layer in range(2)
    }
    rows = model.concept.embed.clone()
    push(lora)
    assert torch.equal(model.concept.embed, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_exported_draws_the_same(kind: str, tmp_path: Path) -> None:
    policy = policy_of(kind, tmp_path)
    push(policy)
    learned = logits(policy.model)
    policy.export(tmp_path / "final")
    loaded = load_policy(tiny_model(), tmp_path / "final")
    torch.testing.assert_close(logits(loaded), learned, rtol=1e-5, atol=1e-5)
    assert not any("lora" in name for name in loaded.state_dict())
    merged = policy.merge()
    assert merged.state_dict().keys() == tiny_model().state_dict().keys()
    torch.testing.assert_close(logits(merged), learned, rtol=1e-5, atol=1e-5)


def test_an_adapter_is_pefts_own(tmp_path: Path) -> None:
    from peft import PeftModel

    policy = policy_of("lora", tmp_path)
    push(policy)
    learned = logits(policy.model)
    policy.export(tmp_path / "final")
    base = tiny_model()
    base.attach(ConceptTokens.load(tmp_path / "final" / "concept"))
    start = logits(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of keys that are missing
        wrapped = PeftModel.from_pretrained(base, str(tmp_path / "final"))
    assert (start - learned).abs().max() > 0.05
    torch.testing.assert_close(logits(base), learned, rtol=1e-5, atol=1e-5)  # adapted in place
    torch.testing.assert_close(logits(wrapped.merge_and_unload()), learned, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_version_0_1_still_loads() -> None:
    """Rank 2, alpha 3, on q_proj and fc1, trained and written by 0.1, with logits that its model gave."""
    folder = Path(__file__).parent / "old_adapter"
    loaded = load_policy(tiny_model(), folder)
    expected = load_file(folder / "expected.safetensors")["logits"]
    torch.testing.assert_close(logits(loaded)[..., ::7], expected, rtol=1e-5, atol=1e-5)
    plain = tiny_model()
    plain.attach(ConceptTokens.load(folder / "concept"))
    assert (logits(plain)[..., ::7] - expected).abs().max() > 0.05


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = policy_of("lora", tmp_path).export(tmp_path / "final")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 16)

    def refused(match: str, **changed: object) -> None:
        (folder / "adapter_config.json").write_text(json.dumps(config | changed))
        with pytest.raises(UserError, match=match):
            load_policy(tiny_model(), folder)

    refused("does not fit this model", r=4)
    refused("does not fit this model", target_modules=["q_proj"])
    refused(r"targets=\['no_such_layer'\]: must be some of q_proj", target_modules=["no_such_layer"])
    refused(r"targets=\['lm_head'\]: must be some of q_proj", target_modules=["lm_head"])
    refused("use_dora=True: plain LoRA alone is read here", use_dora=True)
    refused("is not the configuration of a LoRA adapter", peft_type="IA3")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        load_policy(tiny_model(), folder)


def test_bfloat16_weights_learn_in_steps_too_small_for_them(tmp_path: Path) -> None:
    """A step of 1e-4 vanishes in bfloat16 (it resolves 0.4 %); the float32 master weight keeps it until it shows."""
    policy = policy_of("full", tmp_path, dtype=torch.bfloat16)
    start = policy.model.showo.model.layers[0].self_attn.dense.weight.detach().float().clone()
    push(policy, steps=40, lr=1e-4)
    moved = (policy.model.showo.model.layers[0].self_attn.dense.weight.detach().float() - start).abs()
    assert moved.dtype == torch.float32 and moved.max() > 1e-3


def test_state_comes_back_and_misfits_are_named(tmp_path: Path) -> None:
    policy = policy_of("lora", tmp_path)
    push(policy)
    state = {name: value.clone() for name, value in policy.state_dict().items()}
    other = policy_of("lora", tmp_path)
    other.load_state_dict(state)
    assert torch.equal(logits(other.model), logits(policy.model))
    with pytest.raises(UserError, match="1 trained tensors are missing"):
        other.load_state_dict({name: value for name, value in state.items() if name != "concept.embed"})
    state["concept.embed"] = torch.zeros(4, 32)
    with pytest.raises(UserError, match=r"concept.embed has shape \(4, 32\), this model's has \(6, 32\)"):
        other.load_state_dict(state)


def test_what_cannot_be_a_policy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no concept attached"):
        Policy(tiny_model())
    model = tiny_model()
    model.attach(tiny_concept())
    with pytest.raises(UserError, match="trainable='head': must be concept, lora or full"):
        Policy(model, "head")
    with pytest.raises(UserError, match="reference_file"):
        Policy(model, "full")
    policy_of("full", tmp_path).export(tmp_path / "final")
    (tmp_path / "final" / "policy.json").write_text('{"trainable": "half"}')
    with pytest.raises(UserError, match="must be concept, lora or full"):
        load_policy(tiny_model(), tmp_path / "final")


def test_gradients_of_many_pieces_add_up_in_float32() -> None:
    """In bfloat16 1000 additions of 1 stop at 256; the twin's gradient and the leaves' do not."""
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = Optimizer({"weight": weight}, lr=1.0)
    for _ in range(1000):
        weight.sum().backward()
    assert weight.grad is None and optimizer.grad_norm() == pytest.approx(1000 * 3**0.5)
    optimizer.zero_grad()
    assert optimizer.grad_norm() == 0
    live = torch.ones(3, dtype=torch.bfloat16, requires_grad=True) * 2
    leaves = Leaves(live)
    for _ in range(1000):
        (piece,) = leaves()
        assert piece.dtype == torch.bfloat16
        piece.sum().backward()
    (source,) = torch.autograd.grad(live, [live], torch.ones(3, dtype=torch.bfloat16))
    assert source.eq(1).all()
    live.retain_grad()
    leaves.backward()
    assert live.grad is not None and (live.grad.float() - 1000).abs().max() <= 4


def test_a_base_of_four_bits_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(MissingExtra, match=r"bitsandbytes is needed here.*pip install 'pyunictokens\[quant\]'"):
        Policy(tiny_model(), "lora", lora=LoraConfig(base="nf4"))


def test_adapters_learn_on_a_base_of_four_bits(tmp_path: Path) -> None:
    """The base is smaller and near, the reference is the quantised base, adapters alone learn and are written, and
    merging gives plain layers that compute the same."""
    pytest.importorskip("bitsandbytes", reason="the extra quant is not installed")
    plain = tiny_model(width=64)
    policy = Policy(tiny_model(width=64), "lora", lora=LoraConfig(base="nf4"))
    model = policy.model
    inner = {name: value for name, value in model.named_parameters() if "fc1.base_layer.weight" in name}
    assert len(inner) == 2 and all(value.dtype == torch.uint8 and value.numel() == 64 * 64 for value in inner.values())
    before = logits(model)
    off = (before.softmax(-1) - logits(plain).softmax(-1)).abs().max()
    assert 1e-4 < off < 0.3, "another model, and near"
    assert all("lora_" in name for name in policy.named_parameters())
    push(policy)
    after = logits(model)
    assert (after - before).abs().max() > 0.02
    with policy.reference():
        assert torch.equal(logits(model), before)
    policy.export(tmp_path)
    assert all("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    merged = policy.merge()
    assert not [name for name, value in merged.named_parameters() if value.dtype == torch.uint8 or "lora_" in name]
    assert torch.allclose(logits(merged), after, atol=1e-4)
