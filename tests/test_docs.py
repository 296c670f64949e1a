"""The documents hold: links lead somewhere, commands and options exist, code blocks compile and their imports work.

Also what no committed text may contain: paths of one machine, or where packages are fetched from.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import multiprocessing
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TRACKED = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")[:-1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _code_lines(text: str) -> list[str]:
    """Lines of fenced blocks without a language (or sh) and of indented blocks, continued lines joined."""
    blocks = [body for language, body in _FENCE.findall(text) if language in {"", "sh", "bash", "console"}]
    plain = _FENCE.sub("", text)
    blocks += [line[4:] for line in plain.splitlines() if line.startswith("    ")]
    return "\n".join(blocks).replace("\\\n", " ").splitlines()


@functools.cache  # the tree of all commands takes a while to build, and pages name some two hundred
def _tree() -> Any:
    import typer.main

    from pyunictokens.cli import app

    return typer.main.get_command(app)


def _commands(words: list[str]) -> tuple[Any, list[str]]:
    """The command that `words` call, and what is left of them."""
    command = _tree()
    while words and hasattr(command, "commands"):
        if words[0] in command.commands:
            command, words = command.commands[words[0]], words[1:]
        elif hasattr(command, "default") and not words[0].startswith("-"):
            command = command.commands[command.default]  # `evaluate RUN` is short for `evaluate run RUN`
        else:
            break
    return command, words


def test_there_are_documents() -> None:
    names = {_name(path) for path in DOCUMENTS}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/index.md", "docs/tour.md"} <= names


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_links_lead_somewhere(path: Path) -> None:
    text = _FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{_name(path)} links to {target}, which is not there"
        if anchor and linked.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{_name(path)} links to {target}: no such heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_commands_exist(path: Path) -> None:
    for line in _code_lines(path.read_text(encoding="utf-8")):
        found = re.match(r"(?:\$ )?pyunictokens (\S.*)", line.strip())
        if not found:
            continue
        words = shlex.split(found[1], comments=True)
        words = words[: next((i for i, word in enumerate(words) if word in {">", "|"}), len(words))]
        command, rest = _commands(words)
        assert not hasattr(command, "commands") or rest[:1] in ([], ["--help"], ["--version"]), (
            f"{_name(path)}: `{line.strip()}`: no such command"
        )
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in rest:
            option = word.partition("=")[0]
            if option.startswith("-") and option not in {"--help", "-h"}:
                assert option in known, f"{_name(path)}: `{line.strip()}`: no option {option}"


def test_the_table_of_commands_names_them_all() -> None:
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    table = set(re.findall(r"^\| `(\w+)", text, re.MULTILINE))
    commands = _tree().commands
    assert table == {name for name, command in commands.items() if not command.hidden}


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"^    make ([a-z]+)", text, re.MULTILINE) + re.findall(r"`make ([a-z]+)`", text):
            assert target in targets, f"{_name(path)}: make {target}"


def _holds(name: str, parameters: str) -> None:
    """A signature shown in a document must be that of the operation: names, order and defaults."""
    ops = importlib.import_module("pyunictokens.ops")
    shown = [word.strip() for word in parameters.split(",") if word.strip() not in {"*", ""}]
    real = inspect.signature(getattr(ops, name)).parameters.values()
    empty = inspect.Parameter.empty
    assert shown == [p.name if p.default is empty else f"{p.name}={p.default!r}" for p in real], name


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_python_blocks_compile_and_import(path: Path) -> None:
    for language, body in _FENCE.findall(path.read_text(encoding="utf-8")):
        if language != "python":
            continue
        signature = re.match(r"(\w+)\((.*?)\)\s*->", body, re.DOTALL)
        if signature:
            _holds(signature[1], signature[2])
            continue
        if body.startswith(">>>"):
            body = "\n".join(line[4:] for line in body.splitlines() if line.startswith((">>>", "...")))
        compile(body, "a block of " + _name(path), "exec")
        for line in body.splitlines():
            if re.match(r"(from|import) pyunictokens", line):
                exec(line, {})
        for attribute in re.findall(r"\buct\.((?:ops\.)?\w+)", body):
            target: Any = importlib.import_module("pyunictokens")
            for part in attribute.split("."):
                assert hasattr(target, part), f"{_name(path)}: uct.{attribute}"
                target = getattr(target, part)


def test_the_version_is_in_the_changelog() -> None:
    import pyunictokens

    assert f"## {pyunictokens.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_no_machine_paths_and_no_registry_hosts() -> None:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    forbidden = re.compile(
        rb"(?<![\w.])/(?:work|home|root|Users|workspace)/\w"
        rb"|(?:files\.|test\.)?" + rb"pypi" + rb"\.org|py" + rb"thonhosted|download\." + rb"pytorch\.org"
    )
    for name in listing.stdout.decode().split("\0"):
        path = ROOT / name
        if not name or not path.is_file() or path.suffix in {".safetensors", ".png", ".jpg", ".pt", ".npz"}:
            continue
        found = forbidden.search(path.read_bytes())
        assert found is None, f"{name}: {found[0]!r}" if found else ""


def _sources(*suffixes: str) -> dict[str, str]:
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in TRACKED if name.endswith(suffixes)}


def test_every_file_that_is_named_exists() -> None:
    """In documents, docstrings, comments and scripts. Inside the package a name is read from its own folder, the
    package or the repository; elsewhere it may also be the end of a path: `showo/model.py`."""
    if not TRACKED:
        pytest.skip("not a git checkout")
    ends = {"/".join(name.split("/")[i:]) for name in TRACKED for i in range(name.count("/") + 1)}
    written = {"table.md", "paper.md", "run_cpu.py", "sanitized_core.py"}  # by commands and scripts
    written |= {"contributing.md", "changelog.md", "reporting.md", "Python.h"}  # pages of the site; of Python
    named = re.compile(r"(?<![\w./<{*-])((?:[\w.-]+/)*[\w-]+\.(?:py|md|cu|cpp|h|sh))\b")
    for name, text in _sources(".py", ".md", ".cu", ".cpp", ".h", ".sh", ".toml", ".txt", "Makefile").items():
        inside = name.startswith(("pyunictokens/", "kernels/"))
        if name.startswith("tests/"):
            continue  # tests write files of their own
        for found in named.findall(text):
            if Path(found).name in written or "NAME" in found or found.startswith("../shared/"):
                continue
            places = (ROOT / found, ROOT / "pyunictokens" / found, ROOT / name / ".." / found)
            short = re.sub(r"^(?:\.\./|[A-Z]+/)+", "", found)
            there = any(place.resolve().is_file() for place in places) or (not inside and short in ends)
            assert there, f"{name} names {found}, which is not there"


def test_every_module_that_is_named_exists() -> None:
    if not TRACKED:
        pytest.skip("not a git checkout")
    known = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in TRACKED if ".py" in name}
    known |= {f"pyunictokens.{name}" for name in known if name.startswith("kernels")} | {"pyunictokens._core"}
    known.add("pyunictokens.lookalike")  # the name of an error handler of codecs, not of a module
    for name, text in _sources(".py", ".md", ".sh", ".toml", "Makefile").items():
        for found in re.findall(r"(?<![\w./-])(?:pyunictokens|benchmarks|experiments)(?:\.\w+)+(?![\w/])", text):
            parts = found.split(".")
            depth = next(n for n in range(len(parts), -1, -1) if n == 0 or ".".join(parts[:n]) in known)
            if depth == len(parts) or (len(parts) == 2 and parts[1] in {"md", "json", "yaml", "py"}):
                continue
            target: Any = importlib.import_module(".".join(parts[:depth])) if depth else None
            for part in parts[depth:]:
                target = getattr(target, part, None)
                assert target is not None, f"{name} names {found}, which is not there"


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_every_name_beside_its_file_is_defined_there(path: Path) -> None:
    """As in `train/images.py: ReferenceImages.prefix`."""
    for file, name in re.findall(r"`([\w/]+\.py): (\w+(?:\.\w+)*)`", path.read_text(encoding="utf-8")):
        source = (ROOT / "pyunictokens" / file).read_text(encoding="utf-8")
        for part in name.split("."):
            defined = re.search(rf"\b(?:def|class) {part}\b|^\s*{part}\b.* = ", source, re.MULTILINE)
            assert defined, f"{_name(path)} names {file}: {name}, which is not there"


def _contributions() -> dict[str, str]:
    """The tasks of CONTRIBUTING by their headings."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    part = text.split("\n## Where things go\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^### (.*?)\n(.*?)(?=^### |\Z)", part, re.MULTILINE | re.DOTALL))


