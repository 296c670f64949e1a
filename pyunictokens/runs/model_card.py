"""The model card of a run, written from what its folder holds: what was learned, on what, how, and what was measured.

Nothing is said that the folder does not say. Paths of this machine, servers and the facts about a concept stay out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from ..config.settings import from_mapping, to_mapping
from ..config.training import GrpoConfig
from ..evaluate.result import EvalResult
from ..models.hub import LICENSES, Card, hub_id
from ..train.held_out import LOG, Measurement, difference
from ..utils.files import read_json_lines, read_json_table
from .run_dir import ABOUT, Run

WHAT = {
    "concept": "The tokens of a concept, beside the frozen weights",
    "lora": "LoRA adapters in PEFT's format",
    "full": "All weights",
}
AFTER, BEFORE = "after.json", "before.json"


def card_of(run: Run, learned: Path, family: str, base: str | None, writes: bool) -> Card:
    """The card of what lies in `learned` of `run`. `base` is the model it belongs to, by its hub id or folder."""
    assert run.path is not None
    file = learned / "policy.json"
    kind = str(read_json_table(file).get("trainable")) if file.is_file() else "concept"
    named = base or "the toy model that comes with pyunictokens"
    about = read_json_table(run.path / ABOUT) if (run.path / ABOUT).is_file() else {}
    name = about.get("name")
    known = hub_id(base) if base is not None and not Path(base).exists() else None
    parts = [
        f"{WHAT.get(kind, kind)}, of {named}, trained with pyunictokens{_how(run)}.",
        _use(kind, writes, name),
        "## Data",
        _data(run, about if isinstance(about, dict) else {}),
        "## Settings",
        _settings(run),
        "## Measures",
        _measures(run.path),
        "## Licence",
        f"That of the base model: {LICENSES.get(family, 'look at where it comes from')}."
        + (" Photos of people and things have owners of their own." if name else ""),
    ]
    title = f"{name} by {named}" if name else f"{named}, trained further"
    tags = [kind, *(["personalization"] if name else [])]
    return Card(
        title,
        "\n\n".join(parts),
        known,
        LICENSES.get(family),
        "text-generation" if writes else "text-to-image",
        "peft" if kind == "lora" else "pyunictokens",
        tags,
    )


def _how(run: Run) -> str:
    words = {"stages": "concept stages", "grpo": "reinforcement"}
    done = [words[part] for part in run.origin.parts or () if part in words]
    return f" by {' and '.join(done)}" if done else ""


def _use(kind: str, writes: bool, name: object) -> str:
    prompt = f"A photo of <{name}> on the beach." if name else "a red dog in the snow"
    call = 'pipe("What is 12 · 4?").texts[0]' if writes else f'pipe("{prompt}").images[0]'
    lines = ["```python", "import pyunictokens as uct", "", 'pipe = uct.pipeline("OWNER/NAME")', call, "```"]
    if kind == "lora":
        lines += ["", "`PeftModel.from_pretrained(base, folder)` of PEFT loads the adapters onto the base model."]
    return "\n".join(lines)


def _data(run: Run, about: Mapping[str, object]) -> str:
    assert run.path is not None
    if about.get("name"):
        what = about.get("class_word") or "not said"
        return f"One concept, `<{about['name']}>` ({about.get('kind')}, class: {what}); its photos and facts stay out."
    file = run.path / "run.json"
    identity = read_json_table(file).get("identity") if file.is_file() else None
    if not isinstance(identity, dict) or "prompts" not in identity:
        return "Not recorded."
    held = f", {identity['held_out_prompts']} held out" if "held_out_prompts" in identity else ""
    digest = f" (SHA-256 begins {identity['prompts_sha256']})" if "prompts_sha256" in identity else ""
    return f"A list of {identity['prompts']} prompts{digest}{held}."


def _settings(run: Run) -> str:
    """What differs from the defaults of `GrpoConfig`."""
    section = run.config.get("grpo")
    if not isinstance(section, Mapping):
        return "Not recorded."
    given = to_mapping(from_mapping(GrpoConfig, section, origin="config.yaml: grpo"))
    usual = to_mapping(GrpoConfig())
    rows = [f"| `{key}` | {value} |" for key, value in given.items() if value != usual[key]]
    if not rows:
        return "The defaults of `GrpoConfig`."
    return "Where they differ from the defaults of `GrpoConfig`:\n\n| setting | value |\n|---|---|\n" + "\n".join(rows)


def rows_of(measured: Measurement) -> list[float]:
    """One value a prompt."""
    return next(iter(measured.values.values()))


def _measures(folder: Path) -> str:
    """Means with 95 % intervals: the evaluation of a concept, or held-out prompts."""
    said = []
    if (folder / AFTER).is_file():
        after = EvalResult.load(folder / AFTER)
        before = EvalResult.load(folder / BEFORE) if (folder / BEFORE).is_file() else None
        old = before.metrics if before is not None else {}
        rows = [f"| {name} | {old.get(name, '')} | {metric} |" for name, metric in sorted(after.metrics.items())]
        said.append(
            "The held-out half of the concept's folder, mean [95 % interval]:\n\n"
            "| measure | before | after |\n|---|---|---|\n" + "\n".join(rows)
        )
    if (folder / LOG).is_file():
        history = [Measurement.read(line) for line in read_json_lines(folder / LOG)]
        if len(history) > 1:
            first, last = history[0], history[-1]
            rows = []
            for name in first.values:
                gain, error = difference(last, first, name)
                shown = f"{gain:+.3f} ± {1.96 * error:.3f}" if math.isfinite(error) else f"{gain:+.3f} (one prompt)"
                rows.append(f"| {name} | {first.mean(name):.3f} | {last.mean(name):.3f} | {shown} |")
            said.append(
                f"{len(rows_of(first))} held-out prompts, before and after {last.step} steps, with "
                "the same noise; ± is 1.96 standard errors of the difference, prompt by prompt:\n\n"
                "| measure | before | after | gain |\n|---|---|---|---|\n" + "\n".join(rows)
            )
    return "\n\n".join(said) or "Nothing was measured."
