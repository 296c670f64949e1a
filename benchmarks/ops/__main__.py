"""Measure the operations beside their peers and write benchmarks/results/ops-<machine>.json.

    python -m benchmarks.ops                       # what this machine can: the GPU where there is one, else the CPU
    python -m benchmarks.ops --smoke               # tiny shapes, one round: proves that everything runs
    python -m benchmarks.ops --operations maskgit_step --peers ours-cpu eager
    python -m benchmarks.ops --budget 500          # seconds; what does not fit is listed as not measured
    python -m benchmarks.ops --shape maskgit_step:B=18,N=1024,K=8192 --shape grpo_loss:R=9,T=50,N=1024
    python -m benchmarks.ops --shape maskgit_grpo_loss:R=9,T=50,N=1024,D=2048,K=8192,scope=masked,guidance=5

    python -m benchmarks.ops --tables              # then draw the pictures and write the tables of docs/

Leave the machine alone meanwhile. Shapes of one's own go to `ops-own.json`, apart from the suite. `--tables` runs
`python -m benchmarks.ops.plot` and then `python experiments/readme_tables.py`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from . import clock
from .cases import OPERATIONS, own
from .peers import peers
from .run import Run, Settings, default_file, machine


def main() -> None:
    names = [peer.name for peer in peers()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, one round, no claim about speed")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), metavar="NAME")
    parser.add_argument("--peers", nargs="+", choices=names, default=[], metavar="NAME", help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=20, help="measured rounds of each side (default 20)")
    parser.add_argument("--share", type=float, help="seconds one side may take of one phase (default 5; on a GPU 0.6)")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds of the whole run (default: endless)"
    )
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's own choice")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--shape", action="append", default=[], metavar="OPERATION:KEY=N,…", help="a case of your own")
    parser.add_argument("--skip-peers", nargs="+", choices=names, default=[], metavar="NAME", help="all but these")
    parser.add_argument("--resume", action="store_true", help="go on behind the last case of the result file")
    parser.add_argument("--out", type=Path, help="result file (default benchmarks/results/ops-<machine>.json)")
    parser.add_argument("--tables", action="store_true", help="draw the pictures and rewrite the pages afterwards")
    options = parser.parse_args()
    if options.rounds < 1 or (options.share or 1) <= 0 or options.budget <= 0 or options.threads < 0:
        parser.error("--rounds must be at least 1, --share and --budget above 0, --threads at least 0")
    if options.tables and (options.smoke or options.out):
        parser.error("--tables: only for a full run into benchmarks/results/ (without --smoke and --out)")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch finds no GPU here; use --device cpu")
    clock.take(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        shapes = tuple(own(text) for text in options.shape)
    except ValueError as error:
        parser.error(str(error))
    settings = Settings(
        device=options.device,
        smoke=options.smoke,
        operations=tuple(options.operations),
        only_peers=tuple(name for name in options.peers or names if name not in options.skip_peers),
        rounds=1 if options.smoke else options.rounds,
        share=options.share or (5.0 if options.device == "cpu" else 0.6),
        budget=options.budget,
        with_memory=not options.no_memory,
        shapes=shapes,
        resume=options.resume,
    )
    out = options.out or (default_file(machine(settings)).with_name("ops-own.json") if shapes else None)
    run = Run(settings, out)
    run.all()
    missing = {(each.peer, each.reason) for each in run.report.absences if each.reason != "offers no such operation"}
    for peer, reason in sorted(missing):
        print(f"not measured: {peer}: {reason}")
    print(run.out)
    if run.lost:
        sys.exit(3)
    if options.tables:
        root = Path(__file__).parents[2]
        for command in (["-m", "benchmarks.ops.plot"], ["experiments/readme_tables.py"]):
            subprocess.run([sys.executable, *command], cwd=root, check=True)


if __name__ == "__main__":
    main()
