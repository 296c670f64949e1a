"""What several test files need: the golden vectors, and a tiny random model of the published layout."""

from __future__ import annotations

import functools
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    import torch

# How long an example takes says something about the machine, not about the code.
hypothesis.settings.register_profile("pyunictokens", deadline=None)
hypothesis.settings.load_profile("pyunictokens")

if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core: threads of several would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch  # not above: the process that hands the tests out would import it before it starts the workers

    torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"

SMALL = {"config", "data", "gpu", "kernels", "models", "ops", "rewards", "rollout", "utils"}
"""Folders whose files take a few seconds each. They come last, so that workers that are given a file at a time (`make
test`) end together; the others hold whole runs."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.relative_to(Path(__file__).parent).parts[0] in SMALL)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Random inputs depend on the test's name alone, not on which tests this process ran before: what fails in one run
    fails in the next. TEST_SEED=N draws others."""
    import torch

    torch.manual_seed(zlib.crc32(f"{item.nodeid} {os.environ.get('TEST_SEED', 0)}".encode()))


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the library remembers between commands (which rewards were trusted) stays out of the tester's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_tree_of_commands() -> Iterator[None]:
    """`CliRunner.invoke` builds the tree of all commands anew, which takes longer than most of the commands do."""
    import typer.testing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.testing, "_get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture(scope="session", autouse=True)
def reports_without_painted_curves() -> Iterator[None]:
    """See tests/curves.py."""
    from tests.curves import unpainted

    with unpainted():
        yield


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden vectors."""
    return GOLDEN


@pytest.fixture(scope="session")
def showo_cases() -> dict[str, torch.Tensor]:
    """Tensors of the tiny Show-o's golden cases."""
    from safetensors.torch import load_file

    return load_file(GOLDEN / "showo_tiny" / "cases.safetensors")


@pytest.fixture(scope="session")
def showo_meta() -> dict[str, Any]:
    """Ids and sizes that belong to the golden cases."""
    return json.loads((GOLDEN / "showo_tiny" / "cases.json").read_text())


@pytest.fixture
def showo_tiny(showo_meta: dict[str, Any]) -> Any:
    """A freshly loaded golden Show-o in fp32; tests may attach concepts and train it."""
    import pyunictokens as uct

    model = uct.Showo.from_pretrained(GOLDEN / "showo_tiny")
    model.max_text = showo_meta["max_text_tokens"]
    return model
