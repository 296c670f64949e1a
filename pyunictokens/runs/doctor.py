"""What is installed here, what works, and the exact command that adds what is missing.

`examine()` looks and returns plain values; `render()` writes them for people. It repairs nothing, downloads nothing,
and no finding of its own is ever an exception.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.devices import usable_cores
from ..utils.errors import needs
from ..utils.files import AnyJson

if TYPE_CHECKING:
    from rich.console import Console

    from ..models.weight_files import WeightStatus

Findings = dict[str, AnyJson]
"""What was found, by name; values that JSON can hold."""

REQUIRED = (
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "transformers",
    "huggingface_hub",
    "peft",
    "pillow",
    "pyyaml",
    "typer",
    "rich",
    "scikit-learn",
    "matplotlib",
    "jinja2",
    "tensorboard",
    "sacrebleu",
)
"""What the package and its extra `cli` need: every command on the toy model."""

OPTIONAL = {
    "triton": ("", "Triton kernels on a GPU; comes with torch on Linux"),
    "facenet-pytorch": ("rewards", "FER: faces in images of people"),
    "open_clip_torch": ("rewards", "CLIP scores of real images"),
    "torchvision": ("rewards", "images resized on their device"),
    "uvicorn": ("serve", "serving reward models to trainers"),
    "httpx": ("serve", "asking served reward models"),
    "openai": ("judge", "the remote judge"),
    "diffusers": ("diffusers", "pipelines of diffusers as rows of a table"),
    "ray": ("cluster", "runs over several machines"),
    "flash-attn": ("flash", "attention over shared prompts on a GPU"),
    "fastapi": ("web", "serving trained runs to OpenAI's clients"),
    "gradio": ("studio", "a page in the browser"),
    "pytest": ("dev", "the test suite"),
}
"""Distributions that nothing needs at import, with the extra that adds each and what it is for."""

_CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


def examine() -> Findings:
    """Everything the doctor looks at, as values JSON can hold. `ok` says whether the essential parts work."""
    report: Findings = {
        "pyunictokens": _own_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in REQUIRED},
        "optional": {
            name: {"version": _version(name), "for": purpose, "add": _add(extra)}
            for name, (extra, purpose) in OPTIONAL.items()
        },
        "cpu": _cpu(),
        "core": _core(),
        "gpu": _gpu(),
        "backends": _backends(),
        "steps": _chosen("mode", "..rollout.cuda_graphs.capture", "best_mode"),
        "attention": _chosen("way", "..models.showo.kernels", "attention_way"),
        "gelu": _chosen("way", "..models.fused_gelu", "gelu_way"),
        "toy": toy_status(),
    }
    report["problems"] = _problems(report)
    report["ok"] = not report["problems"]
    return report


def _own_version() -> str:
    from .. import __version__

    return __version__


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _add(extra: str) -> str:
    return f"pip install 'pyunictokens[{extra}]'" if extra else "pip install triton"


def _cpu() -> Findings:
    flags: set[str] = set()
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in {"flags", "Features"}:
                flags = set(value.split())
            elif key.strip() == "model name":
                model = value.strip()
            elif not line.strip():  # the first core is enough
                break
    except OSError:
        pass  # no Linux: the name of the machine is what there is
    result: Findings = {
        "model": model,
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "features": [flag for flag in _CPU_FLAGS if flag in flags],
    }
    try:
        import torch

        result["torch_threads"] = torch.get_num_threads()
        result["torch_instructions"] = torch.backends.cpu.get_cpu_capability()
    except ImportError:
        pass
    return result


def _core() -> Findings:
    """The compiled core: whether it loads, and whether it was built with CUDA."""
    try:
        core = importlib.import_module("pyunictokens._core")
    except ImportError as error:
        return {
            "loads": False,
            "why": str(error),
            "add": "pip install --force-reinstall --no-deps . (in the source folder, with a C++ compiler)",
        }
    info = dict(core.build_info())
    info["has_cuda"] = bool(info.get("cuda"))
    return {"loads": True, **info}


def _gpu() -> Findings:
    try:
        import torch
    except ImportError:
        return {"present": False, "why": "torch is missing"}
    result: Findings = {"torch_cuda": torch.version.cuda, "nvcc": shutil.which("nvcc") is not None}
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no usable GPU here"
        return {"present": False, "why": why, **result}
    devices = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": facts.name,
                "memory_gib": round(facts.total_memory / 2**30, 1),
                "capability": f"{facts.major}.{facts.minor}",
            }
        )
    return {"present": True, "devices": devices, **result}


def _chosen(what: str, module: str, choose: str) -> dict[str, str]:
    """What the function `choose` of a module takes on the GPU (or the CPU, without one), and why."""
    try:
        import torch

        function = getattr(importlib.import_module(module, __package__), choose)
        taken, why = function(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except Exception as error:  # a finding, like any other
        return {what: "unknown", "why": str(error)}
    return {what: taken, "why": why}


def _backends() -> Findings:
    try:
        from .. import ops

        return dict(ops.capabilities())
    except Exception as error:  # whatever is wrong with the ops is a finding, not a crash of the doctor
        return {"error": f"{type(error).__name__}: {error}"}


def toy_status() -> Findings:
    """Whether the embedded toy's files are there and have the checksums they were shipped with."""
    import hashlib
    import json

    from ..toy.model import toy_folder

    folder = toy_folder()
    listing = folder / "provenance.json"
    try:
        wanted = json.loads(listing.read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {"ok": False, "why": f"{listing.name} cannot be read ({error}); install pyunictokens again"}
    wrong = []
    for name, digest in wanted.items():
        file = folder / name
        if not file.is_file():
            wrong.append(f"{name} is missing")
        elif hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            wrong.append(f"{name} has another checksum")
    size = sum((folder / name).stat().st_size for name in wanted if (folder / name).is_file())
    if wrong:
        return {"ok": False, "why": f"{'; '.join(wrong)}: install pyunictokens again"}
    return {"ok": True, "files": len(wanted), "mib": round(size / 2**20, 1)}


def _problems(report: Findings) -> list[dict[str, str]]:
    """What keeps the essential parts from working, each with what to do."""
    found = []
    for name, version in report["packages"].items():
        if version is None:
            found.append({"what": f"{name} is missing", "do": f"pip install {name}"})
    if not report["core"]["loads"]:
        found.append(
            {"what": f"the compiled core does not load ({report['core']['why']})", "do": report["core"]["add"]}
        )
    if "error" in report["backends"]:
        found.append({"what": f"the ops cannot be used: {report['backends']['error']}", "do": "see the line before"})
    if not report["toy"]["ok"]:
        found.append({"what": f"the embedded toy: {report['toy']['why']}", "do": "or pass --model, --vq, --tokenizer"})
    return found


def render(report: Findings, console: Console) -> None:
    """Write the findings as tables."""
    with needs("cli"):
        from rich.table import Table

    cpu, gpu, core = report["cpu"], report["gpu"], report["core"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("pyunictokens", report["pyunictokens"])
    table.add_row("python", f"{report['python']} on {report['platform']}")
    features = " ".join(cpu["features"]) or "no vector features known"
    table.add_row("cpu", f"{cpu['model']}, {cpu['usable_cores']} of {cpu['cores']} cores usable; {features}")
    if "torch_threads" in cpu:
        table.add_row("", f"torch: {cpu['torch_threads']} threads, {cpu['torch_instructions']}")
    if core["loads"]:
        cuda = f"with CUDA for {core['cuda']['architectures']}" if core["has_cuda"] else "without CUDA"
        table.add_row("compiled core", f"{core['version']}, {core['compiler']}, {core['cpu_level']}, {cuda}")
    else:
        table.add_row("compiled core", f"[red]does not load[/red]: {core['why']}")
    if gpu["present"]:
        for device in gpu["devices"]:
            table.add_row("gpu", f"{device['name']}, {device['memory_gib']} GiB, sm_{device['capability']}")
    else:
        table.add_row("gpu", f"none: {gpu['why']}; nvcc {'found' if gpu.get('nvcc') else 'not found'}")
    table.add_row("rollout steps", f"{report['steps']['mode']}: {report['steps']['why']}")
    table.add_row("attention", _plain(f"{report['attention']['way']}: {report['attention']['why']}"))
    table.add_row("product with GELU", _plain(f"{report['gelu']['way']}: {report['gelu']['why']}"))
    toy = report["toy"]
    table.add_row(
        "embedded toy", f"{toy['files']} files, {toy['mib']} MiB, checksums agree" if toy["ok"] else toy["why"]
    )
    console.print(table)

    backends = Table(title="ops", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for title in ("backend", "runs here"):
        backends.add_column(title, overflow="fold")
    for name, facts in report["backends"].items() if "error" not in report["backends"] else ():
        backends.add_row(name, ", ".join(facts["ops"]) if facts["available"] else _plain(f"no: {facts['reason']}"))
    console.print(backends)

    packages = Table(title="packages", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for title in ("package", "version", "for", "add with"):
        packages.add_column(title, overflow="fold")
    for name, version in report["packages"].items():
        packages.add_row(name, version or "[red]missing[/red]", "required", "" if version else f"pip install {name}")
    for name, facts in report["optional"].items():
        missing = facts["version"] is None
        packages.add_row(name, facts["version"] or "not here", facts["for"], _plain(facts["add"]) if missing else "")
    console.print(packages)

    for problem in report["problems"]:
        console.print(f"[red]{_plain(problem['what'])}[/red]\n  {_plain(problem['do'])}")
    if report["ok"]:
        console.print("The essential parts work.")


def render_weights(findings: Sequence[WeightStatus], console: Console, further: Sequence[WeightStatus] = ()) -> None:
    """Write what was found of each part; `further` reward models in one line each."""
    for finding in findings:
        mark = "[green]here[/green]" if finding.ok else "[red]missing[/red]"
        size = "size not known" if finding.gigabytes is None else f"{finding.gigabytes:.3g} GB"
        console.print(f"[bold]{_plain(finding.name)}[/bold]  {_plain(finding.network)}, {size}: {mark}")
        places = finding.found or " and ".join(finding.looked_in)
        console.print(f"  {'found in' if finding.found else 'looked in'} {_plain(places)}")
        if finding.missing:
            console.print(f"  wants {_plain(', '.join(finding.missing))} from {_plain(finding.source)}")
            console.print(f"  {_plain(finding.get)}", soft_wrap=True)
        console.print(f"  licence: {_plain(finding.licence)}")
    absent = [finding for finding in findings if not finding.ok]
    known = sum(finding.gigabytes or 0.0 for finding in absent)
    here = len(findings) - len(absent)
    console.print(f"{here} of {len(findings)} parts are here" + (f"; to fetch: {known:.3g} GB" if absent else ""))
    if further:
        named = (f"{each.name} ({'here' if each.ok else each.source})" for each in further)
        console.print(f"further reward models: {_plain(', '.join(named))}")


def _plain(text: str) -> str:
    """`text` with its square brackets kept from rich's markup."""
    with needs("cli"):
        from rich.markup import escape

    return escape(text)
