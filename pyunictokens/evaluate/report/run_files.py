"""What a run's folder holds for its report: evaluations, the log, the configuration, the sample pictures.

Reads and checks; computes nothing. A folder may be unfinished: what is missing is simply absent here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...utils.errors import UserError
from ...utils.files import read_json_lines, read_json_table
from ...utils.json import Json
from ...utils.text import read_text
from ...utils.yaml_text import parse_yaml, settled
from ..result import EvalResult

STAGES = {"base": "Base model", "before": "Before", "after": "After"}
"""Evaluations by file name, in order, and their column in the tables; "Before" is before the last training."""
REINFORCED = {"base": "Base model", "before": "Tokens learned", "after": "Reinforced"}
"""The same for a run that shows all three."""


@dataclass
class RunFiles:
    """What was found in a run's folder."""

    folder: Path
    results: dict[str, EvalResult] = field(default_factory=dict)
    rows: list[dict[str, Json]] = field(default_factory=list)
    """Steps of reinforcement."""
    stage_rows: list[dict[str, Json]] = field(default_factory=list)
    """Steps of the stages before it."""
    config: dict[str, Json] = field(default_factory=dict)
    config_text: str = ""
    about: dict[str, str] = field(default_factory=dict)
    samples: list[int] = field(default_factory=list)

    @property
    def grpo(self) -> Mapping[str, Json]:
        """The settings of reinforcement."""
        found = self.config.get("grpo", self.config)
        return found if isinstance(found, Mapping) else {}

    @property
    def labels(self) -> dict[str, str]:
        """The evaluations that are there, by file name, in order, with their names in tables and above images."""
        names = REINFORCED if self.rows and len(self.results) == len(REINFORCED) else STAGES
        return {stage: names[stage] for stage in STAGES if stage in self.results}

    @property
    def pair(self) -> tuple[EvalResult, EvalResult] | None:
        """Before and after, when both were measured."""
        if "before" in self.results and "after" in self.results:
            return self.results["before"], self.results["after"]
        return None


def read_run(run_dir: str | os.PathLike[str]) -> RunFiles:
    """Everything a report is made of. Raises UserError when the folder holds neither a log nor an evaluation."""
    folder = Path(run_dir)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: give the folder of a run")
    files = RunFiles(folder, rows=_rows(folder / "metrics.jsonl"))
    files.stage_rows = _rows(folder / "stages" / "stages.jsonl") or _rows(folder / "stages.jsonl")
    for stage in STAGES:
        if (folder / f"{stage}.json").exists():
            files.results[stage] = EvalResult.load(folder / f"{stage}.json")
    if not (files.rows or files.stage_rows or files.results):
        raise UserError(f"{folder}: holds no metrics.jsonl, before.json or after.json: is this the folder of a run?")
    for name in ("config.yaml", "grpo.yaml"):
        if (folder / name).exists():
            files.config_text = read_text(folder / name)
            config = settled(parse_yaml(files.config_text, str(folder / name)))
            files.config = config if isinstance(config, dict) else {}
            break
    if (folder / "about.json").exists():
        about = read_json_table(folder / "about.json")
        files.about = {str(key): value if isinstance(value, str) else str(value) for key, value in about.items()}
    steps = (path.name[5:-10] for path in (folder / "samples").glob("step_*_final.png"))
    files.samples = sorted(int(step) for step in steps if step.isdigit())
    return files


def _rows(path: Path) -> list[dict[str, Json]]:
    """Lines of a log; a run that has none yet has no lines."""
    return [row for row in read_json_lines(path) if "step" in row] if path.exists() else []
