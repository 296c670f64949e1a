"""Scoring a group as one batch against scoring its drawings one by one, and drawings a second by expert.

    python -m benchmarks.rewards_batch                    # writes benchmarks/results/rewards-<device>.json
    python -m benchmarks.rewards_batch --device cuda --full          # the networks in the sizes of the paper

Two sets of networks: the toy's reward models as shipped, and small random checkpoints of the paper's (ERNIE, BLIP-2,
DINOv2, and MTCNN with FaceNet, these two in full size), made by the tests. `--full` measures the latter alone, in their
published sizes with random weights in bfloat16, on drawings of 512², and the rate of operations that this comes to. The
two sides take turns, round by round, after a warm-up that embeds photos, facts and prompts; answers are new in every
round, as in training. Quoted are ratios of medians. Both sides give the same scores, or nothing is timed.
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

from benchmarks import reward_costs as cost
from benchmarks.machine import results
from benchmarks.run_cpu import machine
from pyunictokens.rewards import Ensemble, RewardBatch
from pyunictokens.rewards.load import load_rewards
from pyunictokens.toy.rewards import load_toy_rewards
from pyunictokens.utils.files import read_json, write_json
from tests.rewards import checkpoints

TOY, REAL = "the toy's reward models", "small ERNIE, BLIP-2, DINOv2; MTCNN and FaceNet"
FULL = "ERNIE 3.0 base, BLIP-2 ViT-g, DINOv2 base, MTCNN and FaceNet"
SIDE = 64
ANSWER_TOKENS = 10  # of the answers below: seven words, a number, and the two that frame them
_NUMBERS = itertools.count()


def real_ensemble(folder: Path, device: str, dtype: str = "float32") -> Ensemble:
    """The paper's networks, small and random."""
    saved = checkpoints.Folders(
        checkpoints.save_ernie(folder / "ernie", max_position_embeddings=64),
        checkpoints.save_blip2(folder / "blip2"),
        checkpoints.save_dinov2(folder / "dinov2"),
        checkpoints.save_facenet(folder / "facenet"),
    )
    return load_rewards({"experts": saved.settings(), "dtype": dtype}, device)


def full_ensemble(folder: Path, device: str) -> Ensemble:
    """The paper's networks in their published sizes. Weights are random and made in place: times do not mind."""
    import transformers

    ensemble = real_ensemble(folder, device, dtype="bfloat16")
    configs = cost.paper_configs()._asdict()
    clip = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    blip = transformers.BlipImageProcessor(size={"height": 224, "width": 224}, **clip)
    bit = transformers.BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, **clip)
    made = {
        "tier": (transformers.ErnieModel, None),
        "ber": (transformers.Blip2ForImageTextRetrieval, blip),
        "der": (transformers.Dinov2Model, bit),
    }
    for name, (kind, processor) in made.items():
        network: Any = ensemble.experts[name]._encoder  # type: ignore[attr-defined]
        network.load()  # the tokenizer of the small one stays
        with torch.device(device):
            net = kind(configs[name]).to(network.dtype)
        network._modules = (net.eval().requires_grad_(False),)
        network._processor = processor
    return ensemble


