"""Evaluation: measures, UnifyBench++ on the held-out half of a concept's folder, the report of a run, and the paper's
tables for any models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import metrics
    from .benchmark import SPLITS, unifybench
    from .clip import Embeddings, OpenClip
    from .model import Candidate, Unsupported
    from .report.page import write_report
    from .result import EvalResult, Metric, bootstrap
    from .runner import TableSettings, fill
    from .scoring import Scorer
    from .suites import open_suite
    from .table_files import Table

_NAMES = {
    "EvalResult": "result",
    "Metric": "result",
    "bootstrap": "result",
    "SPLITS": "benchmark",
    "unifybench": "benchmark",
    "write_report": "report.page",
    "Embeddings": "clip",
    "OpenClip": "clip",
    "Candidate": "model",
    "Unsupported": "model",
    "TableSettings": "runner",
    "fill": "runner",
    "Scorer": "scoring",
    "open_suite": "suites",
    "Table": "table_files",
}

__all__ = [
    "SPLITS",
    "Candidate",
    "Embeddings",
    "EvalResult",
    "Metric",
    "OpenClip",
    "Scorer",
    "Table",
    "TableSettings",
    "Unsupported",
    "bootstrap",
    "fill",
    "metrics",
    "open_suite",
    "unifybench",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name == "metrics":
        return importlib.import_module(f"{__name__}.metrics")
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
