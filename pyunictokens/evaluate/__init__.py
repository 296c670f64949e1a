"""Evaluation: measures, UnifyBench++ on the held-out half of a concept's folder, and the report of a run."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import metrics
    from .benchmark import SPLITS, unifybench
    from .report import write_report
    from .result import EvalResult, Metric, bootstrap

_NAMES = {
    "EvalResult": "result",
    "Metric": "result",
    "bootstrap": "result",
    "SPLITS": "benchmark",
    "unifybench": "benchmark",
    "write_report": "report",
}

__all__ = ["SPLITS", "EvalResult", "Metric", "bootstrap", "metrics", "unifybench", "write_report"]


def __getattr__(name: str) -> Any:
    if name == "metrics":
        return importlib.import_module(f"{__name__}.metrics")
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
