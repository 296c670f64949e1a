"""What the tests of the compiled core share: its instruction sets, and torch's number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pyunictokens.ops.backends import cpu as _native

CORE = _native.core()


@pytest.fixture(params=CORE.cpu_levels() if CORE is not None else [])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set that this build and this machine share."""
    monkeypatch.setattr(_native, "level", request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of torch's threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
