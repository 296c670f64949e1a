"""UniCTokens without reinforcement (An et al., 2025): the concept stages alone, on the masked model.

    DIR/stages/      as `train` leaves it
    DIR/concept/     the tokens

Its settings are those of the section `stages` of `train`, its numbers those of `train --no-grpo`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..config.stages import StageConfig
from ..config.training import PRESETS
from ..models.showo.costs import parameters
from ..train.concept_tokens.stages import PLANS, questions_of, stage_steps, train_concept_tokens
from ..train.costs import sizes_of, stages_flops
from .base import Job, Method, Plan, Trained
from .planning import bytes_of, parts_lacking


class UniCTokens(Method[StageConfig]):
    """The tokens `<name>` and its helpers."""

    name, title, masked, reasons = "unictokens", "UniCTokens", True, True
    about = "tokens of the concept for answering and drawing, stage by stage; nothing else of the model learns"
    settings = StageConfig

    def defaults(self, toy: bool) -> StageConfig:
        return PRESETS["toy" if toy else "unictokens"].stages

    def plan(self, job: Job[StageConfig]) -> Plan:
        """Counted from the sizes of the model."""
        config, costs = job.settings, job.costs or sizes_of(job.sources.model)
        asked, images = len(questions_of(job.concept, config)), len(job.concept.train_images)
        steps = sum(stage_steps(stage, config, asked, images) for stage in config.stages)
        rows = 1 + config.num_understanding + config.num_generation
        rows += config.num_extra if "deepening" in config.stages else 0
        return Plan(
            steps,
            stages_flops(costs, config, job.concept),
            bytes_of(parameters(costs.config), rows * (2 * costs.config.hidden_size + 1), job.dtype),
            parts_lacking(job.sources),
            notes=(f"stages: {', '.join(config.stages)}",),
        )

    def train(self, job: Job[StageConfig]) -> Mapping[str, object]:
        """The stages, in their order."""
        bundle = job.bundle()
        stages = job.folder / "stages"
        concept = train_concept_tokens(
            bundle.model,
            bundle.vq,
            bundle.tokenizer,
            job.concept,
            job.settings,
            stages,
            face_embedding=job.find_faces() if job.concept.kind == "human" else None,
            resume=job.resume and (stages / "stages.json").is_file(),
            progress=job.progress,
            stop=job.stop,
        )
        concept.save(job.folder / "concept")
        learned = {row for stage in job.settings.stages for row in PLANS[stage].learning}
        return {"rows": concept.num_tokens, "learned": sorted(learned)}

    def words(self, folder: Path, trained: Trained) -> str:
        return f"ours:{folder}"
