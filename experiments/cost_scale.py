"""Write the tables of docs/cost-at-scale.md, a step on 1, 8 and 64 GPUs: ``python -m experiments.cost_scale``.

With ``--check`` nothing is written and the exit code says whether the page is up to date. Rates of one GPU are those of
cost_tables.py, rates between GPUs those of `Links`; all of it is prediction, nothing was measured. The slowest rank is
what a step waits for, so a step's time is that of the rank with most rollouts.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from pyunictokens.models.showo import costs as cost
from pyunictokens.models.showo.costs import Cost
from pyunictokens.utils.files import write_text_atomic

from .cost_tables import (
    CONFIG,
    CONTEXT,
    GPU,
    GRID,
    GROUP,
    PROMPT,
    STEPS,
    TOKENS,
    VQ,
    Span,
    ours,
    updated,
)

FILE = Path(__file__).parent.parent / "docs" / "cost-at-scale.md"
RUN, CONCEPTS, LORA_RANK = 100, 1000, 8
LEARNS = {"full": "all weights", "lora": f"LoRA of rank {LORA_RANK}", "concept": "concept rows"}
PASS_RATE, PREVIEW_STEP = 0.25, STEPS // 5
ROW_STEPS = STEPS + round((1 / PASS_RATE - 1) * PREVIEW_STEP)
"""Image steps for each accepted image: its own, and those of the candidates whose preview was refused."""


@dataclass(frozen=True)
class Links:
    """What is assumed between GPUs, bytes a second each way; what large rings usually reach, not data-sheet peaks."""

    nvlink: float = 300e9
    """For each GPU of a node of eight (450e9 on paper)."""
    infiniband: float = 200e9
    """For a node with eight adapters of 400 Gb/s (400e9 on paper); rings cross each node's border once."""
    single: float = 40e9
    """For a node with one such adapter (50e9 on paper)."""
    node: int = 8


LINKS = Links()


def share(groups: int, ranks: int) -> int:
    """Rollouts on the rank that has most."""
    return math.ceil(groups * GROUP / ranks)


def work(rollouts: int, trainable: str) -> Span:
    """A rank's own seconds in one step with `rollouts` of its own."""
    contexts = math.ceil(rollouts / GROUP)
    rows = math.ceil(rollouts / contexts)
    text = cost.answers_of(CONFIG, CONTEXT, [TOKENS] * rows)
    once: list[Span] = [
        ours(cost.answers(CONFIG, rows, CONTEXT, TOKENS), eager=True),
        ours(rows * cost.prefill(CONFIG, PROMPT) + cost.prefill(CONFIG, 3)),
        ours(ROW_STEPS * cost.image_step(CONFIG, rows, PROMPT)),
        ours(cost.decode_pixels(VQ, rows, GRID) + cost.decode_pixels(VQ, math.ceil(rows / PASS_RATE), GRID)),
        ours(cost.reference(CONFIG, rows, STEPS, PROMPT) + text, head=GPU.matrix),
        ours(cost.update(CONFIG, rows, STEPS, PROMPT, trainable=trainable) + 3 * text, head=GPU.matrix),
    ]
    total = Span(0.0, 0.0)
    for span in once:
        total = total + span * contexts
    return total


def optimizer(trainable: str, ranks: int) -> Span:
    """AdamW on a rank's share: gradient, twin and moments read, twin, moments and weight written."""
    learned = cost.learned_parameters(CONFIG, trainable, rank=LORA_RANK)
    return ours(Cost(bytes=(4 + 12 + 12 + 2) * learned / ranks))


def between(trainable: str, ranks: int, links: Links = LINKS) -> float:
    """Seconds in which nothing but gradients and new weights travels; they are not hidden behind work."""
    if ranks == 1:
        return 0.0
    sent = cost.exchanged_bytes(cost.learned_parameters(CONFIG, trainable, rank=LORA_RANK), ranks)
    return sent / (links.nvlink if ranks <= links.node else min(links.nvlink, links.infiniband))


def step(trainable: str, ranks: int, groups: int) -> Span:
    """Seconds of one step of `groups` groups over `ranks` GPUs."""
    travel = between(trainable, ranks)
    return work(share(groups, ranks), trainable) + optimizer(trainable, ranks) + Span(travel, travel)


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}".replace(",", " ")


def _small(value: float, digits: int) -> str:
    least = 10.0**-digits
    return f"below {least:g}" if value < least else _number(value, 0 if value >= 10 else digits)


def _span(span: Span, unit: float = 1.0) -> str:
    low, high = span.fast / unit, span.slow / unit
    digits = 2 if high < 2 else 1 if high < 20 else 0
    return f"{_number(low, digits)} to {_number(high, digits)}"


PLANS = ((1, 1), (8, 1), (8, 8), (64, 1), (64, 7), (64, 64))
"""(GPUs, groups a step)."""


