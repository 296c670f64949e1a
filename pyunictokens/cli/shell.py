"""What every command shares at the edges: how errors end, where text goes, and the options that mean the same."""

from __future__ import annotations

import codecs
import contextlib
import errno
import functools
import io
import logging
import os
import re
import select
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec, TypeVar

import typer

from ..utils.errors import MissingExtra, RankLost, UserError
from ..utils.progress import NO_NUMBERS, Numbers, note_of
from ..utils.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table
    from rich.text import Text

    from ..utils.profiling import PhaseReport

P = ParamSpec("P")
R = TypeVar("R")

_LOOKALIKE = "pyunictokens.lookalike"
_ASCII = {"→": "->", "−": "-", "–": "-", "×": "x", "…": "...", "≥": ">=", "≤": "<=", "≈": "~", "·": "*", "±": "+-"}
_ASCII |= {"⟨": "<", "⟩": ">", "“": '"', "”": '"', "‘": "'", "’": "'", "━": "-", "─": "-", "╸": "-", "╺": "-", "•": "*"}

USER_ERROR, UNEXPECTED, INTERRUPTED = 2, 1, 130
_LONGEST = 10_000
"""Characters of one message."""

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Folder, hub id or word (docs/models.md); show-o-512 implies image tokenizer and text tokenizer. Default: "
        "the embedded toy, or what the run used.",
    ),
]
VqOption = Annotated[str | None, typer.Option("--vq", help="MAGVIT-v2 folder or hub id. Default: the model's own.")]
TokenizerOption = Annotated[
    str | None, typer.Option("--tokenizer", help="Folder or hub id with tokenizer.json. Default: the model's own.")
]
VisionOption = Annotated[
    str | None,
    typer.Option(
        "--vision",
        help="Of Show-o's CLIP-ViT variant: the image encoder, a folder or hub id. Default: "
        "openai/clip-vit-large-patch14-336, or what the run used.",
    ),
]
ClipOption = Annotated[
    str | None,
    typer.Option(
        "--clip",
        help="CLIP of open_clip for the CLIP-T and CLIP-I columns: a folder, a hub id, or ARCHITECTURE=FILE. Default: "
        "what the run used; the toy has its own.",
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="auto, float32, bfloat16 or float16; auto is bfloat16 on a GPU (the toy keeps float32), else float32.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Same seed, same result.")]
TrustOption = Annotated[
    bool,
    typer.Option("--trust", help="Let the settings of this run or --config name code to import and servers to ask."),
]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML file with settings.", metavar="FILE.yaml")]
ProfileOption = Annotated[
    Path | None,
    typer.Option("--profile", help="Write a torch.profiler trace (of training: two steps) here.", metavar="FILE.json"),
]
RunsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[RUN]...", help="Runs of `train`; `base` is always there.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings by name; they win over --config.", show_default=False),
]


def console(stderr: bool = False) -> Console:
    """A rich console on stdout or stderr. Control characters in what is printed are shown, not obeyed."""
    return _console_class()(stderr=stderr, highlight=False)


def say(text: str) -> None:
    """A line on stdout as it stands: brackets in it are no markup."""
    console().print(text, markup=False)


def plain_table(*titles: str, right: Collection[str] = ()) -> Table:
    """A table without lines. Its columns are headed `titles`; those in `right` stand on the right, all fold."""
    from rich.table import Table

    made = Table(box=None, padding=(0, 2, 0, 0))
    for title in titles:
        made.add_column(title, justify="right" if title in right else "left", overflow="fold")
    return made


def as_words(options: Mapping[str, object]) -> list[str]:
    """The command-line words of options by name; those that are None are left out."""
    return [word for name, value in options.items() if value is not None for word in (name, str(value))]


