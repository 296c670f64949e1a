"""Runs that are killed: one pipeline run in a process of its own, ended by SIGKILL at a chosen or a random moment.

A child is forked from a process that has everything loaded, so a kill costs no start-up. It ends either by the clock
(`after` seconds) or in the middle of its own writing (`at_call`: just before the n-th call of fsync, replace or rename,
the moments between which files are not whole). `contents` says what a finished run must have in common with another.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pytest import MonkeyPatch

from pyunictokens.models.bundle import ModelBundle
from pyunictokens.runs.bundle import Scorers
from pyunictokens.runs.context import Parts, RunContext
from pyunictokens.runs.pipeline import _Run, run_concept
from pyunictokens.runs.run_dir import CONFIG, EvaluationConfig, RunConfig
from pyunictokens.train import read_metrics
from pyunictokens.utils.files import read_json, read_safetensors
from pyunictokens.utils.signals import Stopped, stop_on_signals
from tests.train.world import World, experts, grpo_config, red_preview, stage_config, tiny_model

OPERATIONS = ("fsync", "replace", "rename")


def settings(**grpo: Any) -> RunConfig:
    changes = {"steps": 6, "checkpoint_every": 2, "keep_last": 2, "keep_best": 1, "sample_every": 2, **grpo}
    return RunConfig(
        replace(stage_config(), epochs=1, max_steps=3, save_every=1),
        grpo_config(**changes),
        EvaluationConfig(samples=1, timesteps=2, guidance_scale=1.0, max_new_tokens=3, tasks=("vqa", "pure")),
    )


def run(world: World, config: RunConfig, out: Path, stop: Any = None, report: bool = False, ranks: Any = None) -> None:
    """One life of a run: begun, or taken up where the folder says. Its report, most of the time, only on demand."""
    if not report:
        with MonkeyPatch.context() as patch:
            patch.setattr(_Run, "report", lambda self: self.out / "report.html")
            return run(world, config, out, stop, report=True, ranks=ranks)
    bundle = ModelBundle(tiny_model(), world.vq, world.tokenizer)
    arguments = {name: value for name, value in (("stop", stop), ("ranks", ranks)) if value is not None}
    context = RunContext(bundle, world.data, config, out, Scorers(experts(), red_preview), **arguments)
    run_concept(context, Parts(resume=(out / CONFIG).exists()))
    return None


def count_calls(world: World, config: RunConfig, out: Path) -> int:
    """How often an undisturbed run calls one of :data:`OPERATIONS`. It is run here first: children find all loaded."""
    calls = out.parent / "calls"
    run(world, config, out.parent / "warm")
    assert live(world, config, out, count_in=calls) == 0
    return int(calls.read_text())


def live(
    world: World, config: RunConfig, out: Path, *, after: float = 0.0, at_call: int = 0, count_in: Path | None = None
) -> int:
    """One life in a child; returns its exit code, −9 when it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            calls = _watch(at_call)
            with stop_on_signals() as stop:
                run(world, config, out, stop)
            if count_in is not None:
                count_in.write_text(str(calls[0]))
            code = 0
        except Stopped:
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(code)
    if after:
        deadline = time.monotonic() + after
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _watch(kill_at: int) -> list[int]:
    """Count the calls that make files whole, and be killed at one of them."""
    calls = [0]
    for name in OPERATIONS:
        real = getattr(os, name)

        def call(*arguments: Any, _real: Any = real, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return _real(*arguments, **named)

        setattr(os, name, call)
    return calls


def contents(out: Path) -> dict[str, Any]:
    """What a finished run leaves that may depend on nothing but its settings: numbers, texts and tensors."""
    found: dict[str, Any] = {}
    for folder, name in ((out, "metrics.jsonl"), (out / "stages", "stages.jsonl")):
        found[name] = [
            {key: value for key, value in line.items() if key != "seconds"} for line in read_metrics(folder, name)
        ]
    for name in ("before", "after"):
        result = read_json(out / f"{name}.json")
        found[name] = {key: result[key] for key in ("records", "metrics", "notes", "settings")}
    for file in sorted(out.rglob("*.safetensors")):
        if "checkpoints" not in file.parts and not file.name.startswith("."):
            found[str(file.relative_to(out))] = file.read_bytes()
    last = max((out / "checkpoints").glob("step_*"))
    tensors = read_safetensors(last / "tensors.safetensors")
    found["checkpoint"] = {name: value.tolist() for name, value in tensors.items() if not name.startswith("rng")}
    samples = sorted((out / "samples").iterdir()) if (out / "samples").is_dir() else []
    found["samples"] = {file.name: file.read_bytes() for file in samples}
    return found


def leftovers(out: Path) -> list[str]:
    """Files that were being written when a life ended and that nobody cleaned up."""
    return [str(path.relative_to(out)) for path in out.rglob("*.part")]
