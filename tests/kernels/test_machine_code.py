"""The budget of machine code: what is counted on a disassembly made by hand, and the step kernels of the built core."""

from __future__ import annotations

import importlib.util

import pytest

import pyunictokens as uct
from experiments import machine_code

LINES = """
.text.kernel:
.L_x_1:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   STS.128 [R8], R4 ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   MUFU.EX2 R1, R1 ;
        /*0040*/               @P1 BRA `(.L_x_3) ;
        /*0050*/                   IMAD.WIDE.U32 R4, R5, R6, RZ ;
        /*0060*/               @P2 BRA `(.L_x_3) ;
        /*0070*/                   ATOMS.MAX RZ, [R1], R2 ;
.L_x_3:
        /*0080*/                   IADD3 R1, R1, 1, RZ ;
        /*0090*/               @P3 BRA `(.L_x_2) ;
        /*00a0*/                   EXIT ;
"""


def test_a_round_of_a_loop_is_counted_without_what_seldom_runs() -> None:
    (code,) = machine_code.functions(LINES)
    assert code.name == "kernel" and len(code.instructions) == 11
    assert code.loops() == [(0, 2), (3, 9)]
    assert code.count("LDG.E", (0, 2)) == 1
    # Round without a product: the first branch is taken. With it: the block of the atomic is jumped over.
    assert code.rounds((3, 9), "IMAD.WIDE.U32") == {0: 4, 1: 6}


def test_a_kernel_without_its_loops_is_refused() -> None:
    (code,) = machine_code.functions(LINES)
    with pytest.raises(ValueError, match="none that races"):
        machine_code.entry_cost(code, 8)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="nvdisasm comes with Triton")
def test_the_step_kernels_keep_their_budget() -> None:
    info = uct.ops.build_info()
    if not info or info["cuda"] is None:
        pytest.skip("built without nvcc")
    said: list[str] = []
    assert machine_code.core_problems(said) == []
    if "90" in info["cuda"]["architectures"]:
        assert len(said) == 3 and "instructions an unknown entry" in said[0]
