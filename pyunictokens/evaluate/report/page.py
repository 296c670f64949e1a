"""One page about one run: what changed, how sure that is, how it came about (``write_report(run)`` → report.html).

Takes what a run left behind (run_files.py), the sentences computed from it (summary.py) and the curves (plots.py, also
written as PNG into plots/), and fills one HTML file that needs no other file and no network. What is missing is left
out.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ...utils.errors import UserError
from ...utils.files import read_json_table, write_bytes_atomic, write_text_atomic
from ..result import REFERENCES, ItemRecord
from ..tasks import ALL_SAMPLES, TASKS, label
from . import environment, plots
from .embedded_images import each, file_uri, on_white, png_uri
from .run_files import RunFiles, read_run
from .summary import HEADLINE, outcome, summarize

TABLE = {
    "Held-out prompts": ("reasoning_generation", "reward tier ber der fer attributes"),
    "All images": (ALL_SAMPLES, "attributes subject prompted clip_t clip_i"),
    "Short prompts": ("pure", "attributes subject clip_t clip_i"),
    "Understanding": (
        "",
        "recognition.weight reasoning.accuracy reasoning.bleu vqa.accuracy vqa.bleu qa.accuracy qa.bleu",
    ),
}
"""Groups of the main table, by the titles of their tasks, with their measures; every other one goes into the table
below it."""

_GENERATED = {"reasoning_generation": 6, "dense_reasoning_generation": 2, "dense": 2, "pure": 4}
_ANSWERED = {"reasoning": 12, "vqa": 12, "qa": 10, "recognition": 8}
_REST = "By kind of prompt or question"
_SAMPLE_STEPS = 3


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write report.html (and plots/*.png) into the folder of a run; returns its path.

    Raises UserError when there is nothing to report, or a file of the run cannot be read.
    """
    files = read_run(run_dir)
    path = files.folder / "report.html"
    write_text_atomic(path, environment().get_template("report.html").render(**_context(files)))
    return path


# --- the page's parts ----------------------------------------------------------------------------------------------


def _context(files: RunFiles) -> dict[str, object]:
    some = next(iter(files.results.values()), None)
    result, sentences = summarize(files)
    references = some.images.get(REFERENCES) if some else None
    return {
        "name": files.about.get("name") or (some.concept if some else files.folder.name),
        "subtitle": " · ".join(filter(None, [files.about.get("class_word"), files.about.get("kind")])),
        "caution": files.about.get("caution", ""),
        "outcome": result,
        "sentences": sentences,
        "tiles": _tiles(files),
        "references": each(references[0]) if references else [],
        "stages": files.labels,
        "table": _table(files),
        "generated": _generated(files),
        "answers": _answers(files),
        "plots": _plots(files),
        "samples": _samples(files),
        "settings": _settings(files),
        "config_text": files.config_text,
        "notes": sorted({note for result in files.results.values() for note in result.notes}),
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }


def _tiles(files: RunFiles) -> list[dict[str, str]]:
    if files.pair is None:
        return []
    before, after = files.pair
    changes = before.compare(after)
    return [
        {
            "label": label(key),
            "before": f"{before.metrics[key].mean:.3f}",
            "after": f"{after.metrics[key].mean:.3f}",
            "change": f"{changes[key].mean:+.3f}",
            "outcome": outcome(changes[key]),
        }
        for key in HEADLINE
        if key in changes
    ]


def _table(files: RunFiles) -> list[dict[str, object]]:
    metrics = {stage: result.metrics for stage, result in files.results.items()}
    changes = files.pair[0].compare(files.pair[1]) if files.pair else {}
    present = {key for found in metrics.values() for key in found}
    groups = {title: [f"{task}.{n}" if task else n for n in names.split()] for title, (task, names) in TABLE.items()}
    listed = {key for group in groups.values() for key in group}
    groups[_REST] = [key for task in TASKS for key in sorted(present - listed) if key.partition(".")[0] == task]
    lines = {
        title: [
            {
                "label": label(key).removeprefix(f"{title}: "),
                "cells": [metrics[stage].get(key) for stage in files.results],
                "change": changes.get(key),
                "outcome": outcome(changes[key]) if key in changes else "",
            }
            for key in keys
            if key in present
        ]
        for title, keys in groups.items()
    }
    return [{"title": title, "lines": found, "folded": title == _REST} for title, found in lines.items() if found]


def _generated(files: RunFiles) -> list[dict[str, object]]:
    """The same prompts before and after, images side by side."""
    found: list[dict[str, object]] = []
    for task, limit in _GENERATED.items():
        shown = {stage: result for stage, result in files.results.items() if result.images.get(task)}
        items = []
        for index in range(min([limit, *(len(result.images[task]) for result in shown.values())])):
            records = {stage: result.records[task][index] for stage, result in shown.items()}
            rows = [
                {
                    "stage": files.labels[stage],
                    "drawn": record["drawn"],
                    "images": each(shown[stage].images[task][index]),
                }
                for stage, record in records.items()
            ]
            first = next(iter(records.values()), None)
            if first is not None:
                items.append({"prompt": first["prompt"], "truth": first.get("truth", ""), "rows": rows})
        if items:
            found.append({"title": TASKS[task].title, "items": items})
    return found


