"""The doctor: what it finds, that it names a command for what is missing, and that it never raises."""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from pyunictokens.runs import doctor


def _render(report: dict[str, Any]) -> str:
    from rich.console import Console

    text = io.StringIO()
    doctor.render(report, Console(file=text, width=200))
    return text.getvalue()


def test_report_is_json_and_names_what_is_here() -> None:
    import torch

    report = json.loads(json.dumps(doctor.examine()))
    assert report["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert report["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report["core"]["loads"] is True
    assert report["backends"]["reference"]["available"] is True
    assert report["steps"]["mode"] in ("loop", "replay", "eager") and report["steps"]["why"]
    assert report["attention"]["way"] and report["attention"]["why"]
    assert report["attention"]["way"] in _render(report)
    assert report["gelu"]["way"] in ("fused", "plain") and report["gelu"]["why"]
    assert "product with GELU" in _render(report)
    assert report["cpu"]["torch_threads"] == torch.get_num_threads()
    assert report["gpu"]["present"] == torch.cuda.is_available()


def test_every_requirement_of_the_project_is_looked_at() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def names(lines: list[str]) -> set[str]:
        """Distributions by their lower-case names, with those of extras that an extra names."""
        found: set[str] = set()
        for line in lines:
            if inner := re.fullmatch(r"pyunictokens\[(.*)\]", line):
                found |= set().union(*(names(extras[extra]) for extra in inner[1].split(",")))
            else:
                found.add(re.split("[><= ]", line)[0].lower())
        return found

    assert {name.lower() for name in doctor.REQUIRED} == names(project["dependencies"] + extras["cli"])
    for name, (extra, _) in doctor.OPTIONAL.items():
        assert not extra or name.lower() in names(extras[extra]), name


def test_a_missing_optional_package_names_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    known = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "open_clip_torch" else known(name))
    report = doctor.examine()
    assert report["optional"]["open_clip_torch"]["add"] == "pip install 'pyunictokens[rewards]'"
    assert "pip install 'pyunictokens[rewards]'" in _render(report)
    assert not any("open_clip" in problem["what"] for problem in report["problems"])


def test_a_missing_required_package_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    known = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "sacrebleu" else known(name))
    report = doctor.examine()
    assert not report["ok"]
    assert {"what": "sacrebleu is missing", "do": "pip install sacrebleu"} in report["problems"]
    assert "pip install sacrebleu" in _render(report)


def test_a_core_that_does_not_load_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, package: str | None = None) -> Any:
        raise ImportError("undefined symbol: _Z3foo")

    monkeypatch.setattr(doctor.importlib, "import_module", refuse)
    core = doctor._core()
    assert core["loads"] is False and "undefined symbol" in core["why"] and "pip install" in core["add"]


@pytest.mark.parametrize("harm", ["none", "changed", "missing", "no list"])
def test_toy_checksums(harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"showo/model.safetensors": b"weights" * 100, "experts.json": b"{}"}
    for name, content in data.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in data.items()}
    (tmp_path / "provenance.json").write_text(json.dumps({"sha256": digests}))
    monkeypatch.setattr("pyunictokens.toy.model.toy_folder", lambda: tmp_path)
    if harm == "changed":
        (tmp_path / "experts.json").write_bytes(b"[]")
    elif harm == "missing":
        (tmp_path / "experts.json").unlink()
    elif harm == "no list":
        (tmp_path / "provenance.json").unlink()
    status = doctor.toy_status()
    assert status["ok"] is (harm == "none")
    wanted = {
        "changed": "experts.json has another checksum",
        "missing": "experts.json is missing",
        "no list": "provenance",
    }
    assert harm == "none" or wanted[harm] in status["why"]
