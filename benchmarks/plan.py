"""How the head operations would cut up a call: `kernels/plan.py` for a shape, with its estimated times and memory.

    pyunictokens bench plan --shape R=9,T=50,N=1024,D=2048,K=8192
    pyunictokens bench plan --shape R=9,T=50,N=1024,D=2048,K=8192 --dtype float32

The estimates go by the constants of kernels/plan.py, which are assumptions about a Hopper GPU. Needs no GPU. Where
there is one with TMA, a chunk of maskgit_grpo_loss is computed with statistics of the softmax by the row kernel and by
the product's epilogue, and both times are printed with the form that calls take (kept in a file: docs/kernels.md).
"""

from __future__ import annotations

import argparse

from benchmarks.ops.cases import own
from pyunictokens.kernels import plan

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def describe(text: str, dtype: str) -> list[str]:
    """The plan in words, with and without gradients. Raises ValueError for a bad shape."""
    sizes = own(f"maskgit_grpo_loss:{text}").sizes
    tokens, width, entries, size = sizes["R"] * sizes["T"] * sizes["N"], sizes["D"], sizes["K"], BYTES[dtype]
    lines = [f"{tokens} tokens, width {width}, {entries} entries, {dtype}"]
    for gradient in (False, True):
        chosen = plan.choose(tokens, width, entries, size, gradient=gradient)
        extra = plan.extra_bytes(chosen, tokens, width, entries, size, gradient=gradient) / 2**20
        kind = "with gradients" if gradient else "log-probs alone"
        pieces = f"{-(-tokens // chosen.rows)} chunks of {chosen.rows} rows, logits of {chosen.inner} at once"
        lines.append(f"{kind}: {chosen.engine}, {pieces}, {extra:.0f} MiB")
    seconds = plan.costs(tokens, width, entries, size)
    lines += [
        f"estimate, log-probs alone, {engine}: {1e3 * each:.3g} ms (assumed rates)" for engine, each in seconds.items()
    ]
    forms = plan.statistics_costs(tokens, width, entries, size)
    lines.append(
        "estimate, logits to their gradient, statistics by "
        + ", by ".join(f"the {form}: {1e3 * each:.3g} ms" for form, each in forms.items())
        + " (assumed rates)"
    )
    return [*lines, f"statistics: {measured(sizes, dtype)}"]


def measured(sizes: dict[str, int], dtype: str) -> str:
    """The form that a call takes on this machine: measured on its GPU, or why not."""
    import importlib.util

    import torch

    if importlib.util.find_spec("triton") is None:
        return "by no kernel of ours: Triton is not installed"
    if not torch.cuda.is_available():
        return "by the rows; no GPU here, on one with TMA (compute capability 9.0) it is measured"
    from pyunictokens.kernels import engine, measured, scores

    width, entries = sizes["D"], sizes["K"]
    tokens = sizes["R"] * sizes["T"] * sizes["N"]
    kind = getattr(torch, dtype)
    rows = plan.choose(tokens, width, entries, kind.itemsize, gradient=True).inner
    hidden = torch.randn(1, rows, width, device="cuda", dtype=kind)
    weight = torch.randn(entries, width, device="cuda", dtype=kind) / width**0.5
    if why := scores.objection(hidden.view(rows, width), weight):
        return f"by the rows; {why}"
    target, old = torch.zeros(1, rows, device="cuda", dtype=torch.int64), torch.full((1, rows), -9.0, device="cuda")
    one = torch.ones(1, device="cuda")
    loss = (target, old, old, one, one, None, None, None, 0.0, 1.0, 0.2, 0.2, 0.01, 15, False)
    engine.maskgit_grpo_loss(hidden, weight, *loss)
    torch.cuda.synchronize()
    found = [
        (key, choice) for key, choice in measured.choices().items() if (key.width, key.entries) == (width, entries)
    ]
    return (
        "; ".join(
            f"by the {choice.form}, measured on {key.card}, {key.rows} {key.dtype} rows: "
            + ", ".join(f"{form} {1e3 * each:.3g} ms" for form, each in choice.seconds.items())
            for key, choice in found
            if key.dtype == dtype
        )
        or "by the rows; torch.use_deterministic_algorithms is on"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="pyunictokens bench plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", required=True, metavar="R=…,T=…,N=…,D=…,K=…")
    parser.add_argument("--dtype", choices=BYTES, default="bfloat16")
    options = parser.parse_args()
    try:
        print("\n".join(describe(options.shape, options.dtype)))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
