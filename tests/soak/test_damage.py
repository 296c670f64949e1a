"""`make soak`: every file that a run writes, damaged in every way, and every moment of its writing, disturbed.

The list of files is that of an undisturbed run, so a new file is in the matrix from the day it is written. For what a
later command computes with, the outcome is the same result or an error that says why; for what people alone read
(logs, pages, pictures), it is anything but a traceback. `DAMAGE` is the number of bits flipped a file and kind of run,
`ONLY` a word in the names of files, for a shorter run.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pyunictokens.config.settings import load_yaml
from pyunictokens.evaluate.report.page import write_report
from pyunictokens.evaluate.result import EvalResult
from pyunictokens.models.concept_tokens import ConceptTokens
from pyunictokens.runs.run_dir import Run, RunConfig
from pyunictokens.train.policy import load_policy
from pyunictokens.utils.errors import UserError
from tests.soak import chaos
from tests.train.world import World, tiny_model, world

pytestmark = [
    pytest.mark.soak,
    pytest.mark.filterwarnings("ignore:.*rows are filled"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]

DAMAGE, ONLY = int(os.environ.get("DAMAGE", "3")), os.environ.get("ONLY", "")
READ_BY_PEOPLE = ("tensorboard", "samples", "_images", "metrics.jsonl", "stages.jsonl", "report.html", "phases.json")
"""Parts of names of what no later command computes with; a bit in it may go unnoticed, a traceback may not come."""
OPEN_TEXT = ("config.yaml", "grpo.yaml", "stages.yaml", "about.json", "experts.json", "README.md")
"""Text that people may change, and so no checksum is taken of."""


@pytest.fixture
def here(tmp_path: Path) -> World:
    return world(tmp_path / "data")


def written(out: Path) -> list[str]:
    """The files of a run, locks left out."""
    files = (str(path.relative_to(out)) for path in sorted(out.rglob("*")) if path.is_file())
    return [name for name in files if not Path(name).name.endswith("lock") and ONLY in name]


def kinds(data: bytes, rng: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """(what was done, the file's bytes after it; None: it is gone)."""
    yield "gone", None
    yield "empty", b""
    yield "cut in half", data[: len(data) // 2]
    yield "cut by a byte", data[:-1]
    yield "zeros at its end", data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
    yield "another kind", b"[1]\n"
    for _ in range(DAMAGE):
        place, bit = rng.randrange(len(data)), rng.randrange(8)
        flipped = bytearray(data)
        flipped[place] ^= 1 << bit
        yield f"bit {bit} of byte {place}", bytes(flipped)


def use(here: World, config: RunConfig, out: Path) -> None:
    """Everything that later commands do with a run: read it, go on with it, report it."""
    run = Run.find(str(out))
    RunConfig.make("toy", load_yaml(out / "config.yaml"), str(out))
    _ = run.origin
    load_policy(tiny_model(), out / "final")
    for folder in (out / "concept", *(out / "stages" / stage for stage in config.stages.stages)):
        ConceptTokens.load(folder)
    for name in ("before.json", "after.json"):
        EvalResult.load(out / name)
    write_report(out)
    chaos.run(here, config, out)


@pytest.mark.parametrize("trainable", ["concept", "full", "lora"])
def test_damage_is_the_same_result_or_an_error(here: World, tmp_path: Path, trainable: str) -> None:
    config, straight, out = chaos.settings(trainable=trainable, steps=4), tmp_path / "straight", tmp_path / "run"
    chaos.run(here, config, straight, report=True)
    wanted, rng, same, told, wrong = chaos.contents(straight), random.Random(3), 0, 0, []
    for name in written(straight):
        data = (straight / name).read_bytes()
        for what, damaged in kinds(data, rng) if data else ():
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(straight, out)
            (out / name).unlink() if damaged is None else (out / name).write_bytes(damaged)
            try:
                use(here, config, out)
            except (UserError, OSError):
                told += 1
                continue
            except BaseException:
                wrong.append(f"{name}, {what}: {traceback.format_exc()[-800:]}")
                print(wrong[-1], flush=True)
                continue
            same += 1
            if not any(part in name for part in (*READ_BY_PEOPLE, *OPEN_TEXT)) and chaos.contents(out) != wanted:
                wrong.append(f"{name}, {what}: another result, and no word of it")
                print(wrong[-1], flush=True)
    print(f"{trainable}: {same + told} kinds of damage, {same} without effect, {told} told, {len(wrong)} wrong")
    assert not wrong, "\n".join(wrong)


# --- disturbed while it is written -----------------------------------------------------------------------------------


def child(work: Callable[[], None]) -> int:
    """The exit code of `work` in a process of its own: 0, 2 for a UserError or OSError, 1 for anything else."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = 1
    try:
        torch.set_num_threads(1)
        work()
        code = 0
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def at_file(name: str, act: Callable[[], None]) -> None:
    """From here on `act` is called where the bytes of a file called so are to be flushed."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if place.name == name or (place.name.startswith(f".{name}.") and place.suffix == ".part"):
            act()
        real(descriptor)

    os.fsync = fsync


def _full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("act", "codes"), [(_full, (2,)), (_kill, (-signal.SIGKILL,))], ids=["full", "kill"])
def test_a_disk_that_is_full_and_a_kill_at_every_file(
    here: World, tmp_path: Path, act: Callable[[], None], codes: tuple[int, ...]
) -> None:
    config: Any = chaos.settings(steps=4, trainable="full")
    straight = tmp_path / "straight"
    chaos.run(here, config, straight)
    wanted, flushed, quiet = chaos.contents(straight), [], []
    for number, name in enumerate(dict.fromkeys(Path(each).name for each in written(straight))):
        out = tmp_path / f"run{number}"

        def life(name: str = name, out: Path = out) -> None:
            at_file(name, act)
            chaos.run(here, config, out)

        code = child(life)
        assert code in (0, *codes), f"{name}: ended with {code}"
        (flushed if code else quiet).append(name)
        chaos.run(here, config, out)
        assert chaos.contents(out) == wanted and not chaos.leftovers(out), name
        shutil.rmtree(out)
    print(f"{len(flushed)} files, each disturbed while it was written; never flushed: {', '.join(quiet) or 'none'}")
    assert len(flushed) >= 8
