"""The stages of benchmarks/gpu.sh that are not a suite of their own: environment, core, smoke, summary.

    python -m benchmarks.gpu environment|core|smoke|summary --out FOLDER [--device cpu]

Each stage runs in a process of its own and writes FOLDER/<stage>.json as it goes, so what one loses the others keep.
`--device cpu` is the dry run: the same stages with what a machine without a GPU has. This module imports neither torch
nor the package before a stage wants them: the core stage must be able to say that they are not there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, commit, cores, processor

CARRIED = ROOT / "build" / "carried"
"""Where benchmarks/carry.sh leaves a core that was built for the Python of another machine."""
TOOLKITS = ("/usr/local/cuda", "/opt/cuda", "/usr/lib/cuda")


def write(out: Path, stage: str, content: dict[str, Any]) -> None:
    """FOLDER/<stage>.json, whole or as it was."""
    out.mkdir(parents=True, exist_ok=True)
    part = out / f"{stage}.part"
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(out / f"{stage}.json")


def read(out: Path, stage: str) -> dict[str, Any]:
    """What a stage wrote; empty where it wrote nothing."""
    file = out / f"{stage}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def brief(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def find_nvcc(path: str | None = None, toolkits: Iterable[str] = TOOLKITS) -> str | None:
    """nvcc on the PATH, else where toolkits are installed. CMake alone looks at the PATH and CUDACXX."""
    roots = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for toolkit in toolkits:
        roots += [toolkit, *sorted((str(each) for each in Path(toolkit).parent.glob("cuda-*")), reverse=True)]
    found = shutil.which("nvcc", path=path)
    return found or next((f"{root}/bin/nvcc" for root in roots if os.access(f"{root}/bin/nvcc", os.X_OK)), None)


# --- environment ------------------------------------------------------------------------------------------------------


def environment(out: Path, device: str) -> None:
    """The card, what is installed, and the two ceilings of the machine."""
    import importlib.metadata

    found: dict[str, Any] = {"python": platform.python_version(), "processor": processor(), "cores": cores()}
    found |= {"commit": commit(), "git": shutil.which("git") or "not found", "nvcc": find_nvcc() or "not found"}
    for package in (
        "torch",
        "triton",
        "transformers",
        "peft",
        "pytest",
        "pytest-xdist",
        "numpy",
        "liger-kernel",
        "trl",
    ):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    write(out, "environment", found)
    import torch

    if device == "cpu":
        found["card"] = "none: a dry run on the processor"
    else:
        properties = torch.cuda.get_device_properties(0)
        found["card"], found["capability"] = properties.name, f"{properties.major}.{properties.minor}"
        found["memory_bytes"], found["cuda"] = properties.total_memory, torch.version.cuda
    write(out, "environment", found)
    from benchmarks.ops import clock

    dry = device == "cpu"
    copy, matrix = clock.ceilings(device, torch.float32 if dry else torch.bfloat16, smoke=dry)
    found["copy_bytes_per_second"], found["matrix_flops_per_second"] = copy, matrix
    write(out, "environment", found)
    for name, value in found.items():
        print(f"{name}: {value}")


# --- core -------------------------------------------------------------------------------------------------------------


def core(out: Path, device: str) -> None:
    """Put a compiled core in place: one that was carried here, else one built for this card alone, else the CPU part.

    Loud about what it fell back to: without a CUDA part the step kernel and the captured loop are not measured at all.
    """
    said: dict[str, Any] = {"source": "as installed", "tried": []}
    if device != "cpu":
        for name, put in (("carried", _carried), ("built", _built), ("built without CUDA", _built_for_cpu)):
            try:
                put(out)
                said["source"] = name
            except Exception as error:
                said["tried"].append(f"{name}: {brief(error)}")
                print(f"  {name}: {brief(error)}", flush=True)
                continue
            said["info"] = info = _look()
            write(out, "core", said)
            if "error" not in info and (name == "built without CUDA" or info["cuda"]):
                break
            said["tried"].append(f"{name}: {info.get('error', 'has no CUDA part')}")
    said["info"] = info = _look()
    loud = info.get("error") or (
        "" if info.get("cuda") else "THE CORE HAS NO CUDA PART: maskgit_step and the loop run as"
    )
    said["fell_back"] = f"{loud} the reference and replay" if loud.startswith("THE CORE") else loud
    write(out, "core", said)
    print(f"core: {said['source']}; {info}")
    if said["fell_back"]:
        print(f"!!! {said['fell_back']}")
        for line in said["tried"]:
            print(f"!!! tried: {line}")


def _look() -> dict[str, Any]:
    """What the core says of itself, asked in a process of its own."""
    code = "import json, torch, pyunictokens as u, pyunictokens.kernels; print(json.dumps(u.ops.build_info()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["import failed"])[-1][:300]}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found or {"error": "the package has no compiled core"}


def _carried(out: Path) -> None:
    file = CARRIED / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not file.exists():
        raise FileNotFoundError(f"{file.name} is not in build/carried (benchmarks/carry.sh makes it)")
    shutil.copy2(file, ROOT / "pyunictokens" / file.name)
    link = ROOT / "pyunictokens" / "kernels"
    if not link.exists():  # what an installation would do
        link.symlink_to(ROOT / "kernels")


def _install(out: Path, cuda: str, more: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-v", "-e", "."]
    environment = {**os.environ, "PYUNICTOKENS_CUDA": cuda, **more}
    with open(out / "build.log", "a", encoding="utf-8") as log:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        lines = (out / "build.log").read_text(errors="replace").splitlines()
        wrong = [line.strip() for line in lines if "error" in line.lower()]
        raise RuntimeError((wrong or lines or ["pip failed"])[-1][:300])


def _built(out: Path) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc: neither on the PATH, in CUDA_HOME, nor under /usr/local/cuda*")
    import torch

    major, minor = torch.cuda.get_device_capability()
    target = f"{major}{minor}{'a' if major >= 9 else ''}-real"
    arguments = f"-DPYUNICTOKENS_CUDA_ARCHITECTURES={target}"
    path = f"{Path(nvcc).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    _install(out, "on", {"CUDACXX": nvcc, "PATH": path, "PYUNICTOKENS_CMAKE_ARGS": arguments})


def _built_for_cpu(out: Path) -> None:
    _install(out, "off", {})


# --- smoke ------------------------------------------------------------------------------------------------------------


def smoke(out: Path, device: str) -> None:
    """Every operation on every backend once, a captured step as loop and replay, joined attention both ways."""
    import torch

    found: dict[str, str] = {}

    def probe(name: str, call: Callable[[], object]) -> None:
        start = time.monotonic()
        try:
            said = call()
            if device != "cpu":
                torch.cuda.synchronize()
            found[name] = f"ok, {time.monotonic() - start:.1f} s" + (f", {said}" if isinstance(said, str) else "")
        except Exception as error:
            found[name] = f"FAILED: {brief(error)}"
        print(f"{name}: {found[name]}", flush=True)
        write(out, "smoke", {"probes": found})

    from benchmarks.ops import cases, check, peers

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for case in cases.suite("cpu", smoke=True):
        for peer in peers.peers():
            if peer.name.startswith("ours-") and not peer.missing(case, device, dtype):
                name = f"{case.operation} {case.shape} {peer.name}"
                probe(
                    name, lambda peer=peer, case=case: f"{check.check(peer, case, device, dtype).value:.1e} off float64"
                )
    for mode in ("eager", "replay", "loop"):
        probe(f"captured step: {mode}", lambda mode=mode: _counted(mode, device))
    probe("joined attention, forward and backward", lambda: _joined(device, dtype))
    probe("attention over buffers", lambda: _buffered(device, dtype))


def _counted(mode: str, device: str) -> str:
    import torch

    from pyunictokens.rollout.cuda_graphs.capture import CapturedSteps
    from pyunictokens.utils.errors import UserError

    value, going = torch.zeros(1, device=device), torch.ones(1, dtype=torch.int32, device=device)

    def step() -> None:
        value.add_(going)
        going.copy_(going * (value < 3))

    try:
        steps = CapturedSteps(step, going, mode=mode)  # type: ignore[arg-type]
    except UserError as error:
        if device == "cpu" or mode == "eager":
            return f"cannot run: {error}"
        raise
    taken = steps.run(9)
    assert taken == 3 and float(value) == 3.0, (taken, float(value))
    return steps.report()


def _joined(device: str, dtype: Any) -> str:
    import torch

    from pyunictokens.models.showo.shared_prefix import joined_attention

    q, k, v = (torch.randn(3, 4, 40, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    keys, values = (torch.randn(4, 9, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    out = joined_attention(q, k, v, [(3, keys, values)])
    full = torch.nn.functional.scaled_dot_product_attention(
        q.double(),
        torch.cat([keys.expand(3, -1, -1, -1), k], 2).double(),
        torch.cat([values.expand(3, -1, -1, -1), v], 2).double(),
    )
    upstream = torch.randn_like(full)
    leaves = (q, k, v, keys, values)
    mine = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
    theirs = torch.autograd.grad(full, leaves, upstream)
    pairs = [(out, full), *zip(mine, theirs, strict=True)]
    worst = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    assert worst < limit, f"{worst:.1e} from one softmax, allowed {limit:.0e}"
    return f"{worst:.1e} off one softmax"


def _buffered(device: str, dtype: Any) -> str:
    import torch

    from pyunictokens.models.showo.attention import PromptKV
    from pyunictokens.models.showo.buffers import BufferedAttention
    from pyunictokens.models.showo.padding import padded

    with torch.no_grad():
        q, k, v = (torch.randn(3, 4, 40, 64, device=device, dtype=dtype) for _ in range(3))
        keys, values = ([[torch.randn(4, size, 64, device=device, dtype=dtype)] for size in (9, 3)] for _ in range(2))
        prompts = PromptKV(keys, values, [0, 0])
        room = padded(prompts.select([0]), 128) + prompts.select([1])
        out = BufferedAttention(room, [0, 0, 1], 40, 64)(0, q, k, v)
        worst = 0.0
        for row, prompt in enumerate((0, 0, 1)):
            past = (torch.cat([part[prompt][0], own[row]], 1).double() for part, own in ((keys, k), (values, v)))
            exact = torch.nn.functional.scaled_dot_product_attention(q[row].double(), *past)
            worst = max(worst, float((out[row].double() - exact).norm() / exact.norm()))
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    assert worst < limit, f"{worst:.1e} from one softmax, allowed {limit:.0e}"
    return f"{worst:.1e} off one softmax"


# --- summary ----------------------------------------------------------------------------------------------------------


def counted_tests(out: Path) -> dict[str, int] | None:
    """Tests passed, failed and skipped, from pytest's own file; None where it wrote none."""
    file = out / "tests.xml"
    if not file.exists():
        return None
    total = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in xml.parse(file).getroot().iter("testsuite"):
        for key in total:
            total[key] += int(suite.get(key, 0))
    wrong = total["failures"] + total["errors"]
    return {"passed": total["tests"] - wrong - total["skipped"], "failed": wrong, "skipped": total["skipped"]}


