"""The table of kernels: what counts as a problem, occupancy, and one kernel really compiled for every target."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path

import pytest

from experiments import kernel_table

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET", "0") == "1",
    reason="Triton is not installed, or interprets instead of compiling",
)


@needs_triton
def test_every_kernel_is_noted_and_one_compiles_for_every_target(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = kernel_table.variants()
    assert {variant.name for variant in found} == {
        *("grpo_tokens", "compact_tokens", "gather_rows", "scatter_rows", "column_sums"),
        *(
            "logprob_rows",
            "gradient_rows",
            "loss_rows",
            "logprob_tiles",
            "combine_splits",
            "product_tiles",
            "score_tiles",
        ),
        *("norm_rotary", "norm_rotary_backward"),
    }
    assert {variant.dtype for variant in found} == {"float32", "bfloat16", "float16"}
    small = next(variant for variant in found if variant.name == "compact_tokens")
    usages: dict[tuple[kernel_table.Variant, int], kernel_table.Usage | str] = {}
    for target in kernel_table.TARGETS:
        usage = usages[small, target] = kernel_table.compile_variant(small, target)
        assert 0 < usage.registers <= 255 and usage.spilled == 0 and usage.threads == 128
    assert kernel_table.problems(usages) == []
    assert kernel_table.table(usages).count("\n") == 3

    broken = dataclasses.replace(small, constants=(("BLOCK", 1000),))  # not a power of two
    assert isinstance(kernel_table._compile_one((broken, 90)), str)
    usages[small, 80] = dataclasses.replace(usage, spilled=8)
    usages[small, 90] = dataclasses.replace(usage, shared=kernel_table.SHARED_LIMIT[90] + 1)
    usages[small, 100] = "CompilationError"
    problems = kernel_table.problems(usages)
    assert [text in line for text, line in zip(("8 bytes spilled", "limit is", "Compil"), problems, strict=True)] == [
        True
    ] * 3


def test_occupancy_is_bound_by_what_runs_out_first() -> None:
    usage = kernel_table.Usage(registers=32, spilled=0, shared=0, threads=128)
    assert usage.occupancy(90) == 1.0
    assert dataclasses.replace(usage, registers=255).occupancy(90) == 2 * 128 / 2048
    assert dataclasses.replace(usage, shared=100 << 10).occupancy(90) == 2 * 128 / 2048
    assert dataclasses.replace(usage, shared=100 << 10).occupancy(80) == 128 / 2048
    assert dataclasses.replace(usage, threads=32).occupancy(80) == 0.5


def test_the_page_says_what_the_plan_decides() -> None:
    text = kernel_table.FILE.read_text(encoding="utf-8")
    assert kernel_table.renewed(text, "choices", kernel_table.choices()) == text
