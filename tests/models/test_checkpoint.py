"""Every published file layout loads, and every broken one says what is wrong."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from pyunictokens.models.checkpoint import load_state_dict, read_config, resolve
from pyunictokens.models.showo.model import Showo
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
    with pytest.raises(UserError, match="the hub cannot be read"):
        resolve("somebody/nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        resolve(tmp_path / "file")
    with pytest.raises(UserError, match="no weights found"):
        load_state_dict(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="must hold a JSON object"):
        read_config(tmp_path)