def goal_lines(out: Path) -> list[str]:
    """Every goal with its number: met, missed or not measured."""
    from benchmarks import engine_report
    from benchmarks.ops import goals
    from benchmarks.ops.schema import Report

    ops, engine = out / "ops-gpu.json", out / "engine-gpu.json"
    report = Report.load(ops) if ops.exists() else None
    rolled = engine_report.EngineReport.load(engine) if engine.exists() else None
    lines = []
    for goal in goals.GOALS:
        if goal.device != "cuda":
            continue
        smoke = report is None or report.machine.smoke or report.machine.device != "cuda"
        answer = None if smoke or report is None else goal.answer(report)
        lines.append(_goal(goal.text, None if answer is None else answer[0], answer is not None and answer[1]))
    for each in engine_report.GOALS:
        value = None if rolled is None or rolled.machine.smoke else each.measured(rolled)
        shown = None if value is None else each.show(value)
        lines.append(_goal(each.text, shown, value is not None and each.holds(value)))
    return lines


def lever_lines(out: Path) -> list[str]:
    """Every lever of a rollout step: measured with and without it, beside what was predicted for one H100."""
    from benchmarks import engine_report, levers
    from experiments.cost_tables import lever_predictions

    file = out / "engine-gpu.json"
    report = engine_report.EngineReport.load(file) if file.exists() else None
    predicted = {each.key: 1e3 * (each.before - each.after) for each in lever_predictions()}
    lines = []
    for lever in levers.LEVERS:
        said = f"predicted {predicted[lever.key]:.1f} ms less" if lever.key in predicted else "no prediction"
        name = f"lever {lever.key}"
        sides = [None if report is None else report.find(name, side) for side in ("with", "without")]
        having, lacking = (None if each is None else 1e3 * each.seconds / each.amount for each in sides)
        if report is None or report.machine.smoke or having is None or lacking is None:
            reason = "" if report is None else report.absences.get(name, "")
            failed = bool(reason) and not reason.startswith((levers.MISSING, *"0123456789"))
            words = f"FAILED        {lever.text}: {reason}" if failed else f"not measured  {lever.text}"
            lines.append(f"  {words}" + (f": {reason}" if reason and not failed else "") + f" ({said})")
            continue
        saved = lacking - having
        verdict = "measured"
        if lever.key in predicted:
            verdict = "met   " if saved >= predicted[lever.key] else "MISSED"
        lines.append(
            f"  {verdict} {lever.text}: {having:.2f} ms a step with it, {lacking:.2f} without, "
            f"{lacking / having:.3f} ×, {saved:.2f} ms less ({said})"
        )
    return lines


