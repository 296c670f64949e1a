"""Everything that reads foreign bytes, as functions of bytes: nothing may come out of one but a UserError.

A target puts the bytes where a file of its kind would be, inside a folder that is otherwise good, and reads it through
the ordinary door. `SEEDS` gives each a few good files to begin with. hypothesis (test_fuzz.py) and atheris
(tests/fuzz/__main__.py) drive the same targets; tests/fuzz/corpus keeps what once broke one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import io
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from pyunictokens.utils.errors import UserError

Target = Callable[[bytes], None]

_LIMIT = 1 << 18  # bytes of one input


@functools.cache
def _room() -> Path:
    """A folder of this process with one good file of each kind."""
    from safetensors.torch import save

    from pyunictokens.config.settings import to_mapping
    from pyunictokens.config.training import TrainConfig
    from pyunictokens.models import ConceptTokens
    from tests.data.conftest import Folder
    from tests.train.world import tiny_concept

    torch.set_num_threads(1)
    room = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, room, ignore_errors=True)
    Folder(room / "data")
    tiny_concept().save(room / "tokens")
    ConceptTokens("bo", 4, 2, 1).save_published(room / "published", 3)
    for name in ("showo_tiny", "magvit_tiny"):
        shutil.copytree(Path(__file__).parent.parent / "golden" / name, room / name)
    (room / "weights").mkdir()
    (room / "weights" / "a.safetensors").write_bytes(save({"x": torch.zeros(2)}))
    from pyunictokens.train.checkpoint.run_state import RunFolder

    with RunFolder(room / "run", {"a": 1}, {"b": [1, 2]}) as run:
        run.save(1, {"x": torch.zeros(2)}, {"threshold": {"value": 0.5}, "reward": 0.5}, keep_last=1)
    from pyunictokens.evaluate.result import EvalResult

    records = {"vqa": [{"question": "?", "scores": {"bleu": [0.5]}}]}
    EvalResult("bo", {}, records, {"photos": [torch.zeros(1, 3, 4, 4, dtype=torch.uint8)]}).save(room / "eval.json")
    (room / "settings.yaml").write_text(yaml.safe_dump(to_mapping(TrainConfig.preset("toy"))))
    (room / "metrics.jsonl").write_text('{"step": 0, "reward_mean": 0.5}\n')
    return room


def _put(data: bytes, *parts: str) -> Path:
    file = _room().joinpath(*parts)
    file.write_bytes(data[:_LIMIT])
    return file


def _with(name: str, data: bytes, read: Callable[[Path], Any]) -> None:
    """Read with the bytes in place of one file, which is put back afterwards."""
    file = _room() / name
    good = file.read_bytes() if file.exists() else None
    try:
        file.write_bytes(data[:_LIMIT])
        read(_room())
    finally:
        if good is None:
            file.unlink()
        else:
            file.write_bytes(good)


def _concept(name: str) -> Target:
    def target(data: bytes) -> None:
        from pyunictokens.data.folder import load_concept, read_concept

        def read(room: Path) -> None:
            read_concept(room / "data", "bo")
            load_concept(room / "data", "bo")

        _with(f"data/concept/{name}", data, read)

    return target


def picture(data: bytes) -> None:
    from pyunictokens.data.images import load_batch

    load_batch([_put(data, "picture.png")], 16)


def safetensors(data: bytes) -> None:
    from pyunictokens.models.checkpoint import load_state_dict
    from pyunictokens.utils.files import read_safetensors

    read_safetensors(_put(data, "weights", "model.safetensors"))
    load_state_dict(_room() / "weights")


def pickled(data: bytes) -> None:
    from pyunictokens.models.checkpoint import load_tensors

    load_tensors(_put(data, "pytorch_model.bin"))


def index(data: bytes) -> None:
    from pyunictokens.models.checkpoint import load_state_dict

    def read(room: Path) -> None:
        load_state_dict(room / "weights")

    _with("weights/model.safetensors.index.json", data, read)


def showo_config(data: bytes) -> None:
    from pyunictokens.models import Showo

    _with("showo_tiny/config.json", data, lambda room: Showo.from_pretrained(room / "showo_tiny"))


def magvit_config(data: bytes) -> None:
    from pyunictokens.models import MagvitV2

    _with("magvit_tiny/config.json", data, lambda room: MagvitV2.from_pretrained(room / "magvit_tiny"))


def tokens_json(data: bytes) -> None:
    from pyunictokens.models import ConceptTokens

    _with("tokens/concept.json", data, lambda room: ConceptTokens.load(room / "tokens"))


def tokens_tensors(data: bytes) -> None:
    from pyunictokens.models import ConceptTokens

    _with("tokens/concept.safetensors", data, lambda room: ConceptTokens.load(room / "tokens"))


def tokens_published(data: bytes) -> None:
    from pyunictokens.models import ConceptTokens

    def read(room: Path) -> None:
        ConceptTokens.load_published(room / "published", "bo", num_understanding=2)

    _with("published/epoch_3_lm_head_bias.pt", data, read)


def run_state(data: bytes) -> None:
    from pyunictokens.train.checkpoint.run_state import RunFolder

    def read(room: Path) -> None:
        with RunFolder(room / "run", {"a": 1}, {"b": [1, 2]}, resume=True) as run:
            run.latest()

    _with("run/checkpoints/step_000001/state.json", data, read)


def run_json(data: bytes) -> None:
    from pyunictokens.train.checkpoint.run_state import RunFolder

    def read(room: Path) -> None:
        with RunFolder(room / "run", {"a": 1}, {"b": [1, 2]}, resume=True):
            pass

    _with("run/run.json", data, read)


def run_tensors(data: bytes) -> None:
    from pyunictokens.train.checkpoint.run_state import RunFolder

    def read(room: Path) -> None:
        with RunFolder(room / "run", {"a": 1}, {"b": [1, 2]}, resume=True) as run:
            run.latest()

    _with("run/checkpoints/step_000001/tensors.safetensors", data, read)


def policy(data: bytes) -> None:
    """policy.json with an adapter of version 0.1, or the configuration of one in PEFT's format."""
    from safetensors.torch import load_file, save_file

    from pyunictokens.train.policy import load_policy
    from tests.train.world import tiny_model

    folder = _room() / "final"
    old = Path(__file__).parents[1] / "train" / "old_adapter"
    if not folder.exists():
        shutil.copytree(_room() / "tokens", folder / "concept")
        shutil.copy(old / "adapter.safetensors", folder)
        shutil.copytree(_room() / "tokens", _room() / "peft" / "concept")
        (_room() / "peft" / "policy.json").write_text('{"trainable": "lora"}')
        tensors = load_file(old / "adapter.safetensors")
        tensors = {"base_model.model." + name.replace(".default", ""): value for name, value in tensors.items()}
        save_file(tensors, _room() / "peft" / "adapter_model.safetensors")
    if b"peft_type" in data:
        _with("peft/adapter_config.json", data, lambda room: load_policy(tiny_model(), room / "peft"))
    else:
        _with("final/policy.json", data, lambda room: load_policy(tiny_model(), folder))


