"""Evaluation: measures, UnifyBench++ on the held-out half of a concept's folder, the report of a run, and the paper's
tables for any models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import lazy

if TYPE_CHECKING:
    from . import metrics
    from .benchmark import SPLITS, unifybench
    from .clip import Embeddings, OpenClip
    from .core import Baseline, Unsupported
    from .report.page import write_report
    from .result import EvalResult, Metric, bootstrap
    from .runner import TableSettings, fill
    from .scoring import Scorer
    from .suites import open_suite
    from .table_files import Table


__all__ = [
    "SPLITS",
    "Baseline",
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

__getattr__, __dir__ = lazy(
    __name__,
    {
        "benchmark": ("SPLITS", "unifybench"),
        "clip": ("Embeddings", "OpenClip"),
        "core": ("Baseline", "Unsupported"),
        "report.page": ("write_report",),
        "result": ("EvalResult", "Metric", "bootstrap"),
        "runner": ("TableSettings", "fill"),
        "scoring": ("Scorer",),
        "suites": ("open_suite",),
        "table_files": ("Table",),
    },
    modules=("metrics",),
)
