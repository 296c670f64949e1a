"""Optimizer steps over whatever a method learns, with a log, checkpoints, and an end in good order.

Everything that a step draws follows from the seed and the number of the step, so a checkpoint holds the learned
tensors, AdamW's moments and that number, and a training that was cut off ends as if it never had been.

    checkpoint.safetensors      value.NAME, optimizer.…, and as bytes of JSON: what is learned, and the next step
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..data.concept import Concept
from ..data.image_files import list_images
from ..models.checkpoint import load_tensors
from ..train.bad_steps import BadSteps
from ..train.metrics import MetricsLog
from ..train.optimizer import Optimizer, fitting, learning_rate
from ..utils.errors import UserError
from ..utils.files import save_safetensors_atomic
from ..utils.signals import Stopped
from .base import Job, PhotoSettings, Settings

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.safetensors"

Losses = Callable[[int, torch.Generator], Iterable[Tensor]]
"""Parts of the loss of step n, whose sum is learned from. Each is sent backward before the next is asked for, so a
method may give one a picture. All that is random comes from the generator, which the seed and n decide."""


def learn(
    job: Job[Settings],
    what: str,
    named: Mapping[str, nn.Parameter],
    losses: Losses,
    *,
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    warmup: int = 0,
    schedule: str = "constant",
    max_grad_norm: float | None = None,
    max_bad_steps: int = 3,
) -> None:
    """Take `steps` steps of AdamW on `named`, from the checkpoint of `what` where `job.resume` finds one.

    what: the part of a method that this is; a method of two parts calls twice, under two names.

    Raises UserError where `max_bad_steps` steps in a row have a loss or gradient that is not finite, Stopped where
    `job.stop` says so; a checkpoint is written first.
    """
    file, seed = job.folder / CHECKPOINT, job.settings.seed
    optimizer = Optimizer(named, lr=lr, weight_decay=weight_decay, eps=eps, max_grad_norm=max_grad_norm)
    first = _restore(job, what, named, optimizer) if job.resume else 0
    bad = BadSteps(max_bad_steps, log)

    def save(step: int) -> None:
        metrics.sync()
        state = json.dumps({"what": what, "step": step}).encode()
        tensors = {f"value.{name}": value.detach() for name, value in named.items()}
        tensors |= {f"optimizer.{name}": value for name, value in optimizer.state_dict().items()}
        save_safetensors_atomic(file, {**tensors, "state": torch.frombuffer(bytearray(state), dtype=torch.uint8)})

    with MetricsLog(job.folder, from_step=first, name=f"{what}.jsonl") as metrics:
        for step in range(first, steps):
            optimizer.zero_grad()
            total, problem, norm = 0.0, "", math.nan
            for part in losses(step, generator_of(seed, step)):
                total += float(part.detach())
                if not math.isfinite(total):
                    problem = f"loss {total:g}"
                    break
                part.backward()
            rate = learning_rate(step, lr=lr, steps=steps, warmup=warmup, schedule=schedule)
            if not problem:
                norm = optimizer.step(rate)
                problem = "" if math.isfinite(norm) else f"gradient of length {norm:g}"
            bad.count(f"{what}, step {step}", problem)
            values: dict[str, object] = {"step": step, "loss": total, "grad_norm": norm, "lr": rate}
            metrics.write({**values, "skipped": problem} if problem else values)
            job.progress(what, step + 1, steps, values)
            if bad.too_many:
                save(step + 1)
                raise UserError(bad.diagnosis(f"step {step}", f"step {step + 1}", problem, "lower lr"))
            stopping = step + 1 < steps and job.stop()
            if stopping or (job.settings.save_every and (step + 1) % job.settings.save_every == 0):
                save(step + 1)
            if stopping:
                raise Stopped(f"stopped in {what} after step {step + 1} of {steps}, its checkpoint is written")
    optimizer.release()


def photos_to_learn(concept: Concept, most: int = 0, pictures: str = "") -> list[Path]:
    """The photos of `concept`, the first `most` of them (0: all), and those in the folder `pictures`. Raises UserError
    where there is none."""
    paths = [*concept.train_images[: most or None], *(list_images(Path(pictures)) if pictures else [])]
    if not paths:
        raise UserError(f"{concept.name}: has no photos to learn from: see {concept.train_folder}")
    return paths


def learn_photos(
    job: Job[PhotoSettings], what: str, named: Mapping[str, nn.Parameter], losses: Losses, photos: int
) -> dict[str, object]:
    """:func:`learn` as the job's settings say; returns the facts to remember."""
    settings = job.settings
    learn(
        job,
        what,
        named,
        losses,
        steps=settings.steps,
        lr=settings.rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
    )
    learned = sum(value.numel() for value in named.values())
    return {"steps": settings.steps, "learned": learned, "photos": photos}


def finished(job: Job[Settings]) -> None:
    """Remove the checkpoint, once what was learned is saved."""
    (job.folder / CHECKPOINT).unlink(missing_ok=True)


def generator_of(seed: int, step: int) -> torch.Generator:
    """The generator of one step."""
    state = np.random.SeedSequence([seed, step]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def batch_of(count: int, size: int, seed: int, step: int) -> list[int]:
    """Which of `count` items step `step` takes: every item once an epoch, in an order of (seed, epoch); the last batch
    of an epoch may be smaller."""
    a_pass = -(-count // size)
    epoch, place = divmod(step, a_pass)
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return [int(index) for index in order[place * size : (place + 1) * size]]


def _restore(job: Job[Settings], what: str, named: Mapping[str, nn.Parameter], optimizer: Optimizer) -> int:
    """Bring the checkpoint of `what` into the parameters; returns the step to go on with, 0 without one."""
    file = job.folder / CHECKPOINT
    if not file.is_file():
        return 0
    try:
        tensors = load_tensors(file)
        state = json.loads(tensors["state"].numpy().tobytes())
        step, of = int(state["step"]), str(state["what"])
    except (UserError, KeyError, TypeError, ValueError) as error:
        log.warning("%s is left out, %s is begun anew: %s", file, what, error)
        return 0
    if of != what:
        return 0
    with torch.no_grad():
        for name, value in named.items():
            value.copy_(fitting(tensors, f"value.{name}", value.shape, file))
    moments = {
        name.removeprefix("optimizer."): value for name, value in tensors.items() if name.startswith("optimizer.")
    }
    optimizer.load_state_dict(moments, file)
    return step
