"""The build: what the core links, what an import pulls in, what constraints and package data cover."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyunictokens as uct
from pyunictokens.ops.backends import cpu as _native

ROOT = Path(__file__).parent.parent
CORE = _native.core()
HEAVY = ("transformers", "peft", "sklearn", "matplotlib", "tensorboard", "jinja2", "typer", "rich", "triton.compiler")


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_core_is_built_and_of_this_version() -> None:
    assert CORE is not None
    info = uct.ops.build_info()
    assert info["version"] == uct.__version__
    assert info["cpu_level"] == CORE.cpu_levels()[-1]
    assert CORE.cpu_levels()[0] == "baseline"


def test_the_cuda_part_answers_without_a_gpu() -> None:
    cuda = uct.ops.build_info()["cuda"]
    if cuda is None:
        pytest.skip("built without nvcc")
    assert "80-real" in cuda["architectures"]
    assert "virtual" in cuda["architectures"]
    assert cuda["runtime_version"] >= 11000
    assert (cuda["device_count"] == 0) == bool(cuda["error"])


def test_the_core_links_neither_torch_nor_cuda() -> None:
    if CORE is None or shutil.which("ldd") is None:
        pytest.skip("no ldd here")
    linked = subprocess.run(["ldd", CORE.__file__], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in linked or "libc.musl" in linked
    assert not re.search(r"libcuda|libcudart|libtorch|libc10|libgomp", linked)


def test_the_core_loads_without_torch() -> None:
    assert CORE is not None
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_core', {CORE.__file__!r})\n"
        "core = importlib.util.module_from_spec(spec); spec.loader.exec_module(core)\n"
        "print(core.philox4x32(0, 0, 0, 0, 0, 0)[0], 'torch' in sys.modules)"
    )
    assert _python(code) == f"{0x6627E8D5} False"


def test_ops_need_torch_alone() -> None:
    code = f"import sys, pyunictokens\npyunictokens.ops\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    assert _python(code) == "[]"


def test_kernels_are_a_part_of_the_package() -> None:
    import pyunictokens.kernels

    assert Path(pyunictokens.kernels.__file__).name == "__init__.py"
    # From elsewhere, where the source tree is not on the path by accident.
    code = "import os; os.chdir('/'); import pyunictokens.kernels as k; print(k.__name__)"
    assert _python(code) == "pyunictokens.kernels"


def test_an_unknown_cpu_level_is_refused() -> None:
    assert CORE is not None
    with pytest.raises(ValueError, match="cpu level 'avx9'"):
        CORE.maskgit_step((0,) * 20, 0, "avx9")


def _names(lines: list[str]) -> set[str]:
    found = (re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line) for line in lines)
    return {re.sub(r"[-_.]+", "-", match[0]).lower() for match in found if match}


def test_constraints_pin_every_direct_dependency_and_name_no_host() -> None:
    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.match(r"[a-z0-9-]+==\S+( ; .+)?$", line) for line in lines)
    assert "://" not in text
    project = (ROOT / "pyproject.toml").read_text()
    block = project.split("\ndependencies = [")[1].split("]\n")[0] + project.split("\ndev = [")[1].split("]\n")[0]
    wanted = _names(re.findall(r'"([^"]+)"', block))
    assert len(wanted) > 20
    assert wanted <= _names(lines)


def test_a_wrong_build_setting_is_named() -> None:
    pytest.importorskip("pybind11")
    environment = {**os.environ, "PYUNICTOKENS_CUDA": "perhaps"}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", os.devnull],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "PYUNICTOKENS_CUDA=perhaps: must be on, off or auto" in done.stderr
