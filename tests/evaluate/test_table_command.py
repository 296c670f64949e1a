"""`pyunictokens evaluate table` and `compare` on a tiny model, with the toy's judge served on this machine."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pyunictokens.data.images import to_pil
from pyunictokens.evaluate import judge_prompts as judging
from pyunictokens.evaluate.tasks import IMAGE_TASKS
from pyunictokens.toy.concept import write_toy_concept
from pyunictokens.toy.drawing import render
from pyunictokens.toy.scene import random_scene
from tests.tiny import tiny_experts, tiny_toy

ROOT = Path(__file__).parent.parent.parent
TINY = ("samples=1", "limit=1", "timesteps=2", "max_new_tokens=4", "--device", "cpu")


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def call(*words: object, code: int = 0) -> str:
    from pyunictokens.cli import app

    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyunictokens.toy.model.load_toy", tiny_toy)
    monkeypatch.setattr("pyunictokens.toy.rewards.load_toy_rewards", tiny_experts)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_concept(tmp_path_factory.mktemp("data"), seed=1, kind="animal", name="bo")


@pytest.fixture
def judge() -> Iterator[str]:
    module = script("local_judge")
    server = module.make_server(judge=module.ToyJudge())
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def test_the_whole_row_with_a_judge_and_two_baselines(data: Path, toy: None, judge: str, tmp_path: Path) -> None:
    judged = ("--judge-url", judge, "--judge-model", "toy", "--judge-key-env", "none")
    models = ("-m", "ours:base", "-m", "showo-tp", "-m", "showo-ip", "-m", "real")
    text = call("evaluate", "table", data, *models, *judged, "--out", tmp_path, *TINY)
    assert "ours (base)" in text and "Show-o + TP" in text and "Dense Rea. Gen. Judge" in text
    content = json.loads((tmp_path / "results.json").read_text())
    found = {row["model"]: row["metrics"] for row in content["rows"]["all"]}
    from pyunictokens.evaluate.tables import TABLE_1

    for model in ("ours (base)", "Show-o + TP", "Show-o + IP"):
        assert {column.key for column in TABLE_1} <= set(found[model]), model
    assert set(found["Real images"]) == {key for key in found["Show-o + TP"] if key.partition(".")[0] in IMAGE_TASKS}
    assert content["failures"] == [] and (tmp_path / "pages" / "index.html").is_file()
    again = call("evaluate", "table", data, *models, *judged, "--out", tmp_path, *TINY)
    assert "0 of" in again.splitlines()[-1]
    differences = call(
        "evaluate", "compare", tmp_path, tmp_path, "--model-a", "Show-o + TP", "--model-b", "ours (base)"
    )
    assert "Show-o + TP → ours (base)" in differences and "recognition.weight" in differences


def test_without_a_judge_the_rest_is_filled(data: Path, toy: None, tmp_path: Path) -> None:
    text = call(
        "evaluate", "table", data, "-m", "showo-tp", "--out", tmp_path, *TINY, "tasks=[vqa, pure]", "--no-pages"
    )
    assert "judge: none was given" in text and not (tmp_path / "pages").exists()
    text = call(
        "evaluate", "table", data, "-m", "showo-tp", "--out", tmp_path, *TINY, "tasks=[pure]", "--clip", "nowhere"
    )
    assert "not judged: Show-o + TP" in text and "CLIP model nowhere" in text


def test_what_cannot_be_used_is_said_in_a_line(data: Path, toy: None, tmp_path: Path) -> None:
    for words, message in (
        ((data,), "which models?"),
        ((data, "-m", "gpt"), "must begin with one of"),
        ((data, "-m", "real", "--name", "mimi"), "no concept 'mimi'"),
        ((data, "-m", "real", "sample=3"), "did you mean 'samples'"),
        ((data, "-m", "real", "--judge-url", "http://127.0.0.1:9/v1"), "--judge-url needs --judge-model"),
        ((tmp_path / "none", "-m", "real"), "no such folder"),
        ((data, "-m", f"transformers:{tmp_path}"), "the table is empty"),
    ):
        assert message in call("evaluate", "table", *words, "--out", tmp_path / "t", *TINY, code=2)
    assert "no such file" in call("evaluate", "compare", tmp_path / "a.json", tmp_path / "b", code=2)
    assert "share no scored item" not in call("evaluate", "--help")


def test_two_evaluations_of_a_run_can_be_compared(tmp_path: Path) -> None:
    from tests.evaluate.synthetic import result

    result(0.0).save(tmp_path / "before.json")
    result(0.1).save(tmp_path / "after.json")
    text = call("evaluate", "compare", tmp_path / "before.json", tmp_path / "after.json")
    assert "reasoning_generation.reward" in text and "+0.1" in text


def test_two_runs_are_compared_by_their_last_evaluation(tmp_path: Path) -> None:
    from tests.evaluate.synthetic import result

    for name, shift in (("one", 0.0), ("two", 0.1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("name: bo\n")
        result(shift).save(tmp_path / name / "after.json")
    text = call("compare", tmp_path / "one", tmp_path / "two")
    assert "reasoning_generation.reward" in text and "+0.1" in text
    (tmp_path / "two" / "after.json").unlink()
    assert "holds no after.json: measure it" in call("compare", tmp_path / "one", tmp_path / "two", code=2)
    assert "no such file or folder" in call("compare", tmp_path / "one", tmp_path / "three", code=2)


def test_the_page_shows_the_table_that_was_measured() -> None:
    module = script("toy_table")
    content = json.loads((ROOT / "docs" / "toy_table.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert module.BEGIN + module.block(content) + module.END in page, "run python experiments/toy_table.py --docs"
    assert content["failures"] == 0 and list(content["rows"]) == ["ours", "Show-o + TP", "Show-o + IP", "Real images"]


# --- the toy's judge -----------------------------------------------------------------------------------------------


def ask(url: str, content: Any, path: str = "/chat/completions") -> tuple[int, dict[str, Any]]:
    body = json.dumps({"model": "toy", "messages": [{"role": "user", "content": content}]}).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, body)) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.mark.parametrize(
    ("part", "slots"),
    [
        ("a photo of dog wearing yellow glasses", {"shape": "dog", "wear": "glasses", "wear_colour": "yellow"}),
        ("beside a blue ball on the beach", {"item": "ball", "item_colour": "blue", "place": "beach"}),
        ("a striped pink dog", {"shape": "dog", "colour": "pink", "pattern": "striped"}),
        ("at parties it wears a yellow scarf", {"wear": "scarf", "wear_colour": "yellow"}),
        ("a photo", {}),
    ],
)
def test_the_local_judge_reads_parts(part: str, slots: dict[str, str]) -> None:
    assert script("local_judge").wanted(part) == slots


def test_the_local_judge_scores_what_it_sees(judge: str) -> None:
    import numpy as np
    from PIL import Image

    from pyunictokens.data.images import from_pil
    from pyunictokens.rewards.judge import Judge, JudgeConfig, JudgeItem

    scene = random_scene(np.random.default_rng(4), "animal")
    drawn = from_pil(Image.fromarray(render(scene, 64)))
    assert isinstance(to_pil(drawn), Image.Image)
    words = {slot: scene.word(slot) for slot in ("colour", "shape", "place")}
    right = f"a {words['colour']} {words['shape']}, in the {words['place']}"
    wrong = "a red star" if words["shape"] != "star" else "a blue fish"
    client = Judge(JudgeConfig("toy", judge, None))
    items = [
        JudgeItem(judging.segment_question(right, "thing"), [drawn]),
        JudgeItem(judging.segment_question(f"a {words['shape']} in the {_other(words['place'])}", "thing"), [drawn]),
        JudgeItem(judging.segment_question(wrong, "thing"), [torch.full((3, 64, 64), -1.0)]),
        JudgeItem(judging.answer_question("what?", "a red ball", "The red ball.")),
        JudgeItem(judging.answer_question("what?", "a red ball", "a blue ball")),
    ]
    values = [score.value for score in client.score(items)]
    assert values[0] == 1.0 and values[1] == 0.5 and values[3] == 1.0 and values[4] == 0.5
    assert values[2] is not None and values[2] < 1


def _other(place: str) -> str:
    return "snow" if place != "snow" else "beach"


def test_the_local_judge_refuses_what_is_no_question_of_its_own(judge: str) -> None:
    status, body = ask(judge, "What is the capital of France?")
    assert status == 400 and "answers and parts" in body["error"]["message"]
    assert ask(judge, "x", "/models")[0] == 404
    bad = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    text = {"type": "text", "text": judging.segment_question("a dog", "dog")}
    assert ask(judge, [*bad, text])[0] == 400
