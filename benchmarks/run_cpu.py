"""Measure the CPU workloads against their peers and write benchmarks/results/cpu-<cores>core.json.

    python -m benchmarks.run_cpu                          # everything, as quoted in the README
    python -m benchmarks.run_cpu --only text --rounds 3
    python -m benchmarks.run_cpu --only dsog              # work for an accepted image: counted, the same on any machine

The two sides of a case alternate round by round in one process after a warm-up; what is quoted is the ratio of their
medians, with the ratios of single rounds as spread. Cases of earlier runs that are not measured again stay in the file.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import rollout_cases
from benchmarks.machine import commit, cores, processor, results
from benchmarks.rollout_cases import Case
from pyunictokens import __version__
from pyunictokens.utils.files import read_json, write_json


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    return {
        "cpu": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pyunictokens": __version__,
        "commit": commit(),
        "dtype": "float32",
    }


def measure(case: Case, rounds: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """Medians of `rounds` alternating runs of both sides, and their ratio (how many times faster ours is)."""

    def seconds(call: Callable[[], object]) -> float:
        start = clock()
        call()
        return clock() - start

    seconds(case.ours), seconds(case.plain)
    pairs = [(seconds(case.ours), seconds(case.plain)) for _ in range(rounds)]
    ours, plain = (statistics.median(side) for side in zip(*pairs, strict=True))
    single = sorted(theirs / mine for mine, theirs in pairs)
    return {
        "name": case.name,
        "peer": case.peer,
        "ratio": round(plain / ours, 2),
        "ratio_min": round(single[0], 2),
        "ratio_max": round(single[-1], 2),
        "ours_seconds": round(ours, 4),
        "peer_seconds": round(plain, 4),
        "per": case.per,
        "rounds": rounds,
        "settings": case.settings,
    }


def _key(result: dict[str, Any]) -> tuple[str, Any]:
    return result["name"], result["settings"].get("text_vocabulary")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["images", "text", "dsog"], help="one workload instead of all")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of each side (default 5)")
    parser.add_argument("--steps", type=int, default=18, help="MaskGIT timesteps of an image (default 18)")
    parser.add_argument("--groups", type=int, default=40, help="groups whose DSOG work is counted (default 40)")
    parser.add_argument("--tokens", type=int, default=50, help="tokens of an answer (default 50)")
    parser.add_argument(
        "--text-vocabulary", type=int, default=rollout_cases.TEXT_VOCABULARY, help="text ids of the model"
    )
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's own choice")
    parser.add_argument("--out", type=Path, help="result file (default benchmarks/results/cpu-<cores>core.json)")
    options = parser.parse_args()
    if min(options.rounds, options.steps, options.tokens, options.groups) < 1:
        parser.error("--rounds, --steps, --tokens and --groups must be at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    about = machine()
    file = options.out or results() / f"cpu-{about['cores']}core.json"
    content = read_json(file) if file.exists() else {"results": []}
    taken = {_key(result): result for result in content["results"]}
    if options.only != "dsog":
        model = rollout_cases.build_model(options.text_vocabulary)
        cases = [rollout_cases.images_case(model, options.steps), rollout_cases.text_case(model, options.tokens)]
        for case in cases:
            if options.only in (None, case.name):
                result = measure(case, options.rounds)
                taken[_key(result)] = {**result, "machine": about}
                print(
                    f"{case.name}: {result['ratio']}× ({result['ratio_min']}…{result['ratio_max']}) against {case.peer}"
                )
    content["results"] = list(taken.values())
    if options.only in (None, "dsog"):
        work = content["dsog"] = rollout_cases.dsog_work(options.groups)
        print(
            f"dsog: {work['row_steps_per_image']} row-steps for an accepted image, {work['above_least_percent']} % "
            f"above the least possible ({work['least']:g})"
        )
    write_json(file, content)
    print(file)


if __name__ == "__main__":
    main()
