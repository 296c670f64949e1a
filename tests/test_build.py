"""The build: what the core links, what an import pulls in, what constraints and package data cover."""

from __future__ import annotations

import ast
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


BARE = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
FREE = {"torch", "torchgen", "functorch", "numpy", "pyunictokens", "sympy", "mpmath", "networkx", "jinja2",
        "markupsafe", "fsspec", "filelock", "typing_extensions", "setuptools", *sys.stdlib_module_names}
class Only(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.partition(".")[0]
        return PathFinder.find_spec(name, path, target) if top in FREE or top.startswith("_") else None
sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Only]
"""
"""An interpreter in which torch with its own requirements and numpy can be imported, and nothing else."""


@pytest.mark.slow
def test_the_operations_run_where_torch_and_numpy_alone_are_installed() -> None:
    code = """
import torch
import pyunictokens as uct
torch.manual_seed(0)
hidden, weight = torch.randn(3, 2, 5, 7, requires_grad=True), torch.randn(11, 7, requires_grad=True)
chosen = torch.randint(11, (3, 2, 5))
old = uct.ops.selected_logprob(hidden, weight, chosen)
assert torch.allclose(old, (hidden @ weight.T).log_softmax(-1).gather(-1, chosen[..., None])[..., 0], atol=1e-5)
loss, stats = uct.ops.grpo_loss(old, old.detach(), None, torch.randn(3), beta=0.0)
whole, _, _ = uct.ops.maskgit_grpo_loss(hidden, weight, chosen, old.detach(), None, torch.randn(3), beta=0.0)
(loss + whole).backward()
assert hidden.grad.abs().sum() > 0
out = uct.ops.maskgit_step(torch.randn(2, 9, 13), torch.full((2, 9), uct.MASK), mask_len=4, temperature=1.0, seed=1,
                           sample_ids=torch.arange(2), step=0)
