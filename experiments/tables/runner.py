"""Which cells are made, by how many processes, and everything that was made in one table (docs/experiments.json).

A process takes one concept and seed with all its arms, because they share their beginnings. How a cell is made is
lab.py's business.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from pyunictokens.utils.errors import UserError
from pyunictokens.utils.files import write_json
from pyunictokens.utils.signals import end_with_parent_process

from .arms import ARMS, SCALES
from .lab import ToyLab, Unit, about_of, cell_file, config_of, read_cell, run_unit, units


def choose(scale: str, names: Sequence[str] | None, arms: Sequence[str] | None) -> dict[Unit, list[str]]:
    """The units and arms asked for. Exits with a message for a unit that the scale does not have."""
    planned = {unit.name: (unit, cells) for unit, cells in units(SCALES[scale]).items()}
    unknown = [name for name in names or [] if name not in planned]
    if unknown:
        raise SystemExit(f"unit {unknown[0]}: scale {scale} has {', '.join(planned)}")
    return {
        unit: [cell for cell in cells if not arms or cell in arms]
        for name, (unit, cells) in planned.items()
        if not names or name in names
    }


def run(chosen: dict[Unit, list[str]], scale: str, work: Path, workers: int) -> list[str]:
    """Make what is missing, a process a unit; returns what could not be made."""
    problems: list[str] = []
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes to come
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, end_with_parent_process, max_tasks_per_child=1) as pool:
        futures = {pool.submit(_work, unit, names, scale, work): unit for unit, names in chosen.items()}
        for number, future in enumerate(as_completed(futures), start=1):
            unit = futures[future]
            try:
                problems += future.result()
            except Exception as error:  # one unit's failure is reported, the others go on
                problems.append(f"{unit.name}: {type(error).__name__}: {error}")
            print(f"{number}/{len(futures)} {unit.name}", flush=True)
    return sorted(set(problems))


def _work(unit: Unit, names: list[str], scale: str, work: Path) -> list[str]:
    import warnings

    warnings.filterwarnings("ignore", message=".*rows are filled with the best rejected")
    return run_unit(unit, names, scale, work, ToyLab(work))


def gather(scale: str, work: Path, problems: Sequence[str]) -> dict[str, Any]:
    """Everything measured under the present settings, as docs/experiments.json keeps it."""
    import torch

    cells, settings = [], {}
    for unit, names in units(SCALES[scale]).items():
        for name in names:
            try:
                config = config_of(ARMS[name], unit, SCALES[scale])
            except UserError:  # a setting that this version does not have: told when it was to be run
                continue
            cell = read_cell(cell_file(work, SCALES[scale], unit, name), about_of(ARMS[name], unit, config))
            if cell is not None:
                settings[name] = cell["settings"]
                cells.append({key: value for key, value in cell.items() if key != "settings"})
    cores = len(os.sched_getaffinity(0))
    machine = f"{cores} CPU {'core' if cores == 1 else 'cores'} ({platform.machine()}), torch {torch.__version__}"
    return {
        "scale": scale,
        "words": list(SCALES[scale].words),
        "settings": settings,
        "command": command_of(scale),
        "machine": machine,
        "problems": list(problems),
        "cells": cells,
    }


def restore(stored: dict[str, Any], work: Path) -> None:
    """Write the cells of `stored` (docs/experiments.json) that WORK lacks, so that another machine goes on where the
    committed cells end. A cell that was made with other settings than today's is made again, as ever."""
    for cell in stored["cells"]:
        unit = Unit(cell["kind"], cell["number"], cell["seed"])
        file = cell_file(work, SCALES[stored["scale"]], unit, cell["arm"])
        settings = stored.get("settings", {}).get(cell["arm"])
        if settings is not None and not file.exists():
            seeded = {part: {**settings[part], "seed": unit.seed} for part in ("stages", "grpo")}
            write_json(file, {**cell, "settings": {**settings, **seeded}})


def command_of(scale: str) -> str:
    """The command that makes all cells of a scale."""
    return "python -m experiments.tables" + ("" if scale == "full" else f" --scale {scale}")
