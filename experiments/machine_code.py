"""A budget for machine code: what the compilers made of the hot kernels, counted without a GPU.

    python -m experiments.machine_code              # prints what was counted
    python -m experiments.machine_code --check      # exit 1 where something is beyond its budget (.ci/aot.sh)

Of the compiled core's step kernel: no local memory, 128-bit loads of the logits, and the instructions that one unknown
entry costs on the way that most entries take. Of the Triton kernels on sm_90: warp-group products (HGMMA) where
products are, 128-bit loads where rows are read, no local memory. Reads what Triton's nvdisasm and cuobjdump print; says
nothing about time.

An entry's instructions are those of the loop that finds the largest logit plus those of the loop that sums and races,
once round and divided by the entries of a round; blocks with atomics (an entry that takes the lead, a few of a row) and
with loads from memory (explicit noise) are left out.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments.kernel_table import cuobjdump

ENTRY = {"BFloat16": 24.0, "Float16": 24.0, "float": 24.0}
"""Most instructions an unknown entry may cost in the step kernel on sm_90a, by dtype of the logits."""
PACK = {"BFloat16": 8, "Float16": 8, "float": 4}
"""Entries of one vector of 16 bytes."""
ROUND = 8
"""Entries that one round of the race takes (kTogether packs), of any dtype."""
LOCAL = re.compile(r"\b(LDL|STL)\b")
ELSEWHERE = re.compile(r"ATOM|LDG|CALL")
TRITON = {  # kernel → what its code on sm_90 must hold, in bfloat16 at a width and codebook that are multiples of 16
    "logprob_tiles": ("HGMMA", r"LDGSTS\.E\S*\.128"),
    "product_tiles": ("HGMMA", r"LDGSTS\.E\S*\.128"),
    "score_tiles": ("HGMMA", "UTMALDG", "UTMASTG"),
    "loss_rows": (r"LDG\.E\S*\.128",),
    "logprob_rows": (r"LDG\.E\S*\.128",),
    "gather_rows": (r"LDG\.E\S*\.128", r"STG\.E\S*\.128"),
    "scatter_rows": (r"LDG\.E\S*\.128", r"STG\.E\S*\.128"),
    "column_sums": (r"LDG\.E\S*\.128",),
    "grpo_tokens": (r"LDG\.E",),
    "norm_rotary": (r"LDG\.E\S*\.128", r"STG\.E\S*\.128"),
    "norm_rotary_backward": (r"LDG\.E\S*\.128", r"STG\.E\S*\.128"),
}


BLACKWELL = {"score_tiles": (r"UTC\w*MMA", "UTMALDG", "UTMASTG")}
"""The same on sm_100, whose products are tcgen05's."""


@dataclass(frozen=True)
class Code:
    """One function: its instructions in order, and where each label stands among them."""

    name: str
    instructions: tuple[str, ...]
    labels: dict[str, int]

    def target(self, at: int) -> int | None:
        """Where the branch at `at` goes; None where it is none."""
        match = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", self.instructions[at])
        return self.labels.get(match[1]) if match else None

    def loops(self) -> list[tuple[int, int]]:
        """(first, last) instruction of every loop."""
        backward = ((self.target(at), at) for at in range(len(self.instructions)))
        return [(start, at) for start, at in backward if start is not None and start <= at]

    def count(self, pattern: str, span: tuple[int, int]) -> int:
        """Instructions of a span that hold `pattern`."""
        return sum(pattern in line for line in self.instructions[span[0] : span[1] + 1])

    def rounds(self, span: tuple[int, int], pattern: str) -> dict[int, int]:
        """Number of `pattern` met → fewest instructions of one round of a loop that meets so many."""
        first, last = span
        reached: dict[int, dict[int, int]] = {first: {0: 0}}
        for at in range(first, last + 1):
            line = self.instructions[at]
            if at not in reached or ELSEWHERE.search(line):
                continue
            goal = self.target(at)
            following = [goal] if goal is not None and at < goal <= last else []
            if (goal is None and " BRA " not in f" {line} ") or line.startswith("@"):
                following.append(at + 1)
            for met, spent in reached[at].items():
                now = met + (pattern in line)
                for place in following:
                    costs = reached.setdefault(place, {})
                    costs[now] = min(costs.get(now, spent + 2), spent + 1)
        return {met: spent + 1 for met, spent in reached.get(last, {}).items()}


def functions(text: str) -> Iterator[Code]:
    """The functions of a disassembly."""
    for part in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        instructions: list[str] = []
        labels: dict[str, int] = {}
        for line in part.split("\n"):
            if match := re.match(r"\s*(\.L_x_\d+):", line):
                labels[match[1]] = len(instructions)
            elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
                instructions.append(match[1])
        yield Code(part.partition(":")[0].strip(), tuple(instructions), labels)


def disassembled(cubin: Path) -> str:
    """What nvdisasm makes of a cubin."""
    program = Path(cuobjdump()).with_name("nvdisasm")
    return subprocess.run([program, "-c", cubin], capture_output=True, text=True, check=True).stdout


