"""A run's folder as training would leave it, made of drawn scenes and made-up numbers. Also runs by itself:

python -m tests.evaluate.synthetic FOLDER
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyunictokens.data.images import from_pil, make_grid, save_image
from pyunictokens.evaluate.result import EvalResult, to_bytes
from pyunictokens.toy.drawing import render
from pyunictokens.toy.scene import Attributes, random_moment, random_scene

FACTS = ["its favourite toy is a red ball", "it sleeps in the snow", "it loves to wear a blue hat"]


def drawings(scene: Attributes, count: int, rng: np.random.Generator) -> Tensor:
    """The subject at `count` moments, pixels [count, 3, 64, 64]."""
    from PIL import Image

    return torch.stack([from_pil(Image.fromarray(render(random_moment(scene, rng), 64))) for _ in range(count)])


def result(lift: float, seed: int = 0, samples: int = 3, kind: str = "animal") -> EvalResult:
    """An evaluation whose scores are noise around a level raised by `lift`; the noise depends on the seed alone."""
    rng, look, more = (
        np.random.default_rng(seed),
        np.random.default_rng(7),
        np.random.default_rng(round(1000 * lift) % 997),
    )
    subject = random_scene(look, kind)
    made = EvalResult("bo", {"samples": samples, "seed": 0, "steps": 12, "guidance_scale": 3.0}, seconds=41.5)
    made.notes.append("recognition: every negative picture was also seen in training")

    def scores(*names: str) -> dict[str, list[float]]:
        level = {name: 0.5 + lift + rng.normal(0, 0.08, samples) + more.normal(0, 0.02, samples) for name in names}
        return {name: np.clip(values, 0, 1).tolist() for name, values in level.items()}

    def some(right: float) -> list[float]:
        return [float(rng.random() < right + 2 * lift)]

    made.images["references"] = [to_bytes(drawings(subject, 8, look))]
    for split, count in (("pure", 5), ("reasoning_generation", 3), ("dense", 3)):
        made.records[split], made.images[split] = [], []
        for index in range(count):
            record = {"prompt": f"a photo of <bo>, {split} number {index}", "drawn": f"a photo of <bo>, number {index}"}
            names = ["clip_t", "clip_i", "attributes", "subject", "prompted"]
            if split == "reasoning_generation":
                fact = FACTS[index]
                record |= {"drawn": f"a photo of <bo>. {fact}.", "truth": fact, "answer": fact}
                names += ["reward", "tier", "ber", "der"]
            made.records[split].append({**record, "scores": scores(*names)})
            made.images[split].append(to_bytes(drawings(subject, samples, look)))
    answers = [
        ("what colour is <bo>?", "red"),
        ("where is <bo>?", "on the beach"),
        ("what is <bo> wearing?", "a blue hat"),
    ]
    for split in ("vqa", "qa"):
        made.records[split] = []
        for place in range(16):
            question, truth = answers[place % 3]
            right = some(0.5)
            record = {"question": f"{question} ({place})", "truth": truth, "answer": truth if right[0] else "green <b>"}
            made.records[split].append({**record, "scores": {"accuracy": right, "bleu": [0.3 + 0.6 * right[0]]}})
    made.records["recognition"] = [
        {
            "image": f"{place}.png",
            "question": "is <bo> in the picture?",
            "truth": "yes" if place % 2 else "no",
            "answer": "yes",
            "group": "positive" if place % 2 else "negative",
            "scores": {"weight": some(0.6)},
        }
        for place in range(12)
    ]
    made.records["reasoning"] = [
        {"question": f"prompt {i}", "truth": fact, "answer": fact, "scores": {"accuracy": some(0.4), "bleu": [0.5]}}
        for i, fact in enumerate(FACTS)
    ]
    return made


def metrics(steps: int) -> list[dict]:
    """Lines of metrics.jsonl, one of them with numbers missing."""
    rng = np.random.default_rng(5)
    rows = []
    for step in range(steps):
        level = 0.45 + 0.12 * (1 - math.exp(-step / 25))
        parts = {
            name: level + shift + rng.normal(0, 0.03) for name, shift in (("tier", 0.1), ("ber", -0.05), ("der", 0.02))
        }
        rate = float(np.clip(0.25 + rng.normal(0, 0.1), 0.05, 1))
        rows.append(
            {
                "step": step,
                "mode": "visual" if rng.random() < 0.5 else "text_only",
                "loss": rng.normal(0, 0.01),
                "reward_mean": 0.4 * parts["tier"] + 0.3 * parts["ber"] + 0.3 * parts["der"],
                "within_group_std": 0.04 + 0.01 * rng.random(),
                "parts": parts,
                "parts_std": {name: 0.05 for name in parts},
                "kl": 0.002 * step / steps + 0.0003 * rng.random(),
                "clip_fraction": 0.02 * rng.random(),
                "grad_norm": 0.6 + 0.2 * rng.random(),
                "ratio_max": 1.1,
                "lr": 2e-5,
                "threshold": 0.5 - 0.2 * (1 - math.exp(-step / 10)) + rng.normal(0, 0.01),
                "pass_rate": rate,
                "candidates": 9 / rate,
                "no_face": 0,
                "seconds": 3.1 + 0.2 * rng.random(),
                "answer": FACTS[0],
                "prompt": f"a photo of <bo> with its favourite toy. {FACTS[0]}.",
                "skipped": None,
            }
        )
    rows[steps // 2] |= {"loss": None, "grad_norm": None, "kl": None, "skipped": "loss nan"}
    return rows


def write_run(folder: Path, steps: int = 60, lift: float = 0.08) -> Path:
    """Write the whole folder; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    result(0.0).save(folder / "before.json")
    result(lift).save(folder / "after.json")
    lines = [json.dumps(row) for row in metrics(steps)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 60, "rew', encoding="utf-8")
    (folder / "config.yaml").write_text(
        "version: 0.1.0\nmodel: null\ngrpo:\n  steps: 60\n  group_size: 9\n  lr: 2.0e-05\n  trainable: full\n"
        "  dsog:\n    target_pass_rate: 0.25\n",
        encoding="utf-8",
    )
    (folder / "stages").mkdir(exist_ok=True)
    stages = [
        {"step": step, "stage": stage, "loss_understanding": 2 * math.exp(-step / 40), **more}
        for step in range(120)
        for stage, more in [("understanding", {}) if step < 60 else ("generation", {"loss_generation": 3.0})]
    ]
    (folder / "stages" / "stages.jsonl").write_text("\n".join(map(json.dumps, stages)), encoding="utf-8")
    about = {"name": "bo", "kind": "animal", "class_word": "cat", "extra_info": FACTS}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
    rng = np.random.default_rng(9)
    subject = random_scene(rng, "animal")
    (folder / "samples").mkdir(exist_ok=True)
    for step in range(0, steps, 10):
        final = drawings(subject, 9, rng)
        prompts = [f"a photo of <bo> with its favourite toy. {FACTS[0]}."] * 9
        rewards = rng.random(9).tolist()
        base = folder / "samples" / f"step_{step:04d}"
        captions = [f"{reward:.3f} {prompt}" for reward, prompt in zip(rewards, prompts, strict=True)]
        save_image(make_grid(final, 3, captions), f"{base}_final.png")
        save_image(make_grid((final + torch.randn(final.shape) * 0.3).clamp(-1, 1), 3), f"{base}_preview.png")
        words = {"step": step, "prompts": prompts, "answers": [FACTS[0]] * 9, "rewards": rewards}
        Path(f"{base}.json").write_text(json.dumps(words), encoding="utf-8")
    return folder


if __name__ == "__main__":
    from pyunictokens.evaluate.report.page import write_report

    print(write_report(write_run(Path(sys.argv[1]))))
