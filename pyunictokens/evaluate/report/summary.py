"""What a run's numbers say, in sentences: did it improve, how sure is that, did training go well.

Every word is chosen by a number; nothing is claimed whose interval includes zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from ..result import Metric
from . import plots
from .run_files import RunFiles

HEADLINE = ("reasoning_generation.reward", "samples.attributes", "reasoning.accuracy", "recognition.weight")
"""What the tiles at the top show, as far as it was measured."""

_SUBJECTS = {
    "reasoning_generation.reward": "The mean reward of images of held-out prompts",
    "samples.attributes": "Attribute accuracy of all images",
    "reasoning.accuracy": "The share of right facts chosen",
    "recognition.weight": "Recognition",
}
_SMALL_SPREAD = 0.005
_MOVED_BY, _STILL = 10, 1e-7


def summarize(files: RunFiles) -> tuple[str, list[str]]:
    """("better" | "worse" | "unclear" | "unmeasured", sentences) about the run as a whole."""
    if files.pair is None:
        missing = " and ".join(f"{stage}.json" for stage in ("before", "after") if stage not in files.results)
        return "unmeasured", [f"Nothing can be said about improvement: {missing} missing.", *health(files)]
    before, after = files.pair
    changes = before.compare(after)
    measured = [key for key in HEADLINE if key in changes]
    if not measured:
        return "unmeasured", ["Before and after share no measured item, so nothing can be compared.", *health(files)]
    sentences = []
    for key in measured:
        change, first, second = changes[key], before.metrics[key].mean, after.metrics[key].mean
        verb = {"better": "rose", "worse": "fell"}.get(outcome(change), "did not change clearly:")
        interval = f"{change.mean:+.3f}, 95 % interval {change.low:+.3f} to {change.high:+.3f}, {change.n} pairs"
        sentences.append(f"{_SUBJECTS[key]} {verb} from {first:.3f} to {second:.3f} ({interval}).")
    result = outcome(changes[measured[0]])
    opening = {"better": "It improved: ", "worse": "It got worse: ", "unclear": "No clear change: "}[result]
    sentences[0] = opening + sentences[0][0].lower() + sentences[0][1:]
    sentences[1:1] = _from_the_start(files, measured[0])
    return result, sentences + health(files)


def _from_the_start(files: RunFiles, key: str) -> list[str]:
    """The headline measure over the whole way, where all three were measured."""
    means = [files.results[stage].metrics.get(key) for stage in files.labels]
    if len(means) < 3 or not all(means):
        return []
    way = [f"{name.lower()} {mean.mean:.3f}" for name, mean in zip(files.labels.values(), means, strict=True) if mean]
    return [f"The whole way: {', '.join(way)}."]


def health(files: RunFiles) -> list[str]:
    """What the log says about how the training went."""
    if not files.rows:
        return []
    spread = _mean(plots.numbers(files.rows, "within_group_std"))
    sentences = []
    if spread is not None and spread < _SMALL_SPREAD:
        sentences.append(
            f"Rewards hardly differed inside a group (spread {spread:.4f}): there was little to learn from."
        )
    sentences += _previews(files)
    compared = files.grpo.get("beta") != 0  # without the reference policy there is no divergence from it
    moved = [value for value in plots.numbers(files.rows, "kl") if math.isfinite(value)] if compared else []
    if len(moved) > _MOVED_BY and max(moved) < _STILL:
        sentences.append(f"The policy hardly moved: its divergence from the reference stayed below {max(moved):.1g}.")
    skipped = sum(1 for row in files.rows if row.get("skipped"))
    if skipped:
        sentences.append(f"{skipped} of {len(files.rows)} steps were left out because a number was not finite.")
    faceless = sum(value for value in plots.numbers(files.rows, "no_face") if math.isfinite(value))
    if faceless and files.about.get("kind", "human") == "human":
        sentences.append(f"No face was found in {faceless:.0f} training images; their FER is 0.")
    return sentences


def _previews(files: RunFiles) -> list[str]:
    """Which part of the previews passed, beside the part that was wanted."""
    passed = [value for value in plots.numbers(files.rows, "pass_rate") if math.isfinite(value)]
    settings = files.grpo.get("dsog")
    wanted = settings.get("target_pass_rate") if isinstance(settings, Mapping) else None
    if not passed or not isinstance(wanted, (int, float)):
        return []
    rate, none = sum(passed) / len(passed), next((i for i, value in enumerate(passed) if value > 0), len(passed))
    said = f"DSOG: {rate:.0%} of the previews passed, {wanted:.0%} were wanted"
    idle = f"; none passed in the first {none} steps, so nothing was selected there (dsog.initial=auto)"
    return [f"{said}{idle if none > 1 else ''}."]


def outcome(change: Metric) -> str:
    """ "better" or "worse" when the interval leaves zero out, else "unclear"."""
    return "better" if change.low > 0 else "worse" if change.high < 0 else "unclear"


def _mean(values: Iterable[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None
