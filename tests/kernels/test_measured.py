"""The choice between two forms: what is faster is taken and remembered, what is broken is said and not taken."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from pyunictokens.kernels import measured

KEY = measured.Key("a card", measured.SOFTWARE, "bfloat16", 4096, 2048, 8192, True, False)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measured, "_choices", None)
    monkeypatch.setenv("PYUNICTOKENS_PLANS", str(tmp_path / "of" / "plans.json"))


def _forms(gradient: torch.Tensor, product: Callable[[], object]) -> Callable[[str], None]:
    def run(form: str) -> None:
        if form == "rows":
            gradient.fill_(1.0)
        else:
            product()

    return run


@pytest.mark.parametrize(("seconds", "wanted"), [((2.0, 1.0), "product"), ((1.0, 2.0), "rows")])
def test_the_faster_form_is_taken_and_kept(
    monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, float], wanted: str
) -> None:
    monkeypatch.setattr(measured, "_timed", lambda run: dict(zip(measured.FORMS, seconds, strict=True)))
    gradient = torch.full((300, 5), torch.nan)
    run = _forms(gradient, lambda: gradient.fill_(1.001))
    assert measured.faster(KEY, run, gradient) == wanted
    monkeypatch.setattr(measured, "_choices", None)  # as another process finds it
    assert measured.remembered(KEY, gradient) == wanted
    assert measured.choices()[KEY].seconds["rows"] == seconds[0]
    monkeypatch.setattr(measured, "_choices", {})  # as a process that began at the same time
    monkeypatch.setattr(measured, "_timed", lambda run: dict(zip(measured.FORMS, reversed(seconds), strict=True)))
    assert measured.faster(KEY, run, gradient) == wanted, "the first choice stands"
    other = dataclasses.replace(KEY, rows=8192)
    assert measured.remembered(other, gradient) == "rows", "nothing is measured where there is no GPU"


def _raises() -> object:
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize("broken", ["raises", "wrong", "nan"])
def test_a_broken_form_is_said_and_not_taken(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    monkeypatch.setattr(measured, "_timed", lambda run: {"rows": 2.0, "product": 1.0})
    gradient = torch.zeros(300, 5)
    products = {"raises": _raises, "wrong": lambda: gradient.mul_(1.1), "nan": lambda: gradient[7].fill_(torch.nan)}
    with pytest.warns(RuntimeWarning, match="no such instruction" if broken == "raises" else "gradients differ"):
        assert measured.faster(KEY, _forms(gradient, products[broken]), gradient) == "rows"
    assert measured.remembered(KEY, gradient) == "rows" and measured.choices()[KEY].seconds == {}
    assert not measured.file().exists(), "the next process tries again"


def test_a_file_that_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "of").write_text("no folder")
    monkeypatch.setattr(measured, "_timed", lambda run: {"rows": 2.0, "product": 1.0})
    gradient = torch.zeros(300, 5)
    with pytest.warns(RuntimeWarning, match="measures again"):
        assert measured.faster(KEY, _forms(gradient, lambda: gradient.fill_(1.0)), gradient) == "product"
    assert measured.remembered(KEY, gradient) == "product"


def test_what_is_nan_in_both_does_not_differ() -> None:
    one = torch.tensor([1.0, torch.nan, -torch.inf])
    assert measured.difference(one, one.clone()) == 0.0


def test_deterministic_algorithms_leave_nothing_to_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "_choices", {KEY: measured.Choice("product", {})})
    like = torch.zeros(1)
    assert measured.remembered(KEY, like) == "product"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert measured.remembered(KEY, like) == "rows"


def test_a_file_of_something_else_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "plans.json"
    file.write_text("[1]")
    monkeypatch.setenv("PYUNICTOKENS_PLANS", str(file))
    monkeypatch.setattr(measured, "_choices", None)
    with pytest.raises(ValueError, match="delete it"):
        measured.choices()


def test_numbers_of_rows_share_a_case_with_the_next_power_of_two() -> None:
    assert [measured.bucket(rows) for rows in (1, 2, 3, 1000, 4096)] == [1, 2, 4, 1024, 4096]