def settings(data: bytes) -> None:
    from pyunictokens.config.settings import load_yaml
    from pyunictokens.config.training import TrainConfig
    from pyunictokens.runs.run_dir import RunConfig

    file = _put(data, "given.yaml")
    values = load_yaml(file)
    RunConfig.make("toy", values, str(file))
    TrainConfig.from_yaml(file)


def overrides(data: bytes) -> None:
    from pyunictokens.runs.run_dir import RunConfig

    RunConfig.make("toy", words=data.decode("utf-8", errors="replace").split("\n")[:4])


def run_config(data: bytes) -> None:
    """A run's config.yaml and about.json, as `generate` and `--resume` read them."""
    from pyunictokens.models.bundle import Sources
    from pyunictokens.runs.run_dir import Run

    def read(room: Path) -> None:
        run = Run.find(str(room / "tokens"))
        run.sources(Sources())
        assert run.origin

    _with("tokens/about.json", data, lambda room: Run.find(str(room / "tokens")))
    _with("tokens/config.yaml", data, read)


def log(data: bytes) -> None:
    from pyunictokens.train.metrics import MetricsLog, read_metrics

    file = _put(data, "log", "metrics.jsonl") if (_room() / "log").exists() else None
    if file is None:
        (_room() / "log").mkdir()
        file = _put(data, "log", "metrics.jsonl")
    read_metrics(file.parent)
    with MetricsLog(file.parent, from_step=1) as metrics:
        metrics.write({"step": 1})
    assert all(line["step"] <= 1 for line in read_metrics(file.parent))


def evaluation(data: bytes) -> None:
    from pyunictokens.evaluate.result import EvalResult

    def read(room: Path) -> None:
        result = EvalResult.load(room / "eval.json")
        _ = result.metrics
        result.compare(result)

    _with("eval.json", data, read)


