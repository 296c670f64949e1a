"""Compile every Triton kernel for sm_80, sm_90 and sm_100 without a GPU, and write what that shows to docs/kernels.md.

    python -m experiments.kernel_table            # compile and rewrite the tables in docs/kernels.md
    python -m experiments.kernel_table --check    # compile; exit 1 on spills or too much shared memory (.ci/aot.sh)

What is compiled is what would be launched: the operations run over tensors without memory while their launches are
noted (`pyunictokens.kernels.launch.recording`), over all dtypes, shapes of each kind and combinations of options.
Triton keeps what it has compiled under TRITON_CACHE_DIR. Where the compiled core has a CUDA part, its kernels are
listed too. Says nothing about time.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from pyunictokens.utils.files import write_text_atomic
from pyunictokens.utils.signals import end_with_parent_process

FILE = Path(__file__).parent.parent / "docs" / "kernels.md"
MARKS = "<!-- {}: begin -->\n", "<!-- {}: end -->"

TARGETS = (80, 90, 100)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory that one block may have."""
SHARED_TOTAL = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
"""Bytes of shared memory of one multiprocessor; every block takes 1 KiB more than it asks for."""
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32
"""What else one multiprocessor has."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = {  # R, T, N, D, K
    "Show-o 512²": (9, 50, 1024, 2048, 8192),
    "toy": (4, 12, 64, 128, 512),
    "text head": (4, 1, 100, 2048, 58523),
    "nothing round": (3, 5, 7, 99, 1001),
    "wide codebook": (2, 5, 64, 512, 16384),
}
HEADS = {  # B, H, L, E, R of what turns
    "Show-o 512²": (18, 32, 1026, 64, 32),
    "Show-o, one position": (9, 32, 1, 64, 32),
    "toy": (8, 4, 66, 32, 16),
    "nothing round": (3, 5, 7, 10, 6),
    "all turns": (2, 8, 100, 128, 128),
}
PLAIN_TOO = (8192, 58523, 1001)
"""Codebooks that are also run without any option; the others differ from them in block sizes alone."""
SCORE_TILES = {256: (90,), 128: (100,)}
"""Columns of a tile of `score_tiles` → the targets that launch it; cards before sm_90 have no TMA."""
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.bool: "*i1"}
TYPES |= {torch.int32: "*i32", torch.int64: "*i64"}


@dataclass(frozen=True)
class Variant:
    """One compilation: a kernel of a file of kernels/, with everything that shapes its code."""

    module: str
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    """Positions of pointers and integers known to be multiples of 16."""
    warps: int
    stages: int
    dtype: str


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one target."""

    registers: int
    spilled: int
    shared: int
    threads: int

    def occupancy(self, target: int) -> float:
        """Share of the threads that a multiprocessor could hold; registers are given out by eight a thread."""
        blocks = min(
            REGISTERS // (-(-max(self.registers, 1) // 8) * 8 * self.threads),
            SHARED_TOTAL[target] // (self.shared + 1024),
            THREADS // self.threads,
            BLOCKS,
        )
        return blocks * self.threads / THREADS


def variants() -> list[Variant]:
    """Every distinct launch that the operations can make, over the shapes and options above."""
    from pyunictokens.kernels.launch import recording

    found: dict[Variant, None] = {}
    for shape, dtype in itertools.product(SHAPES.values(), DTYPES):
        with recording() as launches:
            _operations(shape, dtype)
        for launch in launches:
            found[_variant(launch)] = None
    for heads, dtype in itertools.product(HEADS.values(), DTYPES):
        with recording() as launches:
            _queries_and_keys(heads, dtype)
        for launch in launches:
            found[_variant(launch)] = None
    return list(found)


