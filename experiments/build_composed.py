"""Make the composed world's models from nothing: draw, train, measure, export. Any stage can be stopped and goes on.

    python experiments/build_composed.py --work build-world               # all stages, under three hours on two cores
    python experiments/build_composed.py --work build-world --stage report
    python experiments/build_composed.py --work longer --stage shipped     # begin with the shipped weights, then
    python experiments/build_composed.py --work longer --seed 1 --stage cache                      # new scenes, and
    python experiments/build_composed.py --work longer --stage codes                               # their codes, and
    python experiments/build_composed.py --work longer --seed 1 --stage showo --steps 16000        # train further

Stages: cache (draw scenes), vq (image tokenizer), reader and spotter (what measures, what rewards ask), showo (the
model that draws), report (how often it draws a prompt right), export (weights into pyunictokens/assets/composed).
Lengths are steps, so a loaded machine only takes longer. Logs go to WORK/*.log.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from composed_train import (
    WIDTHS,
    build_cache,
    encode_cache,
    load_cache,
    load_showo,
    load_spotter,
    load_vq,
    train_showo,
    train_spotter,
    train_vq,
)
from torch import nn
from toy_vq import log_line, to_pixels

from pyunictokens.models import TextTokenizer
from pyunictokens.models.checkpoint import load_tensors
from pyunictokens.models.packed import pack, unpack
from pyunictokens.rewards.experts.objects import check
from pyunictokens.rollout.engine import RolloutEngine
from pyunictokens.toy.composed.prompts import caption, prompt_list, words
from pyunictokens.toy.composed.scene import KINDS
from pyunictokens.toy.composed.spotter import Detector
from pyunictokens.toy.words import build_tokenizer
from pyunictokens.utils.files import read_json, save_safetensors_atomic, write_json, write_text_atomic

Net = TypeVar("Net", bound=nn.Module)
ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "pyunictokens" / "assets" / "composed"
LIMIT = 5_000_000
STEPS = {"vq": 2200, "reader": 2500, "spotter": 2200, "showo": 8200}
STAGES = ("cache", *STEPS, "report", "export")
APART = ("shipped", "codes")
"""Stages of a training that goes on from the shipped weights."""


def begin_with_shipped(work: Path) -> None:
    """WORK/NAME.pt of every training, as it was exported: without an optimizer."""
    steps = read_json(ASSETS / "provenance.json")["steps"]
    for name in STEPS:
        model = ASSETS / (f"{name}/model.safetensors" if name in ("vq", "showo") else f"{name}.safetensors")
        torch.save({"model": load_tensors(model), "step": steps[name]}, work / f"{name}.pt")


def as_shipped(model: Net) -> Net:
    """`model` with its weights rounded to the bits that the package carries, so that what is measured is what ships."""
    model.load_state_dict(unpack(pack(model.state_dict()), "the weights"))
    return model


@torch.no_grad()
def measure_spotters(work: Path) -> dict[str, dict[str, float]]:
    """Of true drawings that nothing was trained on, and of the same through the tokenizer: the share of captions of
    which everything is found."""
    import numpy as np

    images, scenes = load_cache(work)
    rows = range(len(images) - 500, len(images))
    drawn = to_pixels(images[rows.start : rows.stop])
    vq, rng = as_shipped(load_vq(work)), np.random.default_rng(5)
    again = torch.cat([vq.decode(vq.encode(part)) for part in drawn.split(100)]).clamp(-1, 1)
    asked = [caption(scenes[row], rng, colours=True)[1] for row in rows]
    found: dict[str, dict[str, float]] = {}
    for name in WIDTHS:
        detector = Detector(as_shipped(load_spotter(work, name)))
        found[name] = {}
        for kind, pixels in (("drawn", drawn), ("reconstructed", again)):
            ready = (pixels + 1) / 2
            seen = detector(ready)
            right = [all(check(a, s, p)) for a, s, p in zip(asked, seen, ready, strict=True)]
            found[name][kind] = sum(right) / len(right)
    return found


@torch.no_grad()
def report(work: Path, prompts: int = 20, images: int = 9) -> None:
    """WORK/report.json: by kind of prompt, how often the model draws it wholly right at once, and in one of nine."""
    numbers: dict[str, object] = {"spotters": measure_spotters(work)}
    reader = Detector(as_shipped(load_spotter(work, "reader")))
    tokenizer = TextTokenizer(build_tokenizer(words()), "<|endoftext|>", "<|endoftext|>")
    engine = RolloutEngine(as_shipped(load_showo(work)), as_shipped(load_vq(work)), tokenizer)
    rows = prompt_list(prompts * len(KINDS), seed=4242)
    texts = [str(row["prompt"]) for row in rows]
    for name, steps, guidance in (("4 timesteps", 4, 0.0), ("12 timesteps", 12, 0.0)):
        drawn = engine.generate_images(
            texts, samples=images, steps=steps, guidance_scale=guidance, seed=1, record=False
        )
        assert drawn.pixels is not None
        ready = (drawn.pixels.clamp(-1, 1) + 1) / 2
        seen = reader(ready)
        table: dict[str, dict[str, float]] = {}
        for kind in KINDS:
            once, best = [], []
            for place, row in enumerate(rows):
                if row["kind"] == kind:
                    own = range(place * images, (place + 1) * images)
                    right = [all(check(row["objects"], seen[k], ready[k])) for k in own]  # type: ignore[arg-type]
                    once.append(sum(right) / images)
                    best.append(float(any(right)))
            table[kind] = {"once": sum(once) / len(once), f"one of {images}": sum(best) / len(best)}
        table["all"] = {key: sum(table[kind][key] for kind in KINDS) / len(KINDS) for key in table[KINDS[0]]}
        numbers[name] = table
    write_json(work / "report.json", numbers)
    log_line(work / "report.log", json.dumps(numbers, indent=1))


def export(work: Path, seed: int, into: Path, notes: list[str]) -> None:
    """Packed weights with their provenance: how they were made, and `notes` after those that are there. Raises when
    they are larger than the package may carry."""
    said = read_json(into / "provenance.json").get("notes", []) if (into / "provenance.json").exists() else []
    for name, model in (("showo", load_showo(work)), ("vq", load_vq(work))):
        model.save_pretrained(into / name)
        save_safetensors_atomic(into / name / "model.safetensors", pack(model.state_dict()))
    write_text_atomic(into / "tokenizer" / "tokenizer.json", build_tokenizer(words()).to_str(pretty=False) + "\n")
    write_json(
        into / "tokenizer" / "tokenizer_config.json", {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    )
    for name, width in WIDTHS.items():
        save_safetensors_atomic(into / f"{name}.safetensors", pack(load_spotter(work, name).state_dict()))
        write_json(into / f"{name}.json", {"width": width})
    write_json(into / "report.json", read_json(work / "report.json"))
    files = sorted(path for path in into.rglob("*") if path.is_file() and path.name != "provenance.json")
    size = sum(path.stat().st_size for path in files)
    if size > LIMIT:
        raise SystemExit(f"the assets are {size} bytes: the package may carry {LIMIT}")
    commit = subprocess.run(
        ["git", "log", "-1", "--format=%H", "--", "experiments"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    provenance = {
        "made_by": "experiments/build_composed.py",
        "commit": commit.stdout.strip(),
        "seed": seed,
        "steps": {name: torch.load(work / f"{name}.pt", weights_only=True)["step"] for name in STEPS},
        "versions": {name: version(name) for name in ("torch", "numpy", "pillow", "tokenizers")},
        "bytes": size,
        "sha256": {str(path.relative_to(into)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "notes": [*said, *notes],
    }
    write_json(into / "provenance.json", provenance)
    print(f"{size / 1e6:.1f} MB in {into}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("all", *STAGES, *APART), default="all")
    parser.add_argument("--work", type=Path, required=True, help="folder for scenes, checkpoints and logs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, help="length of a training stage in place of its own")
    parser.add_argument("--into", type=Path, default=ASSETS, help="where `export` writes")
    parser.add_argument("--note", action="append", default=[], help="what `export` adds to the provenance's notes")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    for stage in STAGES if args.stage == "all" else (args.stage,):
        start, steps = time.time(), args.steps or STEPS.get(stage, 0)
        if stage == "cache":
            build_cache(args.work, args.seed, args.threads)
        elif stage == "vq":
            train_vq(args.work, steps, args.seed)
        elif stage in WIDTHS:
            train_spotter(args.work, stage, steps)
        elif stage == "showo":
            train_showo(args.work, steps, args.seed)
        elif stage == "report":
            report(args.work)
        elif stage == "shipped":
            begin_with_shipped(args.work)
        elif stage == "codes":
            encode_cache(args.work)
        else:
            export(args.work, args.seed, args.into, args.note)
        log_line(args.work / "times.log", f"{stage} {time.time() - start:.0f}")


if __name__ == "__main__":
    main()