def steps() -> str:
    """Seconds, samples and GPU-hours of a step of one concept, by what learns, GPUs and groups a step."""
    lines = [
        f"| what learns | GPUs | groups a step | rollouts on the fullest GPU | GPUs in use | seconds a step "
        f"| samples a second | GPU-hours for {RUN} steps | … for {RUN} groups |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for trainable, name in LEARNS.items():
        for ranks, groups in PLANS:
            taken, rows = step(trainable, ranks, groups), groups * GROUP
            rate = Span(rows / taken.slow, rows / taken.fast)
            hours = taken * (RUN * ranks)
            cells = (
                name,
                str(ranks),
                str(groups),
                str(share(groups, ranks)),
                f"{rows / ranks / share(groups, ranks):.0%}",
                _span(taken),
                _span(rate),
                _span(hours, 3600),
                _span(hours, 3600 * groups),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def concepts() -> str:
    """A thousand concepts in three ways on 64 GPUs, and on fewer."""
    lines = [
        f"| what learns | {_number(CONCEPTS, 0)} concepts, {RUN} steps each "
        "| GPU-hours | days on 1 GPU | on 8 | on 64 |",
        "|---|---|---|---|---|---|",
    ]
    for trainable, name in LEARNS.items():
        for ranks in (1, 8, 64):
            whole = step(trainable, ranks, 1) * (RUN * CONCEPTS * ranks)
            ways = {1: "a job a concept, one GPU each", 8: "a job a concept, eight GPUs each"}
            days = []
            for gpus in (1, 8, 64):
                waves = math.ceil(CONCEPTS / (gpus // ranks)) if gpus >= ranks else 0
                days.append(_span(step(trainable, ranks, 1) * (RUN * waves), 86400) if waves else "")
            way = ways.get(ranks, "one concept at a time, all 64 GPUs")
            lines.append(f"| {name} | {way} | {_span(whole, 3600)} | {' | '.join(days)} |")
    return "\n".join(lines)


def memory() -> str:
    """What a GPU holds between steps, and how many packed rows fit beside it."""
    lines = [
        "| what learns | parameters that learn | GB of state on 1 GPU | on 8 | on 64 "
        "| packed rows beside it on 80 GB: 1, 8, 64 GPUs |",
        "|---|---|---|---|---|---|",
    ]
    for trainable, name in LEARNS.items():
        learned = cost.learned_parameters(CONFIG, trainable, rank=LORA_RANK)
        own = 2.0 * learned  # a piece's own gradients, formed apart
        row = cost.activation_bytes(CONFIG, PROMPT, trainable=trainable)
        states = [cost.sharded_state_bytes(CONFIG, trainable, ranks=n, rank=LORA_RANK) for n in (1, 8, 64)]
        rows = [str(int(0.85 * (GPU.memory - state - own) / row)) for state in states]
        sizes = " | ".join(f"{state / 1e9:.2f}" for state in states)
        lines.append(f"| {name} | {_number(learned / 1e6, 1)} M | {sizes} | {', '.join(rows)} |")
    return "\n".join(lines)


def travel() -> str:
    """What gradients and new weights weigh, and how long they travel."""
    lines = [
        "| what learns | MB of float32 gradients | MB sent by a GPU of 8, of 64 | ms on 8 GPUs, NVLink "
        "| ms on 64, eight adapters a node | ms on 64, one adapter a node | at most, of a step on 64 GPUs, 64 groups |",
        "|---|---|---|---|---|---|---|",
    ]
    slow = replace(LINKS, infiniband=LINKS.single)
    for trainable, name in LEARNS.items():
        learned = cost.learned_parameters(CONFIG, trainable, rank=LORA_RANK)
        sent = [cost.exchanged_bytes(learned, ranks) / 1e6 for ranks in (8, 64)]
        times = (between(trainable, 8), between(trainable, 64), between(trainable, 64, slow))
        part = between(trainable, 64) / step(trainable, 64, 64).fast
        cells = (
            name,
            _number(4 * learned / 1e6, 1),
            ", ".join(_number(each, 1) for each in sent),
            *(_small(1000 * seconds, 2) for seconds in times),
            f"{_small(100 * part, 1)} %",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def links() -> str:
    """The assumptions between GPUs."""
    return (
        f"{LINKS.nvlink / 1e9:.0f} GB/s each way for a GPU over NVLink inside a node of {LINKS.node}; "
        f"{LINKS.infiniband / 1e9:.0f} GB/s for a node with eight InfiniBand adapters of 400 Gb/s, "
        f"{LINKS.single / 1e9:.0f} GB/s with one."
    )


PARTS = {"links": links, "steps": steps, "concepts": concepts, "memory": memory, "travel": travel}


def main() -> None:
    text = FILE.read_text(encoding="utf-8")
    new = updated(text, PARTS, FILE.name)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if new == text else f"{FILE.name} is out of date: python -m experiments.cost_scale")
    write_text_atomic(FILE, new)


if __name__ == "__main__":
    main()
