"""The demo: a toy concept that the toy model has never seen, from nothing to reinforced, with everything measured.

    write a concept → measure → learn its tokens → measure → UniCTask-GRPO → measure → report

Also the small table that says what changed. It uses the parts any run uses and adds only the choice of a concept.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..data.folder import load_concept
from ..evaluate.result import EvalResult
from ..evaluate.tasks import label
from ..models.bundle import Sources
from ..toy.concept import write_toy_concept
from ..utils.devices import check_training_dtype, pick_device, pick_dtype
from ..utils.errors import UserError
from ..utils.progress import Progress, silent
from .bundle import load_scorers, open_bundle
from .context import Parts, RunContext
from .pipeline import Outcome, run_concept
from .run_dir import CONFIG, RunConfig

NAME = "bo"

HEADLINES = {
    key: label(key)
    for key in (
        "reasoning_generation.reward",
        "reasoning_generation.attributes",
        "pure.attributes",
        "pure.subject",
        "pure.clip_i",
        "pure.clip_t",
        "reasoning.accuracy",
        "vqa.accuracy",
        "qa.accuracy",
        "recognition.weight",
    )
}
"""Measures shown after a demo, where they were taken, with the label that the report gives them."""


def run_demo(
    out: Path,
    *,
    kind: str = "animal",
    seed: int = 0,
    words: Iterable[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    replace: bool = True,
    progress: Progress = silent,
) -> Outcome:
    """Everything on a toy concept of a `kind` (human, animal, object), in the folder `out`.

    `words` are `key=value` settings. A demo that is there already is made anew; another folder is refused.
    """
    words = list(words)
    config = RunConfig.make("toy", words=words, seed=seed)
    check_training_dtype(pick_dtype(dtype, pick_device(device)))
    if out.exists() and any(out.iterdir()):
        if not (replace and (out / CONFIG).exists() and (out / "data" / "concept").is_dir()):
            raise UserError(f"{out}: is not empty and holds no earlier demo: choose another folder")
        shutil.rmtree(out)
    write_toy_concept(out / "data", seed=seed, kind=kind, name=NAME)
    concept = load_concept(out / "data", NAME)
    bundle = open_bundle(Sources(), device, dtype)
    rewards = load_scorers(bundle.sources, bundle.device)
    context = RunContext(bundle, concept, config, out, rewards, progress=progress)
    return run_concept(context, Parts())


def headline_rows(results: Mapping[str, EvalResult]) -> list[list[str]]:
    """Rows of [measure, one cell a result, change] for :data:`HEADLINES`; the change is the last result against the one
    before it, measured item by item, with its 95 % interval."""
    means = {name: result.metrics for name, result in results.items()}
    names = list(results)
    changes = results[names[-2]].compare(results[names[-1]]) if len(names) > 1 else {}
    rows = []
    for key, title in HEADLINES.items():
        if not any(key in metrics for metrics in means.values()):
            continue
        cells = [f"{metrics[key].mean:.3f}" if key in metrics else "" for metrics in means.values()]
        change = changes.get(key)
        span = f"{change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}]" if change is not None else ""
        rows.append([title, *cells, span])
    return rows
