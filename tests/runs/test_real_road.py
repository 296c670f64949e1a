"""The road to real weights: one word for a model, its parts with sizes, a plan before anything starts, precision by
device, the paper's rewards by default, and a toy that says what it is when it meets photographs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pyunictokens.cli import app
from pyunictokens.data.folder import load_concept
from pyunictokens.models.bundle import Sources
from pyunictokens.models.registry import implied, known_files
from pyunictokens.rewards.registry import registered
from pyunictokens.runs.bundle import paper_rewards, read_rewards, resolved_dtype
from pyunictokens.runs.plan import CARDS, LEARNERS, parts_of, plan_run
from pyunictokens.runs.run_dir import RunConfig
from pyunictokens.toy.concept import write_toy_concept
from pyunictokens.utils.devices import pick_dtype
from pyunictokens.utils.errors import UserError
from tests.tiny import tiny_experts, tiny_toy

GOLDEN = Path(__file__).parents[1] / "golden"
SEVEN = ["model", "vq", "tokenizer", "tier", "ber", "der", "fer"]
SHORT = ("stages.max_steps=1", "num_understanding=2", "num_generation=2", "grpo.steps=1", "grpo.group_size=2")
SHORT += ("grpo.groups=1", "grpo.timesteps=2", "grpo.max_new_tokens=2", "evaluation.samples=1")
SHORT += ("evaluation.timesteps=2", "evaluation.max_new_tokens=2", "evaluation.base=false")


def call(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing here may reach the hub, and nothing that lies in the working folder is found."""

    def refuse(name: str, **options: Any) -> str:
        raise ConnectionError(f"{name}: no network in tests")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def concept(tmp_path: Path) -> Any:
    write_toy_concept(tmp_path / "data", seed=3, kind="animal", name="bo")
    return load_concept(tmp_path / "data", "bo")


# --- parts and their sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "keys"),
    [("showlab/show-o-512x512", "show-o-512x512"), ("showlab/magvitv2", "magvitv2")],
)
def test_sizes_of_the_model_are_those_of_the_published_tensors(source: str, keys: str) -> None:
    tensors = json.loads((GOLDEN / f"checkpoint_{keys}.json").read_text())
    wide = {"float32": 4, "int64": 8}
    total = sum(math.prod(shape) * wide[kind] for shape, kind in tensors.values())
    files = known_files(source)
    assert files is not None and files.gigabytes == pytest.approx(total / 1e9, rel=0.01)


def test_sizes_of_the_reward_models_are_those_of_their_networks() -> None:
    """In float32, as they are published; ERNIE's vocabulary is larger than that of transformers' default."""
    transformers, facenet = pytest.importorskip("transformers"), pytest.importorskip("facenet_pytorch")
    from benchmarks.reward_costs import paper_configs

    configs = paper_configs()
    configs.tier.vocab_size = 40000
    with torch.device("meta"):
        networks = {
            "tier": transformers.ErnieModel(configs.tier),
            "ber": transformers.Blip2ForImageTextRetrieval(configs.ber),
            "der": transformers.Dinov2Model(configs.der),
            "fer": facenet.InceptionResnetV1(pretrained=None, classify=True, num_classes=8631),
        }
    for name, network in networks.items():
        files = registered()[name].files
        size = 4 * sum(value.numel() for value in network.state_dict().values())
        assert files is not None and files.gigabytes == pytest.approx(size / 1e9, rel=0.03), name


def test_the_doctor_names_all_seven_parts_with_size_and_licence() -> None:
    text = call("doctor", "--weights", code=1)
    found = json.loads(CliRunner().invoke(app, ["doctor", "--weights", "--json"]).output)
    assert [part["name"] for part in found] == SEVEN
    assert all(part["gigabytes"] > 0 and part["licence"] and part["get"] and not part["ok"] for part in found)
    assert "5.79 GB: missing" in text and "0 of 7 parts are here; to fetch: 11.8 GB" in text
    assert "hf download showlab/magvitv2 --local-dir weights/magvitv2" in text and "pickscore (" in text


def _fill(folder: Path, *files: str) -> None:
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_bytes(b"x" * 500)


