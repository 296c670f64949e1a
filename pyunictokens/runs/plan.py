"""What a run needs before it starts: files to fetch, memory of the GPU, hours and their price (`train --plan`).

Operations come from the model's sizes and the settings (train/costs.py, models/showo/costs.py), hours from a rate of
useful work that is given, or of the toy measured here by drawing one group. Nothing is loaded for a published model. It
does not know the command line.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from ..config.settings import with_overrides
from ..data.concept import Concept
from ..evaluate.protocol import SYNC_R1, protocol_named
from ..evaluate.runner import TableSettings
from ..evaluate.suites import sync_r1, unify
from ..evaluate.tasks import TASKS
from ..models.bundle import Sources
from ..models.four_bit import BITS
from ..models.registry import known_files
from ..models.showo import costs as cost
from ..models.showo.costs import ShowoCosts
from ..models.weight_files import WEIGHTS, WeightFiles, WeightStatus, status_of
from ..rewards.load import RewardConfig
from ..rewards.registry import registered, weight_status
from ..train.costs import PROMPT, sizes_of, stages_flops, training_flops
from .run_dir import EvaluationConfig, RunConfig

if TYPE_CHECKING:
    from ..models.bundle import ModelBundle

GPU_RATE = 300e12
"""Useful operations a second of one large GPU, assumed where none is given: half of what an H100's large products reach
in bfloat16. No measurement."""


CARDS = (16, 24, 40, 80)
"""Gigabytes of usual cards."""
USABLE = 0.9
"""The part of a card's memory that is planned with; the rest is the driver's and the allocator's."""
LEARNERS = ("trainable=full", "trainable=lora", "trainable=lora lora.base=nf4", "trainable=concept")


@dataclass(frozen=True)
class Memory:
    """Bytes on the device while reinforcement updates, by what they hold."""

    state: float
    """Weights, and of what learns gradients, moments, float32 master weights and, where one is kept, their average."""
    update: float
    """The microbatch's activations and its own gradients."""
    least_update: float
    """The same one rollout at a time with all layers recomputed (micro_rows=1, checkpoint_layers=true)."""
    others: float
    """Image tokenizer and reward models."""

    @property
    def peak(self) -> float:
        return self.state + self.update + self.others

    @property
    def least(self) -> float:
        return self.state + self.least_update + self.others


@dataclass(frozen=True)
class RunPlan:
    """What a run needs."""

    parts: list[WeightStatus]
    """Model, tokenizers and reward models, here or not."""
    memory: Memory | None
    """None for the toy."""
    dtype: str
    rate: float
    """Operations a second that the hours rest on."""
    measured: bool
    """Whether the rate was measured on this machine."""
    flops: dict[str, float]
    """Operations by part of the run: stages, reinforcement, measuring."""
    fits: dict[str, list[str]] = field(default_factory=dict)
    """For each choice of what learns, whether it fits cards of :data:`CARDS`: "as set", "least" (as `Memory.least`),
    or "no"."""

    @property
    def download(self) -> float:
        """Gigabytes that are not here yet, as far as sizes are known."""
        return sum(part.gigabytes or 0.0 for part in {p.source: p for p in self.parts if not p.ok}.values())

    @property
    def hours(self) -> dict[str, float]:
        """Hours by part of the run."""
        return {name: flops / self.rate / 3600 for name, flops in self.flops.items()}


def parts_of(sources: Sources, rewards: str | Mapping[str, object] | None = None) -> list[WeightStatus]:
    """The files of a model with its tokenizers, and of reward models where settings name them; none for the toy."""
    found, seen = [], set[str]()
    for name in ("model", "vq", "tokenizer", "vision"):
        where = getattr(sources, name)
        if where is None or where in seen:
            continue
        seen.add(where)
        told = "not known here: see where it comes from"
        wanted = known_files(where) or WeightFiles(where, where, (("config.json",), WEIGHTS), told)
        at_home = where.removeprefix("hub:") in (wanted.source, wanted.home)
        found.append(status_of(name, wanted, None if at_home else where))
    if isinstance(rewards, Mapping):
        found += weight_status(RewardConfig.from_mapping(rewards).paths())
    return found


def published_gigabytes(part: WeightStatus) -> float:
    """Size of a part as it is published, whatever lies here; where that is not known, of what lies here, or 0."""
    kinds = registered()
    files = known_files(part.source) or (kinds[part.name].files if part.name in kinds else None)
    return (files.gigabytes if files is not None else None) or part.gigabytes or 0.0


