"""Day one, in small: the public checkpoints' file layout with random weights, through the command line from photos to
the report. Show-o as `pytorch_model.bin` with its language model's config beside it, a byte-level BPE tokenizer,
MAGVIT-v2 that halves four times, the paper's four reward models by their own libraries, a person's real portrait, and
a real CLIP; on one process, and on two under torchrun that begin with given tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pyunictokens.cli import app
from pyunictokens.models import ConceptTokens
from tests.judge_server import JudgeServer
from tests.runs.real_layout import SHORT, Weights, call, make_person, make_weights, steps_of

pytest.importorskip("facenet_pytorch", reason="FER needs the extra `rewards`")
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_person(tmp_path_factory.mktemp("photos"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*rows are filled", "ignore:.*only the first")
def test_train_table_and_report_on_the_real_layout(weights: Weights, data: Path, tmp_path: Path) -> None:
    run, table = tmp_path / "run", tmp_path / "table"
    words = ("--rewards", weights.rewards, "--clip", weights.clip, "--device", "cpu", *weights.flags)
    call("train", data, "ann", "--out", run, *words, *SHORT)
    steps = steps_of(run)
    assert len(steps) == 2 and all(step["skipped"] is None for step in steps)
    assert set(steps[0]["parts"]) == {"tier", "ber", "der", "fer"}
    assert json.loads((run / "final" / "policy.json").read_text()) == {"trainable": "full"}  # the `paper` preset
    assert (run / "report.html").stat().st_size > 10_000
    measured = json.loads((run / "after.json").read_text())["metrics"]
    assert {"pure.clip_t", "pure.clip_i", "recognition.weight", "reasoning.bleu"} <= set(measured)
    with JudgeServer() as server:
        judged = ("--judge-url", server.url, "--judge-model", "m", "--judge-key-env", "none")
        rows = ("-m", "ours", "-m", "showo-tp", "-m", "showo-ip", "-m", "real")
        few = ("samples=1", "limit=1", "timesteps=2", "max_new_tokens=3", "--device", "cpu", "--clip", weights.clip)
        text = call("evaluate", "table", run, *rows, *judged, *few, "--out", table)
    content = json.loads((table / "results.json").read_text())
    assert content["failures"] == [] and "Show-o + IP" in text
    ours = next(row for row in content["rows"]["all"] if row["model"] == "ours")
    from pyunictokens.evaluate.tables import TABLE_1

    assert {column.key for column in TABLE_1} <= set(ours["metrics"])
    answer = call("understand", run, data / "concept" / "test" / "ann" / "0.png", "Who is <ann>?", "max_new_tokens=2")
    assert answer.endswith("\n")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tokens as UniCTokens publishes them."""
    folder = tmp_path_factory.mktemp("published") / "ann"
    folder.mkdir()
    torch.manual_seed(3)
    ConceptTokens("ann", 32, num_understanding=16, num_generation=2, seed=1).save_published(folder, 15)
    return folder


INTRODUCED = "USER: <ann> is " + "".join(f"<token_{place}>" for place in range(16)) + "."


class Heard:
    """What engines are asked and what they draw from, in the order of the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        from pyunictokens.rollout.engine import RolloutEngine

        self.questions: list[tuple[str, bool]] = []
        self.prompts: list[str] = []
        asked, drawn = RolloutEngine.generate_text, RolloutEngine.generate_images

        def text(engine: Any, images: Any, questions: Any, **words: Any) -> Any:
            self.questions += [(question, bool(words.get("raw"))) for question in questions]
            return asked(engine, images, questions, **words)

        def images(engine: Any, prompts: Any, **words: Any) -> Any:
            self.prompts += prompts
            return drawn(engine, prompts, **words)

        monkeypatch.setattr(RolloutEngine, "generate_text", text)
        monkeypatch.setattr(RolloutEngine, "generate_images", images)

    def published(self) -> bool:
        """Whether all questions were worded and all prompts named the concept as UniCTokens' code does."""
        helpers = "".join(f"<token_{place}>" for place in range(18))
        named = all(prompt.count("<ann>") == prompt.count(helpers + "<ann>") for prompt in self.prompts)
        worded = [text.startswith(INTRODUCED) and text.endswith(" ASSISTANT:") for text, raw in self.questions if raw]
        return named and len(worded) == len(self.questions) > 0 and all(worded)


