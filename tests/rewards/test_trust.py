"""A folder from a stranger runs no code: what its settings name is imported only after its user has said so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pyunictokens.cli import app
from pyunictokens.models.bundle import Sources
from pyunictokens.rewards.load import reaches_out
from pyunictokens.runs.bundle import check_objective, choose_rewards, load_scorers
from pyunictokens.toy.concept import write_toy_concept
from pyunictokens.utils import trust
from pyunictokens.utils.errors import UserError

TRAP = {"experts": {"x": {"use": "torch.hub:load", "repo_or_dir": ".", "source": "local"}}, "weights": {"x": 1}}


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.mark.parametrize(
    "stored", [TRAP, "os:getcwd", "http://stranger.example:7000", {"models": {"judge": {"model": "m"}}}]
)
def test_what_a_folder_names_is_refused_until_it_is_trusted(tmp_path: Path, stored: Any) -> None:
    with pytest.raises(UserError, match=r"its settings name .*--trust"):
        choose_rewards(None, stored, tmp_path / "run")
    assert choose_rewards(None, stored, tmp_path / "run", trust=True) == (stored, True)
    assert choose_rewards(None, stored, tmp_path / "run") == (stored, True), "remembered"
    with pytest.raises(UserError, match="--trust"):
        choose_rewards(None, stored, tmp_path / "another")
    assert str(tmp_path) not in trust.memory().read_text() and trust.memory().stat().st_mode & 0o077 == 0


def test_other_settings_in_the_same_folder_are_not_trusted(tmp_path: Path) -> None:
    choose_rewards(None, TRAP, tmp_path, trust=True)
    changed = {**TRAP, "experts": {"x": {**TRAP["experts"]["x"], "repo_or_dir": "/elsewhere"}}}  # type: ignore[dict-item]
    with pytest.raises(UserError, match="--trust"):
        choose_rewards(None, changed, tmp_path)


def test_the_command_line_is_trusted_and_remembered(tmp_path: Path) -> None:
    assert choose_rewards("my:load", None, tmp_path) == ("my:load", True)
    assert choose_rewards(None, "my:load", tmp_path) == ("my:load", True), "as --resume reads it"
    plain = {"experts": {"der": {"path": "weights/dino"}}}
    assert choose_rewards(None, plain, tmp_path) == (plain, False) and not reaches_out(plain)
    assert choose_rewards(None, None, tmp_path) == (None, False)


def test_nothing_is_imported_without_it(tmp_path: Path) -> None:
    """The door behind the door: callers that ask nobody get no import either."""
    with pytest.raises(UserError, match="not trusted"):
        load_scorers(Sources(), "cpu", TRAP)
    with pytest.raises(UserError, match="not trusted"):
        load_scorers(Sources(), "cpu", "os:getcwd")


def test_a_memory_that_cannot_be_written_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert choose_rewards(None, TRAP, tmp_path, trust=True) == (TRAP, True)
    assert "cannot be written" in caplog.text


def test_evaluate_and_resume_do_not_run_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole commands, on a folder whose config.yaml names torch.hub and whose hubconf.py would leave a mark."""
    import yaml
    from typer.testing import CliRunner

    from pyunictokens.cli import app
    from pyunictokens.toy.concept import write_toy_concept

    monkeypatch.chdir(tmp_path)
    write_toy_concept(tmp_path / "data")
    (tmp_path / "hubconf.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef it(**kw): pass\n")
    trap = {"experts": {"x": {"use": "torch.hub:load", "repo_or_dir": str(tmp_path), "model": "it", "source": "local"}}}
    run = tmp_path / "theirs"
    run.mkdir()
    (run / "policy.json").write_text("{}")  # finished, by the look of it
    settings = {"root": str(tmp_path / "data"), "name": "bo", "rewards": trap}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    for command in (["evaluate", "theirs"], ["train", "--out", "theirs", "--resume"]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2 and "--trust" in result.output.replace("\n", " "), result.output
        assert not (tmp_path / "ran").exists()


def test_an_objective_that_a_folder_names_is_refused_until_it_is_trusted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    check_objective("gspo", [], run)
    for words in ([], ["grpo.steps=3"], ["x=objective"]):
        with pytest.raises(UserError, match=r"grpo\.objective=trap:Objective, which would be imported.*--trust"):
            check_objective("trap:Objective", words, run)
    check_objective("trap:Objective", ["grpo.objective=trap:Objective"], run)
    check_objective("trap:Objective", [], run)  # remembered: --resume of it needs no word
    for objective, folder in (("trap:Other", run), ("trap:Objective", tmp_path / "another")):
        with pytest.raises(UserError, match="--trust"):
            check_objective(objective, [], folder)
    check_objective("trap:Other", [], run, trust=True)


def test_a_command_imports_no_objective_of_a_stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    write_toy_concept(tmp_path / "data", seed=5, kind="animal", name="bo")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"root: {tmp_path / 'data'}\nname: bo\ngrpo:\n  objective: trap:Objective\n")
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    for words in (
        ["train", "--out", run, "--resume"],
        ["train", "--config", run / "config.yaml", "--out", tmp_path / "other"],
        ["reinforce", tmp_path / "prompts.txt", "--reward", "math:sqrt", "--config", run / "config.yaml", "--out", run],
    ):
        said = CliRunner().invoke(app, [str(word) for word in words])
        assert said.exit_code == 2 and "--trust" in said.output, said.output
    assert not (tmp_path / "sprung").exists()
