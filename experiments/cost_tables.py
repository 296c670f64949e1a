"""Write the tables of docs/cost-model.md from the cost model: ``python -m experiments.cost_tables``.

With ``--check`` nothing is written and the exit code says whether the page is up to date. What the phases cost is
arithmetic over the model's sizes (pyunictokens/models/costs.py). What a GPU makes of it is a prediction from the
assumptions in `Gpu`; nothing here was measured, and every table says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pyunictokens.models import MagvitConfig, ShowoConfig
from pyunictokens.models.showo import costs as cost
from pyunictokens.models.showo.costs import Cost
from pyunictokens.utils.files import write_text_atomic

FILE = Path(__file__).parent.parent / "docs" / "cost-model.md"
CONFIG, VQ, GRID = ShowoConfig(), MagvitConfig(), (32, 32)
GROUP, STEPS, PROMPT, MAX_TEXT, TOKENS, CONTEXT = 9, 50, 123, 128, 100, 1059
CANDIDATES = 4
"""Previews for each accepted image at a pass rate of one quarter."""
SMALL = 256


@dataclass(frozen=True)
class Gpu:
    """What is assumed of one H100 (SXM). Rates are what large kernels usually reach, not data-sheet peaks."""

    matrix: float = 650e12
    """bfloat16 products, operations a second."""
    single: float = 50e12
    """float32 products without TF32."""
    attention: float = 350e12
    """bfloat16 attention without a mask (flash kernels)."""
    masked: float = 150e12
    """bfloat16 attention under a boolean mask (memory-efficient kernels)."""
    single_attention: float = 30e12
    """float32 attention."""
    bandwidth: float = 2.8e12
    """Bytes a second."""
    launch: float = 6e-6
    """Seconds of the host for each kernel that Python launches."""
    memory: float = 80e9
    eight_bits: float = 1100e12
    """Products in e4m3 with a scale a row, operations a second."""


GPU = Gpu()


@dataclass(frozen=True)
class Span:
    """Seconds between two readings: everything overlaps (fast), nothing does (slow)."""

    fast: float
    slow: float

    def __mul__(self, times: float) -> Span:
        return Span(self.fast * times, self.slow * times)

    def __add__(self, other: Span) -> Span:
        return Span(self.fast + other.fast, self.slow + other.slow)


def seconds(work: Cost, dense: float, attention: float, head: float, eager: bool) -> Span:
    """Device time of `work` at the given rates; with `eager` not less than the host needs to launch it."""
    compute = work.dense / dense + work.attention / attention + work.head / head
    moving, host = work.bytes / GPU.bandwidth, work.launches * GPU.launch if eager else 0.0
    return Span(max(compute, moving, host), max(compute + moving, host))


def ours(work: Cost, eager: bool = False, head: float = GPU.single) -> Span:
    """The engine: bfloat16, flash attention, heads in float32."""
    return seconds(work, GPU.matrix, GPU.attention, head, eager)


def published(work: Cost) -> Span:
    """The published loop: float32 throughout."""
    return seconds(work, GPU.single, GPU.single_attention, GPU.single, True)


def batched(work: Cost) -> Span:
    """The published loop with rows together and in bfloat16: a mask, the whole vocabulary, no cache."""
    return seconds(work, GPU.matrix, GPU.masked, GPU.matrix, True)


STEP = cost.image_step(CONFIG, GROUP, PROMPT)
ALONE = cost.image_step(CONFIG, 1, PROMPT)
FEW = cost.image_step(CONFIG, 1, PROMPT, SMALL)
PUBLISHED = cost.plain_image_step(CONFIG, 1, MAX_TEXT)
BATCHED = cost.plain_image_step(CONFIG, GROUP, MAX_TEXT, itemsize=2)
ANSWERS = cost.answers(CONFIG, GROUP, CONTEXT, TOKENS)
PLAIN_ANSWERS = cost.plain_answers(CONFIG, GROUP, CONTEXT, TOKENS)
REFERENCE = cost.reference(CONFIG, GROUP, STEPS, PROMPT)
UPDATE = cost.update(CONFIG, GROUP, STEPS, PROMPT)

PHASES: list[tuple[str, Cost]] = [
    ("prefill of nine prompts and the empty one", 9 * cost.prefill(CONFIG, PROMPT) + cost.prefill(CONFIG, 3)),
    (f"one step of {GROUP} images, guided, prompts cached", STEP),
    (f"one step of {GROUP} images as published, in bfloat16", BATCHED),
    (f"{STEPS} steps of {GROUP} images", STEPS * STEP),
    (f"{GROUP} images decoded to pixels", cost.decode_pixels(VQ, GROUP, GRID)),
    (f"{CANDIDATES * GROUP} previews decoded", cost.decode_pixels(VQ, CANDIDATES * GROUP, GRID)),
    (f"{GROUP} answers of {TOKENS} tokens after {CONTEXT}", ANSWERS),
    ("the same as published", PLAIN_ANSWERS),
    ("reference log-probs of all timesteps", REFERENCE),
    ("update over all timesteps, all weights learn", UPDATE),
    ("the same, concept rows alone learn", cost.update(CONFIG, GROUP, STEPS, PROMPT, trainable="concept")),
]


def _show(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}".replace(",", " ")


def phases() -> str:
    """Operations, bytes and launches of every phase."""
    lines = ["| phase | TFLOP | of it attention | heads | GB moved | launches |", "|---|---|---|---|---|---|"]
    for name, work in PHASES:
        numbers = (work.flops / 1e12, work.attention / 1e12, work.head / 1e12, work.bytes / 1e9, work.launches)
        lines.append(f"| {name} | {' | '.join(map(_show, numbers))} |")
    return "\n".join(lines)


def memory() -> str:
    """The GRPO step's memory, all weights learning in bfloat16."""
    gb = 1e9
    state, row = cost.state_bytes(CONFIG), cost.activation_bytes(CONFIG, PROMPT)
    again = cost.activation_bytes(CONFIG, PROMPT, checkpointed_layers=CONFIG.num_hidden_layers)
    gradients = 2.0 * cost.parameters(CONFIG)
    records = [GROUP * steps * CONFIG.num_vq_tokens * (2 + 2 + 4 + 4) for steps in (10, STEPS)]
    rows = int(0.85 * (GPU.memory - state - gradients) / row)
    learned = f"{cost.parameters(CONFIG) / 1e9:.2f} B parameters"
    lines = [
        "| what | GB |",
        "|---|---|",
        f"| weights, gradients, moments and float32 master weights of {learned} | {state / gb:.1f} |",
        f"| a microbatch's own gradients, formed apart | {gradients / gb:.1f} |",
        f"| reference weights on the device, during the reference pass alone | {gradients / gb:.1f} |",
        f"| one packed row (a rollout at a timestep, both halves) | {row / gb:.2f} |",
        f"| the same with all layers recomputed | {again / gb:.2f} |",
        f"| packed rows that are planned with on 80 GB: {rows} | {rows * row / gb:.1f} |",
        f"| records at T = 10, at T = {STEPS} | {records[0] / gb:.4f}, {records[1] / gb:.4f} |",
        f"| the step's peak, by this plan, at any T | {(state + gradients + rows * row) / gb:.1f} |",
    ]
    return "\n".join(lines)


