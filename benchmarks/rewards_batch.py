"""Scoring a group as one batch against scoring its drawings one by one, and drawings a second by expert.

    python -m benchmarks.rewards_batch                    # writes benchmarks/results/rewards-<device>.json
    python -m benchmarks.rewards_batch --device cuda --rows 9 --rounds 20

Two sets of networks: the toy's experts as shipped, and small random checkpoints of the paper's networks (ERNIE, BLIP-2,
DINOv2, and MTCNN with FaceNet, these two in full size), made by the tests. The two sides take turns, round by round,
after a warm-up that embeds photos, facts and prompts; answers are new in every round, as in training. Quoted are ratios
of medians. Both sides give the same scores, or nothing is timed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.run_cpu import machine
from pyunictokens.io import read_json, write_json
from pyunictokens.rewards import Ensemble, RewardBatch, load_toy_experts
from pyunictokens.rewards.load import load_rewards
from tests.rewards import checkpoints

RESULTS = Path(__file__).parent / "results"
TOY, REAL = "the toy's experts", "small ERNIE, BLIP-2, DINOv2; MTCNN and FaceNet"
SIDE = 64
_NUMBERS = itertools.count()


def real_ensemble(folder: Path, device: str) -> Ensemble:
    """The paper's networks, small and random."""
    saved = checkpoints.Folders(
        checkpoints.save_ernie(folder / "ernie", max_position_embeddings=64),
        checkpoints.save_blip2(folder / "blip2"),
        checkpoints.save_dinov2(folder / "dinov2"),
        checkpoints.save_facenet(folder / "facenet"),
    )
    return load_rewards({"experts": saved.settings()}, device).ensemble


def group(rows: int, kind: str, device: str) -> RewardBatch:
    """A group of made-up drawings; its answers were never seen before."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(rows + 3, 3, 8, 8, generator=generator) * 1.6 - 0.8
    pixels = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear").to(device)
    answers = [f"its favourite toy is the blue ball {next(_NUMBERS)}" for _ in range(rows)]
    facts = checkpoints.SENTENCES
    return RewardBatch(pixels[3:], ["a photo of a red dog"] * rows, answers, facts, 1, pixels[:3], kind)


def one_by_one(score: Callable[[RewardBatch], torch.Tensor], batch: RewardBatch) -> torch.Tensor:
    return torch.cat([score(batch.row(index)) for index in range(len(batch))])


def compare(score: Callable[[RewardBatch], torch.Tensor], kind: str, rows: int, rounds: int, device: str) -> dict:
    """Medians of both sides for one expert or ensemble, and their ratio."""

    def timed(side: Callable[[RewardBatch], torch.Tensor], batch: RewardBatch) -> float:
        _wait(device)
        begin = time.perf_counter()
        side(batch)
        _wait(device)
        return time.perf_counter() - begin

    first = group(rows, kind, device)
    torch.testing.assert_close(score(first), one_by_one(score, first), atol=2e-3, rtol=1e-3)
    together, singly = [], []
    for _ in range(rounds):
        together.append(timed(score, group(rows, kind, device)))
        singly.append(timed(partial(one_by_one, score), group(rows, kind, device)))
    batch, single = statistics.median(together), statistics.median(singly)
    ratios = sorted(b / a for a, b in zip(together, singly, strict=True))
    return {
        "batch_seconds": batch,
        "single_seconds": single,
        "ratio": single / batch,
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "items_per_second": rows / batch,
    }


def _faces(encode: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], batch: RewardBatch) -> torch.Tensor:
    found, faces = encode(batch.images)
    return torch.where(found, faces.sum(1), 0.0)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(ensemble: Ensemble, rows: int, rounds: int, device: str) -> dict[str, dict]:
    """The ensemble as animals and objects use it, and every expert alone."""
    result = {"ensemble": compare(lambda batch: ensemble.score(batch).total, "animal", rows, rounds, device)}
    for name, expert in ensemble.experts.items():
        if name == "fer":  # with no face in the photos there is nothing to compare with: the search is what costs
            encode = expert._encoder.encode_faces  # type: ignore[attr-defined]
            result[name] = compare(partial(_faces, encode), "human", rows, rounds, device)
        else:
            result[name] = compare(expert.score, "animal", rows, rounds, device)
    return result


def markdown(report: dict[str, Any]) -> str:
    """The table of docs/rewards.md; drawings a second are shown of a GPU alone, where they mean something elsewhere."""
    gpu = report["device"] == "cuda"
    rate = " drawings a second |" if gpu else ""
    lines = [
        f"| networks | expert | one batch of {report['rows']} is faster by |{rate}",
        "|---|---|---|" + "---|" * gpu,
    ]
    for networks, experts in report["networks"].items():
        for name, found in experts.items():
            spread = f"{found['ratio_min']:.1f} to {found['ratio_max']:.1f}"
            rate = f" {found['items_per_second']:.0f} |" if gpu else ""
            lines.append(f"| {networks} | {name} | {found['ratio']:.1f} ({spread}) |{rate}")
    about, load = report["machine"], report["load"]
    place = report["gpu"] if gpu else f"{about['cpu']}, threads of torch: {about['threads']} of {about['cores']} cores"
    conditions = (
        f"{SIDE}² pixels, medians of {report['rounds']} rounds and the extremes, load of the machine {load:.1f}"
    )
    return "\n".join([*lines, "", f"{place}; {conditions}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the networks run")
    parser.add_argument("--rows", type=int, default=9, help="drawings of a group (default 9)")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds of each side (default 15)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's own choice")
    parser.add_argument("--out", type=Path, help="result file (default benchmarks/results/rewards-<device>.json)")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table of the result file")
    options = parser.parse_args()
    file = options.out or RESULTS / f"rewards-{options.device}.json"
    if options.table:
        print(markdown(read_json(file)))
        return
    if options.rows < 1 or options.rounds < 1:
        parser.error("--rows and --rounds must be at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]  # before this adds to it
    with tempfile.TemporaryDirectory() as folder:
        ensembles = {
            TOY: load_toy_experts(device=options.device).ensemble,
            REAL: real_ensemble(Path(folder), options.device),
        }
        networks = {n: measure(e, options.rows, options.rounds, options.device) for n, e in ensembles.items()}
    report = {
        "what": "seconds to score a group as one batch, and drawing by drawing",
        "device": options.device,
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        "machine": machine(),
        "load": round(load, 1),
        "rows": options.rows,
        "rounds": options.rounds,
        "networks": networks,
    }
    write_json(file, report)
    print(markdown(report))
    for name, experts in networks.items():
        rates = ", ".join(f"{expert} {found['items_per_second']:.0f}" for expert, found in experts.items())
        print(f"drawings a second, {name}: {rates}")
    print(file)


if __name__ == "__main__":
    main()