def _goal(text: str, number: str | None, holds: bool) -> str:
    if number is None:
        return f"  not measured  {text}"
    return f"  {'met   ' if holds else 'MISSED'} {number}: {text}"


def summary(out: Path, device: str) -> None:
    """One page at the end: the card, what was fallen back to, tests, every goal, every lever."""
    about, built, probes = read(out, "environment"), read(out, "core"), read(out, "smoke").get("probes", {})
    print(f"card: {about.get('card', 'unknown: the environment stage wrote nothing')}")
    if "matrix_flops_per_second" in about and device != "cpu":
        rate, copy = about["matrix_flops_per_second"] / 1e12, about["copy_bytes_per_second"] / 1e9
        print(f"matrix rate {rate:.0f} TFLOP/s, copy {copy:.0f} GB/s")
    print(f"core: {built.get('source', 'unknown')}" + (f"; !!! {built['fell_back']}" if built.get("fell_back") else ""))
    failed = [name for name, said in probes.items() if said.startswith("FAILED")]
    print(f"smoke: {len(probes) - len(failed)} of {len(probes)} probes passed")
    for name in failed:
        print(f"  {name}: {probes[name]}")
    tests = counted_tests(out)
    words = ", ".join(f"{count} {word}" for word, count in tests.items()) if tests else "no result: did the stage end?"
    print(f"tests: {words}")
    for stage, file in (("ops", "ops-gpu.json"), ("engine", "engine-gpu.json")):
        if not (out / file).exists():
            print(f"{stage}: wrote nothing")
    lines = goal_lines(out)
    print("goals:\n" + "\n".join(lines))
    met, missed = (sum(line.strip().startswith(word) for line in lines) for word in ("met", "MISSED"))
    print(f"{met} goals met, {missed} missed, {len(lines) - met - missed} not measured")
    each = lever_lines(out)
    print("levers of a rollout step (predictions are for one H100):\n" + "\n".join(each))
    content = {"card": about.get("card"), "tests": tests, "goals": lines, "levers": each, "core": built.get("source")}
    write(out, "summary", content)


STAGES: dict[str, Callable[[Path, str], None]] = {
    "environment": environment,
    "core": core,
    "smoke": smoke,
    "summary": summary,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    STAGES[options.stage](options.out, options.device)


if __name__ == "__main__":
    main()
