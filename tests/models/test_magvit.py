"""The image tokenizer against golden vectors, and what it refuses."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

import pyunictokens as uct
from pyunictokens.models.magvit import MagvitConfig, MagvitV2
from pyunictokens.utils.errors import UserError


@pytest.fixture(scope="module")
def tiny(golden):
    return uct.MagvitV2.from_pretrained(golden / "magvit_tiny")


@pytest.fixture(scope="module")
def cases(golden):
    return load_file(golden / "magvit_tiny" / "cases.safetensors")


def test_encodes_and_decodes_as_published(tiny, cases):
    assert (tiny.encoder(cases["pixels"]) - cases["pre_quant"]).abs().max() < 1e-4
    assert torch.equal(tiny.encode(cases["pixels"]), cases["codes"])
    assert (tiny.decode(cases["codes"]) - cases["decoded"]).abs().max() < 1e-4
    assert (tiny.decode(cases["rect_codes"], (4, 6)) - cases["rect_decoded"]).abs().max() < 1e-4


def test_most_significant_bit_comes_first(tiny):
    bits = tiny.bits(torch.tensor([1, 16]))
    assert bits.tolist() == [[-1, -1, -1, -1, 1], [1, -1, -1, -1, -1]]


def test_full_size_keys_map_exactly(golden):
    listed = json.loads((golden / "checkpoint_magvitv2.json").read_text())
    shapes = {key: tuple(shape) for key, (shape, _) in listed.items()}
    config = MagvitConfig.from_state_dict(shapes)
    assert config == MagvitConfig() and (config.downsampling, config.codebook_size) == (16, 8192)
    with torch.device("meta"):
        model = MagvitV2(config)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes
    assert {k: str(v.dtype).removeprefix("torch.") for k, v in model.state_dict().items()} == {
        key: dtype for key, (_, dtype) in listed.items()
    }


def test_saved_tokenizer_loads_back(tiny, tmp_path, cases):
    tiny.save_pretrained(tmp_path, dtype=torch.float16)
    again = MagvitV2.from_pretrained(tmp_path)
    assert again.config == tiny.config and again.quantize.power_vals.dtype == torch.int64
    assert (again.decode(cases["codes"]) - tiny.decode(cases["codes"])).abs().max() < 0.05


def test_other_norm_groups_survive_saving(tmp_path):
    config = MagvitConfig(8, (1, 2), (1, 1), (1, 1), (2, 1), 3, norm_groups=4)
    model = MagvitV2(config)
    model.save_pretrained(tmp_path)
    again = MagvitV2.from_pretrained(tmp_path)
    assert again.config == config
    pixels = torch.randn(1, 3, 6, 8)
    assert torch.equal(model.encode(pixels), again.encode(pixels)) and model.encode(pixels).shape == (1, 12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode(torch.zeros(3, 16, 16)), r"must be \[B, 3, H, W\]"),
        (lambda m: m.encode(torch.zeros(1, 3, 16, 15)), "multiples of 4"),
        (lambda m: m.decode(torch.zeros(1, 15, dtype=torch.long)), "do not fill a grid of 3×3"),
        (lambda m: m.decode(torch.full((1, 16), -1)), "−1 is an unknown code"),
        (lambda m: m.decode(torch.full((1, 16), 32)), "must lie in 0…31"),
        (lambda m: m.decode(torch.zeros(16, dtype=torch.long)), r"must be \[B, h·w\]"),
    ],
)
def test_bad_input_is_named(tiny, call, message):
    with pytest.raises(UserError, match=message):
        call(tiny)


def test_weights_of_another_shape_are_named(tiny, tmp_path):
    weights = tiny.state_dict()
    weights["encoder.mid.attn_1.q.weight"] = torch.zeros(2, 2, 1, 1)
    del weights["decoder.norm_out.bias"]
    from pyunictokens.utils.files import save_safetensors_atomic

    save_safetensors_atomic(tmp_path / "model.safetensors", weights)
    with pytest.raises(UserError, match=r"1 missing \(decoder.norm_out.bias\).*1 of another shape.*attn_1.q.weight"):
        MagvitV2.from_pretrained(tmp_path)


def test_config_is_a_plain_record():
    assert dataclasses.asdict(MagvitConfig())["z_channels"] == 13
