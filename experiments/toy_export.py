"""Stage `export` of the toy's build: half-precision weights into pyunictokens/assets/toy, with their provenance.

Layout: showo/ and vq/ as `from_pretrained` reads them, tokenizer/, experts.safetensors with experts.json,
provenance.json (seed, commit of the scripts, versions, wall times, notes, checksums).
"""

from __future__ import annotations

import hashlib
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
from toy_experts import load_experts
from toy_showo import load_showo
from toy_vq import load_vq

from pyunictokens.toy.words import build_tokenizer, words
from pyunictokens.utils.files import save_safetensors_atomic, write_json, write_text_atomic

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "pyunictokens" / "assets" / "toy"
LIMIT = 20_000_000


def _times(work: Path) -> dict[str, int]:
    """Seconds of each stage, several legs added up."""
    spent: dict[str, int] = {}
    path = work / "times.log"
    for line in path.read_text().splitlines() if path.exists() else []:
        stage, seconds = line.split()
        spent[stage] = spent.get(stage, 0) + int(seconds)
    return spent


def export(work: Path, *, seed: int) -> None:
    """Write the assets. Raises when they are larger than the package may carry."""
    half = torch.float16
    load_showo(work).save_pretrained(ASSETS / "showo", dtype=half)
    load_vq(work).save_pretrained(ASSETS / "vq", dtype=half)
    write_text_atomic(ASSETS / "tokenizer" / "tokenizer.json", build_tokenizer().to_str(pretty=False) + "\n")
    ends = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    write_json(ASSETS / "tokenizer" / "tokenizer_config.json", ends)
    experts = load_experts(work).state_dict()
    weights = {key: value.to(half) if value.is_floating_point() else value for key, value in experts.items()}
    save_safetensors_atomic(ASSETS / "experts.safetensors", weights)
    write_json(ASSETS / "experts.json", {"words": words()})
    files = sorted(path for path in ASSETS.rglob("*") if path.is_file() and path.name != "provenance.json")
    size = sum(path.stat().st_size for path in files)
    if size > LIMIT:
        raise SystemExit(f"the assets are {size} bytes: the package may carry {LIMIT}")
    commit = subprocess.run(
        ["git", "log", "-1", "--format=%H", "--", "experiments"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    notes = work / "notes.txt"  # what a rerun of the scripts as they are would do differently
    provenance = {
        "made_by": "experiments/build_toy.py",
        "commit": commit.stdout.strip(),
        "seed": seed,
        "versions": {name: version(name) for name in ("torch", "numpy", "pillow", "tokenizers")},
        "seconds": _times(work),
        "notes": notes.read_text(encoding="utf-8").splitlines() if notes.exists() else [],
        "bytes": size,
        "sha256": {str(path.relative_to(ASSETS)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }
    write_json(ASSETS / "provenance.json", provenance)
    print(f"{size / 1e6:.1f} MB in {ASSETS}")
