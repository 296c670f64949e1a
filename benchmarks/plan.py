"""How the head operations would cut up a call: `kernels/plan.py` for a shape, with its estimated times and memory.

    pyunictokens bench plan --shape R=9,T=50,N=1024,D=2048,K=8192
    pyunictokens bench plan --shape R=9,T=50,N=1024,D=2048,K=8192 --dtype float32

The estimates go by the constants of kernels/plan.py, which are assumptions about a Hopper GPU. Needs no GPU.
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
    return lines


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
