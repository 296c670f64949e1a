"""Dockerfiles, without Docker: what they copy is there and enough to build from, and what they install exists.

The images themselves are built by nobody here.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
CALL = "import setuptools.build_meta as b, sys; print(b.prepare_metadata_for_build_wheel(sys.argv[1]))"


def instructions(file: Path) -> list[list[str]]:
    """The words of each instruction, continued lines joined, the name first."""
    text = re.sub(r"^#.*\n", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.strip()]


def copied(file: Path) -> list[str]:
    """What comes from the build context, in order."""
    found = [words[1:-1] for words in instructions(file) if words[0] == "COPY" and not words[1].startswith("--from")]
    return list(dict.fromkeys(name for names in found for name in names))


def test_there_is_one_for_a_cpu_and_one_for_a_gpu() -> None:
    assert [file.name for file in FILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_is_copied_is_there_and_not_ignored(file: Path) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied(file) and set(copied(file)) == kept
    assert all((ROOT / name).exists() for name in copied(file))


def test_the_package_can_be_built_from_what_is_copied(tmp_path: Path) -> None:
    """Its metadata at least: version, readme, licence and packages are found in these files alone."""
    file, *others = FILES
    assert all(set(copied(other)) == set(copied(file)) for other in others), "the same files, so built once"
    source = tmp_path / "src"
    source.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.safetensors")
    for name in copied(file):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    done = subprocess.run(
        [sys.executable, "-c", CALL, str(tmp_path)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    text = metadata.read_text(encoding="utf-8")
    assert "Name: pyunictokens" in text and "# pyunictokens" in text and "Provides-Extra: web" in text
    assert (source / "pyunictokens" / "kernels" / "__init__.py").is_file(), "the link leads to what was copied"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_is_installed_exists(file: Path) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    words = [word for line in instructions(file) for word in line]
    (extras,) = [found[1] for word in words if (found := re.search(r"\.whl\)?\[(.*)\]", word))]
    assert {"cli", "web"} <= set(extras.split(","))
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras.split(","))
    assert ("rewards" in extras) == (file.stem == "cuda")
    names = [line[0] for line in instructions(file)]
    assert names[0] == "FROM" and names.count("FROM") == 2 and names[-2:] == ["ENTRYPOINT", "CMD"]
    assert ["USER", "user"] in instructions(file), "not as root"
    assert any("PYUNICTOKENS_CUDA=" + ("on" if file.stem == "cuda" else "off") in word for word in words)


PYTHON_OF = {"ubuntu24.04": "3.12"}
"""What `python3` is there."""


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_wheel_is_built_for_the_python_that_it_is_installed_in(file: Path) -> None:
    build, final = (line for line in instructions(file) if line[0] == "FROM")
    assert build[2:] == ["AS", "build"]
    copied_over = [line for line in instructions(file) if line[:2] == ["COPY", "--from=build"]]
    assert copied_over == [["COPY", "--from=build", "/wheels", "/wheels"]]
    assert any(
        line[0] == "RUN" and "wheel" in line and line[line.index("-w") + 1] == "/wheels" for line in instructions(file)
    )
    kind, _, tag = build[1].partition(":")
    version = tag.partition("-")[0] if kind == "python" else PYTHON_OF[tag.rpartition("-")[2]]
    assert final[1].startswith(f"python:{version}-"), "another Python refuses the wheel"
    assert f'Python :: {version}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_final_stage_has_what_runs_need(file: Path) -> None:
    lines = instructions(file)
    final = lines[max(place for place, line in enumerate(lines) if line[0] == "FROM") :]
    compiler = any("apt-get" in line and {"gcc", "libc6-dev"} <= set(line) for line in final)
    assert compiler == (file.stem == "cuda"), "Triton compiles its launchers with gcc when kernels first run"
    assert "--uid 1000" in " ".join(next(line for line in final if "useradd" in line)), "the comment names the id"
    for line in lines:
        if "apt-get" in line:
            assert "update" in line and "-y" in line and "rm" in line, "one layer: no stale list, no question, no rest"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_key_it_shows_is_taken(file: Path) -> None:
    from pyunictokens.serve.keys import KEY, Keys, KeySettings

    for key in re.findall(rf"{KEY}=(\S+)", file.read_text(encoding="utf-8")):
        assert Keys([KeySettings(key=key)])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_commands_it_shows_exist(file: Path) -> None:
    import typer.main

    from pyunictokens.cli import app

    text = file.read_text(encoding="utf-8").replace("\\\n#", " ")
    shown = re.findall(r"docker run .*pyunictokens:\w+ +(\w.*)$", text, re.MULTILINE)
    root = typer.main.get_command(app)
    assert shown
    for line in shown:
        words = shlex.split(line)
        root.commands[words[0]].make_context("docker", words[1:])  # type: ignore[attr-defined]
