"""The proof on a GPU: `pytest -m gpu`. Every body also runs on the CPU, on small shapes, in the usual suite.

`device` is cpu or cuda; the cuda half carries the mark `gpu`. `backend` is each backend by name; what it cannot do is
skipped with the reason the library itself gives. The Triton backend runs on the CPU where TRITON_INTERPRET=1 was set.
"""

from __future__ import annotations

import pytest
import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the tensors lie."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device here")
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The backend that is asked for."""
    return request.param