@functools.cache
def _console_class() -> type[Console]:
    from rich.console import Console

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Text:  # of everything printed, cells of tables too
            return super().render_str(printable(text), **options)

        def print(self, *objects: object, soft_wrap: bool | None = None, **options: Any) -> None:
            text = all(isinstance(each, str) for each in objects)  # its lines stay whole: paths in them are copied
            super().print(*objects, soft_wrap=text if soft_wrap is None else soft_wrap, **options)

    return Plain


def nobody_reads() -> None:
    """The reader of our output has gone, as in `pyunictokens data list | head -1`: what follows goes nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_anything() -> None:
    """From here on printing never ends a command: what the terminal's encoding lacks is written in signs it has.

    An arrow becomes `->`, a minus `-`; letters become their escape (`\\xfc`), so that two names stay two names. Where
    the reader of the output has gone, the command goes on in silence.
    """
    from rich.console import Console

    Console.on_broken_pipe = lambda self: nobody_reads()  # type: ignore[method-assign]  # its own ends with code 1
    codecs.register_error(_LOOKALIKE, _lookalike)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_LOOKALIKE)


def _lookalike(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    said = "".join(_ASCII.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in text)
    return said, error.end


def command(*words: object) -> str:
    """A command of this program as it can be pasted into a shell, names with spaces and the like in quotes."""
    return shlex.join(["pyunictokens", *map(str, words)])


def show_phases(report: PhaseReport) -> None:
    """A table of where the time went."""
    from rich.table import Table

    rate = report.matrix_flops_per_second
    title = f"where the time went: {report.seconds:.1f} s on {report.device}"
    table = Table("phase", "calls", "seconds", "share", "TFLOP", "TFLOP/s", "of the matrix rate", title=title)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for phase in report.phases:
        part = report.fraction(phase)
        known = (f"{phase.flops / 1e12:.3g}", f"{phase.flops / phase.seconds / 1e12:.3g}") if part else ("", "")
        share = f"{100 * phase.seconds / report.seconds:.1f} %" if report.seconds else ""
        row = (phase.name, str(phase.calls), f"{phase.seconds:.2f}", share, *known)
        table.add_row(*row, f"{100 * part:.1f} %" if part else "")
    rest = report.seconds - sum(phase.seconds for phase in report.phases)
    table.add_row("the rest", "", f"{rest:.2f}", f"{100 * rest / report.seconds:.1f} %" if report.seconds else "")
    notes = [f"matrix rate {rate / 1e12:.3g} TFLOP/s, a large product in {report.dtype}, measured here"]
    notes += [f"{what}: {100 * fraction:.1f} %" for what, fraction in report.shares.items()]
    notes += [f"{what}: {path}" for what, path in report.paths.items()]
    table.caption = "\n".join(notes)
    console().print(table)


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Give `command` the exit codes of this program: a mistake of the user is one message, never a traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except RankLost as error:  # nobody's mistake: the launcher may start anew
            if not error.quiet:
                _say(str(error))
            raise typer.Exit(UNEXPECTED) from None
        except (UserError, MissingExtra) as error:
            _say(str(error))
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            _say("stopped", mark="")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            if not _stdout_is_broken():
                _unexpected()
            nobody_reads()
            raise typer.Exit(0) from None
        except OSError as error:
            if error.filename is None and error.errno not in _NO_ROOM:
                _unexpected()
            place = "" if error.filename is None else f"{error.filename}: "
            _say(f"{place}{error.strerror}")  # no space, no permission, not a folder: the user's to change
            raise typer.Exit(USER_ERROR) from None
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except SystemExit as error:  # of foreign code: it does not end a command without a word
            _say(f"something that was called ended this program (sys.exit({error.code!r})): look at your own code")
            raise typer.Exit(UNEXPECTED) from None
        except Exception as error:
            if not _out_of_memory(error):
                _unexpected()
            _say(
                f"out of memory ({_first_line(error)}): ask for less at once (fewer images or samples, a smaller "
                "batch), or use --dtype bfloat16"
            )
            raise typer.Exit(USER_ERROR) from None

    return run


_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


def _stdout_is_broken() -> bool:
    """Whether nobody reads our output any more; a pipe may also break elsewhere."""
    try:
        sys.stdout.flush()
        watch = select.poll()
        watch.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))
    except BrokenPipeError:
        return True
    except (OSError, ValueError, AttributeError):  # no file behind it, or a system without poll
        return False


def _out_of_memory(error: Exception) -> bool:
    """Whether an error is the system's or a device's word for no memory left (PyTorch has no type for the first)."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def show_warnings_briefly() -> None:
    """Print a warning as one line, and one that only differs in its numbers not again."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_PlainFormatter())
    seen: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        text = str(message)
        kind = re.sub(r"[0-9.]+", "#", text)
        if kind not in seen:
            seen.add(kind)
            _say(text, mark="warning: ")

    warnings.showwarning = show


def quiet() -> None:
    """No warnings and no log from here on: another process says it."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _short(printable(super().format(record)))


