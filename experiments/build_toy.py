"""Make the toy's models from nothing: draw, train, measure, export. Every stage can be run alone and again.

    python experiments/build_toy.py --work build/toy                 # all stages, an hour and a half on two cores
    python experiments/build_toy.py --work build/toy --stage vq --seconds 900

Stages: cache (draw scenes), corpus (write sentences), vq (autoencoder, then codes), showo (the model), experts (the
small networks), export (weights into pyunictokens/assets), report (numbers and pictures into docs). `vq` and `showo`
go on from what the work folder holds. Training logs go to WORK/*.log.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

STAGES = ("cache", "corpus", "vq", "showo", "experts", "export", "report")
SECONDS = {"vq": 1500.0, "showo": 1800.0, "experts": 480.0}


def run(stage: str, work: Path, seed: int, seconds: float | None) -> None:
    """Run one stage; the stages' modules are imported when they are needed."""
    length = seconds if seconds is not None else SECONDS.get(stage, 0.0)
    if stage == "cache":
        from toy_cache import build_cache

        build_cache(work, count=36_000, seed=seed)
    elif stage == "corpus":
        from toy_corpus import build_corpus

        build_corpus(work, seed=seed)
    elif stage == "vq":
        from toy_vq import train_vq

        train_vq(work, seconds=length, seed=seed)
    elif stage == "showo":
        from toy_showo import train_showo

        train_showo(work, seconds=length, seed=seed)
    elif stage == "experts":
        from toy_experts import train_experts

        train_experts(work, seconds=length, seed=seed)
    elif stage == "export":
        from toy_export import export

        export(work, seed=seed)
    else:
        from toy_report import report

        report(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures, codes, checkpoints and logs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="wall time of a training stage")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if args.stage == "all" else (args.stage,):
        start = time.time()
        run(stage, args.work, args.seed, args.seconds)
        with open(args.work / "times.log", "a") as file:
            file.write(f"{stage} {time.time() - start:.0f}\n")


if __name__ == "__main__":
    main()