def many(data: bytes) -> None:
    from pyunictokens.runs.sweep import JOBS, Status
    from pyunictokens.runs.sweep_results import collect, write_results

    runs = _room() / "runs"
    (runs / JOBS).mkdir(parents=True, exist_ok=True)
    (runs / "bo").mkdir(exist_ok=True)
    for name in (f"{JOBS}/bo.json", "bo/about.json", "bo/after.json"):
        _with(f"runs/{name}", data, lambda room: (Status.read(runs, "bo"), write_results(runs, collect(runs, ["bo"]))))


def plan(data: bytes) -> None:
    from pyunictokens.runs import sweep as many

    runs = _room() / "planned"
    (runs / many.JOBS).mkdir(parents=True, exist_ok=True)

    def read(room: Path) -> None:
        many.plan(runs, ["bo"], ["x"], grpo=True, evaluate=True, retries=0)

    _with(f"planned/{many.JOBS}/{many.PLAN}", data, read)


def judge(data: bytes) -> None:
    """What a remote judge answered."""
    from pyunictokens.rewards.judge import parse_score  # type: ignore[import-not-found]

    score, _ = parse_score(data.decode("utf-8", errors="replace"), 1.0, 10.0)
    assert 1.0 <= score <= 10.0


def experts(data: bytes) -> None:
    """What came over a connection to served experts, or from them."""
    from pyunictokens.rewards.served.messages import decode, tensor, texts, unpack_batch

    message, tensors = decode(data)
    for read in (
        lambda: unpack_batch(message, tensors, torch.device("cpu")),
        lambda: (texts(message, "parts"), tensor(tensors, "total")),
        lambda: tensor(tensors, "index", torch.int64),
    ):
        with contextlib.suppress(UserError):
            read()


def judge_reply(data: bytes) -> None:
    """The HTTP body that an endpoint of a judge answered with, good or bad status; the key may be anywhere in it."""
    from pyunictokens.rewards.replies import NoAnswer, complaint, completion, images

    key = _KEY
    for read in (completion, images, lambda body, key: complaint(body, key, {"retry-after": "1"})[0]):
        with contextlib.suppress(NoAnswer):
            made = read(data, key)
            json.loads(made)
            assert key not in json.dumps(json.loads(made), ensure_ascii=False)


def http_request(data: bytes) -> None:
    """Path, headers and body that a stranger sends to a server of reward models: none of them proves the key."""
    from pyunictokens.rewards.served.messages import Exchange, decode

    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    pairs = (line.partition(b":") for line in lines)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    exchange = Exchange.of(_KEY.encode() * 2, "POST", first.decode("latin-1"), headers, len(body))
    assert exchange is None
    decode(body)


def run_folder(data: bytes) -> None:
    """Any file of a run's folder, as commands open it; which one, the first byte says."""
    from pyunictokens.evaluate.report.run_files import read_run
    from pyunictokens.evaluate.report.summary import summarize
    from pyunictokens.models import ConceptTokens
    from pyunictokens.runs.run_dir import Run, RunConfig

    folder = _room() / "old"
    if not folder.exists():
        old = Path(__file__).parents[1] / "runs" / "old_run" / "run"
        shutil.copytree(old, folder, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "*.html"))
    files = sorted(str(path.relative_to(_room())) for path in folder.rglob("*") if path.is_file())

    def read(room: Path) -> None:
        for use in (
            lambda: summarize(read_run(folder)),
            lambda: Run.find(str(folder)).origin,
            lambda: RunConfig.make("toy", Run.find(str(folder)).config),
            lambda: ConceptTokens.load(folder / "final" / "concept"),
        ):
            with contextlib.suppress(UserError):
                use()

    _with(files[data[0] % len(files)] if data else files[0], data[1:], read)


_KEY = "sk-a-key-of-the-judge"

_JSON = "train/bo/info.json", "train/bo/conversations.json", "train/bo/positive_recognitions.json"
_JSON += "train/bo/random_recognitions.json", "test/bo/vqa.json", "test/bo/text_only.json"
_JSON += "test/bo/t2i_conditions.json", "train/train_images.json"

TARGETS: dict[str, Target] = {
    **{f"concept_{Path(name).stem}": _concept(name) for name in _JSON},
    **{
        function.__name__: function
        for function in (
            picture,
            safetensors,
            pickled,
            index,
            showo_config,
            magvit_config,
            tokens_json,
            tokens_tensors,
            tokens_published,
            run_state,
            run_json,
            run_tensors,
            policy,
            settings,
            overrides,
            run_config,
            log,
            evaluation,
            many,
            plan,
            experts,
            judge_reply,
            http_request,
            run_folder,
        )
    },
}
if importlib.util.find_spec("pyunictokens.rewards.judge") is not None:
    TARGETS["judge"] = judge