def _unexpected() -> NoReturn:
    print(printable(traceback.format_exc()), file=sys.stderr)
    _say("this was not expected; the traceback above says where. `pyunictokens doctor` tells what is installed.")
    raise typer.Exit(UNEXPECTED)


def _say(text: str, mark: str = "error: ") -> None:
    print(f"{mark}{_short(printable(text))}", file=sys.stderr, flush=True)


def _short(text: str) -> str:
    """`text` without its middle where it is very long: an error may quote a value that somebody made long."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST // 2]} … ({len(text) - _LONGEST} characters left out) … {text[-_LONGEST // 2 :]}"


HEARD = ("pyunictokens.train.headroom", "pyunictokens.train.held_out")
"""Whose news is shown above the bars, not its warnings alone."""


class _Heard(logging.Handler):
    """What a log says, said above the bars."""

    def __init__(self, say: Callable[[str], None]):
        super().__init__(logging.INFO)
        self._tell = say

    def emit(self, record: logging.LogRecord) -> None:
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        self._tell(f"{mark}{record.getMessage()}")


class Bars:
    """Progress bars by name on stderr. `bars("images", done, total)` makes, moves and finishes one.

    Without a terminal a line is written every ten seconds at most, so that logs stay short. `quiet` shows nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = console(stderr=True)
        self._console.quiet = quiet
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last_line = time.monotonic()

    def __enter__(self) -> Bars:
        self._progress.start()
        self._heard = _Heard(self.say)
        for name in HEARD:
            logger = logging.getLogger(name)
            logger.addHandler(self._heard)
            logger.setLevel(logging.INFO)
        return self

    def __exit__(self, *error: object) -> None:
        for name in HEARD:
            logger = logging.getLogger(name)
            logger.removeHandler(self._heard)
            logger.setLevel(logging.NOTSET)
        self._progress.stop()

    def __call__(self, name: str, done: int, total: int, numbers: Numbers = NO_NUMBERS, /) -> None:
        name, note = printable(name), printable(note_of(numbers))
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, note=note)
        self._progress.update(self._tasks[name], completed=done, total=total, note=note)
        if not self._console.is_terminal and time.monotonic() - self._last_line > 10:
            self._last_line = time.monotonic()
            self._console.print(f"{name} {done}/{total} {note}".rstrip(), markup=False)

    def say(self, text: str) -> None:
        """A line of text above the bars."""
        self._progress.console.print(text, markup=False, soft_wrap=True)

    def each(self, name: str, least: int = 0) -> Callable[[str], None]:
        """A function to call with each thing that is done, which moves the bar `name` of at least `least` things."""
        done = 0

        def step(current: str) -> None:
            nonlocal done
            done += 1
            self(name, done, max(done, least), {"note": current})

        return step

    def counter(self, name: str) -> Callable[[int, int], None]:
        """A function of (done, total) that moves the bar `name`."""
        return lambda done, total: self(name, done, total)