assert out.masked.sum() == 8 and uct.ops.mask_schedule("cosine", 0, 2) > 0 and uct.ops.capabilities()
print("done")
"""
    assert _python(BARE + code) == "done"


def test_what_is_missing_names_its_extra(tmp_path: Path) -> None:
    cases = [
        ("uct.ConceptTokens('bo', 8).save('.')", "safetensors", "train"),
        ("uct.rollout; uct.TextTokenizer.from_pretrained('.')", "tokenizers", "train"),
        ("from pyunictokens.train.policy import *; add_adapters(None, LoraConfig(), 0)", "peft", "train"),
        ("from pyunictokens.data.images import read_picture", "PIL", "data"),
        ("from pyunictokens.config.settings import load_yaml; load_yaml('x.yaml')", "yaml", "train"),
        ("from pyunictokens.evaluate.metrics import word_bleu; word_bleu('a b', 'a b')", "sacrebleu", "evaluate"),
        ("from pyunictokens.rewards.networks import require; require('facenet_pytorch', 'rewards')",
         "facenet_pytorch", "rewards"),
    ]  # fmt: skip
    body = f"import os; os.chdir({str(tmp_path)!r}); open('x.yaml', 'w').close()\nimport pyunictokens as uct\n"
    for code, _, _ in cases:
        body += (
            f"try:\n    exec({code!r}); print()\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
        )
    for line, (code, package, extra) in zip(_python(BARE + body).splitlines(), cases, strict=True):
        wanted = rf"MissingExtra {package} is needed here .*pip install 'pyunictokens\[{extra}\]'"
        assert re.fullmatch(wanted, line), (code, line)


def test_the_command_line_without_its_packages_says_what_to_install() -> None:
    code = (
        BARE
        + "import runpy; sys.argv = ['pyunictokens', '--help']; runpy.run_module('pyunictokens', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "typer is needed here" in done.stderr and "pip install 'pyunictokens[cli]'" in done.stderr


def _extras() -> dict[str, set[str]]:
    """Extras by the distributions they bring, those of other extras included. Names in lower case with dashes."""
    text = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[project")[0]
    lists = {
        name: re.findall(r'"([^"]+)"', body) for name, body in re.findall(r"^(\w+) = \[(.*?)\]$", text, re.M | re.S)
    }

    def names(extra: str) -> set[str]:
        found: set[str] = set()
        for line in lists[extra]:
            inner = re.fullmatch(r"pyunictokens\[(.*)\]", line)
            found |= set().union(*map(names, inner[1].split(","))) if inner else _names([line])
        return found

    return {extra: names(extra) for extra in lists}


def test_every_import_of_an_optional_package_names_an_extra_that_brings_it() -> None:
    """`with needs(extra):` around imports and `require(module, extra)`; the command line asks once, in __main__.py."""
    extras, package = _extras(), ROOT / "pyunictokens"
    assert extras["all"] >= extras["cli"] >= extras["train"] >= extras["data"]
    called = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "open_clip": "open-clip-torch"}
    called |= {"mlflow": "mlflow-skinny", "faiss": "faiss-cpu"}
    free = {"torch", "numpy", "triton", "pyunictokens", *sys.stdlib_module_names}

    def check(module: str, extra: str | None, where: str) -> None:
        top = module.partition(".")[0]
        if top in free or (extra is None and where.startswith("cli/") and top in {"typer", "rich"}):
            return
        assert extra is not None, f"{where}: import {module} without needs(extra)"
        assert _names([called.get(top, top)]) <= extras[extra], f"{where}: {module} does not come with {extra}"

    def visit(node: ast.AST, extra: str | None, where: str) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Try) and any("ImportError" in ast.unparse(each.type or node) for each in node.handlers):
            return  # does without
        if isinstance(node, ast.With):
            found = re.match(r"needs\('(\w+)'\)", ast.unparse(node.items[0].context_expr))
            extra = found[1] if found else extra
        if isinstance(node, ast.Import):
            for alias in node.names:
                check(alias.name, extra, where)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            check(node.module or "", extra, where)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
            named = re.match(r"require\('([\w.]+)', '(\w+)'\)", ast.unparse(node))
            check(*(named.groups() if named else ("torch", "")), where)
        for child in ast.iter_child_nodes(node):
            visit(child, extra, where)

    for file in package.rglob("*.py"):
        visit(ast.parse(file.read_text(encoding="utf-8")), None, file.relative_to(package).as_posix())


@pytest.mark.slow
def test_type_checkers_see_the_package_from_elsewhere(tmp_path: Path) -> None:
    """An editable install has to put a path where checkers look: an import hook would make the package Any for them."""
    (tmp_path / "user.py").write_text("import pyunictokens\nreveal_type(pyunictokens.ops.selected_logprob)\n")
    rooms = ",".join(
        f"pyunictokens.{p.name}.*" for p in (ROOT / "pyunictokens").iterdir() if p.is_dir() and p.name != "ops"
    )
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n[mypy-torch.*,numpy.*,{rooms}]\nfollow_imports = skip\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "user.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}: is the package installed by `pip install -e .` of this version?"
    assert re.search(r"def \(hidden: .*, target: .*, \*, .*guidance_scale: .*float =", done.stdout), done.stdout


def test_kernels_are_a_part_of_the_package() -> None:
    import pyunictokens.kernels

    assert Path(pyunictokens.kernels.__file__).name == "__init__.py"
    # From elsewhere, where the source tree is not on the path by accident.
    code = "import os; os.chdir('/'); import pyunictokens.kernels as k; print(k.__name__)"
    assert _python(code) == "pyunictokens.kernels"


def test_an_unknown_cpu_level_is_refused() -> None:
    assert CORE is not None
    with pytest.raises(ValueError, match="cpu level 'avx9'"):
        CORE.maskgit_step((1,) * 20, 0, "avx9")  # sizes and addresses of 1 pass: the level is refused before use


def _names(lines: list[str]) -> set[str]:
    found = (re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line) for line in lines)
    return {re.sub(r"[-_.]+", "-", match[0]).lower() for match in found if match}


def test_constraints_pin_every_direct_dependency_and_name_no_host() -> None:
    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.match(r"[a-z0-9-]+==\S+( ; .+)?$", line) for line in lines)
    assert "://" not in text
    project = (ROOT / "pyproject.toml").read_text()
    wanted = _names(re.findall(r'"([^"]+)"', project.split("\ndependencies = [")[1].split("]\n")[0])) | _extras()["dev"]
    assert len(wanted) > 20
    assert wanted <= _names(lines)


def test_hooks_and_workflow_run_what_the_command_runs() -> None:
    """The steps of .ci/run are those of the workflow, the tools before a commit have the tested versions."""
    import yaml

    script = (ROOT / ".ci" / "run").read_text()
    steps = re.findall(r"^#   (\w+) ", script, re.MULTILINE)
    assert steps == re.search(r"steps=\$\{\*:-(.*)\}", script)[1].split()  # type: ignore[index]
    for step in set(steps) - {"lint", "test", "slow", "shared"}:
        assert (ROOT / ".ci" / f"{step}.sh").is_file()
    readme = (ROOT / "README.md").read_text()
    assert "\nmake test\n" in readme and 'lint | test | slow) make "$step"' in script
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["step"]
    assert job["strategy"]["matrix"]["step"] == [step for step in steps if step != "shared"]
    assert job["steps"][-1]["run"] == ".ci/run ${{ matrix.step }}"
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(pin in pins for hook in hooks for pin in hook.get("additional_dependencies", []))
    lint = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    assert all(hook["entry"].split()[-1] in lint or hook["entry"].split()[0] in lint for hook in hooks)
    assert re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [uct.__version__]


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