def entry_cost(code: Code, pack: int) -> float:
    """Instructions an unknown entry costs in one step kernel, `pack` entries at a time.

    Raises:
        ValueError: the two loops are not there.
    """
    fills = [loop for loop in code.loops() if code.count("STS.128", loop) and code.count("LDG.E", loop)]
    wide = [loop for loop in fills if re.search(r"LDG\.E\.\S*128", " ".join(code.instructions[loop[0] : loop[1] + 1]))]
    races = [
        loop
        for loop in code.loops()
        if code.count("MUFU.EX2", loop) >= ROUND and code.count("IMAD.WIDE.U32", loop) >= 16
    ]
    if not wide or not races:
        raise ValueError(f"{code.name}: no loop that fills the cache by vectors, or none that races")
    fill = min((last - first + 1) / (pack * code.count("STS.128", (first, last))) for first, last in wide)
    products = 16 * ROUND // 4  # of the Philox blocks of a round
    raced = []
    for loop in races:
        met = [spent for number, spent in code.rounds(loop, "IMAD.WIDE.U32").items() if number >= products]
        if met:
            raced.append(min(met) / ROUND)
    if not raced:
        raise ValueError(f"{code.name}: no way through the race that forms its noise")
    return fill + max(raced)  # there are two versions of the loop; the dearer one counts


def core_problems(say: list[str]) -> list[str]:
    """What is wrong with the step kernels of the compiled core; what was counted goes to `say`."""
    from pyunictokens.ops.backends import cpu

    core = cpu.core()
    if core is None or cpu.build_info()["cuda"] is None:
        return ["the compiled core has no CUDA part: build it with nvcc"]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        dump = [cuobjdump(), "-xelf", "all", str(core.__file__)]
        subprocess.run(dump, capture_output=True, check=True, cwd=folder)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            target = re.search(r"sm_\w+?(?=\.)", cubin.name)
            for code in functions(disassembled(cubin)):
                if "step_kernel" in code.name:
                    found += _step_problems(code, target[0] if target else "?", say)
    return found


def _step_problems(code: Code, target: str, say: list[str]) -> list[str]:
    kind = next((name for name in ("BFloat16", "Float16") if f"{len(name)}{name}" in code.name), "float")
    cached = "Lb1E" in code.name
    name = f"step_kernel<{kind}, {'cached' if cached else 'from memory'}> {target}"
    text = "\n".join(code.instructions)
    found = [f"{name}: uses local memory"] if LOCAL.search(text) else []
    if not re.search(r"LDG\.E\.\S*128", text):
        found.append(f"{name}: reads no 128 bits at once")
    if cached and target == "sm_90":
        try:
            cost = entry_cost(code, PACK[kind])
        except ValueError as error:
            return [*found, str(error)]
        say.append(f"{name}: {cost:.1f} instructions an unknown entry (at most {ENTRY[kind]:g})")
        if cost > ENTRY[kind]:
            found.append(f"{name}: {cost:.1f} instructions an unknown entry, at most {ENTRY[kind]:g}")
    return found


def triton_problems(say: list[str]) -> list[str]:
    """What is wrong with the Triton kernels on sm_90, and with those that sm_100 has tiles of its own for."""
    import torch

    from experiments.kernel_table import (
        HEADS,
        SHAPES,
        Variant,
        _operations,
        _queries_and_keys,
        _variant,
        machine_code,
        targets_of,
    )
    from pyunictokens.kernels.launch import recording

    with recording() as launches:
        _operations(SHAPES["Show-o 512²"], torch.bfloat16)
        _queries_and_keys(HEADS["Show-o 512²"], torch.bfloat16)
    wanted = {90: TRITON, 100: BLACKWELL}
    chosen: dict[tuple[str, int], Variant] = {}
    for variant in map(_variant, launches):
        if variant.dtype == "bfloat16" or variant.name == "grpo_tokens":
            for target in targets_of(variant):
                if variant.name in wanted.get(target, {}):
                    chosen.setdefault((variant.name, target), variant)
    every = {(name, target) for target, names in wanted.items() for name in names}
    found = [f"{name} sm_{target}: never launched" for name, target in every - chosen.keys()]
    for (name, target), variant in chosen.items():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(machine_code(variant, target))
            file.flush()
            code = next(functions(disassembled(Path(file.name))))
        text = "\n".join(code.instructions)
        products = len(re.findall(r"HGMMA|UTC\w*MMA", text))
        say.append(f"{name} sm_{target}: {len(code.instructions)} instructions, {products} warp-group products")
        found += [
            f"{name} sm_{target}: nothing like {each}" for each in wanted[target][name] if not re.search(each, text)
        ]
        if LOCAL.search(text):
            found.append(f"{name} sm_{target}: uses local memory")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 where something is beyond its budget")
    options = parser.parse_args()
    said: list[str] = []
    found = core_problems(said) + triton_problems(said)
    print("\n".join(said))
    for line in found:
        print(f"beyond its budget: {line}")
    if found and options.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