def test_each_contribution_touches_at_most_three_files_that_exist() -> None:
    tasks = _contributions()
    assert len(tasks) == 6
    for task, text in tasks.items():
        files = re.findall(r"^- `([^`]+)`( \(new)?", text, re.MULTILINE)
        assert 1 < len([name for name, _ in files if not name.startswith("tests/")]) <= 3, task
        assert any(name.startswith("tests/") for name, _ in files), task
        for name, new in files:
            assert (ROOT / name).parent.is_dir() if new else (ROOT / name).is_file(), f"{task}: {name}"
            assert bool(new) == ("NAME" in name), f"{task}: {name}"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_examples_of_contributions_run(tmp_path: Path) -> None:
    """In a process of their own, as they enter a reward model and a backend; forked: torch takes a while to import."""
    code = "\n".join(body for text in _contributions().values() for _, body in _FENCE.findall(text))
    code += """
import io, pathlib, pyunictokens as uct
from types import SimpleNamespace
from pyunictokens.rewards.base import RewardBatch
from pyunictokens.rewards.registry import registered
batch = RewardBatch(torch.rand(3, 3, 4, 5), ["a", "b", "c"])
assert registered()["contrast"].kind().score(batch).shape == (3,) and FAMILY.recognises({"model_type": "mine"})
registry.BACKENDS["mine"] = ("cpu",)
logp, advantages = torch.randn(2, 7), torch.tensor([1.0, -1.0])
losses = [uct.ops.grpo_loss(logp, logp - 0.1, None, advantages, beta=0.0, backend=b)[0] for b in ("mine", "reference")]
assert uct.ops.capabilities()["mine"]["ops"] == ["grpo_loss"] and torch.equal(*losses)
got = BestOnly().advantages(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 0, 0]))
assert got.tolist() == [0.0, 0.0, 3.0]
assert _slowest(SimpleNamespace(rows=[{"step": 1, "seconds": 2}, {"step": 2, "seconds": 3}, {}]))["step"] == 2
pathlib.Path("metrics.jsonl").write_text("{}\\n{}\\n")
steps(pathlib.Path("."))
"""
    child = multiprocessing.get_context("fork").Process(target=_execute, args=(code, tmp_path))
    child.start()
    child.join()
    assert child.exitcode == 0 and (tmp_path / "said").read_text() == "2\n"


