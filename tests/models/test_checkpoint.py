"""Every published file layout loads, and every broken one says what is wrong."""

import json
import pathlib
import pickle
import warnings

import pytest
import torch
from safetensors.torch import save_file

from pyunictokens.models.checkpoint import load_state_dict, local_or_hub, read_config, resolve
from pyunictokens.models.concept_tokens import ConceptTokens
from pyunictokens.models.showo.model import Showo
from pyunictokens.models.tokenizer import TextTokenizer
from pyunictokens.utils.errors import UserError


@pytest.fixture
def weights(showo_tiny):
    return dict(showo_tiny.state_dict())


def _folder(tmp_path, golden):
    folder = tmp_path / "checkpoint"
    (folder / "phi").mkdir(parents=True)
    for name in ("config.json", "phi/config.json"):
        (folder / name).write_text((golden / "showo_tiny" / name).read_text())
    return folder


def _same(folder, weights):
    loaded = Showo.from_pretrained(folder).state_dict()
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[key], weights[key]) for key in weights)


def test_bin_and_sharded_layouts_load(tmp_path, golden, weights):
    folder = _folder(tmp_path, golden)
    torch.save(weights, folder / "pytorch_model.bin")
    _same(folder, weights)
    (folder / "pytorch_model.bin").unlink()
    keys = sorted(weights)
    table = {}
    for number, part in enumerate((keys[:20], keys[20:])):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: weights[key].clone() for key in part}, folder / name)
        table.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    _same(folder, weights)
    (folder / name).unlink()
    with pytest.raises(UserError, match="the checkpoint is incomplete"):
        Showo.from_pretrained(folder)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_state_dict(tmp_path)


def test_truncated_safetensors_is_named(tmp_path):
    save_file({"a": torch.zeros(100)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-50])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_state_dict(tmp_path)


def test_shards_stay_in_their_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(UserError, match="plain file name"):
        load_state_dict(tmp_path)


def test_another_vocabulary_is_named(tmp_path, golden, weights):
    folder = _folder(tmp_path, golden)
    config = json.loads((folder / "config.json").read_text())
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 140}))
    with pytest.raises(UserError, match="vocab_size=140, the embedding has 133 rows"):
        Showo.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config, "codebook_size": 30}))
    with pytest.raises(UserError, match="must be llm_vocab_size"):
        Showo.from_pretrained(folder)
    del weights["showo.model.layers.1.mlp.fc1.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"1 missing \(showo.model.layers.1.mlp.fc1.weight\)"):
        Showo.from_pretrained(folder)


def test_places_that_are_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="not a hub id"):
        resolve(tmp_path / "absent")
    with pytest.warns(UserWarning, match="the hub is asked"), pytest.raises(UserError, match="the hub cannot be read"):
        resolve("somebody/nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        resolve(tmp_path / "file")
    with pytest.raises(UserError, match="no weights found"):
        load_state_dict(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="must be a table"):
        read_config(tmp_path)


def test_a_local_path_that_is_absent_is_never_asked_of_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for absent in (
        "weights/phi-1_5", "Weights/phi-1_5", "mine/phi-1_5", "./phi", "~/phi", "/tmp/absent/phi", "a/b/c", "phi",
        "../phi", "owner/model.safetensors", "owner\\phi", "own er/phi", "hub:phi", "hub:../x/y",
    ):  # fmt: skip
        with pytest.raises(UserError):
            resolve(absent)
    with pytest.raises(UserError, match="write hub:weights/phi-1_5"):
        local_or_hub("weights/phi-1_5")
    assert asked == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve("hub:microsoft/phi-1_5")
        assert local_or_hub("hub:weights/phi") == "weights/phi" and local_or_hub("mine") == "mine"
    with pytest.warns(UserWarning, match="hub:microsoft/phi-1_5 means the hub"):
        resolve("microsoft/phi-1_5")
    assert asked == ["microsoft/phi-1_5"] * 2
    monkeypatch.setenv("PYUNICTOKENS_HUB", "explicit")
    with pytest.raises(UserError, match="PYUNICTOKENS_HUB=explicit"):
        resolve("microsoft/phi-1_5")
    resolve("hub:microsoft/phi-1_5")
    assert len(asked) == 3


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 2900000000\n"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.safetensors.index.json"])
def test_a_git_lfs_pointer_is_called_one(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(UserError, match="Git LFS pointer, not the file itself: run `git lfs pull`") as caught:
        load_state_dict(tmp_path)
    assert name in str(caught.value) and "weights_only" not in str(caught.value)


def test_git_lfs_pointers_beside_the_weights_are_called_so(tmp_path):
    (tmp_path / "config.json").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"config\.json: a Git LFS pointer"):
        read_config(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"tokenizer\.json: a Git LFS pointer"):
        TextTokenizer.from_pretrained(tmp_path)
    for part in ("embed", "lm_head_weight", "lm_head_bias"):
        (tmp_path / f"epoch_3_{part}.pt").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"epoch_3_embed\.pt: a Git LFS pointer"):
        ConceptTokens.load_published(tmp_path, "bo")


