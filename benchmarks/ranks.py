"""Reinforcement by one rank on one core against two on two cores: samples a second, and what synchronising takes.

    python -m benchmarks.ranks                            # writes benchmarks/results/ranks-cpu.json
    python -m benchmarks.ranks --rounds 1 --steps 2 --groups 1

The embedded toy with its preset (all weights learn, DSOG on), from tokens that a short stage has learned. Every rank is
a process with one thread, pinned to a core of its own. Both sides take turns; a run's first steps warm up and are not
counted. `processor_seconds` are those that rank 0 computed: where they are much less than `seconds` beyond the share of
synchronisation, other programs had the cores. A sample is one answer with its image: previewed, scored, held against
the reference and trained on. The share of synchronisation is what rank 0 spends in calls to the other, waiting for it
included.
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


def work(folder: Path, out: Path, words: list[str], core: int) -> None:
    """One rank, in a process of its own."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    toy, rewards, data = load_toy(), load_toy_rewards(), load_concept(folder / "data", "bo")
    times = [(time.perf_counter(), time.process_time())]
    with Ranks.open("cpu") as ranks:
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
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(ranks))
    running = []
    for rank in range(ranks):
        named = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in named.items()}, "OMP_NUM_THREADS": "1"}
        job = json.dumps({"folder": str(folder), "out": str(out), "words": words, "core": cores[rank]})
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
        "synchronisation_share": round(spent.get("synchronisation", 0.0) / sum(spent.values()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a run (default 4)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before that (default 1)")
    parser.add_argument("--groups", type=int, default=2, help="groups of nine in a step (default 2)")
    parser.add_argument("--out", type=Path, default=results() / "ranks-cpu.json", help="result file")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job)
        work(Path(job["folder"]), Path(job["out"]), job["words"], job["core"])
        return
    if min(options.rounds, options.steps, options.warmup, options.groups) < 1:
        parser.error("--rounds, --steps, --warmup and --groups must be at least 1")
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < 2:
        parser.error("two cores are needed")
    pairs = []
    with tempfile.TemporaryDirectory() as room:
        prepare(Path(room))
        for turn in range(options.rounds):
            pairs.append([measure(Path(room), Path(room) / f"run{turn}-{n}", n, options) for n in (1, 2)])
            print(f"round {turn + 1}: " + ", ".join(f"{each['samples_per_second']} a second" for each in pairs[-1]))
    one, two = (statistics.median(run["samples_per_second"] for run in side) for side in zip(*pairs, strict=True))
    single = sorted(second["samples_per_second"] / first["samples_per_second"] for first, second in pairs)
    result = {
        "command": " ".join(["python -m benchmarks.ranks", *sys.argv[1:]]),
        "machine": machine(),
        "settings": {"steps": options.steps, "warmup": options.warmup, "groups": options.groups, "group_size": 9},
        "one_rank_samples_per_second": one,
        "two_ranks_samples_per_second": two,
        "ratio": round(two / one, 3),
        "ratio_min": round(single[0], 3),
        "ratio_max": round(single[-1], 3),
        "synchronisation_share": statistics.median(second["synchronisation_share"] for _, second in pairs),
        "runs": [run for pair in pairs for run in pair],
    }
    write_json(options.out, result)
    share = 100 * result["synchronisation_share"]
    print(
        f"two ranks: {result['ratio']} × one ({result['ratio_min']}…{result['ratio_max']}), {share:.1f} % synchronising"
    )
    print(options.out)


if __name__ == "__main__":
    main()