def ratio(mine: Span, theirs: Span) -> tuple[float, float]:
    """How many times faster, both sides read alike; in order."""
    both = sorted((theirs.fast / mine.fast, theirs.slow / mine.slow))
    return both[0], both[1]


def _verdict(low: float, high: float, goal: float) -> str:
    return "yes" if low >= goal else "no" if high < goal else "open"


def predictions() -> str:
    """The issue's numbers as the assumptions give them."""
    rows: list[tuple[str, str, str]] = []

    def faster(what: str, mine: Span, theirs: Span, goal: float) -> None:
        low, high = ratio(mine, theirs)
        digits = 0 if low >= 10 else 1
        rows.append((what, f"{low:.{digits}f} to {high:.{digits}f} ×", f"≥ {goal:g} ×: {_verdict(low, high, goal)}"))

    def share(what: str, work: Cost, span: Span, goal: float) -> None:
        low, high = (work.flops / taken / GPU.matrix for taken in (span.slow, span.fast))
        rows.append((what, f"{low:.0%} to {min(1.0, high):.0%}", f"≥ {goal:.0%}: {_verdict(low, high, goal)}"))

    group = ours(STEP) * (STEPS / GROUP)
    rows.append(("images a second, captured", f"{1 / group.slow:.2f} to {1 / group.fast:.2f}", ""))
    alone = published(PUBLISHED) * STEPS
    rows.append(
        ("images a second, published (float32, one at a time)", f"{1 / alone.slow:.2f} to {1 / alone.fast:.2f}", "")
    )
    faster("images against the published loop", group, alone, 8.0)
    faster("images against the same batched in bfloat16", group, batched(BATCHED) * (STEPS / GROUP), 2.5)
    share("part of the matrix rate in the image steps", STEP, ours(STEP), 0.5)
    faster(
        f"one image, {CONFIG.num_vq_tokens} codes: captured against eager", ours(ALONE), ours(ALONE, eager=True), 1.6
    )
    faster(f"one image, {SMALL} codes: captured against eager", ours(FEW), ours(FEW, eager=True), 1.6)
    faster("answers, eager, against the published loop", ours(ANSWERS, eager=True), published(PLAIN_ANSWERS), 40.0)
    learning = ours(UPDATE, head=GPU.matrix)
    share("part of the matrix rate in the update", UPDATE, learning, 0.45)
    rows.append(("seconds of the update", f"{learning.fast:.0f} to {learning.slow:.0f}", ""))
    lines = ["| what | predicted | goal: would it hold? |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def assumptions() -> str:
    """What the predictions rest on."""
    return (
        f"bfloat16 products {GPU.matrix / 1e12:.0f} TFLOP/s, float32 products without TF32 {GPU.single / 1e12:.0f}, "
        f"attention {GPU.attention / 1e12:.0f} without a mask, {GPU.masked / 1e12:.0f} with one, "
        f"{GPU.single_attention / 1e12:.0f} in float32; "
        f"e4m3 products {GPU.eight_bits / 1e12:.0f}; {GPU.bandwidth / 1e12:g} TB/s; {GPU.launch * 1e6:g} µs of the "
        f"host for each kernel that Python launches; {GPU.memory / 1e9:.0f} GB."
    )


@dataclass(frozen=True)
class Lever:
    """Something that shortens a captured step of the group, and the part of the step that it touches."""

    key: str
    """As benchmarks/engine_gpu.py names its case."""
    text: str
    before: float
    """Seconds of that part, predicted."""
    after: float
    built: str
    """Where the code has it."""


def lever_predictions() -> list[Lever]:
    """What would shorten a captured step of the group."""
    rows = 2 * GROUP * (CONFIG.num_vq_tokens + 2)
    item = 2.0 * CONFIG.num_hidden_layers / GPU.bandwidth  # seconds to move one bfloat16 number of every layer
    tensor, inner = rows * CONFIG.hidden_size * item, rows * CONFIG.intermediate_size * item
    products, head = STEP.dense / GPU.matrix, STEP.head / GPU.single
    logits = GROUP * CONFIG.num_vq_tokens * CONFIG.codebook_size * 4 / GPU.bandwidth
    again = 3 * logits  # the second product reads what the first wrote, and the bias is added in place
    eight = STEP.dense / GPU.eight_bits + (
        6 * 1.5 * tensor
    )  # each layer's input is read, and written in half the bytes
    return [
        Lever("fp8", "products of the blocks in e4m3", products, eight, '`products="fp8"`'),
        Lever("rotary", "q/k norm and rotary in one kernel: 22 passes become 4", 22 * tensor, 4 * tensor, "on a GPU"),
        Lever(
            "buffers",
            "prompt's keys and values in buffers beside the row's own, one call: 15 passes become 6",
            15 * tensor,
            6 * tensor,
            "on a GPU, captured steps",
        ),
        Lever(
            "head",
            "head as two bfloat16 products with float32 results",
            head,
            2 * STEP.head / GPU.matrix + again,
            "on a GPU",
        ),
        Lever("gelu", "GELU in the product's epilogue: 2 passes of the inner width", 2 * inner, 0.0, "on a GPU"),
        Lever(
            "compiled",
            "a block's sums and the next one's norm in one kernel, by torch.compile: 8 passes become 5",
            8 * tensor,
            5 * tensor,
            '`blocks="compiled"`',
        ),
        Lever(
            "qkv",
            "q, k and v from one product: the input is read once, not three times",
            3 * tensor,
            tensor,
            "on a GPU",
        ),
    ]


def levers() -> str:
    """The levers as a table, before and after."""
    lines = ["| lever | ms before | ms after | in the code |", "|---|---|---|---|"]
    for each in lever_predictions():
        lines.append(f"| {each.text} | {1e3 * each.before:.1f} | {1e3 * each.after:.1f} | {each.built} |")
    return "\n".join(lines)


LOSS_HEADS = [("codes of an image", GROUP * STEPS * CONFIG.num_vq_tokens, 8192), ("text", 400, 58523)]
"""Heads that statistics in the epilogue are predicted for (name, tokens, entries), in bfloat16."""


def epilogue() -> str:
    """Row statistics of the loss in the product's epilogue: bytes saved, and how fast the product must then be."""
    from pyunictokens.kernels import plan

    lines = [
        "| head | bytes a logit before | after | ms of memory saved | ms of the product by cuBLAS "
        "| share of cuBLAS at which nothing is gained |",
        "|---|---|---|---|---|---|",
    ]
    for name, tokens, entries in LOSS_HEADS:
        before = 4 + 4 * (1 if entries <= plan.RESIDENT else 2) + 2
        after = 4 + 4 + 2 + 24 / plan.PART
        saved = (before - after) * tokens * entries / GPU.bandwidth
        product = 2.0 * tokens * entries * CONFIG.hidden_size / GPU.matrix
        lines.append(
            f"| {name}: {tokens} tokens, {entries} entries | {before} | {after:.2f} | {1e3 * saved:.3f} "
            f"| {1e3 * product:.3f} | {product / (product + saved):.2f} |"
        )
    return "\n".join(lines)


PARTS = {"phases": phases, "memory": memory, "assumptions": assumptions, "predictions": predictions, "levers": levers}
PARTS["epilogue"] = epilogue


def updated(text: str, parts: Mapping[str, Callable[[], str]] = PARTS, page: str = FILE.name) -> str:
    """`text` with every marked part made anew. Raises SystemExit where markers are missing."""
    for name, make in parts.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"{page}: the markers of {name} are missing")
        text = f"{before}{begin}{make()}\n{end}{after}"
    return text


def main() -> None:
    text = FILE.read_text(encoding="utf-8")
    new = updated(text)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if new == text else f"{FILE.name} is out of date: python -m experiments.cost_tables")
    write_text_atomic(FILE, new)


if __name__ == "__main__":
    main()
