"""How a head operation is cut up: which engine, how many rows at a time, and how much memory that takes.

Plain arithmetic on shapes; imports neither torch nor Triton, looks at no device. The decision is written down in
docs/kernels.md.

Legend: M tokens, D width, K codebook entries; bytes `size` of one number of the compute dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

LOGITS_BYTES = 128 << 20
"""float32 logits that exist at once: 4096 rows of a codebook of 8192. They pass through memory (weight, logits and
gradient of fewer rows do not fit into a level-2 cache of 50 MiB either), with a quarter of the launches of 1024."""
GRADIENT_BYTES = 256 << 20
"""Gradient of the logits that is kept, in the compute dtype, for the two products of the way back."""
BIAS_SLICES = 8
"""Parts that the rows of a chunk are dealt out to for the gradient of a bias; each has float32 sums of its own."""
LEAST_ROWS = 512
"""Fewer rows in a product read the weight more often than they use it: 512 rows do 512 operations per byte of it."""

MATRIX_RATE = {2: 700e12, 4: 50e12}
"""Assumed operations per second of cuBLAS by bytes of a number (Hopper: bf16 tensor cores, float32 without them)."""
TILE_SHARE = {2: 0.60, 4: 0.30}
"""Assumed rate of `head.logprob_tiles` relative to cuBLAS: 64 × 128 tiles without tensor-memory copies; plain
multiplications for float32."""
LOGITS_RATE = 3e12
"""Assumed bytes per second at which logits are written and read: memory, as a copy reaches it."""
EPILOGUE_SHARE = 0.85
"""Assumed rate of `scores.score_tiles` relative to cuBLAS: large tiles with TMA, statistics in the epilogue."""
RESIDENT = 16384
"""Longest row that a row kernel keeps in registers and so reads once."""
PART = 128
"""Columns of a row whose statistics the product leaves as one part."""
LAUNCH_SECONDS = 4e-6
"""Assumed time between two kernels of a chunk."""


@dataclass(frozen=True)
class Plan:
    """The choice for one call."""

    engine: str
    """"chunked": a product into a buffer of logits, one kernel over its rows. "fused": tiles that keep no logits."""
    rows: int
    """Rows that are gathered, and whose logits' gradient exists, at once; a multiple of `inner` (or all rows)."""
    inner: int
    """Rows whose float32 logits exist at once."""


def costs(tokens: int, width: int, entries: int, size: int) -> dict[str, float]:
    """Estimated seconds of log-sum-exp and chosen logit for all tokens, per engine.

        chunked   2·M·K·D / rate  +  8·M·K / logits rate  +  2 launches per chunk     (logits written once, read once)
        fused     2·M·K·D / (share · rate)  +  2 launches

    The constants above are assumptions about a Hopper GPU, not measurements; `benchmarks/` measures both engines.
    """
    work = 2.0 * tokens * entries * width / MATRIX_RATE[size]
    chunks = -(-tokens // _cut(tokens, width, entries, size)[1])
    return {
        "chunked": work + 8.0 * tokens * entries / LOGITS_RATE + 2 * chunks * LAUNCH_SECONDS,
        "fused": work / TILE_SHARE[size] + 2 * LAUNCH_SECONDS,
    }


def statistics_costs(tokens: int, width: int, entries: int, size: int) -> dict[str, float]:
    """Estimated seconds of logits, their statistics and their gradient for all tokens: where the two forms differ.

        rows      2·M·K·D / rate            +  (4 + 4·passes + w)·M·K / logits rate    (2 passes beyond RESIDENT)
        product   2·M·K·D / (share · rate)  +  (4 + 4 + w + 24/PART)·M·K / logits rate

    An estimate for the page and `bench plan` alone: which form runs is measured (`measured`).
    """
    logits, work = float(tokens) * entries, 2.0 * tokens * entries * width / MATRIX_RATE[size]
    passes = 1 if entries <= RESIDENT else 2
    return {
        "rows": work + (4 + 4 * passes + size) * logits / LOGITS_RATE,
        "product": work / EPILOGUE_SHARE + (8 + size + 24 / PART) * logits / LOGITS_RATE,
    }


def _cut(tokens: int, width: int, entries: int, size: int) -> tuple[int, int]:
    """(rows, inner) of a plan: gathered rows on their way back cost as much as three numbers of the compute dtype."""
    inner = max(LEAST_ROWS, LOGITS_BYTES // (4 * entries) // 128 * 128)
    most = max(LEAST_ROWS, GRADIENT_BYTES // (size * max(entries, 3 * width, 1)))
    inner = max(1, min(tokens, inner, most))
    return max(inner, min(tokens, most // inner * inner)), inner


def choose(tokens: int, width: int, entries: int, size: int, *, gradient: bool, engine: str | None = None) -> Plan:
    """The plan for a call. `engine` overrides the cost model where no gradient is formed (tests and benchmarks).

    A gradient needs the logits a second time, so it always takes "chunked": tiles would have to compute them anew.
    """
    rows, inner = _cut(tokens, width, entries, size)
    if gradient:
        return Plan("chunked", rows, inner)
    seconds = costs(tokens, width, entries, size)
    return Plan(engine or min(seconds, key=seconds.__getitem__), rows, inner)


def extra_bytes(
    plan: Plan, tokens: int, width: int, entries: int, size: int, *, gradient: bool, gathered: bool = True
) -> int:
    """Upper bound of what a call holds besides its inputs and the gradients that it returns.

    Logits (rows may begin at multiples of 16 bytes), parts of their statistics, their gradient, gathered rows, the rows
    on their way back in float32, the weight's gradient in float32, the bias' gradient in its slices; and per token
    two indices and five numbers.
    """
    total = 4 * plan.inner * entries if plan.engine == "chunked" else 4 * 4 * 64 * plan.rows
    total += gathered * plan.rows * width * size + tokens * (2 * 4 + 5 * 4)
    if gradient:
        total += plan.inner * 12 * (1 + -(-entries // PART))
        total += plan.rows * entries * size + 4 * plan.rows * width
        total += 4 * BIAS_SLICES * entries
        if size < 4:
            total += 4 * entries * width
    return total
