"""The demo of plain text-to-image reinforcement: prompts of the toy world, a reward network, a reader that measures.

    write prompts → measure the held-out ones → reinforce, measuring → before and after side by side, the curve

Nothing of the reader reaches the reward. Held-out prompts are never trained on and are drawn with the same noise each
time, so the pictures side by side differ by the policy alone.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..config.settings import with_overrides
from ..config.training import DsogConfig, GrpoConfig, HeldOutConfig
from ..data.images import from_pil, make_grid, save_image
from ..models.bundle import ModelBundle, Sources
from ..rewards.base import RewardModel
from ..rollout.engine import RolloutEngine
from ..train import reinforce
from ..train.grpo import RunResult
from ..train.held_out import SEED, difference
from ..train.metrics import read_metrics
from ..utils.devices import pick_device, pick_dtype
from ..utils.errors import UserError, needs
from ..utils.files import read_json_lines, write_bytes_atomic, write_text_atomic
from ..utils.progress import Progress, silent

RUN, TRAIN, HELD_OUT, CURVE, PICTURES = "run", "train.jsonl", "held_out.jsonl", "curve.png", "before_and_after.png"

SETTINGS = GrpoConfig(
    trainable="full",
    steps=120,
    groups=6,
    group_size=8,
    lr=6e-5,
    schedule="cosine",
    warmup=3,
    temperature=1.0,
    beta=0.0,
    guidance_scale=0.0,
    timesteps=4,
    token_scope="newly_unmasked",
    micro_rows=0,
    micro_timesteps=0,
    checkpoint_every=40,
    sample_every=40,
    dsog=DsogConfig(enabled=False),
    held_out=HeldOutConfig(every=30, images=2, by="wholly_right", patience=0),
)
"""What was found to learn fastest on two cores: no guidance and few timesteps, many images a step, all weights."""


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
    world: Path | None = None,
    progress: Progress = silent,
) -> DemoResult:
    """All of it, in the folder `out`; a demo that is there already is made anew, another folder is refused.

    world: a folder of the composed world's weights (`composed_folder()`: those in the package); None: the toy world.
    """
    from ..toy.composed.model import composed_reward, load_composed, share_right, wholly_right
    from ..toy.composed.prompts import write_prompts
    from .bundle import open_bundle, resolved_dtype

    if out.exists() and any(out.iterdir()):
        if not (out / TRAIN).exists():
            raise UserError(f"{out}: is not empty and holds no earlier demo: choose another folder")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    dtype = resolved_dtype(Sources(), device, dtype)
    settings = with_overrides(SETTINGS, [f"seed={seed}", f"dtype={dtype}", *(w.removeprefix("grpo.") for w in words)])
    if world is not None:
        bundle = load_composed(world, pick_dtype(dtype), pick_device(device))
        write_prompts(out, train=prompts, held_out=held_out, seed=seed)
        reward: Mapping[str, RewardModel] = {"objects": composed_reward(world)}
        metrics: Mapping[str, RewardModel] = {"wholly_right": wholly_right(world), "share_right": share_right(world)}
    else:
        bundle = open_bundle(Sources(), device, dtype)
        reward, metrics = _toy_world(out, bundle, prompts, held_out, seed)
    texts = [str(line["prompt"]) for line in read_json_lines(out / HELD_OUT)][:12]
    before = _draw(bundle, texts, settings)
    result = reinforce(
        bundle,
        out / TRAIN,
        reward,
        settings,
        out / RUN,
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


def _toy_world(
    out: Path, bundle: ModelBundle, prompts: int, held_out: int, seed: int
) -> tuple[Mapping[str, RewardModel], Mapping[str, RewardModel]]:
    """Prompts and drawings into `out`; the reward, and what is measured."""
    with needs("data"):
        from PIL import Image

    from ..rewards.ensemble import as_model
    from ..toy.drawing import render
    from ..toy.networks import ToyNetworks, load_second_reader
    from ..toy.prompts import dense_prompts, metrics
    from ..toy.prompts import reward as toy_reward

    nets = ToyNetworks.from_pretrained().to(bundle.device)
    (out / "drawings").mkdir()
    test = dense_prompts(held_out, 1)  # the same for every seed
    lines = []
    for number, (row, scene) in enumerate(test):
        file = out / "drawings" / f"{number}.png"
        save_image(from_pil(Image.fromarray(np.asarray(render(scene)))), file)
        lines.append(json.dumps({**row, "reference_image": str(file)}))
    write_text_atomic(out / HELD_OUT, "\n".join(lines) + "\n")
    known = frozenset(str(row["prompt"]) for row, _ in test)
    lines = [json.dumps(row) for row, _ in dense_prompts(prompts, 2 + seed, without=known)]
    write_text_atomic(out / TRAIN, "\n".join(lines) + "\n")
    measured = {name: as_model(function, name) for name, function in metrics(nets.reader).items()}
    second = load_second_reader().to(bundle.device)
    return {"as_asked": as_model(toy_reward(second), "as_asked")}, measured


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