def test_what_lies_where_the_examples_keep_it_is_found_and_used(tmp_path: Path) -> None:
    _fill(tmp_path / "weights" / "show-o-512x512", "config.json", "model.safetensors")
    _fill(tmp_path / "weights" / "dinov2-base", "config.json", "model.safetensors", "preprocessor_config.json")
    assert implied("show-o-512").model == "weights/show-o-512x512"
    assert implied("show-o-512").vq == "showlab/magvitv2"
    parts = {part.name: part for part in parts_of(Sources.choose(Sources("show-o-512")), paper_rewards())}
    assert [name for name, part in parts.items() if part.ok] == ["model", "der"]
    assert parts["model"].gigabytes == pytest.approx(1e-6) and parts["vq"].gigabytes == 0.38
    assert "2 of 7 parts are here" in call("doctor", "--weights", code=1)


def test_a_model_of_ones_own_has_parts_of_unknown_size(tmp_path: Path) -> None:
    (part, *_) = parts_of(Sources("somebody/model", "showlab/magvitv2", "microsoft/phi-1_5"))
    assert part.gigabytes is None and not part.ok and "not known" in part.licence
    assert parts_of(Sources()) == []


# --- rewards and precision -----------------------------------------------------------------------------------------


def test_the_papers_rewards_come_with_the_package_and_ask_for_faces_of_people_alone() -> None:
    assert list(paper_rewards()["models"]) == ["tier", "ber", "der", "fer"]  # type: ignore[call-overload]
    assert read_rewards("paper", "human") == paper_rewards()
    for kind in ("animal", "object"):
        chosen = read_rewards("paper", kind)
        assert isinstance(chosen, dict) and list(chosen["models"]) == ["tier", "ber", "der"]


def test_a_real_model_takes_them_without_being_told(concept: Any, tmp_path: Path) -> None:
    text = call("train", "data", "bo", "--model", "show-o-512", "--out", "run", code=2)
    assert "nghuyong/ernie-3.0-base-zh" in text and "hf download nghuyong/ernie-3.0-base-zh" in text
    assert not (tmp_path / "run").exists()


def test_the_first_command_of_the_page_ends_in_a_clear_error_without_the_hub() -> None:
    page = (Path(__file__).parents[2] / "docs" / "real-weights.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^    pyunictokens (generate base .*)$", page, re.MULTILINE)
    import shlex

    text = call(*shlex.split(line), code=2)
    assert "error: showlab/show-o-512x512: no such folder, and the hub cannot be read (ConnectionError)" in text
    assert "download the files elsewhere and pass their folder" in text


def test_bfloat16_on_a_gpu_that_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolved_dtype(Sources("m", "v", "t"), "cuda", "auto") == "bfloat16"
    assert resolved_dtype(Sources("m", "v", "t"), "cuda", "float32") == "float32"
    assert resolved_dtype(Sources(), "cuda", "auto") == "float32", "the toy's numbers were taken in it"
    assert resolved_dtype(Sources("m", "v", "t"), "cpu", "auto") == "float32"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert pick_dtype("auto", torch.device("cuda")) == torch.float32
    with pytest.raises(UserError, match="must be auto, float32, bfloat16 or float16"):
        pick_dtype("half")


# --- the plan ------------------------------------------------------------------------------------------------------


def test_a_plan_prints_download_memory_hours_and_cost_and_starts_nothing(concept: Any, tmp_path: Path) -> None:
    text = call(
        "train", "data", "bo", "--model", "show-o-512", "--out", "run", "--plan", "--price", "2", "--rate", "100"
    )
    assert "download: 11.7 GB" in text, "no faces for an animal"
    assert re.search(r"GPU memory, bfloat16: about \d+ GB", text) and "at least" in text
    for words in LEARNERS:
        assert re.search(rf"{words}( +(as set|least|no)){{{len(CARDS)}}}\b", text), "whether it fits each card"
    assert "at 100 TFLOP/s" in text and "reinforcement" in text and "measuring" in text
    hours, cost = re.search(r"about ([\d.]+) h on one device.*cost: about ([\d.]+) at 2 an hour", text).groups()  # type: ignore[union-attr]
    assert float(cost) == pytest.approx(2 * float(hours), abs=0.11)
    assert not (tmp_path / "run").exists()
    assert "--plan is of one concept" in call("train", "data", "--concepts", "all", "--plan", code=2)