def check(name: str, data: bytes) -> None:
    """Run a target; whatever it raises but UserError is a defect."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with contextlib.suppress(UserError):
                TARGETS[name](data)
        finally:
            logging.disable(logging.NOTSET)


def seeds(name: str) -> list[bytes]:
    """Good files of a target's kind."""
    room = _room()
    if name.startswith("concept_"):
        (path,) = [each for each in _JSON if Path(each).stem == name[8:]]
        file = room / "data" / "concept" / path
        return [file.read_bytes()] if file.exists() else [b"{}"]
    files = {
        "picture": next((room / "data" / "concept" / "train" / "bo").glob("*.png")),
        "safetensors": room / "weights" / "a.safetensors",
        "showo_config": room / "showo_tiny" / "config.json",
        "magvit_config": room / "magvit_tiny" / "config.json",
        "tokens_json": room / "tokens" / "concept.json",
        "tokens_tensors": room / "tokens" / "concept.safetensors",
        "tokens_published": room / "published" / "epoch_3_lm_head_bias.pt",
        "run_state": room / "run" / "checkpoints" / "step_000001" / "state.json",
        "run_json": room / "run" / "run.json",
        "run_tensors": room / "run" / "checkpoints" / "step_000001" / "tensors.safetensors",
        "evaluation": room / "eval.json",
        "settings": room / "settings.yaml",
        "log": room / "metrics.jsonl",
    }
    if name in files:
        return [files[name].read_bytes()]
    if name == "pickled":
        buffer = io.BytesIO()
        torch.save({"x": torch.zeros(2)}, buffer)
        return [buffer.getvalue()]
    if name == "judge_reply":
        answer = {
            "choices": [{"message": {"content": f'{{"score": 7, "reason": "{_KEY}"}}'}}],
            "usage": {"prompt_tokens": 3},
        }
        failure = {"error": {"message": f"no such model, {_KEY}", "code": "insufficient_quota"}}
        return [json.dumps(each).encode() for each in (answer, {"data": [{"b64_json": "AAAA"}]}, failure)]
    if name == "http_request":
        from pyunictokens.rewards.served.messages import Exchange, encode

        body = encode({"parts": []}, {"total": torch.ones(2)})
        named = Exchange.begin(b"another key of thirty letters", "POST", "/v1/score").headers(body)
        lines = "".join(f"{key}: {value}\r\n" for key, value in named.items())
        return [f"/v1/score\r\n{lines}\r\n".encode() + body]
    if name == "run_folder":
        old = Path(__file__).parents[1] / "runs" / "old_run" / "run"
        return [bytes([number]) + (old / "before.json").read_bytes() for number in range(3)]
    if name == "experts":
        from pyunictokens.rewards import RewardBatch
        from pyunictokens.rewards.served.messages import encode, pack_batch

        pixels = torch.zeros(2, 3, 2, 2)
        batch = RewardBatch(pixels, ["a", "b"], ["c", "d"], ["c", "e"], 1, pixels[:1], "human")
        words, tensors = pack_batch(batch)
        scored = encode({"parts": ["ber"], "no_face": 0}, {"total": torch.ones(2), "part 0": torch.ones(2)})
        judged = encode({"prompts": ["a"]}, {"pixels": pixels, "index": torch.tensor([0, 0])})
        return [encode(words, tensors), scored, judged, encode({"error": "no"})]
    texts: dict[str, list[Any]] = {
        "index": [{"weight_map": {"x": "a.safetensors"}}],
        "policy": [
            {"trainable": "concept"},
            {"trainable": "lora", "lora": {"rank": 2, "alpha": 3, "targets": ["q_proj", "fc1"]}},
            {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["fc1", "q_proj"], "lora_dropout": 0.1},
        ],
        "run_config": [{"name": "bo", "root": "data", "model": None, "max_text": 24}],
        "many": [{"name": "bo", "state": "done"}, {"metrics": {"vqa.bleu": {"mean": 0.5}}}],
        "plan": [{"arguments": ["x"]}],
        "judge": [{"score": 7, "reason": "good"}],
    }
    if name == "overrides":
        return [b"grpo.steps=3\nstages.stages=[joint]", b"grpo.dsog.mu=1e-3"]
    return [json.dumps(value).encode() for value in texts[name]]


CORPUS = Path(__file__).parent / "corpus"


def kept(name: str) -> list[bytes]:
    """Inputs of the corpus for a target: each once broke it, or stands for a kind that must not."""
    return [file.read_bytes() for file in sorted((CORPUS / name).glob("*"))]
