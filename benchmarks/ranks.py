"""Reinforcement by one rank against several: samples and steps a second, and what synchronising takes.

    python -m benchmarks.ranks                            # one and two cores; writes benchmarks/results/ranks-cpu.json
    python -m benchmarks.ranks --rounds 1 --steps 2 --groups 1
    python -m benchmarks.ranks --device cuda --ranks 1,2,4,8 --groups 8        # NCCL, a GPU a rank; ranks-cuda.json

The embedded toy with its preset (all weights learn, DSOG on), from tokens that a short stage has learned. Every rank is
a process with one thread, on a CPU pinned to a core of its own. The sides take turns; a run's first steps warm up and
are not counted. `processor_seconds` are those that rank 0 computed: where they are much less than `seconds` beyond the
share of synchronisation, other programs had the cores. A sample is one answer with its image: previewed, scored,
compared with the reference and trained on. The share of synchronisation is what rank 0 spends in calls to the others,
waiting for them included.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import results
from benchmarks.run_cpu import machine
from pyunictokens.data.folder import load_concept
from pyunictokens.models import ConceptTokens
from pyunictokens.toy.concept import write_toy_concept
from pyunictokens.toy.model import load_toy
from pyunictokens.toy.rewards import load_toy_rewards
from pyunictokens.train import TrainConfig, train_concept_tokens, train_grpo
from pyunictokens.train.distributed.ranks import Ranks
from pyunictokens.utils.files import read_json, write_json

TIMES = "times.json"


def prepare(folder: Path) -> None:
    """A toy concept and tokens for it."""
    write_toy_concept(folder / "data", seed=0, kind="animal", name="bo")
    toy = load_toy()
    config = TrainConfig.preset("toy").override(["stages.stages=[joint]", "stages.max_steps=20"])
    data = load_concept(folder / "data", "bo")
    train_concept_tokens(toy.model, toy.vq, toy.tokenizer, data, config.stages, folder / "stages").save(
        folder / "tokens"
    )


def work(folder: Path, out: Path, words: list[str], core: int, device: str = "cpu") -> None:
    """One rank, in a process of its own."""
    if hasattr(os, "sched_setaffinity") and device == "cpu":
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    with Ranks.open(device) as ranks:
        toy, rewards = load_toy(torch.float32, ranks.device), load_toy_rewards(device=ranks.device)
        data = load_concept(folder / "data", "bo")
        times = [(time.perf_counter(), time.process_time())]
        train_grpo(
            toy.model,
            toy.vq,
            toy.tokenizer,
            data,
            rewards.ensemble,
            TrainConfig.preset("toy").override(words).grpo,
            out,
            concept=ConceptTokens.load(folder / "tokens"),
            preview_scorer=rewards.preview_scorer,
            progress=lambda *_: times.append((time.perf_counter(), time.process_time())),
            ranks=ranks,
        )
        if ranks.first:
            write_json(out / TIMES, times)


def measure(folder: Path, out: Path, ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run on `ranks` ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    steps = options.warmup + options.steps
    words = [f"grpo.groups={options.groups}", f"grpo.steps={steps}", "grpo.checkpoint_every=0", "grpo.sample_every=0"]
    pinned = hasattr(os, "sched_getaffinity") and options.device == "cpu"
    cores = sorted(os.sched_getaffinity(0)) if pinned else list(range(ranks))
    running = []
    for rank in range(ranks):
        named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in named.items()}, "OMP_NUM_THREADS": "1"}
        job = json.dumps(
            {"folder": str(folder), "out": str(out), "words": words, "core": cores[rank], "device": options.device}
        )
        running.append(subprocess.Popen([sys.executable, "-m", "benchmarks.ranks", "--job", job], env=environment))
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"ranks ended with {codes}")
    times, phases = read_json(out / TIMES), read_json(out / "phases.json")
    seconds, busy = (end - begin for begin, end in zip(times[options.warmup], times[-1], strict=True))
    spent = {phase["name"]: phase["seconds"] for phase in phases["phases"]}
    samples = options.steps * options.groups * TrainConfig.preset("toy").grpo.group_size
    return {
        "ranks": ranks,
        "samples": samples,
        "seconds": round(seconds, 3),
        "processor_seconds": round(busy, 3),
        "samples_per_second": round(samples / seconds, 4),
        "steps_per_second": round(options.steps / seconds, 5),
        "synchronisation_share": round(spent.get("synchronisation", 0.0) / sum(spent.values()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a run (default 4)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before that (default 1)")
    parser.add_argument("--groups", type=int, default=2, help="groups of nine in a step (default 2)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cores by gloo, or GPUs by NCCL")
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks to compare, the first against each (1,2)")
    parser.add_argument("--out", type=Path, help="result file; benchmarks/results/ranks-DEVICE.json by default")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job)
        work(Path(job["folder"]), Path(job["out"]), job["words"], job["core"], job["device"])
        return
    if min(options.rounds, options.steps, options.warmup, options.groups) < 1:
        parser.error("--rounds, --steps, --warmup and --groups must be at least 1")
    counts = [int(part) for part in options.ranks.split(",") if part.strip().isdecimal()]
    if len(counts) < 2 or min(counts) < 1 or len(set(counts)) != len(counts):
        parser.error(f"--ranks {options.ranks}: must be two or more different numbers, as in 1,2,4")
    on_cpu = options.device == "cpu"
    there = len(os.sched_getaffinity(0)) if on_cpu and hasattr(os, "sched_getaffinity") else max(counts)
    there = there if on_cpu else torch.cuda.device_count()
    if there < max(counts):
        parser.error(f"{max(counts)} {'cores' if on_cpu else 'GPUs'} are needed, {there} are there")
    sides = []
    with tempfile.TemporaryDirectory() as room:
        prepare(Path(room))
        for turn in range(options.rounds):
            sides.append([measure(Path(room), Path(room) / f"run{turn}-{n}", n, options) for n in counts])
            print(f"round {turn + 1}: " + ", ".join(f"{each['samples_per_second']} a second" for each in sides[-1]))
    by_ranks = {
        str(count): {
            name: statistics.median(run[name] for run in runs)
            for name in ("samples_per_second", "steps_per_second", "synchronisation_share")
        }
        for count, runs in zip(counts, zip(*sides, strict=True), strict=True)
    }
    pairs = [(turn[0], turn[-1]) for turn in sides]
    one, two = (by_ranks[str(count)]["samples_per_second"] for count in (counts[0], counts[-1]))
    single = sorted(second["samples_per_second"] / first["samples_per_second"] for first, second in pairs)
    result = {
        "command": " ".join(["python -m benchmarks.ranks", *sys.argv[1:]]),
        "machine": machine(),
        "settings": {"steps": options.steps, "warmup": options.warmup, "groups": options.groups, "group_size": 9},
        "device": options.device,
        "ranks": counts,
        "by_ranks": by_ranks,
        "one_rank_samples_per_second": one,
        "two_ranks_samples_per_second": two,
        "ratio": round(two / one, 3),
        "ratio_min": round(single[0], 3),
        "ratio_max": round(single[-1], 3),
        "synchronisation_share": statistics.median(second["synchronisation_share"] for _, second in pairs),
        "runs": [run for turn in sides for run in turn],
    }
    out = options.out or results() / f"ranks-{options.device}.json"
    write_json(out, result)
    share = 100 * result["synchronisation_share"]
    span = f"{result['ratio_min']}…{result['ratio_max']}"
    print(f"{counts[-1]} ranks: {result['ratio']} × {counts[0]} ({span}), {share:.1f} % synchronising")
    print(out)


if __name__ == "__main__":
    main()