def group(rows: int, kind: str, device: str, side: int = SIDE) -> RewardBatch:
    """A group of made-up drawings; its answers were never seen before."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(rows + 3, 3, 8, 8, generator=generator) * 1.6 - 0.8
    pixels = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear").to(device)
    answers = [f"its favourite toy is the blue ball {next(_NUMBERS)}" for _ in range(rows)]
    facts = checkpoints.SENTENCES
    return RewardBatch(pixels[3:], ["a photo of a red dog"] * rows, answers, facts, 1, pixels[:3], kind)


def one_by_one(score: Callable[[RewardBatch], torch.Tensor], batch: RewardBatch) -> torch.Tensor:
    return torch.cat([score(batch.row(index)) for index in range(len(batch))])


def compare(
    score: Callable[[RewardBatch], torch.Tensor], kind: str, rows: int, rounds: int, device: str, side: int = SIDE
) -> dict[str, float]:
    """Medians of both sides for one expert or ensemble, and their ratio."""

    def timed(side: Callable[[RewardBatch], torch.Tensor], batch: RewardBatch) -> float:
        _wait(device)
        begin = time.perf_counter()
        side(batch)
        _wait(device)
        return time.perf_counter() - begin

    first = group(rows, kind, device, side)
    near = 2e-3 if side == SIDE else 3e-2  # the full networks run in bfloat16
    torch.testing.assert_close(score(first), one_by_one(score, first), atol=near, rtol=near)
    together, singly = [], []
    for _ in range(rounds):
        together.append(timed(score, group(rows, kind, device, side)))
        singly.append(timed(partial(one_by_one, score), group(rows, kind, device, side)))
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


def measure(ensemble: Ensemble, rows: int, rounds: int, device: str, side: int = SIDE) -> dict[str, dict[str, float]]:
    """The ensemble as animals and objects use it, and every expert alone."""
    result = {"ensemble": compare(lambda batch: ensemble.score(batch).total, "animal", rows, rounds, device, side)}
    for name, expert in ensemble.experts.items():
        if name == "fer":  # with no face in the photos there is nothing to compare with: the search is what costs
            encode = expert._encoder.encode_faces  # type: ignore[attr-defined]
            result[name] = compare(partial(_faces, encode), "human", rows, rounds, device, side)
        else:
            result[name] = compare(expert.score, "animal", rows, rounds, device, side)
    return result


def markdown(report: dict[str, Any]) -> str:
    """The table of docs/rewards.md; drawings a second are shown of a GPU alone, where they mean something elsewhere."""
    gpu = report["device"] == "cuda"
    rate = " drawings a second |" if gpu else ""
    lines = [
        f"| networks | reward model | one batch of {report['rows']} is faster by |{rate}",
        "|---|---|---|" + "---|" * gpu,
    ]
    for networks, experts in report["networks"].items():
        for name, found in experts.items():
            spread = f"{found['ratio_min']:.1f} to {found['ratio_max']:.1f}"
            rate = f" {found['items_per_second']:.0f} |" if gpu else ""
            lines.append(f"| {networks} | {name} | {found['ratio']:.1f} ({spread}) |{rate}")
    about, load = report["machine"], report["load"]
    place = report["gpu"] if gpu else f"{about['cpu']}, threads of torch: {about['threads']} of {about['cores']} cores"
    conditions = f"{report['side']}² pixels, medians of {report['rounds']} rounds and the extremes"
    return "\n".join([*lines, "", f"{place}; {conditions}, load of the machine {load:.1f}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the networks run")
    parser.add_argument("--rows", type=int, default=9, help="drawings of a group (default 9)")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds of each side (default 15)")
    parser.add_argument("--full", action="store_true", help="the published sizes, random weights, drawings of 512²")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's own choice")
    parser.add_argument("--out", type=Path, help="result file (default benchmarks/results/rewards-<device>.json)")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table of the result file")
    options = parser.parse_args()
    file = options.out or results() / f"rewards-{options.device}{'-full' if options.full else ''}.json"
    side = 512 if options.full else SIDE
    if options.table:
        print(markdown(read_json(file)))
        return
    if options.rows < 1 or options.rounds < 1:
        parser.error("--rows and --rounds must be at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]  # before this adds to it
    with tempfile.TemporaryDirectory() as folder:
        if options.full:
            ensembles = {FULL: full_ensemble(Path(folder), options.device)}
        else:
            toy = load_toy_rewards(device=options.device).ensemble
            ensembles = {TOY: toy, REAL: real_ensemble(Path(folder), options.device)}
        networks = {n: measure(e, options.rows, options.rounds, options.device, side) for n, e in ensembles.items()}
    report = {
        "what": "seconds to score a group as one batch, and drawing by drawing",
        "device": options.device,
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        "machine": machine(),
        "load": round(load, 1),
        "rows": options.rows,
        "side": side,
        "rounds": options.rounds,
        "networks": networks,
    }
    write_json(file, report)
    print(markdown(report))
    if options.full:
        flops = cost.group_flops(cost.Setting(rows=options.rows, side=side, answer_tokens=ANSWER_TOKENS))
        rates = {name: flops[name] / networks[FULL][name]["batch_seconds"] / 1e12 for name in flops}
        print("TFLOP/s: " + ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items()))
    for name, experts in networks.items():
        rates = ", ".join(f"{expert} {found['items_per_second']:.0f}" for expert, found in experts.items())
        print(f"drawings a second, {name}: {rates}")
    print(file)


if __name__ == "__main__":
    main()
