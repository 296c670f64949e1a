"""Cells: one arm, one concept, one seed, from tokens to measures, kept as one JSON file each.

What several arms begin with (the concept stages) is learned once and shared. A cell that is there, and was made with
the same settings, is not made again. Everything is drawn from seeds; only the seconds differ from machine to machine:
those that the process worked, on one thread, so that what else runs on the machine hardly counts. What cells there are
is arms.py's business, what they say is stats.py's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from pyunictokens.config.settings import filled, renamed, to_mapping
from pyunictokens.runs.run_dir import RunConfig
from pyunictokens.train.collector import CALIBRATED_ON
from pyunictokens.utils.errors import UserError
from pyunictokens.utils.files import folder_lock, read_json, write_json

from .arms import ARMS, SCALES, TABLES, Arm, Scale

FORMAT = 1
NAME = "bo"


@dataclass(frozen=True)
class Unit:
    """A concept and a seed; its arms share their beginnings."""

    kind: str
    number: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.number}-seed{self.seed}"


def units(scale: Scale) -> dict[Unit, list[str]]:
    """Every unit of a scale with the names of its arms, cheap ones first."""
    asked = {name for table in TABLES for name in table.arms}
    names = [name for name in ARMS if name in asked]
    # seed by seed, so that a table with one seed is whole before the next begins
    return {Unit(kind, number, seed): names for seed in scale.seeds for kind, number in scale.concepts}


def config_of(arm: Arm, unit: Unit, scale: Scale) -> RunConfig:
    """All settings of a cell. Raises UserError for a setting that this version does not have."""
    words = [*scale.words, "grpo.sample_every=0", "grpo.checkpoint_every=0", *(arm.words or ())]
    config = RunConfig.make("toy", words=words, seed=unit.seed)
    if arm.as_dear_as is None:
        return config
    wanted = expected_row_steps(config_of(ARMS[arm.as_dear_as], unit, scale))
    a_step = expected_row_steps(replace(config, grpo=replace(config.grpo, steps=1)))
    return replace(config, grpo=replace(config.grpo, steps=round(wanted / a_step)))


class Lab(Protocol):
    """Whoever can make a cell."""

    def make(self, arm: Arm, unit: Unit, scale: Scale, config: RunConfig) -> dict[str, Any]:
        """Keys: metrics {name: mean}, rows (steps of reinforcement), seconds {part: s}."""
        ...


def cell_file(work: Path, scale: Scale, unit: Unit, arm: str) -> Path:
    return work / scale.name / "cells" / f"{unit.name}.{arm}.json"


def run_unit(unit: Unit, names: Sequence[str], scale_name: str, work: Path, lab: Lab) -> list[str]:
    """Make the cells of one unit that are not there; returns what could not be made, and why.

    Raises UserError where another process, such as one that outlived an earlier call, is at work on this unit.
    """
    scale, problems = SCALES[scale_name], []
    held = work / scale_name / "units" / unit.name
    held.mkdir(parents=True, exist_ok=True)
    with folder_lock(held):
        for name in names:
            arm, file = ARMS[name], cell_file(work, scale, unit, name)
            try:
                config = config_of(arm, unit, scale)
            except UserError as error:
                problems.append(f"{name}: not measured: {error}")
                continue
            about = about_of(arm, unit, config)
            if read_cell(file, about) is None:
                write_json(file, {**about, **lab.make(arm, unit, scale, config)})
    return problems


def about_of(arm: Arm, unit: Unit, config: RunConfig) -> dict[str, Any]:
    """Whose cell it is, and all that it was made with."""
    settings = {"start": arm.start, "reinforced": arm.words is not None, **to_mapping(config)}
    whose = {"arm": arm.name, "kind": unit.kind, "number": unit.number, "seed": unit.seed}
    return {"format": FORMAT, **whose, "settings": settings}


def read_cell(file: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """The cell in `file`, where it was made with the settings of `about`; else None."""
    if not file.exists():
        return None
    try:
        found = read_json(file)
    except UserError:
        return None
    if not isinstance(found, dict):
        return None
    found["settings"] = filled(renamed(RunConfig, found.get("settings") or {}), to_mapping(RunConfig.make("paper")))
    return found if all(found.get(key) == value for key, value in about.items()) else None


class InWords:
    """A concept without tokens: its name is replaced by its looks, as a text prompt would say them."""

    def __init__(self, sks: str, info: str):
        self.sks, self.looks = sks, info.partition(" is ")[2].strip().rstrip(".") or info

    def expand(self, text: str) -> str:
        return text.replace(self.sks, self.looks)


class ToyLab:
    """Makes cells with the toy that comes with the package, in folders under `work`."""

    def __init__(self, work: Path):
        self.work = work

    def make(self, arm: Arm, unit: Unit, scale: Scale, config: RunConfig) -> dict[str, Any]:
        from pyunictokens.data.folder import load_concept
        from pyunictokens.models.bundle import Sources
        from pyunictokens.runs.bundle import load_scorers, open_bundle
        from pyunictokens.runs.pipeline import measure
        from pyunictokens.toy.concept import write_toy_concept

        root = self.work / scale.name / "data" / unit.name
        if not (root / "concepts_list.json").exists():  # the file written last
            write_toy_concept(root, seed=unit.number, kind=unit.kind, name=NAME, force=True)
        concept = load_concept(root, NAME)
        bench = open_bundle(Sources(), "cpu", "float32")
        experts = load_scorers(bench.sources, bench.device)
        assert experts is not None
        seconds = {}
        if arm.start == "text":
            began = time.process_time()
            result = self._in_words(bench, concept, config, experts)
            return _cell(result, [], {"evaluation": time.process_time() - began})
        tokens, seconds["stages"] = self._tokens(bench, concept, experts, arm.start, unit, scale, config)
        bench.model.attach(tokens.requires_grad_(False))
        rows: list[dict[str, Any]] = []
        if arm.words is not None:
            began = time.process_time()
            rows = self._reinforce(
                bench, concept, experts, config, self.work / scale.name / "runs" / f"{unit.name}.{arm.name}"
            )
            seconds["grpo"] = time.process_time() - began
        began = time.process_time()
        result = measure(bench, concept, config.evaluation, experts)
        seconds["evaluation"] = time.process_time() - began
        return _cell(result, rows, seconds)

    def _tokens(
        self, bench: Any, concept: Any, experts: Any, start: str, unit: Unit, scale: Scale, config: RunConfig
    ) -> tuple[Any, float]:
        """Tokens of a start, learned once a unit; and the seconds that took when it was done."""
        from pyunictokens.models.concept_tokens import ConceptTokens
        from pyunictokens.train import train_concept_tokens

        stages = config.stages
        plans = {
            "staged": replace(stages, stages=("understanding", "generation")),
            "unic": replace(stages, stages=("deepening",)),
            "joint": replace(stages, stages=("joint",), max_steps=2 * stages.max_steps, epochs=2 * stages.epochs),
        }
        first, spent = None, 0.0
        if start == "unic":  # goes on from the two stages
            first, spent = self._tokens(bench, concept, experts, "staged", unit, scale, config)
        folder = self.work / scale.name / "stages" / f"{unit.name}.{start}"
        about = {"settings": to_mapping(plans[start])}
        done = folder / "done.json"
        known = read_json(done) if done.exists() else {}
        if known.get("settings") != about["settings"]:
            _empty(folder)
            began = time.process_time()
            train_concept_tokens(
                bench.model,
                bench.vq,
                bench.tokenizer,
                concept,
                plans[start],
                folder,
                start=first,
                face_embedding=experts.face_embedding,
            )
            known = {**about, "seconds": time.process_time() - began}
            write_json(done, known)
        return ConceptTokens.load(folder / "concept"), spent + float(known["seconds"])

    def _reinforce(self, bench: Any, concept: Any, experts: Any, config: RunConfig, out: Path) -> list[dict[str, Any]]:
        from pyunictokens.train import read_metrics, train_grpo

        _empty(out)
        marks = [time.process_time()]
        train_grpo(
            bench.model,
            bench.vq,
            bench.tokenizer,
            concept,
            experts.ensemble,
            config.grpo,
            out,
            preview_scorer=experts.preview_scorer,
            progress=lambda *_: marks.append(time.process_time()),
        )
        kept = [
            {
                "reward": line["reward_mean"],
                "spread": line["within_group_std"],
                "kl": line["kl"],
                "seconds": round(end - begin, 3),
                "row_steps": row_steps(config, line["candidates"]),
            }
            for line, begin, end in zip(read_metrics(out), marks, marks[1:], strict=False)
        ]
        _empty(out)
        return kept

    def _in_words(self, bench: Any, concept: Any, config: RunConfig, experts: Any) -> Any:
        from pyunictokens import RolloutEngine
        from pyunictokens.evaluate.benchmark import SPLITS, unifybench

        settings = config.evaluation
        return unifybench(
            RolloutEngine.of(bench),
            concept,
            InWords(concept.sks, concept.info),
            image_text=experts.image_text,
            ensemble=experts.ensemble,
            reader=experts.reader,
            samples=settings.samples,
            seed=settings.seed,
            steps=settings.timesteps,
            guidance_scale=settings.guidance_scale,
            max_new_tokens=settings.max_new_tokens,
            splits=settings.tasks or SPLITS,
            size=bench.size,
            judged_as=settings.judged_as,
        )


def row_steps(config: RunConfig, candidates: float) -> float:
    """Image rows that went through the model in one step of `candidates` started images, guidance's second row counted,
    a backward pass as two."""
    grpo = config.grpo
    rows = (grpo.groups or 1) * grpo.group_size
    preview = _preview(config)
    drawn = candidates * preview + rows * (grpo.timesteps - preview)
    looked_at = rows * max(1, round(grpo.timesteps * grpo.timestep_fraction))
    passes = 3 * grpo.inner_epochs + (1 if grpo.beta > 0 else 0)
    return (2 if grpo.guidance_scale > 0 else 1) * (drawn + passes * looked_at)


def expected_row_steps(config: RunConfig) -> float:
    """Those of a whole reinforcement in which previews pass as often as its threshold aims at.

    With the pass rate p and at most C candidates a rollout, it starts (1 − (1 − p)^C) / p of them on average; auto
    looks at previews of some groups before the first step.
    """
    grpo, dsog = config.grpo, config.grpo.dsog
    started, first = 1.0, 0.0
    if dsog.enabled:
        p = dsog.target_pass_rate
        started = (1 - (1 - p) ** dsog.max_candidates) / p if p > 0 else dsog.max_candidates
        if dsog.initial == "auto":
            first = CALIBRATED_ON * grpo.group_size * _preview(config) * (2 if grpo.guidance_scale > 0 else 1)
    return first + grpo.steps * row_steps(config, started * (grpo.groups or 1) * grpo.group_size)


def _preview(config: RunConfig) -> int:
    """Timesteps that a candidate takes before it is looked at; 0 without DSOG."""
    grpo = config.grpo
    return (grpo.dsog.preview_step or max(1, grpo.timesteps // 5)) if grpo.dsog.enabled else 0


def _cell(result: Any, rows: list[dict[str, Any]], seconds: dict[str, float]) -> dict[str, Any]:
    metrics = {key: metric.mean for key, metric in result.metrics.items()}
    return {"metrics": metrics, "rows": rows, "seconds": {key: round(value, 2) for key, value in seconds.items()}}


def _empty(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