def test_the_advice_to_run_foreign_code_is_not_passed_on(tmp_path):
    torch.save({"a": torch.zeros(2), "config": pathlib.PurePosixPath("x")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="save the state dict alone") as caught:
        load_state_dict(tmp_path)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("nested", [None, "state_dict", "module"])
def test_what_wrappers_put_around_a_state_dict_is_taken_off(tmp_path, golden, weights, prefix, nested):
    folder = _folder(tmp_path, golden)
    wrapped = {prefix + key: value for key, value in weights.items()}
    torch.save({nested: wrapped, "epoch": 3} if nested else wrapped, folder / "pytorch_model.bin")
    _same(folder, weights)


def test_a_compiled_part_of_a_model_is_the_part(tmp_path, golden, weights):
    folder = _folder(tmp_path, golden)
    compiled = {key.replace("showo.", "showo._orig_mod.", 1): value for key, value in weights.items()}
    torch.save(compiled, folder / "pytorch_model.bin")
    _same(folder, weights)


def test_the_folder_that_accelerate_writes(tmp_path, golden, weights):
    folder = _folder(tmp_path, golden)
    (folder / "unwrapped_model").mkdir()
    torch.save(weights, folder / "unwrapped_model" / "pytorch_model.bin")
    _same(folder, weights)
    (folder / "config.json").rename(folder / "unwrapped_model" / "config.json")
    _same(folder, weights)
    above = folder.rename(tmp_path / "checkpoint-200")
    with pytest.raises(UserError, match="there are weights in checkpoint-200: name that folder"):
        load_state_dict(above.parent)


@pytest.mark.parametrize("whole", ["model.safetensors", "pytorch_model.bin"])
def test_whole_weights_beside_a_stale_index(tmp_path, golden, weights, whole):
    folder = _folder(tmp_path, golden)
    table = {key: "model-00001-of-00002.safetensors" for key in weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors: no such file; the checkpoint is incom"):
        Showo.from_pretrained(folder)
    (save_file if whole.endswith("s") else torch.save)(weights, folder / whole)
    with pytest.warns(UserWarning, match=rf"index\.json: shards it lists are gone: .*{whole} is read"):
        _same(folder, weights)


def test_the_number_of_codes_is_never_guessed(tmp_path, golden, weights):
    folder = _folder(tmp_path, golden)
    torch.save(weights, folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "codebook_size"}))
    assert Showo.from_pretrained(folder).config.codebook_size == config["codebook_size"]
    for changed in ({key: config[key] for key in config if key != "num_vq_tokens"}, {**config, "num_vq_tokens": None}):
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=r"no num_vq_tokens.*256 for the Show-o of 256×256 .* 1024"):
            Showo.from_pretrained(folder)


@pytest.mark.parametrize("part", ["embed", "lm_head_weight", "lm_head_bias"])
def test_tensors_that_are_no_tables_are_errors(tmp_path, part):
    ConceptTokens("bo", 4, 2, 1).save_published(tmp_path, 3)
    good = ConceptTokens.load_published(tmp_path, "bo", num_understanding=2)
    odd = {
        "scalar": torch.tensor(1.0),
        "sparse": torch.eye(4).to_sparse(),
        "meta": torch.empty(4, 4, device="meta"),
        "empty": torch.empty(0),
        "vector": torch.zeros(3),
        "quantized": torch.quantize_per_tensor(torch.zeros(4, 4), 0.1, 0, torch.quint8),
    }
    for value in odd.values():
        torch.save(value, tmp_path / f"epoch_3_{part}.pt")
        with pytest.raises(UserError, match=r"epoch_3|of shape"):
            ConceptTokens.load_published(tmp_path, "bo", num_understanding=2)
        torch.save({"x": value}, tmp_path / "pytorch_model.bin")
        if value.dim() != 0 and value.layout is torch.strided and not value.is_meta and not value.is_quantized:
            load_state_dict(tmp_path)
        elif value.dim() != 0:
            with pytest.raises(UserError, match=r"pytorch_model\.bin: x: is a tensor"):
                load_state_dict(tmp_path)
    assert good.width == 4
