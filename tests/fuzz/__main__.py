"""`make fuzz`: atheris over every reader, guided by what its code does, then hypothesis; some seconds each.

    python -m tests.fuzz --seconds 25                 # all, about twenty minutes
    python -m tests.fuzz --seconds 300 --only index   # one

A reader that lets anything but a UserError through ends with its input in tests/fuzz/corpus/NAME, to stay there.
Without atheris (no wheel for this Python) the long profile of hypothesis runs alone.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
READERS = (
    "config.settings",
    "data.folder",
    "data.images",
    "data.parse",
    "evaluate.report.run_files",
    "evaluate.result",
    "models",
    "models.checkpoint",
    "models.concept_tokens",
    "models.magvit",
    "models.showo",
    "rewards.judge",
    "rewards.replies",
    "rewards.served.messages",
    "runs.run_dir",
    "runs.sweep_results",
    "train.checkpoint.run_state",
    "train.metrics",
    "train.policy",
    "utils.yaml_text",
)
"""Modules whose branches guide the fuzzer."""


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        return guided(sys.argv[2], int(sys.argv[3]))
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=25, help="for each reader")
    parser.add_argument("--only", nargs="+", choices=list(TARGETS))
    parser.add_argument("--record", action="store_true", help="write how many inputs there were to docs/")
    options = parser.parse_args()
    memory = Path("/dev/shm")  # where there is one: files are flushed at every input
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if os.access(memory, os.W_OK) else None) as room:
        environment = {**os.environ, "TMPDIR": room}
        failed = _guided_all(options.only or list(TARGETS), options.seconds, options.record, environment)
        words = ["-k", " or ".join(options.only)] if options.only else []
        long = ["-m", "pytest", "-q", "-m", "fuzz", "tests/fuzz", *words]
        code = subprocess.run([sys.executable, *long], cwd=ROOT, env=environment, check=False).returncode
    sys.exit(failed or code)


def _guided_all(names: Sequence[str], seconds: int, record: bool, environment: Mapping[str, str]) -> bool:
    """Fuzz each reader in a process of its own; whether one broke."""
    from tests.fuzz.record import executed, keep
    from tests.fuzz.targets import CORPUS

    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: hypothesis alone")
        return False
    failed, counts = False, {}
    for name in names:
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz", "--one", name, str(seconds)],
            cwd=ROOT,
            env=environment,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        good, counts[name] = done.returncode == 0, executed(done.stdout)
        if (CORPUS / name).is_dir() and not any((CORPUS / name).iterdir()):
            (CORPUS / name).rmdir()
        verdict = "good" if good else f"broken, see {CORPUS / name}\n{done.stdout[-4000:]}"
        print(f"{name}: {counts[name]} inputs, {verdict}", flush=True)
        failed |= not good
    if record and not failed:
        keep(seconds, counts)
    return failed


def guided(name: str, seconds: int) -> None:
    """Fuzz one reader with coverage of this package, which must not have been imported yet; does not return."""
    import atheris

    with atheris.instrument_imports(include=["pyunictokens"]):
        for module in READERS:
            importlib.import_module(f"pyunictokens.{module}")
    from tests.fuzz.targets import CORPUS, check, kept, seeds

    keep = CORPUS / name
    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate([*seeds(name), *kept(name)]):
            (Path(folder) / str(number)).write_bytes(data)
        keep.mkdir(parents=True, exist_ok=True)
        words = [f"-max_total_time={seconds}", "-max_len=65536", "-rss_limit_mb=4096", "-timeout=30"]
        words += ["-verbosity=0", "-print_final_stats=1", f"-artifact_prefix={keep}{os.sep}", folder]
        atheris.Setup([sys.argv[0], *words], lambda data: check(name, data))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