def test_memory_and_hours_follow_the_settings(concept: Any) -> None:
    sources = Sources.choose(Sources("show-o-512"))

    def plan(*words: str, dtype: str = "bfloat16", **parts: bool) -> Any:
        settings = RunConfig.make("paper", words=[f"grpo.dtype={dtype}", *words])
        return plan_run(sources, concept, settings, paper_rewards("animal"), rate=1e14, **parts)

    full = plan()
    assert full.memory.least < full.memory.peak
    assert plan("grpo.trainable=lora").memory.state < full.memory.state / 3
    assert plan(dtype="float32").memory.peak > full.memory.peak
    four_bits = plan("grpo.trainable=lora", "grpo.lora.base=nf4")
    assert four_bits.memory.state < 0.6 * plan("grpo.trainable=lora").memory.state
    fits = plan("grpo.micro_rows=1").fits
    assert fits["trainable=full"][0] == "no" and fits["trainable=full"][-1] == "as set"
    order = ["no", "least", "as set"]
    for row in fits.values():
        assert [order.index(each) for each in row] == sorted(order.index(each) for each in row), "more memory, no less"
    assert order.index(fits["trainable=lora lora.base=nf4"][0]) >= order.index(fits["trainable=lora"][0])
    assert plan("grpo.micro_rows=8").memory.update > 1.7 * full.memory.update
    twice = plan("grpo.steps=200")
    assert twice.hours["reinforcement"] == pytest.approx(2 * full.hours["reinforcement"])
    assert set(plan(grpo=False, evaluate=False).hours) == {"concept stages"}
    assert [part.name for part in plan(grpo=False).parts] == ["model", "vq", "tokenizer"]
    assert plan("evaluation.samples=8").hours["measuring"] > 1.5 * full.hours["measuring"]


def test_the_toys_plan_rests_on_a_measurement(concept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyunictokens.toy.model.load_toy", tiny_toy)
    text = call("train", "data", "bo", "--plan", "--device", "cpu", *SHORT)
    assert "download: nothing" in text and "measured here by drawing one group" in text
    assert "photographs" not in text


# --- the toy on photographs ----------------------------------------------------------------------------------------


def test_the_toy_on_photographs_says_so_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyunictokens.toy.model.load_toy", tiny_toy)
    monkeypatch.setattr("pyunictokens.toy.rewards.load_toy_rewards", tiny_experts)
    photos = tmp_path / "photos"
    photos.mkdir()
    for n in range(6):
        Image.new("RGB", (300, 260), (40 * n, 90, 120)).save(photos / f"{n}.png")
    (tmp_path / "mug.yaml").write_text(
        "facts:\n" + "".join(f"  - fact: It holds tea {n}.\n    prompt: A photo of <mug> {n}.\n" for n in range(4))
    )
    made = call("data", "new", "mine", "mug", "photos", "--class", "mug", "--facts", "mug.yaml")
    wanted = "pyunictokens train mine mug --model show-o-512 --plan"
    assert "the embedded toy model on photographs" in made and wanted in made
    assert "next: pyunictokens train mine mug --out runs/mug --model show-o-512" in made
    with pytest.warns(UserWarning, match="the embedded toy model on photographs"):
        call("train", "mine", "mug", "--out", "run", "--device", "cpu", *SHORT)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Read with care: this is the embedded toy model on photographs" in page


def test_a_drawn_concept_has_no_such_words(concept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyunictokens.toy.model.load_toy", tiny_toy)
    monkeypatch.setattr("pyunictokens.toy.rewards.load_toy_rewards", tiny_experts)
    call("train", "data", "bo", "--out", "run", "--device", "cpu", *SHORT)
    assert "caution" not in json.loads((tmp_path / "run" / "about.json").read_text())
    assert "Read with care" not in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