def _execute(code: str, folder: Path) -> None:
    os.chdir(folder)
    with open("said", "w") as said, contextlib.redirect_stdout(said):
        exec(code, {"__name__": "__main__"})


def test_nothing_refers_to_a_design_outside_the_repository() -> None:
    for name, text in _sources(".py", ".md", ".cu", ".cpp", ".h", ".sh").items():
        assert name == "tests/test_docs.py" or "DESIGN" not in text, name


def _script(name: str) -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_made_from_results(tmp_path: Path) -> None:
    import json

    script = _script("readme_tables")
    result = {
        "name": "text",
        "peer": "the plain loop",
        "ratio": 21.5,
        "ratio_min": 20.25,
        "ratio_max": 23.0,
        "rounds": 5,
        "settings": {"group": 4, "tokens": 50, "context": 290, "text_vocabulary": 50295},
        "machine": {"cpu": "Some CPU", "cores": 2, "dtype": "float32", "torch": "2.11.0"},
    }
    work = {
        "row_steps_per_image": 80.5,
        "least": 80.0,
        "images": 360,
        "settings": {"group": 9, "steps": 50, "preview": 10, "pass_rate": 0.25},
    }
    (tmp_path / "cpu.json").write_text(json.dumps({"results": [result], "dsog": work}))
    points = [
        {"side": side, "timesteps": t, "bytes": b << 20} for side, t, b in (("streamed", 5, 90), ("plain", 50, 999))
    ]
    memory = {"device": "cpu", "torch": "2.11.0", "settings": {"width": 256}, "points": points}
    (tmp_path / "update-memory.json").write_text(json.dumps(memory))
    text = script.rewritten_numbers(f"a\n{script.BEGIN}old{script.END}\nb\n", tmp_path)
    assert "old" not in text and text.startswith("a\n") and text.endswith("\nb\n")
    row = "| 4 answers of 50 tokens after a context of 290, a vocabulary of 50 295 text ids | the plain loop "
    assert row + "| **21.5** (20.25 to 23, n = 5) |" in text
    assert "one preview in 4 passing: **80.5** model row-steps for an accepted image over 360 images; 80 is" in text
    assert "| this library, streamed | 90 |  |" in text and "| published, every graph alive |  | 999 |" in text
    assert "Nothing was measured yet" in script.numbers(tmp_path / "none")
    with pytest.raises(SystemExit, match="markers"):
        script.rewritten_numbers("no markers", tmp_path)


def test_the_page_of_the_demo_says_what_its_json_says() -> None:
    import json

    file = ROOT / "docs" / "demo.json"
    if not file.exists():
        pytest.skip("no demo was run over its seeds in this checkout")
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    script = _script("demo_seeds")
    kinds = {run["kind"] for run in runs}
    assert len(runs) >= 3 * len(kinds)
    for kind in kinds:
        for line in script.table([run for run in runs if run["kind"] == kind]):
            assert line in page


def test_gains_of_reinforcement_are_those_of_the_runs() -> None:
    """The table of docs/toyworld.md says what docs/reinforce.json holds."""
    page = (ROOT / "docs" / "toyworld.md").read_text(encoding="utf-8")
    for run in json.loads((ROOT / "docs" / "reinforce.json").read_text(encoding="utf-8")):
        first, last = run["curve"][0]["wholly_right"], run["curve"][-1]["wholly_right"]
        cells = f"| {first:.3f} | {last:.3f} | {run['gain']:+.2f} [{run['low']:+.2f}, {run['high']:+.2f}] |"
        assert cells in page, f"{run['command']}: {cells}"