def plan_run(
    sources: Sources,
    concept: Concept,
    settings: RunConfig,
    rewards: str | Mapping[str, object] | None = None,
    *,
    stages: bool = True,
    grpo: bool = True,
    evaluate: bool = True,
    rate: float | None = None,
    toy: ModelBundle | None = None,
) -> RunPlan:
    """The plan of one run on `concept`; settings.grpo.dtype says float32 or bfloat16.

    rate: operations a second of useful work; None is `GPU_RATE`, or for the toy (`toy`, its loaded bundle) what it does
    here when it draws one group.
    """
    dtype = settings.grpo.dtype
    costs = sizes_of(sources.model)
    measured = toy is not None and rate is None
    if toy is not None:
        assert isinstance(toy.model.costs, ShowoCosts)
        costs = toy.model.costs
        rate = rate or _drawing_rate(toy, settings)
    costs = ShowoCosts(costs.config, 2 if dtype == "bfloat16" else 4)
    parts = parts_of(sources, rewards if grpo else None)
    flops = {
        "concept stages": stages_flops(costs, settings.stages, concept) if stages else 0.0,
        "reinforcement": training_flops(costs, settings.grpo) if grpo else 0.0,
        "measuring": 0.0,
    }
    if evaluate:
        times = 3 if stages and grpo and settings.evaluation.base else 2
        flops["measuring"] = times * _evaluation_flops(costs, settings.evaluation, concept)
    memory = None if toy is not None else _memory(costs, settings, parts)
    fits = {} if toy is not None else _fits(costs, settings, parts)
    return RunPlan(parts, memory, dtype, rate or GPU_RATE, measured, {k: v for k, v in flops.items() if v}, fits)


def _evaluation_flops(costs: ShowoCosts, evaluation: EvaluationConfig, concept: Concept) -> float:
    """Operations of measuring a model once on the held-out half of the folder."""
    reading = protocol_named(evaluation.protocol)
    tasks = [task for task in TASKS if not evaluation.tasks or task in evaluation.tasks]
    subject = (sync_r1 if reading is SYNC_R1 else unify).subject_of(concept, tasks)
    asked = TableSettings(samples=evaluation.samples, protocol=evaluation.protocol)
    images = sum(len(subject.of(task)) * asked.images(task) for task in tasks)
    answers = sum(len(subject.of(task)) for task in tasks if not asked.images(task))
    step = costs.image_step(1, PROMPT, costs.count, evaluation.guidance_scale > 0).flops
    answer = costs.answers(costs.count + 40, [evaluation.max_new_tokens]).flops
    return images * evaluation.timesteps * step + answers * answer


def _memory(costs: ShowoCosts, settings: RunConfig, parts: list[WeightStatus]) -> Memory:
    grpo, config, itemsize = settings.grpo, costs.config, costs.itemsize
    guided, rank = grpo.guidance_scale > 0, grpo.lora.rank
    rows = 1 + settings.stages.num_understanding + settings.stages.num_generation
    learned = cost.learned_parameters(config, grpo.trainable, rows=rows, rank=rank)
    bits = BITS if grpo.trainable == "lora" and grpo.lora.base == "nf4" else None
    state = cost.sharded_state_bytes(config, grpo.trainable, rows=rows, rank=rank, itemsize=itemsize, block_bits=bits)
    state += 4 * learned if grpo.ema_decay else 0

    def update(packed: int, recomputed: int) -> float:
        row = costs.activation_bytes(PROMPT, costs.count, guided, grpo.trainable, recomputed)
        return itemsize * learned + packed * row

    recomputed = config.num_hidden_layers if grpo.checkpoint_layers else 0
    packed = max(1, grpo.micro_rows) * max(1, grpo.micro_timesteps)
    now = max(update(packed, recomputed), _reference(costs, settings))
    least = max(update(1, config.num_hidden_layers), _reference(costs, settings))
    beside = [part for part in parts if part.name not in ("model", "tokenizer")]
    others = sum(published_gigabytes(part) * (1.0 if part.name == "vq" else 0.5) for part in beside) * 1e9
    return Memory(state, now, least, others)


def _fits(costs: ShowoCosts, settings: RunConfig, parts: list[WeightStatus]) -> dict[str, list[str]]:
    """`RunPlan.fits` by the words that set a choice."""
    found: dict[str, list[str]] = {}
    for words in LEARNERS:
        need = _memory(costs, replace(settings, grpo=with_overrides(settings.grpo, words.split())), parts)
        room = [USABLE * card * 1e9 for card in CARDS]
        found[words] = ["as set" if need.peak <= each else "least" if need.least <= each else "no" for each in room]
    return found


def _reference(costs: ShowoCosts, settings: RunConfig) -> float:
    """Of the pass that asks the reference policy: its weights, where all learn, and one row without a graph."""
    grpo = settings.grpo
    if not grpo.beta:
        return 0.0
    weights = costs.itemsize * costs.parameters if grpo.trainable == "full" else 0
    return weights + costs.scoring_bytes(PROMPT, costs.count, grpo.guidance_scale > 0)


def _drawing_rate(bundle: ModelBundle, settings: RunConfig) -> float:
    """Operations a second of drawing one group here, after one that warms up."""
    from ..rollout.engine import RolloutEngine

    grpo, engine, costs = settings.grpo, RolloutEngine.of(bundle), bundle.model.costs
    samples, guided = grpo.group_size * max(1, grpo.groups), grpo.guidance_scale > 0
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        engine.generate_images(["a dog"], samples=samples, steps=grpo.timesteps, guidance_scale=grpo.guidance_scale)
        if bundle.device.type == "cuda":
            torch.cuda.synchronize(bundle.device)
        seconds = time.perf_counter() - started
    return costs.image_step(samples, PROMPT, costs.count, guided).flops * grpo.timesteps / seconds