def _queries_and_keys(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Layer norm and rotary of q and k and the way back: heads behind positions in memory, as a layer makes them, and
    gradients either way round; angles shared and a row's own; parameters learning and frozen."""
    from pyunictokens.kernels import engine

    b, h, length, width, turned = shape

    def of(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    x, grad, parameter = of(b, length, h, width).transpose(1, 2), of(b, h, length, width), of(width)
    for angles in (of(length, turned), of(b, 1, length, turned)):
        rest = (x, x, angles, angles, parameter, parameter, parameter, parameter, 1e-5)
        engine.qk_norm_rotary(*rest)
        for each, learning in itertools.product((x, grad), (True, False)):
            engine.qk_norm_rotary_backward(each, each, *rest, learning)


def _operations(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """All operations of one shape: plain, with every option, and with the number of rows on the device."""
    from pyunictokens.kernels import engine, scores

    r, t, n, width, entries = shape

    def of(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    hidden, weight, target = of(r, t, n, width), of(entries, width), of(r, t, n, dtype=torch.int64)
    number, each = of(1, dtype=torch.float32).view(()), of(r, t, n, dtype=torch.float32)
    advantages, mask, bias = of(r, dtype=torch.float32), of(r, t, n, dtype=torch.bool), of(entries)
    everything = (bias, hidden, mask, 5.0)
    before = dataclasses.astuple(engine.settings), scores.assumed
    try:
        for logp in (each, each.to(dtype)):
            engine.grpo_loss(logp, logp, None, advantages, number, None, 0.2, 0.2, 0.0)
            engine.grpo_loss(logp, logp, logp, advantages, each, mask, 0.2, 0.2, 0.01)
        for options in ((None, None, None, 0.0), everything) if entries in PLAIN_TOO else (everything,):
            head = (options[0], options[1], options[3], 1.3)
            for engine.settings.engine in ("chunked", "fused"):
                engine.selected_logprob(hidden, weight, target, *head)
            engine.selected_logprob_backward(each, each, hidden, weight, target, *head, 15)
            cases: list[tuple[bool, bool]] = [(False, True)]
            if options[2] is not None:
                cases += [(True, True), (True, False)]
            for engine.settings.counted, engine.settings.deterministic in cases:
                ref, alpha = (None, number) if options[2] is None else (each, each)
                loss = (target, each, ref, advantages, alpha, *options[:3], options[3], 1.3, 0.2, 0.2, 0.01)
                for engine.settings.statistics, scores.assumed in (("rows", 9), ("product", 9), ("product", 10)):
                    engine.maskgit_grpo_loss(hidden, weight, *loss, 15, options[2] is not None)
                for engine.settings.engine in ("chunked", "fused"):
                    engine.maskgit_grpo_loss(hidden, weight, *loss, 0, True)
    finally:
        engine.settings, scores.assumed = engine.Settings(*before[0]), before[1]


def _variant(launch: Any) -> Variant:
    """What Triton would make of the arguments of a launch: types, ones and None as constants, multiples of sixteen."""
    signature, constants, divisible = [], dict(launch.constants), []
    from triton.tools.tensor_descriptor import TensorDescriptor

    names = launch.kernel.arg_names
    for position, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature.append((name, TYPES[value.dtype]))
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible.append(position)
        elif isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature.append((name, f"tensordesc<{TYPES[value.base.dtype][1:]}[{block}]>"))
        elif isinstance(value, int):
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0:
                divisible.append(position)
        else:
            signature.append((name, "fp32"))
    function, types = launch.kernel.fn, " ".join(kind for _, kind in signature)
    return Variant(
        function.__module__,
        function.__name__,
        tuple(signature),
        tuple(sorted(constants.items())),
        tuple(divisible),
        launch.warps,
        launch.stages,
        next((name for kind, name in (("bf16", "bfloat16"), ("fp16", "float16")) if kind in types), "float32"),
    )


def targets_of(variant: Variant) -> tuple[int, ...]:
    """The targets that a variant can be launched on."""
    return SCORE_TILES[dict(variant.constants)["BLOCK_N"]] if variant.name == "score_tiles" else TARGETS


def compiled(variant: Variant, target: int) -> Any:
    """What Triton makes of a variant for one target."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(variant.module), variant.name)
    constants, types = dict(variant.constants), dict(variant.signature)
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs=constants,
        attrs={(position,): [["tt.divisibility", 16]] for position in variant.divisible},
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def machine_code(variant: Variant, target: int) -> bytes:
    """The cubin of a variant."""
    return compiled(variant, target).asm["cubin"]


def compile_variant(variant: Variant, target: int) -> Usage:
    """Compile for one target and read registers, spills and shared memory from the machine code."""
    made = compiled(variant, target)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        _, usage = resources(Path(file.name))[0]
    spilled = spills(made.asm["ptx"]) if usage["STACK"] + usage["LOCAL"] else 0
    return Usage(usage["REG"], spilled, made.metadata.shared, variant.warps * 32)


def spills(ptx: str) -> int:
    """Bytes that the assembler writes to and reads from the stack for want of registers.

    Asked only where the machine code has a stack at all: a call, such as the division of two float64, has one as well.
    """
    from triton import knobs

    match = re.search(r"^\.target (sm_(\d+)\w*)", ptx, re.MULTILINE)
    assert match is not None
    assembler = knobs.nvidia.ptxas_blackwell if int(match[2]) >= 100 else knobs.nvidia.ptxas
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [assembler.path, "-v", f"--gpu-name={match[1]}", "-o", os.devnull, file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(number) for number in re.findall(r"(\d+) bytes spill", said))


def resources(file: Path) -> list[tuple[str, dict[str, int]]]:
    """(architecture and function, numbers) of every kernel in a cubin or library, as cuobjdump reports them."""
    dump = [cuobjdump(), "--dump-resource-usage", str(file)]
    text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    found, architecture, function = [], "", ""
    for line in text.splitlines():
        if match := re.match(r"\s*arch = (\S+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            function = match[1]
        elif "REG:" in line:
            numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            found.append((f"{architecture} {function}".strip(), {"STACK": 0, "LOCAL": 0, "SHARED": 0} | numbers))
    return found


def cuobjdump() -> str:
    """The program: Triton's own, else the one on the path."""
    import triton

    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(own) if own.exists() else shutil.which("cuobjdump")
    if found is None:
        sys.exit("cuobjdump: neither beside Triton nor on the path; install the CUDA toolkit")
    return found


def _compile_one(job: tuple[Variant, int]) -> Usage | str:
    try:
        return compile_variant(*job)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]


def compile_all(found: list[Variant], processes: int) -> dict[tuple[Variant, int], Usage | str]:
    """Usage of every variant on every target; where it does not compile, why."""
    jobs = [(variant, target) for variant in found for target in targets_of(variant)]
    with ProcessPoolExecutor(processes, get_context("spawn"), end_with_parent_process) as pool:
        results = []
        for done, result in enumerate(pool.map(_compile_one, jobs, chunksize=4), 1):
            results.append(result)
            if done % 50 == 0 or done == len(jobs):
                print(f"{done} of {len(jobs)} compiled", flush=True)
    return dict(zip(jobs, results, strict=True))


def problems(usages: dict[tuple[Variant, int], Usage | str]) -> list[str]:
    """Everything that must not be: what does not compile, spills, or wants more shared memory than there is."""
    found = []
    for (variant, target), usage in usages.items():
        blocks = {key: value for key, value in variant.constants if key.isupper()}
        name = f"{variant.name} {variant.dtype} {blocks} sm_{target}"
        if isinstance(usage, str):
            found.append(f"{name}: {usage}")
        elif usage.spilled:
            found.append(f"{name}: {usage.spilled} bytes spilled")
        elif usage.shared > SHARED_LIMIT[target]:
            found.append(f"{name}: {usage.shared} bytes of shared memory, the limit is {SHARED_LIMIT[target]}")
    return found


def table(usages: dict[tuple[Variant, int], Usage | str]) -> str:
    """One line a kernel, dtype and block size: the most that any of its variants takes, the least that fit at once."""
    groups: dict[tuple[str, ...], dict[int, list[Usage]]] = defaultdict(lambda: defaultdict(list))
    for (variant, target), usage in usages.items():
        blocks = [
            f"{key.removeprefix('BLOCK_')} {value}" for key, value in variant.constants if key.startswith("BLOCK")
        ]
        module = variant.module.rpartition(".")[2]
        key = f"{module}.{variant.name}", variant.dtype, ", ".join(blocks).lower(), f"{variant.warps}, {variant.stages}"
        if isinstance(usage, Usage):
            groups[key][target].append(usage)
    columns = " | ".join(f"sm_{target}" for target in TARGETS)
    lines = [f"| kernel | dtype | blocks | warps, stages | variants | {columns} |", "|" + "---|" * (5 + len(TARGETS))]
    for key, targets in sorted(groups.items()):
        cells = []
        for target in TARGETS:
            if target not in targets:
                cells.append("never launched")
                continue
            most = max(u.registers for u in targets[target]), max(u.shared for u in targets[target]) / 1024
            least = min(u.occupancy(target) for u in targets[target])
            cells.append(f"{most[0]} / {most[1]:.1f} / {100 * least:.0f}")
        kernel, *rest = key
        lines.append(f"| `{kernel}` | {' | '.join(rest)} | {max(map(len, targets.values()))} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def choices() -> str:
    """What `plan.choose` decides for each shape and dtype, with the estimated times it goes by and the extra memory."""
    from pyunictokens.kernels import plan

    lines = [
        "| shape | M | D | K | dtype | log-probs alone (estimate chunked : fused) | with gradients | extra memory |",
        "|" + "---|" * 8,
    ]
    for (name, (r, t, n, width, entries)), dtype in itertools.product(SHAPES.items(), DTYPES[::2]):
        sizes, size = (r * t * n, width, entries), dtype.itemsize
        alone, both = (plan.choose(*sizes, size, gradient=gradient) for gradient in (False, True))
        chunked, fused = plan.costs(*sizes, size).values()
        extra = plan.extra_bytes(both, *sizes, size, gradient=True) / 2**20
        lines.append(
            f"| {name} | {sizes[0]} | {width} | {entries} | {str(dtype).removeprefix('torch.')} "
            f"| **{alone.engine}** (1 : {fused / chunked:.2f}) | {both.engine}, {both.inner} of {both.rows} rows "
            f"| {extra:.0f} MiB |"
        )
    return "\n".join(lines) + "\n"


def renewed(text: str, name: str, content: str) -> str:
    """`text` with what stands between the marks of `name` replaced."""
    begin, end = (mark.format(name) for mark in MARKS)
    start, stop = text.index(begin) + len(begin), text.index(end)
    return text[:start] + content + text[stop:]


def core_table() -> str:
    """The kernels of the compiled core, where it was built with CUDA."""
    from pyunictokens.ops.backends import cpu as _native

    core, info = _native.core(), _native.build_info()
    if core is None or not info.get("cuda"):
        return "The compiled core was built without CUDA here.\n"
    kernels = sorted(resources(Path(core.__file__)))
    if not kernels:
        return "The compiled core's CUDA part holds no kernels in this version.\n"
    lines = ["| kernel | target | registers | stack, bytes | shared, KiB |", "|---|---|---|---|---|"]
    for name, usage in kernels:
        target, _, function = name.partition(" ")
        plain = subprocess.run(["c++filt", function], capture_output=True, text=True, check=False).stdout.strip()
        short = re.sub(r"\(anonymous namespace\)::|\(.*", "", plain or function).removeprefix("void ")
        lines.append(f"| `{short}` | {target} | {usage['REG']} | {usage['STACK']} | {usage['SHARED'] / 1024:.3g} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 on any problem")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        sys.exit("TRITON_INTERPRET=1: the interpreter compiles nothing; unset it")
    import triton

    found = variants()
    usages = compile_all(found, options.processes)
    for problem in (wrong := problems(usages)):
        print(problem)
    text = FILE.read_text(encoding="utf-8")
    if options.check:
        if renewed(text, "choices", choices()) != text:
            wrong.append("docs/kernels.md: the choices are not what kernels/plan.py decides")
            print(wrong[-1])
    else:
        head = f"Triton {triton.__version__}, {len(found)} variants, each compiled for {len(TARGETS)} targets.\n\n"
        core = f"\nThe compiled core's CUDA kernels:\n\n{core_table()}"
        text = renewed(text, "choices", choices())
        write_text_atomic(FILE, renewed(text, "kernels", head + table(usages) + core))
    print(f"{len(found)} variants for {len(TARGETS)} targets, {len(wrong)} problems")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
