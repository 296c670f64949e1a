"""The demo of text-to-image reinforcement: prompts of the composed world, a reward network, a reader that measures.

    write prompts → measure the held-out ones → reinforce, measuring → before and after side by side, the curve

Nothing of the reader reaches the reward. Held-out prompts are never trained on and are drawn with the same noise each
time, so the pictures side by side differ by the policy alone.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config.settings import with_overrides
from ..config.training import DsogConfig, GrpoConfig, HeldOutConfig
from ..data.images import make_grid, save_image
from ..models.bundle import ModelBundle, Sources
from ..rewards.base import RewardModel
from ..rollout.engine import RolloutEngine
from ..train import reinforce
from ..train.grpo import RunResult
from ..train.held_out import SEED, difference
from ..train.metrics import read_metrics
from ..utils.devices import multiplies_bfloat16, pick_device, pick_dtype
from ..utils.errors import UserError
from ..utils.files import read_json_lines, write_bytes_atomic
from ..utils.progress import Progress, silent

RUN, TRAIN, HELD_OUT, CURVE, PICTURES = "run", "train.jsonl", "held_out.jsonl", "curve.png", "before_and_after.png"

SETTINGS = GrpoConfig(
    trainable="full",
    objective="final_sample",
    advantage="std",
    steps=150,
    groups=2,
    group_size=24,
    rollouts_kept=1 / 3,
    lr=2e-4,
    schedule="constant",
    warmup=3,
    ema_decay=0.97,
    temperature=1.0,
    beta=0.0,
    guidance_scale=0.0,
    timesteps=4,
    timestep_fraction=0.5,
    micro_rows=0,
    micro_timesteps=0,
    checkpoint_every=50,
    sample_every=50,
    dsog=DsogConfig(enabled=False),
    held_out=HeldOutConfig(every=75, images=2, by="wholly_right", patience=0),
)
"""What learns well in minutes on two cores (docs/toyworld.md): the finished sample's log-probs under random masks,
advantages with their spread divided out, no guidance, few timesteps of which the update takes half, of 24 images of a
prompt the eight at both ends of the rewards, all weights, and their average."""

PLACE = 0.3
"""Weight of the place beside that of the objects. Without it pictures end in one place, also where a prompt names
another."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo ends with."""

    result: RunResult
    before: float
    after: float
    gain: float
    error: float
    """Standard error of the gain, prompt by prompt."""
    curve: Path
    pictures: Path

    @property
    def sentence(self) -> str:
        low, high = self.gain - 1.96 * self.error, self.gain + 1.96 * self.error
        return (
            f"of held-out prompts {100 * self.before:.0f} % came out wholly right before, {100 * self.after:.0f} % "
            f"after {self.result.steps} steps: {100 * self.gain:+.0f} points [{100 * low:+.0f}, {100 * high:+.0f}]"
        )


def run_prompt_demo(
    out: Path,
    *,
    seed: int = 0,
    words: Iterable[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    prompts: int = 960,
    held_out: int = 192,
    world: str | os.PathLike[str] | None = None,
    places: bool = True,
    progress: Progress = silent,
) -> DemoResult:
    """All of it, in the folder `out`; a demo that is there already is made anew, another folder is refused.

    world: a folder of the composed world's weights; None: those in the package. places: whether the reward also asks
    for the place that a prompt names. dtype: "auto" is bfloat16 also on a CPU
    that multiplies it.
    """
    from ..toy.composed.model import Places, composed_reward, load_composed, share_right, wholly_right
    from ..toy.composed.prompts import write_prompts
    from .bundle import resolved_dtype

    at = pick_device(device)
    if dtype == "auto" and at.type == "cpu" and multiplies_bfloat16():
        dtype = "bfloat16"
    dtype = resolved_dtype(Sources(), device, dtype)
    settings = with_overrides(SETTINGS, [f"seed={seed}", f"dtype={dtype}", *(w.removeprefix("grpo.") for w in words)])
    bundle = load_composed(world, pick_dtype(dtype), at)
    if out.exists() and any(out.iterdir()):  # behind all that may be refused: an earlier demo stays then
        if not (out / TRAIN).exists():
            raise UserError(f"{out}: is not empty and holds no earlier demo: choose another folder")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    write_prompts(out, train=prompts, held_out=held_out, seed=seed)
    reward: dict[str, RewardModel] = {"objects": composed_reward(world)}
    metrics: Mapping[str, RewardModel] = {"wholly_right": wholly_right(world), "share_right": share_right(world)}
    if places:
        reward["place"] = Places()
    texts = [str(line["prompt"]) for line in read_json_lines(out / HELD_OUT)][:12]
    before = _draw(bundle, texts, settings)
    result = reinforce(
        bundle,
        out / TRAIN,
        reward,
        settings,
        out / RUN,
        weights=[1.0, PLACE][: len(reward)],
        held_out=out / HELD_OUT,
        metrics=metrics,
        progress=progress,
    )
    after = _draw(bundle, texts, settings)
    pairs = torch.stack([before, after], 1).flatten(0, 1)
    captions = [word for text in texts for word in (text, "after reinforcement")]
    save_image(make_grid(pairs, 4, captions), out / PICTURES)
    write_curve(out / RUN, out / CURVE)
    by = settings.held_out.by
    first, last = result.held_out[0], result.held_out[-1]
    gain, error = difference(last, first, by)
    return DemoResult(result, first.mean(by), last.mean(by), gain, error, out / CURVE, out / PICTURES)


def _draw(bundle: ModelBundle, texts: list[str], settings: GrpoConfig) -> torch.Tensor:
    """The first image of each prompt as the measurement draws it."""
    drawn = RolloutEngine.of(bundle).generate_images(
        texts,
        steps=settings.timesteps,
        guidance_scale=settings.guidance_scale,
        temperature=settings.temperature,
        seed=SEED,
        sample_ids=[place * settings.held_out.images for place in range(len(texts))],
        record=False,
    )
    assert drawn.pixels is not None
    return drawn.pixels.float().clamp(-1, 1).cpu()


def write_curve(run: Path, file: Path) -> Path:
    """The curve of a run's held-out prompts as PNG."""
    from ..evaluate.report.plots import LIGHT
    from ..evaluate.report.plots import held_out as plot

    rows = [line for line in read_json_lines(run / HELD_OUT) if not math.isnan(line.get("step", math.nan))]
    write_bytes_atomic(file, plot(rows, read_metrics(run), LIGHT))
    return file
