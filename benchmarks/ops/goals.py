"""What the operations are meant to reach, held against a report. A goal without a measurement says so.

Every goal is a sentence and a function from a report to (what was measured, whether the goal holds), or None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .schema import Report

Answer = tuple[str, bool] | None
HEAD, FIRST, STEP = "maskgit_grpo_loss", "Show-o 512² R 9", "B18 N1024 K8192"


@dataclass(frozen=True)
class Goal:
    """One sentence of the plan and how a report answers it."""

    device: str
    text: str
    answer: Callable[[Report], Answer]


def default_side(report: Report, operation: str, shape: str) -> str | None:
    """The side of ours that runs when no backend is named, among those that were timed."""
    order = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}[report.machine.device]
    for name in order:
        if any((m.operation, m.shape, m.peer) == (operation, shape, f"ours-{name}") for m in report.measurements):
            return f"ours-{name}"
    return None


def _ratio(report: Report, operation: str, shape: str, peer: str, phase: str = "both") -> float | None:
    """How many times ours the peer takes."""
    side = default_side(report, operation, shape)
    ours = report.seconds(operation, shape, side, phase) if side else None
    theirs = report.seconds(operation, shape, peer, phase)
    return None if ours is None or theirs is None else theirs / ours


def at_least(operation: str, shape: str, peer: str, limit: float, phase: str = "both") -> Callable[[Report], Answer]:
    def answer(report: Report) -> Answer:
        ratio = _ratio(report, operation, shape, peer, phase)
        return None if ratio is None else (f"{ratio:.2f} ×", ratio >= limit)

    return answer


def over_products(shape: str, limit: float) -> Callable[[Report], Answer]:
    def answer(report: Report) -> Answer:
        ratio = _ratio(report, HEAD, shape, "products")
        return None if not ratio else (f"{1 / ratio:.2f} ×", 1 / ratio <= limit)

    return answer


def _over_best_peer(report: Report) -> Answer:
    peers = [name for name in report.peers if not name.startswith("ours-") and name != "products"]
    ratios = {name: _ratio(report, HEAD, FIRST, name) for name in peers}
    timed = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    if not timed:
        return None
    best = min(timed, key=lambda name: timed[name])
    return f"{timed[best]:.2f} × ({report.peers[best]})", timed[best] >= 1.5


def extra_below(operation: str, shape: str, limit: float) -> Callable[[Report], Answer]:
    def answer(report: Report) -> Answer:
        side = default_side(report, operation, shape)
        held = report.extra(operation, shape, side) if side else None
        return None if held is None else (f"{held.extra_bytes / 2**20:.0f} MiB", held.extra_bytes <= limit)

    return answer


def extra_share(operation: str, shape: str, peer: str, limit: float) -> Callable[[Report], Answer]:
    def answer(report: Report) -> Answer:
        side = default_side(report, operation, shape)
        ours = report.extra(operation, shape, side) if side else None
        theirs = report.extra(operation, shape, peer)
        if ours is None or theirs is None or not theirs.extra_bytes:
            return None
        share = ours.extra_bytes / theirs.extra_bytes
        sizes = f"{ours.extra_bytes / 2**20:.1f} of {theirs.extra_bytes / 2**20:.1f} MiB"
        if ours.resident_bytes is not None and theirs.resident_bytes:
            sizes += f"; resident {ours.resident_bytes / 2**20:.1f} of {theirs.resident_bytes / 2**20:.1f} MiB"
            share = max(share, ours.resident_bytes / theirs.resident_bytes)
        return f"{share:.1%} ({sizes})", share <= limit

    return answer


def fraction(operation: str, shape: str, limit: float, phase: str = "forward") -> Callable[[Report], Answer]:
    def answer(report: Report) -> Answer:
        side = default_side(report, operation, shape)
        found = [report.measurement(operation, shape, side, phase, how) for how in ("graph", "call")] if side else []
        best = next((one for one in found if one is not None and one.fraction is not None), None)
        if best is None or best.fraction is None:
            return None
        return f"{best.fraction:.0%} ({best.launch}, {phase})", best.fraction >= limit

    return answer


def _proportional(report: Report) -> Answer:
    kept = {info.shape: info.sizes["kept"] for info in report.cases if info.operation == HEAD}
    shape = f"{FIRST} newly_unmasked"
    side = default_side(report, HEAD, FIRST)
    full, part = (report.seconds(HEAD, s, side) if side else None for s in (FIRST, shape))
    if full is None or part is None:
        return None
    cost = part / full / kept[shape]
    return f"{cost:.2f} × its share of {kept[shape]:.1%}", abs(cost - 1) <= 0.2


STEPS = tuple(f"B{rows}{tail}" for rows in ("18 N256 K4096", "9 N1024 K8192") for tail in ("", " peaked"))
GOALS = (
    Goal(
        "cuda",
        "`maskgit_grpo_loss`, R 9, T 50, 512²: at most 1.15 × its matrix products alone",
        over_products(FIRST, 1.15),
    ),
    Goal("cuda", "with guidance and a bias at most 1.25 ×", over_products(f"{FIRST} guided, bias", 1.25)),
    Goal("cuda", "without these in at most 1 GiB of extra memory", extra_below(HEAD, FIRST, 2**30)),
    Goal("cuda", "the same at least 1.5 × faster than the best peer that fits", _over_best_peer),
    Goal("cuda", "`newly_unmasked` costs its share of the tokens, ± 20 %", _proportional),
    Goal("cuda", f"`maskgit_step` at {STEP}: at least 60 % of copy bandwidth", fraction("maskgit_step", STEP, 0.6)),
    Goal("cuda", "the same at least 5 × eager", at_least("maskgit_step", STEP, "eager", 5.0, "forward")),
    Goal("cuda", "`grpo_loss`: at least 80 % of copy bandwidth", fraction("grpo_loss", "8.2 M tokens", 0.8)),
    Goal(
        "cpu",
        "`selected_logprob` at 4096×512×4096: no slower than eager",
        at_least("selected_logprob", "4096×512×4096", "eager", 1.0),
    ),
    Goal(
        "cpu",
        "the same with at most 10 % of its extra memory",
        extra_share("selected_logprob", "4096×512×4096", "eager", 0.1),
    ),
    *(
        Goal(
            "cpu",
            f"`maskgit_step` at {shape}: at least 4 × eager",
            at_least("maskgit_step", shape, "eager", 4.0, "forward"),
        )
        for shape in STEPS
    ),
    *(
        Goal("cpu", f"`grpo_loss` at {shape}: at least 3 × eager", at_least("grpo_loss", shape, "eager", 3.0))
        for shape in ("1.8 M tokens", "8.2 M tokens")
    ),
)
