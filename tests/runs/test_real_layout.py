"""Day one, in small: the public checkpoints' file layout with random weights, through the command line from photos to
the report. Show-o as `pytorch_model.bin` with its language model's config beside it, a byte-level BPE tokenizer,
MAGVIT-v2 that halves four times, the paper's four reward models by their own libraries, a person's real portrait, and
a real CLIP; on one process, and on two under torchrun that begin with given tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from pyunictokens.cli import app
from pyunictokens.models import ConceptTokens, MagvitConfig, MagvitV2, Showo, ShowoConfig
from tests.evaluate.test_clip import CONFIG as CLIP_CONFIG
from tests.judge_server import JudgeServer
from tests.rewards.checkpoints import Folders, save_blip2, save_dinov2, save_ernie, save_facenet

pytest.importorskip("facenet_pytorch", reason="FER needs the extra `rewards`")
ROOT = Path(__file__).parent.parent.parent
CORPUS = [
    "A photo of <ann> on the beach. Is <ann> in this image? Yes. No. What colour is it? Brown.",
    "USER: Information: <ann>'s favourite book is a red atlas. Request: which information fits? ASSISTANT:",
]
SHORT = ("grpo.steps=2", "group_size=2", "grpo.timesteps=4", "grpo.max_new_tokens=3", "stages.max_steps=1")
SHORT += ("num_understanding=2", "num_generation=2", "evaluation.samples=1", "evaluation.timesteps=2")
SHORT += ("evaluation.max_new_tokens=3", "grpo.checkpoint_every=0")
FACTS = """\
info: <ann> is a woman with dark hair.
facts:
  - {fact: <ann>'s favourite book is a red atlas., prompt: A photo of <ann> with her favourite book.}
  - {fact: <ann> lives in a blue house., prompt: A photo of <ann> in front of her house.}
  - {fact: <ann> rides a green bicycle., prompt: A photo of <ann> on her way to work.}
  - {fact: <ann> has a white cat., prompt: A photo of <ann> with her pet.}
questions:
  - {question: "What colour is the hair of <ann>?", answer: Dark.}
prompts:
  reasoning_dense:
    - prompt: "A photo of <ann> with her pet in a kitchen, a lamp on the left."
      explicit: "A photo of <ann> with a white cat in a kitchen, a lamp on the left."
"""


class Weights(NamedTuple):
    """Folders as a user downloads them."""

    model: Path
    vq: Path
    tokenizer: Path
    clip: Path
    rewards: Path
    """The settings file of the reward models."""

    @property
    def flags(self) -> list[str]:
        return ["--model", str(self.model), "--vq", str(self.vq), "--tokenizer", str(self.tokenizer)]


def write_tokenizer(folder: Path) -> int:
    """A byte-level BPE tokenizer as language models publish theirs; returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "tokenizer_class": "CodeGenTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return tokenizer.get_vocab_size()


def write_showo(folder: Path, text: int) -> None:
    """Show-o's files: config.json with the names of the published one, phi/config.json, pytorch_model.bin."""
    torch.manual_seed(0)
    config = ShowoConfig(
        vocab_size=text + 10 + 32 + 1,
        llm_vocab_size=text,
        codebook_size=32,
        num_vq_tokens=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        max_text=48,
    )
    (folder / "phi").mkdir(parents=True)
    torch.save(Showo(config).state_dict(), folder / "pytorch_model.bin")
    sizes = asdict(config)
    own = ("vocab_size", "llm_vocab_size", "codebook_size", "num_vq_tokens", "w_clip_vit")
    about = {"_class_name": "Showo", "_diffusers_version": "0.21.0", "llm_model_path": "phi", "load_from_showo": True}
    about |= {"mask_token_id": config.vocab_size - 1, "max_text": config.max_text}
    (folder / "config.json").write_text(json.dumps(about | {name: sizes[name] for name in own}))
    phi = {name: value for name, value in sizes.items() if name not in (*own, "max_text")}
    phi |= {"model_type": "phi", "architectures": ["PhiForCausalLM"], "vocab_size": text, "hidden_act": "gelu_new"}
    (folder / "phi" / "config.json").write_text(json.dumps(phi))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    import open_clip
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("weights")
    found = Weights(root / "show-o", root / "magvitv2", root / "phi-1_5", root / "clip", root / "rewards.yaml")
    write_showo(found.model, write_tokenizer(found.tokenizer))
    torch.manual_seed(1)
    MagvitV2(MagvitConfig(8, (1, 1, 1, 1, 2), (1, 1, 1, 1, 2), (1,) * 5, (1,) * 5, 5, 4)).save_pretrained(found.vq)
    experts = Folders(
        save_ernie(root / "ernie"),
        save_blip2(root / "blip2"),
        save_dinov2(root / "dinov2"),
        save_facenet(root / "facenet"),
    )
    settings = {"rewards": {"models": experts.settings(), "offline": True}}
    found.rewards.write_text(yaml.safe_dump(settings))
    found.clip.mkdir()
    torch.manual_seed(2)
    state = {
        name: value.contiguous() for name, value in open_clip.CLIP(**CLIP_CONFIG["model_cfg"]).state_dict().items()
    }
    save_file(state, found.clip / "open_clip_model.safetensors")
    (found.clip / "open_clip_config.json").write_text(json.dumps(CLIP_CONFIG))
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A person from six cuts of one real portrait, as `data new` makes it of a user's files."""
    from PIL import Image
    from skimage.data import astronaut

    root = tmp_path_factory.mktemp("photos")
    portrait = np.ascontiguousarray(astronaut()[:256, 64:384])
    for number in range(6):
        cut = portrait[4 * number :, 5 * number : 320 - 3 * number]
        Image.fromarray(cut[:, ::-1] if number % 2 else cut).save(root / f"{number}.jpg")
    sheet = root / "ann.yaml"
    sheet.write_text(FACTS)
    words = ("--kind", "human", "--class", "woman", "--facts", sheet)
    call("data", "new", root / "data", "ann", *sorted(root.glob("*.jpg")), *words)
    return root / "data"


def call(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


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
