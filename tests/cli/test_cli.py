"""The command line end to end on a tiny random model in the toy's place: files, exit codes, one-line errors, resume."""

from __future__ import annotations

import json
import os
import shlex
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pyunictokens.models.concept_tokens import ConceptTokens
from pyunictokens.rollout import RolloutEngine, RolloutInterrupted
from tests.cli.calling import call, only_error
from tests.tiny import tiny_experts, tiny_toy

SHORT = [
    "stages.max_steps=2",
    "stages.num_understanding=2",
    "stages.num_generation=2",
    "grpo.steps=2",
    "grpo.group_size=2",
    "grpo.timesteps=2",
    "grpo.max_new_tokens=3",
    "grpo.trainable=full",
    "grpo.checkpoint_every=1",
    "evaluation.samples=1",
    "evaluation.timesteps=2",
    "evaluation.max_new_tokens=3",
    "evaluation.tasks=[reasoning, pure, reasoning_generation]",
]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyunictokens.toy.model.load_toy", tiny_toy)
    monkeypatch.setattr("pyunictokens.toy.rewards.load_toy_rewards", tiny_experts)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pyunictokens.toy.concept import write_toy_concept

    root = tmp_path_factory.mktemp("data")
    write_toy_concept(root, seed=5, kind="animal", name="bo")
    return root


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, trained through the command line."""
    out = tmp_path_factory.mktemp("runs") / "bo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyunictokens.toy.model.load_toy", tiny_toy)
        patch.setattr("pyunictokens.toy.rewards.load_toy_rewards", tiny_experts)
        call("train", data, "bo", "--out", out, *SHORT)
    return out


# --- a run ---------------------------------------------------------------------------------------------------------


def test_train_leaves_the_run_that_is_promised(run: Path, data: Path) -> None:
    import yaml

    from pyunictokens import ConceptTokens

    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["name"] == "bo" and Path(config["root"]) == data and config["grpo"]["steps"] == 2
    assert json.loads((run / "about.json").read_text())["kind"] == "animal"
    tokens = ConceptTokens.load(run / "concept")
    final = ConceptTokens.load(run / "final" / "concept")
    learned = ConceptTokens.load(run / "stages" / "concept")
    assert torch.equal(tokens.embed, final.embed) and not torch.equal(tokens.embed, learned.embed)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1]
    before, after = (json.loads((run / f"{name}.json").read_text())["metrics"] for name in ("before", "after"))
    assert before.keys() == after.keys() and "reasoning_generation.reward" in before
    page = (run / "report.html").read_text()
    assert "<html" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert list((run / "checkpoints").iterdir()) and list((run / "samples").glob("*.png"))


def test_generate_and_understand_with_a_run(run: Path, data: Path, toy: None, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    call("generate", run, "A photo of <bo> on the beach.", "-n", 3, "--out", out, "timesteps=2", "--seed", 7)
    singles = [tmp_path / f"x_{index}.png" for index in range(3)]
    first = [file.read_bytes() for file in singles]
    assert Image.open(out).width > 3 * 32 and Image.open(singles[0]).size == (32, 32)
    call("generate", run, "A photo of <bo> on the beach.", "-n", 3, "--out", out, "timesteps=2", "--seed", 7)
    assert first == [file.read_bytes() for file in singles]
    traced = tmp_path / "trace.json"
    table = call("generate", run, "A photo of <bo> on the beach.", "-n", 3, "--out", out, "timesteps=2", "--seed", 8)
    assert "rollout steps" not in table, "only where it is asked for"
    table = call(
        "generate",
        run,
        "A photo of <bo> on the beach.",
        "-n",
        3,
        "--out",
        out,
        "timesteps=2",
        "--seed",
        8,
        "--profile",
        traced,
    )
    assert "rollout steps" in table and "matrix rate" in table and "rollout steps" in traced.read_text()
    assert first != [file.read_bytes() for file in singles]
    reasoned = call("generate", run, "<bo> with its toy.", "--reason", "--out", out, "timesteps=2", "max_new_tokens=4")
    assert "x.png" in reasoned
    picture = next((data / "concept" / "test" / "bo").glob("*.png"))
    answers = call("understand", run, picture, "What colour is <bo>?", "-n", 2, "max_new_tokens=3")
    assert len(answers.rstrip("\n").split("\n")) == 2
    call("generate", run / "concept", "<bo>", "--out", out, "timesteps=1")
    call("generate", "base", "A red cat.", "--out", out, "timesteps=1")


def test_ctrl_c_keeps_the_images_that_are_finished(
    run: Path, toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = RolloutEngine.generate_images

    def stopped(self: RolloutEngine, *words: Any, **options: Any) -> None:
        done = whole(self, *words, **{**options, "samples": 2})
        raise RolloutInterrupted(done, [1, 3])

    monkeypatch.setattr(RolloutEngine, "generate_images", stopped)
    words = ("generate", run, "A photo of <bo>.", "-n", 5, "--out", tmp_path / "x.png", "timesteps=2")
    assert "stopped: 2 of 5 images were finished and are saved" in call(*words, code=130)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.png", "x_1.png", "x_3.png"]

    def at_once(self: RolloutEngine, *words: Any, **options: Any) -> None:
        done = whole(self, *words, **options)
        done.pixels = None
        raise RolloutInterrupted(done, [])

    monkeypatch.setattr(RolloutEngine, "generate_images", at_once)
    assert "stopped" in call(*words[:5], "--out", tmp_path / "y.png", "timesteps=2", code=130)
    assert not (tmp_path / "y.png").exists()


def test_generate_refuses_what_it_cannot_use(run: Path, toy: None, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    assert "<max> is not a token" in only_error("generate", run, "A photo of <max>.", "--out", out)
    assert "no such folder" in only_error("generate", tmp_path / "none", "x", "--out", out)
    assert "nothing was learned" in only_error("generate", tmp_path, "x", "--out", out)
    assert "must end in" in only_error("generate", run, "x", "--out", tmp_path / "x.txt")
    assert "did you mean 'timesteps'" in only_error("generate", run, "x", "timestep=3", "--out", out)
    assert "guidance_scale=-1.0" in only_error("generate", run, "x", "guidance_scale=-1", "--out", out)
    assert "steps=0" in only_error("generate", run, "x", "timesteps=0", "--out", out)
    assert "--vq and --tokenizer missing" in only_error("generate", run, "x", "--model", "a/b", "--out", out)
    assert "device tpu" in only_error("generate", run, "x", "--device", "tpu", "--out", out)
    assert "dtype int8" in only_error("generate", run, "x", "--dtype", "int8", "--out", out)
    assert "no such image" in only_error("understand", run, tmp_path / "none.png", "What?")
    assert "--concept ROOT NAME" in only_error("generate", "base", "x", "--reason", "--out", out)


def test_evaluate_a_run(run: Path, toy: None, tmp_path: Path) -> None:
    text = call("evaluate", run, "--out", tmp_path / "e.json")
    assert "before" in text and "now" in text
    now = json.loads((tmp_path / "e.json").read_text())["metrics"]
    after = json.loads((run / "after.json").read_text())["metrics"]
    assert now == after  # the run is loaded as it was trained, and the drawings have the same noise
    call("evaluate", "base", "--concept", *_concept(run), "--out", tmp_path / "b.json", "splits=[pure]", "samples=1")
    assert set(json.loads((tmp_path / "b.json").read_text())["records"]) == {"pure"}
    assert "--concept ROOT NAME" in only_error("evaluate", "base")


def test_a_place_that_takes_no_file_is_told_before_the_work(
    run: Path, toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("worked for nothing")

    monkeypatch.setattr("pyunictokens.runs.pipeline.measure", never)
    monkeypatch.setattr(RolloutEngine, "generate_images", never)
    (tmp_path / "file").write_text("")
    for words in (
        ("evaluate", run, "--out", tmp_path / "file" / "x.json"),
        ("evaluate", "table", run, "--out", tmp_path / "file" / "x"),
        ("generate", run, "<bo>", "--out", tmp_path / "file" / "x.png"),
    ):
        assert str(tmp_path / "file") in only_error(*words)


def test_a_data_folder_that_moved_is_told_of_with_the_way_to_name_it(tmp_path: Path, toy: None) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"root: {tmp_path / 'gone'}\nname: bo\n")
    ConceptTokens("bo", 8, 1, 1).save(run)
    said = only_error("evaluate", run)
    gone = f"{tmp_path / 'gone'}: the folder of 'bo' that this run was trained on is no longer there: say where it is"
    assert f"{gone} with --concept ROOT bo" in said
    assert f"{gone} with --concept ROOT bo" in only_error("evaluate", "table", run)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for words in ([], ["samples=1"], ["--seed", 3], ["run", "samples=1"]):
            assert f"{gone} with --concept ROOT bo" in only_error("evaluate", "run", *words)
    assert "no run: leave one of the two" in only_error("evaluate", "table", tmp_path, "--concept", tmp_path, "bo")
    said = only_error("train", "--out", run, "--resume")
    assert f"{gone} with pyunictokens train ROOT bo --out {run} --resume" in said


def _concept(run: Path) -> tuple[str, str]:
    import yaml

    config = yaml.safe_load((run / "config.yaml").read_text())
    return config["root"], config["name"]


def test_train_stops_and_resumes_as_if_it_had_not(run: Path, data: Path, toy: None, tmp_path: Path) -> None:
    """The second step is cut off; the resumed run ends with the same rows as the one that never stopped."""
    from pyunictokens import ConceptTokens
    from pyunictokens.train import grpo

    out = tmp_path / "bo"
    with pytest.MonkeyPatch.context() as patch:
        original = grpo._Run._one_step

        def interrupted(self: Any) -> Any:
            if self.step == 1:
                raise KeyboardInterrupt
            return original(self)

        patch.setattr(grpo._Run, "_one_step", interrupted)
        assert "stopped" in call("train", data, "bo", "--out", out, *SHORT, code=130)
    assert "already holds a run" in only_error("train", data, "bo", "--out", out, *SHORT)
    call("train", data, "bo", "--out", out, "--resume")
    one, other = ConceptTokens.load(run / "concept"), ConceptTokens.load(out / "concept")
    assert torch.equal(one.embed, other.embed) and torch.equal(one.head_bias, other.head_bias)
    weights = [(folder / "final" / "model" / "model.safetensors").read_bytes() for folder in (run, out)]
    assert weights[0] == weights[1]
    assert "cannot be resumed" in only_error("train", data, "bo", "--out", out, "--resume", "grpo.lr=0.5")


def test_a_polite_kill_ends_with_zero_and_says_how_to_go_on(data: Path, toy: None, tmp_path: Path) -> None:
    """SIGTERM during the first step: its checkpoint is written, exit code 0, and the run can be gone on with."""
    from pyunictokens.train import grpo

    out = tmp_path / "bo"
    with pytest.MonkeyPatch.context() as patch:
        original = grpo._Run._one_step

        def told(self: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return original(self)

        patch.setattr(grpo._Run, "_one_step", told)
        said = call("train", data, "bo", "--out", out, *SHORT, "--no-evaluate", code=0)
    following = shlex.split(said.partition("go on with: ")[2])
    assert "after step 1 of 2" in said
    assert following == ["pyunictokens", "train", "--out", str(out), "--resume"]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000001"]
    call(*following[1:])
    assert (out / "final" / "policy.json").exists() and not (out / "after.json").exists()


@pytest.mark.slow
def test_train_from_tokens_and_from_a_config(run: Path, toy: None, tmp_path: Path) -> None:
    from pyunictokens import ConceptTokens

    again = tmp_path / "again"
    call("train", "--config", run / "config.yaml", "--out", again, "--no-evaluate")
    assert torch.equal(ConceptTokens.load(run / "concept").embed, ConceptTokens.load(again / "concept").embed)
    assert not (again / "after.json").exists()
    other = tmp_path / "joint"
    call(
        "train", *_concept(run), "--out", other, "--stages", "joint", "--no-grpo", "--no-evaluate", *SHORT, "--seed", 3
    )
    assert (other / "stages" / "joint").is_dir() and not (other / "run.json").exists()
    further = tmp_path / "further"
    call(
        "train", *_concept(run), "--out", further, "--stages", "none", "--start", other, "--no-evaluate",
        *SHORT, "grpo.steps=1", "grpo.trainable=lora",
    )  # fmt: skip
    assert (further / "final" / "adapter_model.safetensors").exists() and not (further / "stages").exists()
    call("generate", further, "<bo>", "--out", tmp_path / "x.png", "timesteps=1")


def test_the_hint_to_go_on_does_the_parts_that_were_begun(run: Path, toy: None, tmp_path: Path) -> None:
    """Without stages, from other tokens, without measuring: the command that is printed goes on with just that."""
    import yaml

    from pyunictokens.train import grpo

    out = tmp_path / "bo"
    with pytest.MonkeyPatch.context() as patch:
        original = grpo._Run._one_step

        def told(self: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return original(self)

        patch.setattr(grpo._Run, "_one_step", told)
        said = call(
            "train", *_concept(run), "--out", out, "--stages", "none", "--start", run, "--no-evaluate", *SHORT, code=0
        )
    hint = shlex.split(said.partition("go on with: pyunictokens ")[2])
    assert hint == ["train", "--out", str(out), "--resume"]
    call(*hint)
    assert (out / "final" / "policy.json").exists()
    assert not (out / "stages").exists() and not (out / "before.json").exists()
    written = yaml.safe_load((out / "config.yaml").read_text())
    assert written["parts"] == ["grpo"] and Path(written["start"]) == run
    again = tmp_path / "again"
    call("train", "--config", out / "config.yaml", "--out", again)
    assert not (again / "stages").exists() and (again / "final").exists()
    assert "nothing to do" in only_error("train", "--config", out / "config.yaml", "--out", tmp_path / "x", "--no-grpo")
    (tmp_path / "bad.yaml").write_text("parts: [grpo, dance]\n")
    assert "parts: dance" in only_error("train", "--config", tmp_path / "bad.yaml", "--out", tmp_path / "x")


def test_train_refuses_what_it_cannot_use(data: Path, toy: None, tmp_path: Path) -> None:
    out = tmp_path / "r"
    assert "which concept" in only_error("train", "--out", out)
    assert "'nobody'" in only_error("train", data, "nobody", "--out", out)
    assert "'../bo'" in only_error("train", data, "../bo", "--out", out)
    assert "group_size=1" in only_error("train", data, "bo", "--out", out, "grpo.group_size=1")
    assert "no tokens to begin with" in only_error("train", data, "bo", "--out", out, "--stages", "none")
    assert "nothing to do" in only_error("train", data, "bo", "--out", out, "--stages", "none", "--no-grpo")
    assert "no run to resume" in only_error("train", data, "bo", "--out", out, "--resume")
    assert "MODULE:FUNCTION" in only_error("train", data, "bo", "--out", out, "--rewards", "nothing")
    (tmp_path / "bad.yaml").write_text("grpo: [1\n")
    assert "line" in only_error("train", data, "bo", "--out", out, "--config", tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("grpo:\n  stepps: 3\n")
    assert "did you mean 'steps'" in only_error("train", data, "bo", "--out", out, "--config", tmp_path / "bad.yaml")
    assert not out.exists()


def test_rewards_of_ones_own(data: Path, toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "import torch\n"
        "from pyunictokens.rewards import Ensemble\n"
        "class Bright:\n"
        "    name = 'bright'\n"
        "    def score(self, batch):\n"
        "        return batch.images.mean((1, 2, 3)).clamp(-1, 1)\n"
        "def load(device):\n"
        "    return Ensemble({'bright': Bright()}, {'bright': 1.0})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    out = tmp_path / "own"
    call(
        "train", data, "bo", "--out", out, "--rewards", "my_rewards:load", "--no-evaluate", *SHORT,
        "grpo.dsog.enabled=false", "grpo.steps=1",
    )  # fmt: skip
    line = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert "bright" in json.dumps(line)


def test_the_demo_does_it_all(toy: None, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        text = call("demo", "--out", out, *SHORT)
    assert not [str(item.message) for item in caught if "scorer failed" in str(item.message)]  # DSOG really judged
    assert "base" in text and "before" in text and "after" in text and "report.html" in text
    assert (out / "report.html").stat().st_size > 1000 and (out / "data" / "concept" / "train" / "bo").is_dir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("x")
    assert "not empty" in only_error("demo", "--out", tmp_path / "mine")
    assert (tmp_path / "mine" / "precious.txt").exists()


def test_generate_any_grid_and_paint_into_an_image(
    run: Path, toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    drawn = RolloutEngine.generate_images

    def kept(self: RolloutEngine, *words: Any, **options: Any) -> Any:
        rollout = drawn(self, *words, **options)
        asked.append((options["grid"], options["known_codes"], rollout.codes))
        return rollout

    monkeypatch.setattr(RolloutEngine, "generate_images", kept)
    few = ("timesteps=2", "guidance_scale=0", "--device", "cpu")
    wide = tmp_path / "wide.png"
    call("generate", run, "a photo of <bo>", "--size", "16x48", "--out", wide, *few)
    assert asked[-1][0] == (2, 6) and asked[-1][1] is None
    assert Image.open(tmp_path / "wide_0.png").size == (48, 16)
    noise = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "photo.png")
    mask = torch.zeros(32, 32, dtype=torch.uint8)
    mask[3:9, 20] = 255  # touches two codes of one column
    Image.fromarray(mask.numpy()).save(tmp_path / "mask.png")
    words = ("--image", tmp_path / "photo.png", "--mask", tmp_path / "mask.png", "--out", tmp_path / "in.png")
    call("generate", run, "a photo of <bo>", *words, *few)
    grid, known, codes = asked[-1]
    bundle = tiny_toy()
    whole = bundle.vq.encode(noise.permute(2, 0, 1)[None].float() / 127.5 - 1)[0]
    painted = [place for place in range(16) if known[place] == -1]
    assert grid == (4, 4) and painted == [2, 6]
    kept_places = [place for place in range(16) if place not in painted]
    assert torch.equal(known[kept_places], whole[kept_places].long())
    assert torch.equal(codes[0, kept_places].cpu(), known[kept_places]) and int(codes.min()) >= 0
    Image.new("L", (32, 32)).save(tmp_path / "black.png")
    Image.new("L", (16, 32), 255).save(tmp_path / "small.png")
    for options, said in (
        (("--size", "20x32"), "must be multiples of 8"),
        (("--size", "wide"), "must be HEIGHTxWIDTH"),
        (words[:2], "--image and --mask belong together"),
        ((*words[:2], "--mask", tmp_path / "black.png"), "is black all over"),
        ((*words[:2], "--mask", tmp_path / "small.png"), "must be of one size"),
    ):
        assert said in only_error("generate", run, "<bo>", *options, "--out", tmp_path / "x.png", *few)
