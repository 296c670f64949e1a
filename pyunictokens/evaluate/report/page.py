"""One page about one run: what changed, how sure that is, how it came about (``write_report(run)`` → report.html).

Takes what a run left behind (run_files.py), the sentences computed from it (summary.py) and the curves (plots.py, also
written as PNG into plots/), and fills one HTML file that needs no other file and no network. What is missing is left
out; knows no model and no training.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...utils.files import read_json, write_bytes_atomic, write_text_atomic
from . import embedded_images as pictures
from . import plots
from .run_files import STAGES, RunFiles, read_run
from .summary import HEADLINE, outcome, verdict

TABLE: dict[str, dict[str, str]] = {
    "Reward of drawings of held-out facts": {
        "reasoning_generation.reward": "Total",
        "reasoning_generation.tier": "TIER, the answer",
        "reasoning_generation.ber": "BER, the prompt",
        "reasoning_generation.der": "DER, the subject",
        "reasoning_generation.fer": "FER, the face",
    },
    "All drawings": {
        "drawings.attributes": "Attribute accuracy",
        "drawings.subject": "… of the subject",
        "drawings.prompted": "… of what the prompt asks for",
        "drawings.clip_t": "CLIP-T, likeness to the prompt",
        "drawings.clip_i": "CLIP-I, likeness to the photos",
    },
    "Understanding": {
        "recognition.weight": "Recognition, 0.5·yes + 0.5·no",
        "reasoning.accuracy": "Right fact chosen",
        "reasoning.bleu": "Right fact chosen, BLEU",
        "vqa.accuracy": "Questions about pictures, accuracy",
        "vqa.bleu": "Questions about pictures, BLEU",
        "qa.accuracy": "Questions without a picture, accuracy",
        "qa.bleu": "Questions without a picture, BLEU",
    },
}
"""Rows of the main table; every other metric goes into the table below it."""

SPLIT_NAMES = {
    "recognition": "Recognition",
    "vqa": "Questions about pictures",
    "qa": "Questions without a picture",
    "reasoning": "Which fact is meant?",
    "pure": "Short prompts",
    "reasoning_generation": "Prompts that hint at a held-out fact",
    "dense": "Long prompts",
    "dense_reasoning": "Long prompts that hint at a held-out fact",
}

_DRAWN_ITEMS = {"reasoning_generation": 6, "dense_reasoning": 2, "dense": 2, "pure": 4}
_ANSWER_ITEMS = {"reasoning": 12, "vqa": 12, "qa": 10, "recognition": 8}
_SAMPLE_STEPS = 3


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write report.html (and plots/*.png) into the folder of a run; returns its path.

    Raises UserError when there is nothing to report, or a file of the run cannot be read.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    files = read_run(run_dir)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(**_context(files))
    path = files.folder / "report.html"
    write_text_atomic(path, page)
    return path


# --- the page's parts ----------------------------------------------------------------------------------------------


def _context(files: RunFiles) -> dict[str, Any]:
    some = next(iter(files.results.values()), None)
    name = files.about.get("name") or (some.concept if some else files.folder.name)
    result, sentences = verdict(files)
    return {
        "name": name,
        "subtitle": " · ".join(filter(None, [files.about.get("class_word"), files.about.get("kind")])),
        "outcome": result,
        "sentences": sentences,
        "tiles": _tiles(files),
        "photos": pictures.each(some.images["photos"][0]) if some and some.images.get("photos") else [],
        "stages": {stage: STAGES[stage] for stage in STAGES if stage in files.results},
        "table": _table(files),
        "drawn": _drawn(files),
        "answers": _answers(files),
        "plots": _plots(files),
        "samples": _samples(files),
        "settings": _settings(files),
        "config_text": files.config_text,
        "notes": sorted({note for result in files.results.values() for note in result.notes}),
        "split_names": SPLIT_NAMES,
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }


def _tiles(files: RunFiles) -> list[dict[str, Any]]:
    labels = {"reasoning_generation.reward": "Reward, held-out prompts", "recognition.weight": "Recognition"}
    labels |= {"drawings.attributes": "Attribute accuracy", "reasoning.accuracy": "Right fact chosen"}
    if files.pair is None:
        return []
    before, after = files.pair
    changes = before.compare(after)
    return [
        {
            "label": labels[key],
            "before": f"{before.metrics[key].mean:.3f}",
            "after": f"{after.metrics[key].mean:.3f}",
            "change": f"{changes[key].mean:+.3f}",
            "outcome": outcome(changes[key]),
        }
        for key in HEADLINE
        if key in changes
    ]


def _table(files: RunFiles) -> list[dict[str, Any]]:
    metrics = {stage: result.metrics for stage, result in files.results.items()}
    changes = files.pair[0].compare(files.pair[1]) if files.pair else {}
    present = {key for found in metrics.values() for key in found}
    listed = {key for group in TABLE.values() for key in group}
    groups = {title: dict(rows) for title, rows in TABLE.items()}
    rest = [key for split in SPLIT_NAMES for key in sorted(present - listed) if key.partition(".")[0] == split]
    groups["By kind of prompt or question"] = {
        key: f"{SPLIT_NAMES[key.partition('.')[0]]}: {key.partition('.')[2]}" for key in rest
    }
    table = []
    for title, rows in groups.items():
        lines = []
        for key, label in rows.items():
            if key not in present:
                continue
            change = changes.get(key)
            lines.append(
                {
                    "label": label,
                    "cells": [metrics[stage].get(key) for stage in files.results],
                    "change": change,
                    "outcome": outcome(change) if change else "",
                }
            )
        if lines:
            table.append({"title": title, "lines": lines, "folded": title not in TABLE})
    return table


def _drawn(files: RunFiles) -> list[dict[str, Any]]:
    """The same prompts before and after, drawings side by side."""
    found = []
    for split, limit in _DRAWN_ITEMS.items():
        shown = {stage: result for stage, result in files.results.items() if result.images.get(split)}
        if not shown:
            continue
        items = []
        for index in range(min(limit, *(len(result.images[split]) for result in shown.values()))):
            rows = [
                {
                    "stage": STAGES[stage],
                    "drawn": result.records[split][index]["drawn"],
                    "images": pictures.each(result.images[split][index]),
                }
                for stage, result in shown.items()
            ]
            record = next(iter(shown.values())).records[split][index]
            items.append({"prompt": record["prompt"], "truth": record.get("truth", ""), "rows": rows})
        found.append({"title": SPLIT_NAMES[split], "items": items})
    return found


def _answers(files: RunFiles) -> list[dict[str, Any]]:
    found = []
    for split, limit in _ANSWER_ITEMS.items():
        results = [result.records.get(split, []) for result in files.results.values()]
        if not any(results):
            continue
        count = min(len(records) for records in results)
        lines = []
        for index in range(count):
            answers = [records[index] for records in results]
            right = [_right(record) for record in answers]
            cells = [{"text": record["answer"], "right": ok} for record, ok in zip(answers, right, strict=True)]
            first = answers[0]
            lines.append(
                {
                    "question": first["question"],
                    "image": first.get("image", ""),
                    "truth": first["truth"],
                    "cells": cells,
                }
            )
        found.append({"title": SPLIT_NAMES[split], "lines": lines[:limit], "more": lines[limit:]})
    return found


def _right(record: Mapping[str, Any]) -> bool:
    scores = record["scores"]
    return bool((scores.get("accuracy") or scores.get("weight") or [0])[0])


def _plots(files: RunFiles) -> list[dict[str, Any]]:
    settings = files.config.get("grpo", files.config)
    target = settings.get("dsog", {}).get("target_pass_rate") if isinstance(settings.get("dsog", {}), dict) else None
    draw: dict[str, tuple[str, Callable[[plots.Theme], bytes]]] = {}
    if files.stage_rows:
        text = "Losses while the concept's tokens were learned, before reinforcement."
        draw["stages"] = (text, lambda theme: plots.stages(files.stage_rows, theme))
    if files.rows:
        draw |= _curves(files)
    if any(math.isfinite(value) for value in plots.numbers(files.rows, "threshold")):
        text = "Previews that score below the threshold are drawn anew; it moves so that the target share passes."
        draw["dsog"] = (text, lambda theme: plots.dsog(files.rows, theme, target))
    found = []
    for name, (text, figure) in draw.items():
        light = figure(plots.LIGHT)
        write_bytes_atomic(files.folder / "plots" / f"{name}.png", pictures.on_white(light))
        found.append(
            {"name": name, "text": text, "light": pictures.png_uri(light), "dark": pictures.png_uri(figure(plots.DARK))}
        )
    return found


def _curves(files: RunFiles) -> dict[str, tuple[str, Callable[[plots.Theme], bytes]]]:
    rows = files.rows
    reward = "Each dot is the mean reward of one group; the band is the spread inside it, all that is learned from."
    return {
        "reward": (reward, lambda theme: plots.reward(rows, theme)),
        "experts": ("The experts apart, unweighted.", lambda theme: plots.experts(rows, theme)),
        "policy": ("How far and how fast the policy moved.", lambda theme: plots.policy(rows, theme)),
    }


def _samples(files: RunFiles) -> list[dict[str, Any]]:
    """Grids of a few training steps, evenly spread."""
    steps = files.samples
    if len(steps) > _SAMPLE_STEPS:
        places = [round(i * (len(steps) - 1) / (_SAMPLE_STEPS - 1)) for i in range(_SAMPLE_STEPS)]
        steps = [steps[place] for place in places]
    found = []
    for step in steps:
        base = files.folder / "samples" / f"step_{step:04d}"
        preview, texts = base.with_name(f"{base.name}_preview.png"), base.with_name(f"{base.name}.json")
        words = read_json(texts) if texts.exists() else {}
        lines = zip(words.get("prompts", []), words.get("answers", []), words.get("rewards", []), strict=False)
        found.append(
            {
                "step": step,
                "final": pictures.file_uri(base.with_name(f"{base.name}_final.png")),
                "preview": pictures.file_uri(preview) if preview.exists() else "",
                "lines": [{"prompt": p, "answer": a, "reward": r} for p, a, r in lines],
            }
        )
    return found


def _settings(files: RunFiles) -> list[tuple[str, str]]:
    """The settings one asks for first, and how long it took."""
    grpo = files.config.get("grpo", files.config)
    chosen = ("trainable", "group_size", "lr", "beta", "timesteps", "guidance_scale", "visual_ratio", "seed", "dtype")
    lines = [(key.replace("_", " "), str(grpo[key])) for key in chosen if isinstance(grpo, dict) and key in grpo]
    seconds = [value for value in plots.numbers(files.rows, "seconds") if math.isfinite(value)]
    if files.rows:
        lines.insert(0, ("steps", str(len(files.rows))))
    if seconds:
        lines.append(("training", f"{_duration(sum(seconds))} ({sum(seconds) / len(seconds):.2f} s a step)"))
    for stage, result in files.results.items():
        wanted = result.settings
        what = f"{wanted.get('samples', '?')} drawings a prompt, {wanted.get('steps', '?')} timesteps"
        lines.append((f"evaluation, {STAGES[stage].lower()}", f"{_duration(result.seconds)} ({what})"))
    return lines


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
