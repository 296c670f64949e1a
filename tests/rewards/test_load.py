"""Experts named by a run's settings: what is loaded, what is refused and with which words, and what the doctor says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from pyunictokens.cli import app
from pyunictokens.models.bundle import Sources
from pyunictokens.rewards import Ber, Der, Fer, JudgeReward, RewardBatch, Tier
from pyunictokens.rewards.load import RewardConfig, load_rewards
from pyunictokens.rewards.registry import registered, weight_status
from pyunictokens.runs.bundle import load_scorers, read_rewards
from pyunictokens.utils.errors import UserError

from .checkpoints import SENTENCES, Folders


class Bright:
    """An expert of one's own."""

    def __init__(self, scale: float = 1.0, device: str = "cpu"):
        self.scale, self.device = scale, device

    def score(self, batch: RewardBatch) -> torch.Tensor:
        return (batch.images.mean(dim=(1, 2, 3)) + 1) / 2 * self.scale


BRIGHT = {"use": f"{__name__}:Bright", "scale": 0.5}


def batch(kind: str = "animal") -> RewardBatch:
    pixels = torch.rand(3, 3, 33, 47, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return RewardBatch(pixels, SENTENCES[:3], SENTENCES[1:4], SENTENCES[:3], 0, pixels[:2], kind)


# --- what is loaded ------------------------------------------------------------------------------------------------


def test_a_run_names_the_four_experts_and_more(saved: Folders) -> None:
    settings = saved.settings("tier", "ber", "der", "fer")
    settings["ber"]["head"] = "matching"
    settings["der"] |= {"match": "best", "batch": 2}
    settings["bright"] = BRIGHT
    settings["gpt"] = {"use": "judge", "model": "gpt-4o", "photos": 2}
    chosen = {"experts": settings, "dtype": "float32", "batch": 7, "weights": {"ber": 1, "bright": 3}}
    rewards = load_rewards(chosen, trust=True)
    experts = rewards.models
    kinds = [type(experts[name]) for name in ("tier", "ber", "der", "fer", "bright", "gpt")]
    assert kinds == [Tier, Ber, Der, Fer, Bright, JudgeReward]
    ber, der, gpt = experts["ber"], experts["der"], experts["gpt"]
    assert isinstance(ber, Ber) and isinstance(der, Der) and isinstance(gpt, JudgeReward)
    assert ber.head == "matching" and der.match == "best" and gpt.photos == 2
    assert (ber._encoder.config.batch, der._encoder.config.batch) == (7, 2)
    assert not any(e._encoder.loaded for e in (ber, der))  # nothing is read before it is asked
    score = rewards.score(batch())
    torch.testing.assert_close(score.total, score.parts["ber"] + 3 * score.parts["bright"])
    torch.testing.assert_close(score.parts["bright"], (batch().images.mean(dim=(1, 2, 3)) + 1) / 4)
    assert ber._encoder.loaded and not der._encoder.loaded
    assert rewards.preview_scorer is not None and rewards.face_embedding is not None
    preview = rewards.preview_scorer(SENTENCES)(batch().images, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(preview, score.parts["ber"])


def test_settings_from_a_file_and_from_a_run(saved: Folders, tmp_path: Path) -> None:
    settings = {"experts": saved.settings("ber", "der"), "weights": {"ber": 0.5, "der": 0.5}, "memory": "together"}
    for name, content in (
        ("run.yaml", {"model": "m", "rewards": settings}),
        ("alone.yml", settings),
        ("RW.YAML", settings),
    ):
        (tmp_path / name).write_text(yaml.safe_dump(content))
        assert read_rewards(str(tmp_path / name)) == settings
    assert read_rewards("my:load") == "my:load" and read_rewards(None) is None and read_rewards(settings) == settings
    (tmp_path / "none.yaml").write_text("model: m\n")
    with pytest.raises(UserError, match=r"none\.yaml: holds no reward models"):
        read_rewards(str(tmp_path / "none.yaml"))
    experts = load_scorers(Sources("m", "v", "t"), "cpu", read_rewards(str(tmp_path / "run.yaml")))
    assert experts is not None and experts.face_embedding is None and callable(experts.preview_scorer)
    assert experts.ensemble.placement.memory == "together"
    assert set(experts.ensemble.score(batch()).parts) == {"ber", "der"}


def test_a_run_keeps_its_rewards(saved: Folders, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from pyunictokens.runs.context import Parts
    from pyunictokens.runs.run_dir import RunConfig, write_description

    words = {"name": "bo", "kind": "animal", "class_word": "dog", "info": "", "extra_info": []}
    concept: Any = SimpleNamespace(root=tmp_path, test_folder=tmp_path, **words)
    settings = {"experts": saved.settings("der"), "weights": {"der": 1.0}}
    write_description(tmp_path, Sources(), settings, 16, concept, RunConfig.make("toy"), Parts())
    assert read_rewards(str(tmp_path / "config.yaml")) == settings
    RunConfig.make("toy", yaml.safe_load((tmp_path / "config.yaml").read_text()))


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "must be a table"),
        ({"models": {}}, "must be a table"),
        ({"models": ["tier"]}, "must be a table"),
        ({"models": {"tier": "weights/ernie"}}, r"models\.tier='weights/ernie': must be a table"),
        ({"models": {"tier": {}}}, r"rewards\.models\.tier: path is missing"),
        ({"models": {"tier": {"path": " "}}}, r"rewards\.models\.tier: path is empty"),
        ({"models": {"tier": {"path": []}}}, r"tier: path=\[\]: must be text"),
        ({"models": {"tier": {"path": "x", "pooling": "max"}}}, r"tier: pooling='max': must be mean or cls"),
        ({"models": {"tier": {"path": "x", "max_tokens": 2}}}, r"tier: max_tokens=2"),
        ({"models": {"tier": {"path": "x", "pool": "cls"}}}, r"tier: unknown setting 'pool'; did you mean 'pooling'"),
        ({"models": {"ber": {"path": "x", "dtype": "int8"}}}, r"ber: dtype='int8': must be float32"),
        ({"models": {"ber": {"path": "x", "batch": True}}}, r"ber: batch=True: must be a whole number"),
        ({"models": {"ber": {"path": "x", "offline": 1}}}, r"ber: offline=1: must be true or false"),
        ({"models": {"judge": {}}}, r"judge: model is missing"),
        ({"models": {"judge": {"model": "m", "timeout": 0}}}, r"judge: timeout=0"),
        ({"models": {"hps": {"path": "x"}}}, r"hps\.use='hps': must be tier, ber, .*, or MODULE:CLASS"),
        ({"models": {"hps": {"use": "no_such_module:X"}}}, r"hps\.use='no_such_module:X': No module"),
        ({"models": {"hps": {"use": "json:Nothing"}}}, "has no attribute 'Nothing'"),
        ({"models": {"b": {**BRIGHT, "colour": 1}}}, r"b: Bright\(scale, colour\) cannot be called"),
        ({"models": {"b": BRIGHT}, "weights": {"c": 1}}, "name c, reward models are b"),
        ({"models": {"b": BRIGHT}, "memory": "little"}, "memory='little': must be auto, together, lean"),
        ({"models": {"b": BRIGHT}, "wieghts": {"b": 1}}, "unknown wieghts"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_rewards(settings, trust=True)


@pytest.mark.parametrize("expert", ["tier", "ber", "der", "fer"])
def test_missing_weights_say_which_file_and_from_where(expert: str, tmp_path: Path) -> None:
    wanted = registered()[expert].files
    assert wanted is not None
    with pytest.raises(UserError) as nowhere:
        load_rewards({"models": {expert: {"path": str(tmp_path / "absent")}}})
    assert "no such folder" in str(nowhere.value) and wanted.command() in str(nowhere.value)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError) as partly:
        load_rewards({"models": {expert: {"path": str(tmp_path)}}})
    assert wanted.files[-1][0] in str(partly.value) and wanted.command(tmp_path) in str(partly.value)
    assert f"{tmp_path}: config.json" not in str(partly.value)


def test_offline_never_asks_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: list[bool] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append(options["local_files_only"])
        raise OSError("no network in a test")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    for offline in (True, False):
        with pytest.raises(UserError, match="the hub cannot be read"):
            load_rewards({"models": {"der": {"path": "owner/name"}}, "offline": offline})
    assert asked == [True, False]


def test_wrong_checkpoints_are_refused(saved: Folders, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    def score(expert: str, folder: Path) -> None:
        load_rewards({"models": {expert: {"path": str(folder)}}, "weights": {expert: 1}}).score(batch())

    dino = tmp_path / "dino"
    shutil.copytree(saved.dinov2, dino)
    shutil.copy(saved.ernie / "vocab.txt", dino / "vocab.txt")
    with pytest.raises(UserError, match=r"reward model 'ber': .*holds a dinov2 model: must be blip-2"):
        score("ber", dino)
    with pytest.raises(UserError, match=r"holds a blip-2 model: must be dinov2"):
        score("der", saved.blip2)

    weights = load_file(saved.dinov2 / "model.safetensors")
    key = next(name for name in weights if "layer" in name and "weight" in name)
    save_file({k: v for k, v in weights.items() if k != key}, dino / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"no checkpoint of AutoModel: 1 weights missing \("):
        score("der", dino)
    save_file({**weights, key: torch.zeros(2, 2)}, dino / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="weights cannot be read as AutoModel"):
        score("der", dino)
    (dino / "model.safetensors").write_bytes((saved.dinov2 / "model.safetensors").read_bytes()[:500])
    with pytest.raises(UserError, match="weights cannot be read as AutoModel"):
        score("der", dino)
    for file in ("model.safetensors", "preprocessor_config.json", "config.json"):
        shutil.copy(saved.dinov2 / "model.safetensors", dino / "model.safetensors")
        (dino / file).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
        with pytest.raises(UserError, match=rf"{file}: a Git LFS pointer, not the file itself: run `git lfs pull`"):
            score("der", dino)
    shutil.copy(saved.dinov2 / "preprocessor_config.json", dino / "preprocessor_config.json")
    (dino / "config.json").write_text('{"model_type": "no such thing"}')
    with pytest.raises(UserError, match=r"config\.json cannot be used"):
        score("der", dino)


def test_a_blip2_without_retrieval_heads_is_refused(saved: Folders, tmp_path: Path) -> None:
    """The captioning checkpoints share name and type with the retrieval one, but have no heads for it."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(saved.blip2, tmp_path, dirs_exist_ok=True)
    weights = load_file(saved.blip2 / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "projection" not in k and "itm" not in k}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"no checkpoint of Blip2ForImageTextRetrieval: \d+ weights missing \(itm_head"):
        load_rewards({"models": {"ber": {"path": str(tmp_path)}}, "weights": {"ber": 1}}).score(batch())


def test_a_blip2_that_reads_no_text_is_refused(saved: Folders, tmp_path: Path) -> None:
    shutil.copytree(saved.blip2, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["qformer_config"]["use_qformer_text_input"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="its Q-Former reads no text"):
        load_rewards({"models": {"ber": {"path": str(tmp_path)}}, "weights": {"ber": 1}}).score(batch())


# --- the doctor ----------------------------------------------------------------------------------------------------


def test_the_doctor_finds_what_is_there(saved: Folders, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"rewards": {"experts": saved.settings()}}))
    result = CliRunner().invoke(app, ["doctor", "--weights", "--json", "--config", str(config)])
    assert result.exit_code == 0, result.output
    assert [finding.name for finding in weight_status({"der": str(saved.dinov2)})] == ["der"]
    found = {finding["name"]: finding for finding in json.loads(result.output)}
    assert set(found) == {"tier", "ber", "der", "fer"}
    assert all(finding["ok"] and finding["licence"] and finding["missing"] == [] for finding in found.values())
    (saved_file,) = saved.facenet.glob("*.pt")
    assert all(finding.ok for finding in weight_status({"fer": str(saved_file)}))


def test_the_doctor_says_what_is_missing_and_how_to_get_it(
    saved: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    partly = tmp_path / "dinov2"
    shutil.copytree(saved.dinov2, partly)
    (partly / "model.safetensors").unlink()
    settings = {**saved.settings("tier"), "der": {"path": str(partly)}, "ber": {"path": str(tmp_path / "none")}}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"experts": settings}))
    result = CliRunner().invoke(app, ["doctor", "--weights", "--config", str(config)])
    assert result.exit_code == 1
    text = result.output
    assert "tier  ERNIE" in text and "here" in text.splitlines()[0]
    assert "model.safetensors or pytorch_model.safetensors" in text
    assert "hf download facebook/dinov2-base --local-dir" in text and "MIT" in text and "Apache-2.0" in text
    assert "looked in" in text and "fer" not in text
    result = CliRunner().invoke(app, ["doctor", "--weights"])
    assert "20180402-114759-vggface2.pt" in result.output and "nghuyong/ernie-3.0-base-zh" in result.output


def test_the_table_names_what_the_loaders_read() -> None:
    files = {name: entry.files for name, entry in registered().items() if entry.files is not None}
    assert list(files)[:4] == ["tier", "ber", "der", "fer"]
    for wanted in files.values():
        assert wanted.home in wanted.command() and "{" not in wanted.command()


def test_settings_are_a_dataclass() -> None:
    config = RewardConfig.from_mapping({"models": {"tier": {"path": "a"}, "x": {"use": "der", "path": "b"}}})
    assert config.paths() == {"tier": "a", "der": "b"} and config.memory == "auto" and config.weights is None