def _answers(files: RunFiles) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for task, limit in _ANSWERED.items():
        results = [result.records.get(task, []) for result in files.results.values()]
        lines = []
        for records in zip(*results, strict=False):
            first, cells = records[0], [{"text": record["answer"], "right": _right(record)} for record in records]
            about = {"question": first["question"], "image": first.get("image", ""), "truth": first["truth"]}
            lines.append({**about, "cells": cells})
        if lines:
            found.append({"title": TASKS[task].title, "lines": lines[:limit], "more": lines[limit:]})
    return found


def _right(record: ItemRecord) -> bool:
    scores = record["scores"]
    return bool((scores.get("accuracy") or scores.get("weight") or [0])[0])


def _plots(files: RunFiles) -> list[dict[str, str]]:
    dsog = files.grpo.get("dsog")
    target = dsog.get("target_pass_rate") if isinstance(dsog, Mapping) else None
    target = float(target) if isinstance(target, (int, float)) else None
    draw: dict[str, tuple[str, Callable[[plots.Theme], bytes]]] = {}
    if files.stage_rows:
        text = "Losses while the concept's tokens were learned, before reinforcement."
        draw["stages"] = (text, lambda theme: plots.stages(files.stage_rows, theme))
    if files.rows:
        draw |= _curves(files)
    if any(math.isfinite(value) for value in plots.numbers(files.rows, "threshold")):
        text = "Previews that score below the threshold are generated anew; it moves so that the target share passes."
        draw["dsog"] = (text, lambda theme: plots.dsog(files.rows, theme, target))
    found = []
    for name, (text, figure) in draw.items():
        light = figure(plots.LIGHT)
        write_bytes_atomic(files.folder / "plots" / f"{name}.png", on_white(light))
        found.append({"name": name, "text": text, "light": png_uri(light), "dark": png_uri(figure(plots.DARK))})
    return found


def _curves(files: RunFiles) -> dict[str, tuple[str, Callable[[plots.Theme], bytes]]]:
    rows = files.rows
    reward = "Each dot is the mean reward of one group; the band is the spread inside it, all that is learned from."
    return {
        "reward": (reward, lambda theme: plots.reward(rows, theme)),
        "rewards": ("The reward models apart, unweighted.", lambda theme: plots.rewards(rows, theme)),
        "policy": ("How far and how fast the policy moved.", lambda theme: plots.policy(rows, theme)),
    }


def _samples(files: RunFiles) -> list[dict[str, object]]:
    """Grids of a few training steps, evenly spread."""
    steps = files.samples
    if len(steps) > _SAMPLE_STEPS:
        places = [round(i * (len(steps) - 1) / (_SAMPLE_STEPS - 1)) for i in range(_SAMPLE_STEPS)]
        steps = [steps[place] for place in places]
    found = []
    for step in steps:
        base = files.folder / "samples" / f"step_{step:04d}"
        preview, texts = base.with_name(f"{base.name}_preview.png"), base.with_name(f"{base.name}.json")
        words = read_json_table(texts) if texts.exists() else {}
        columns = [words.get(key, []) for key in ("prompts", "answers", "rewards")]
        if not all(isinstance(column, list) for column in columns):
            raise UserError(f"{texts}: prompts, answers and rewards must be lists")
        found.append(
            {
                "step": step,
                "final": file_uri(base.with_name(f"{base.name}_final.png")),
                "preview": file_uri(preview) if preview.exists() else "",
                "lines": [{"prompt": p, "answer": a, "reward": r} for p, a, r in zip(*columns, strict=False)],
            }
        )
    return found


def _settings(files: RunFiles) -> list[tuple[str, str]]:
    """The settings one asks for first, and how long it took."""
    chosen = ("trainable", "group_size", "lr", "beta", "timesteps", "guidance_scale", "visual_ratio", "seed", "dtype")
    lines = [(key.replace("_", " "), str(files.grpo[key])) for key in chosen if key in files.grpo]
    seconds = [value for value in plots.numbers(files.rows, "seconds") if math.isfinite(value)]
    if files.rows:
        lines.insert(0, ("steps", str(len(files.rows))))
    if seconds:
        lines.append(("training", f"{_duration(sum(seconds))} ({sum(seconds) / len(seconds):.2f} s a step)"))
    for stage, result in files.results.items():
        wanted = result.settings
        what = f"{wanted.get('samples', '?')} images a prompt, {wanted.get('steps', '?')} timesteps"
        lines.append((f"evaluation, {files.labels[stage].lower()}", f"{_duration(result.seconds)} ({what})"))
    return lines


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
