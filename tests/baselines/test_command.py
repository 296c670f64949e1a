"""`pyunictokens baseline train`: plans, trains, goes on, refuses; what it leaves is a row of a table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pyunictokens.baselines.base import Trained
from pyunictokens.baselines.registry import METHODS, method
from pyunictokens.models import ConceptTokens
from pyunictokens.utils.errors import UserError

SHORT = ("max_steps=3", "num_understanding=2", "num_generation=2")
ASKED = ("samples=1", "limit=1", "timesteps=2", "max_new_tokens=4", "--device", "cpu")


def test_every_method_has_its_file_its_name_and_a_line_about_it() -> None:
    for name in METHODS:
        one = method(name)
        assert one.name == name and one.title and one.about and one.defaults(False).seed == 0
    with pytest.raises(UserError, match="did you mean showo-tp"):
        method("shows-tp")


@pytest.mark.usefixtures("tiny")
def test_the_tokens_are_those_of_train_and_make_a_row(data: Path, call: Callable[..., str], tmp_path: Path) -> None:
    mine, run = tmp_path / "bo", tmp_path / "run"
    planned = call("baseline", "train", "unictokens", data, "bo", "--out", mine, "--plan", *SHORT)
    assert "steps      6" in planned and "minutes    about" in planned and not mine.exists()
    said = call("baseline", "train", "unictokens", data, "bo", "--out", mine, *SHORT)
    assert "UniCTokens (rows 5)" in said
    call("train", data, "bo", "--out", run, "--no-grpo", "--no-evaluate", *(f"stages.{word}" for word in SHORT))
    ours, theirs = ConceptTokens.load(mine / "concept"), ConceptTokens.load(run / "concept")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))

    call("baseline", "train", "showo-tp", data, "bo", "--out", tmp_path / "tp")
    rows = ("-m", f"unictokens:{tmp_path}/{{name}}", "-m", f"showo-tp:{tmp_path}/tp", "-m", f"ours:{run}")
    out = tmp_path / "table"
    call("evaluate", "table", data, "--name", "bo", *rows, "--out", out, "tasks=[vqa, pure]", *ASKED)
    records = json.loads((out / "results.json").read_text())["records"]
    by_row = {
        name: {(r["task"], r["text"]): r["answer"] for r in records if r["model"] == name}
        for name in {r["model"] for r in records}
    }
    assert set(by_row) == {"UniCTokens", "Show-o + TP", f"ours ({run})"}
    assert by_row["UniCTokens"] == by_row[f"ours ({run})"]  # the same tokens say the same


@pytest.mark.usefixtures("tiny")
def test_what_is_there_is_gone_on_with_or_refused(data: Path, call: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "bo"
    base = ("baseline", "train", "unictokens", data, "bo", "--out", out)
    call(*base, *SHORT)
    assert "already holds a baseline" in call(*base, *SHORT, code=2)
    before = Trained.read(out)
    assert before.done and before.facts["rows"] == 5
    call(*base, *SHORT, "save_every=7", "--resume")  # finished, and save_every alters nothing
    assert Trained.read(out) == before
    assert "with other settings or models" in call(*base, "max_steps=2", "--resume", code=2)
    (out / "baseline.json").write_text(json.dumps({**json.loads((out / "baseline.json").read_text()), "done": False}))
    table = ("evaluate", "table", data, "--name", "bo", "--out", tmp_path / "table", "tasks=[vqa]", *ASKED)
    assert "training is not finished" in call(*table, "-m", f"unictokens:{out}", code=2)
    assert "was trained by unictokens, not by showo-tp" in call(*table, "-m", f"showo-tp:{out}", code=2)
    assert "needs the folder" in call(*table, "-m", "unictokens", code=2)
    assert "--vq: gpt-tp trains no masked model" in call(
        "baseline", "train", "gpt-tp", data, "bo", "--out", tmp_path / "g", "--vq", "x", code=2
    )


def test_prompts_alone_are_written_down_as_tables_name_them(
    data: Path, call: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "gpt"
    words = ("url=http://127.0.0.1:9/v1", "draw=gpt-image-1", "key_env=none")
    call("baseline", "train", "gpt-ip", data, "bo", "--out", out, *words)
    found = Trained.read(out)
    assert found.facts["words"] == "endpoint:http://127.0.0.1:9/v1,model=gpt-4o,draw=gpt-image-1,key=none+ip"
    assert found.generates and found.title == "GPT-4o + IP"
    planned = call("baseline", "train", "qwen-tp", data, "bo", "--out", tmp_path / "q", "--plan")
    assert "to fetch   Qwen/Qwen2.5-VL-7B-Instruct" in planned
