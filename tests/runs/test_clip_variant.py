"""Show-o's CLIP-ViT variant from the stages to the report: questions are about the features of an image encoder, in
training, evaluation and every command, and images are drawn from codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pyunictokens.data.images import load_pixels
from pyunictokens.models.vision import SYSTEM, ClipVision
from tests.models.test_vision import write_tower
from tests.runs.real_layout import SHORT, Weights, call, make_person, make_weights, steps_of, write_showo

pytest.importorskip("facenet_pytorch", reason="FER needs the extra `rewards`")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    from pyunictokens.models import TextTokenizer

    made = make_weights(tmp_path_factory.mktemp("weights"))
    variant = made._replace(model=made.model.with_name("show-o-w-clip-vit"))
    write_showo(variant.model, TextTokenizer.from_pretrained(made.tokenizer).text_size, clip_vit=True)
    write_tower(made.model.with_name("tower"))
    return variant


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_person(tmp_path_factory.mktemp("photos"))


class Looked:
    """What is prefilled before questions, and the features an encoder gave."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        from pyunictokens.models.showo import prefill

        self.seen: list[torch.Tensor] = []
        real = prefill.prefill_images

        def prefill_images(model: Any, seen: torch.Tensor) -> Any:
            assert model.system_ids and SYSTEM.startswith("A chat between")
            self.seen.append(seen.detach().cpu())
            return real(model, seen)

        monkeypatch.setattr(prefill, "prefill_images", prefill_images)

    def features_only(self) -> bool:
        return bool(self.seen) and all(seen.is_floating_point() and seen.shape[1:] == (4, 1024) for seen in self.seen)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*rows are filled", "ignore:.*only the first")
def test_the_clip_vit_variant_learns_is_measured_and_draws(
    weights: Weights, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, run = Looked(monkeypatch), tmp_path / "run"
    tower, photo = weights.model.with_name("tower"), data / "concept" / "test" / "ann" / "0.png"
    words = ("--rewards", weights.rewards, "--clip", weights.clip, "--device", "cpu", *weights.flags)
    call("train", data, "ann", "--out", run, "--vision", tower, *words, *SHORT)
    assert looked.features_only()
    encoder = ClipVision.from_pretrained(tower)
    photos = sorted((data / "concept" / "train" / "ann").glob("*.png"))
    wanted = encoder.features(torch.stack([load_pixels(path, encoder.size) for path in photos]))
    every = torch.cat(looked.seen)
    found = [any(torch.allclose(seen, one, atol=1e-4) for seen in every) for one in wanted]
    assert any(found), "none of the photos was looked at"
    steps = steps_of(run)
    assert len(steps) == 2 and all(step["skipped"] is None for step in steps)
    assert any(step["loss_answer"] != 0 for step in steps)
    measured = json.loads((run / "after.json").read_text())["metrics"]
    assert {"pure.clip_t", "recognition.weight", "vqa.bleu", "reasoning.bleu"} <= set(measured)
    assert yaml.safe_load((run / "config.yaml").read_text())["vision"] == str(tower)
    for command in (
        ("understand", run, photo, "Who is <ann>?", "max_new_tokens=2"),
        ("generate", run, "A photo of <ann>.", "--reason", "timesteps=2", "--out", tmp_path / "a.png"),
        ("evaluate", run, "tasks=[vqa]"),
        ("evaluate", "table", run, "-m", "ours", "-m", "showo-tp", "-m", "showo-ip", "samples=1", "limit=1",
         "timesteps=2", "max_new_tokens=3", "tasks=[vqa, pure]", "--out", tmp_path / "table", "--no-pages"),
    ):  # fmt: skip
        looked.seen.clear()
        call(*command, "--device", "cpu")
        assert looked.features_only(), command[:2]
    content = json.loads((tmp_path / "table" / "results.json").read_text())
    assert content["failures"] == [] and len({record["model"] for record in content["records"]}) == 3


def test_a_model_that_reads_codes_takes_no_encoder(weights: Weights, data: Path, tmp_path: Path) -> None:
    plain = weights._replace(model=weights.model.with_name("show-o"))
    photo = data / "concept" / "test" / "ann" / "0.png"
    asked = ("understand", "base", photo, "Who?", "--vision", tmp_path, "--device", "cpu")
    assert "takes no features" in call(*asked, *plain.flags, code=2)
    assert "takes no features" in call(*asked, code=2)
