"""Who may import whom: an arrow never runs back, and the doors of the library need torch alone."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pyunictokens

PACKAGE = Path(pyunictokens.__file__).parent

MAY_IMPORT = {
    "utils": set(),
    "config": {"utils"},
    "ops": {"utils", "config"},
    "models": {"utils", "config", "ops"},
    "data": {"utils", "config", "models"},
    "rollout": {"utils", "config", "ops", "models"},
    "rewards": {"utils", "config", "models", "data"},
    "evaluate": {"utils", "config", "models", "data", "rollout", "rewards"},
    "train": {"utils", "config", "ops", "models", "data", "rollout", "rewards"},
    "toy": {"utils", "config", "models", "data", "rewards"},
    "baselines": {"utils", "config", "ops", "models", "data", "rollout", "rewards", "evaluate", "train"},
    "runs": {"utils", "config", "ops", "models", "data", "rollout", "rewards", "evaluate", "train", "toy", "baselines"},
    "serve": {"utils", "config", "models", "data", "rollout", "rewards", "runs"},
}
MAY_IMPORT["cli"] = set(MAY_IMPORT)
"""Rooms by the rooms they may know. A room that is not here fails the test: give it its line."""


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(file: Path) -> set[str]:
    """Rooms of this package that `file` imports, wherever in the file it does."""
    base = ["pyunictokens", *file.relative_to(PACKAGE).parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.ImportFrom):
            start = base[: len(base) - node.level + 1] if node.level else []
            target = [*start, *(node.module or "").split(".")] if node.module else start
            if target[:1] == ["pyunictokens"]:
                names = [target[1]] if len(target) > 1 else [alias.name for alias in node.names]
                found |= set(names)
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            found |= {part[1] for part in parts if part[0] == "pyunictokens" and len(part) > 1}
    return {name for name in found if (PACKAGE / name).is_dir() or name in MAY_IMPORT}


def test_no_arrow_runs_back():
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        inside = file.relative_to(PACKAGE)
        if len(inside.parts) == 1:  # the doors: __init__ and __main__
            continue
        room = inside.parts[0]
        wrong += [f"{inside} imports {other}" for other in sorted(imports(file) - MAY_IMPORT[room] - {room, "kernels"})]
    assert not wrong, "\n".join(wrong)


def test_no_module_stands_beside_the_rooms():
    loose = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert not loose, f"give them a room: {sorted(loose)}"


OPEN = {"Any", "AnyJson"}
"""`Any` and its alias for JSON that nobody has looked at yet. `Argument` of a registered operation is one in ops."""
SAYS_ANY = {"cli/evaluate.py: parse_args"}
"""Public functions with `Any` itself in their signature: typer carries a click of its own."""


def public_functions(body: list[ast.stmt]) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods of public names, `__init__` and `__call__` among them."""
    found = []
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found += public_functions(node.body)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found += [node] if not node.name.startswith("_") or node.name in ("__init__", "__call__") else []
    return found


def test_any_is_rare_and_on_no_public_signature():
    lines, public = set(), set()
    for file in sorted(PACKAGE.rglob("*.py")):
        inside = file.relative_to(PACKAGE).as_posix()
        open_names = OPEN | {"Argument"} if inside.startswith("ops/") else OPEN
        tree = parsed(file)
        names = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
        lines |= {(inside, name.lineno) for name in names if name.id in open_names}
        for function in public_functions(tree.body):
            signature = [function.args, *([function.returns] if function.returns else [])]
            said = {node.id for part in signature for node in ast.walk(part) if isinstance(node, ast.Name)}
            public |= {f"{inside}: {function.name}"} if "Any" in said else set()
    assert public == SAYS_ANY, "a type, a protocol or `object` says more than Any"
    assert len(lines) <= 90, f"Any stands on {len(lines)} lines"


def test_the_package_and_its_operations_need_torch_alone():
    code = (
        "import sys; import pyunictokens, pyunictokens.ops;"
        "heavy = {'transformers', 'safetensors', 'tokenizers', 'PIL', 'yaml', 'typer', 'rich', 'sklearn', 'matplotlib',"
        " 'jinja2', 'peft', 'huggingface_hub', 'tensorboard', 'sacrebleu', 'pydantic', 'triton', 'uvicorn', 'httpx',"
        " 'fastapi'};"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