@pytest.mark.filterwarnings("ignore:.*only the first")
def test_published_tokens_are_a_row_of_a_table(
    weights: Weights, data: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyunictokens.data.images import load_pixels
    from pyunictokens.evaluate.sample_cache import SampleCache
    from pyunictokens.models.bundle import Sources
    from pyunictokens.rollout.engine import RolloutEngine
    from pyunictokens.runs.run_dir import Run

    heard = Heard(monkeypatch)
    parts = ("--showo", weights.model, "--vq", weights.vq, "--tokenizer", weights.tokenizer, "--clip", weights.clip)
    few = ("samples=1", "limit=2", "timesteps=2", "max_new_tokens=4", "tasks=[vqa, recognition, pure, reasoning]")
    row = ("-m", f"ours:{published.parent}/{{name}}", "--name", "ann", "--device", "cpu", "--no-pages")
    call("evaluate", "table", data, *row, *parts, *few, "--out", tmp_path / "table")
    assert heard.published() and any("Which information fits?" in text for text, _ in heard.questions)
    content = json.loads((tmp_path / "table" / "results.json").read_text())
    assert content["failures"] == []
    (found,) = content["rows"]["all"]
    assert {"vqa.bleu", "recognition.weight", "pure.clip_t", "pure.clip_i", "reasoning.bleu"} <= set(found["metrics"])
    files = [*(tmp_path / "table" / "samples").rglob("vqa/*.json")]
    assert len(files) == 2
    bundle = Run.find(str(published)).open(
        Sources(str(weights.model), str(weights.vq), str(weights.tokenizer)), "cpu", "float32", "ann"
    )
    for file in files:
        record = SampleCache.read(file)
        assert record is not None
        image = load_pixels(data / "concept" / "test" / "ann" / record.image, bundle.size)[None]
        worded = f"{INTRODUCED}{record.text} ASSISTANT:"
        said = RolloutEngine.of(bundle).generate_text(image, [worded], raw=True, temperature=0, max_new_tokens=4)
        assert record.answer is not None and said.texts[0].split() == record.answer.split()
    heard.questions.clear()
    call("evaluate", "table", data, *row, *parts, *few, "question_form=ours", "--out", tmp_path / "table")
    assert heard.questions and not any(raw for _, raw in heard.questions)  # records of the other form do not count


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*rows are filled", "ignore:.*only the first")
def test_reinforcement_goes_on_in_the_form_of_published_tokens(
    weights: Weights, data: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, run = Heard(monkeypatch), tmp_path / "run"
    words = ("--rewards", weights.rewards, "--device", "cpu", *weights.flags, *SHORT, "evaluation.tasks=[vqa]")
    call("train", data, "ann", "--out", run, "--stages", "none", "--start-from", published, *words)
    assert heard.published() and len(heard.prompts) >= 4  # measuring before and after, and two groups of two
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["grpo"]["question_form"] == "unictokens"
    for command in (
        ("understand", run, data / "concept" / "test" / "ann" / "0.png", "Who is <ann>?", "max_new_tokens=2"),
        ("generate", run, "<ann> beside <ann>.", "--reason", "timesteps=2", "--out", tmp_path / "a.png"),
        ("evaluate", run, "tasks=[vqa]"),
    ):
        heard.questions.clear()
        heard.prompts.clear()
        call(*command, "--device", "cpu")
        assert heard.published(), command[0]
    heard.questions.clear()
    other = (*words, "--no-evaluate", "grpo.question_form=ours")
    call("train", data, "ann", "--out", tmp_path / "ours", "--stages", "none", "--start-from", published, *other)
    assert heard.questions and not any(raw for _, raw in heard.questions)


def test_of_the_tokenizers_repository_only_its_own_files_are_fetched(
    weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repository of a language model holds gigabytes beside its tokenizer."""
    import shutil

    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    remote = tmp_path / "remote"
    shutil.copytree(weights.tokenizer, remote)
    for heavy in ("config.json", "model.safetensors", "pytorch_model.bin", "merges.txt", "README.md", "sub/a.json"):
        (remote / heavy).parent.mkdir(exist_ok=True)
        (remote / heavy).write_bytes(b"gigabytes")
    asked: list[str] = []

    def snapshot_download(repo: str, *, allow_patterns: list[str], local_files_only: bool = False) -> str:
        assert not local_files_only
        asked.append(repo)
        every = [file.relative_to(remote).as_posix() for file in remote.rglob("*") if file.is_file()]
        for name in filter_repo_objects(every, allow_patterns=allow_patterns):
            (tmp_path / "local").mkdir(exist_ok=True)
            shutil.copy(remote / name, tmp_path / "local" / name)
        return str(tmp_path / "local")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    parts = ("--model", weights.model, "--vq", weights.vq, "--tokenizer", "hub:someone/phi")
    out = tmp_path / "a.png"
    call("generate", "base", "A photo.", *parts, "timesteps=2", "--device", "cpu", "--out", out)
    assert asked == ["someone/phi"] and out.is_file()
    assert {file.name for file in (tmp_path / "local").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_two_ranks_under_torchrun_begin_with_published_tokens(
    weights: Weights, data: Path, published: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ranks = ("--nproc-per-node", "2", "--nnodes", "1", "--master-port", "0", "--rdzv-backend", "c10d")
    command = [sys.executable, "-m", "torch.distributed.run", *ranks, "--rdzv-endpoint", "127.0.0.1:0"]
    command += ["-m", "pyunictokens", "train", str(data), "ann", "--out", str(run), "--stages", "none"]
    command += ["--start-from", str(published), "--rewards", str(weights.rewards), "--no-evaluate", "--device", "cpu"]
    command += [*weights.flags, *SHORT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(steps_of(run)) == 2 and (run / "final" / "model" / "model.safetensors").is_file()


def test_no_option_of_ours_is_taken_by_torchrun(capsys: pytest.CaptureFixture[str]) -> None:
    """torchrun reads its whole command line before it hands ours on, and takes unique beginnings of its own options."""
    import typer.main
    from torch.distributed.run import get_args_parser

    commands: Any = typer.main.get_command(app)
    lost = []
    for name in ("train", "reinforce"):
        for parameter in commands.commands[name].params:
            for option in (*parameter.opts, *parameter.secondary_opts):
                if not option.startswith("-"):
                    continue
                words = [name, option, "x"]
                try:
                    kept = get_args_parser().parse_args(["-m", "pyunictokens", *words]).training_script_args
                except SystemExit:
                    kept = None
                lost += [option] if kept != words else []
    assert set(lost) <= {"--start"}  # said in its help; --start-from is the name for torchrun
    assert "--start-from" not in lost
    capsys.readouterr()
