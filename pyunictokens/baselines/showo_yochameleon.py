"""Yo'Chameleon's recipe (Nguyen et al., 2025) on a masked model: soft positives and self-prompting.

    prompts      "<name> is ⟨g⟩⟨u⟩. PROMPT⟨g⟩"        ⟨u⟩ = <token_0>…, understanding tokens; ⟨g⟩ generation tokens
    questions    "<name> is ⟨g⟩⟨u⟩. QUESTION"          answered "⟨u⟩ ANSWER"

Self-prompting: answers begin with ⟨u⟩ and drawings with ⟨g⟩, so each task has tokens of its own. Soft positives:
pictures of other things, ranked by likeness to the photos and cut into bands; a picture of band i is drawn with the
first i generation tokens and no `<name>`, so the tokens learn from coarse to fine; the photos alone have all of them.
Only the rows of these tokens learn.

    DIR/soft_positives.json      the ranking (evaluate/retrieval.py)
    DIR/concept/                 the tokens
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config.limits import at_least, within
from ..data.batches import UnderstandingItem, understanding_items
from ..evaluate.baselines.ours import EngineModel, Sampling
from ..evaluate.core import Model
from ..evaluate.retrieval import Ranking, RetrievalSettings, rank
from ..evaluate.tasks import Subject
from ..models import AnsweringModel, ConceptTokens, TextTokenizer, answering, owning_rows
from ..rollout.engine import RolloutEngine
from ..train.concept_tokens.losses import TextRow
from ..train.concept_tokens.token_init import from_class_word
from ..utils.errors import UserError
from .base import Job, Method, PhotoSettings, Plan, Reading
from .loop import batch_of, finished, learn_photos, photos_to_learn
from .masked import answering_loss, drawing_loss, photos_of, plan_of

if TYPE_CHECKING:
    from PIL.Image import Image

RANKED = "soft_positives.json"


@dataclass(frozen=True)
class YoChameleonSettings(PhotoSettings):
    """How the tokens learn."""

    generation: int = 16
    """⟨g⟩: tokens that drawings begin with; one fewer is the number of bands of soft positives."""
    understanding: int = 16
    """⟨u⟩: tokens that answers begin with."""
    soft_positives: int = 1000
    """Pictures of the pool that serve as soft positives, the most alike; 0 leaves them out."""
    pool: str = ""
    """The folder of those pictures. Default: the concept's own pictures of other things."""
    images: int = 4
    """Images a step, half of them photos of the concept."""
    questions: int = 4
    """Questions a step."""
    lr: float = 1e-3
    """AdamW's learning rate."""
    weight_decay: float = 1e-4
    """AdamW's weight decay."""
    negatives_per_positive: float = 1.0
    """No-questions kept for each yes-question about images."""
    dropout: float = 0.1
    """Probability that a prompt is replaced by the empty one."""
    flip: bool = True
    """Mirror images at random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, generation=self.generation, understanding=self.understanding)
        at_least(1, images=self.images, questions=self.questions)
        at_least(0, soft_positives=self.soft_positives)
        within(0, 1, dropout=self.dropout)
        if self.soft_positives and self.generation < 2:
            raise UserError(f"generation={self.generation}: soft positives need 2 tokens or more, or soft_positives=0")


class ShowoYoChameleon(Method[YoChameleonSettings]):
    """Soft positives and self-prompting on the masked model."""

    name, title, masked, reasons = "showo-yochameleon", "Yo'Chameleon's recipe (Show-o)", True, True
    about = "tokens for drawing and for answering, with soft positives and self-prompting, on the masked model"
    settings = YoChameleonSettings

    def defaults(self, toy: bool) -> YoChameleonSettings:
        if not toy:
            return YoChameleonSettings()
        return YoChameleonSettings(
            generation=4, understanding=4, soft_positives=24, steps=80, images=8, questions=4, lr=5e-3, flip=False
        )

    def plan(self, job: Job[YoChameleonSettings]) -> Plan:
        settings = job.settings
        rows = 1 + settings.generation + settings.understanding
        needs = () if not settings.soft_positives or job.embeddings else (_NO_ENCODER,)
        return replace(plan_of(job, settings.steps, settings.images, settings.questions, rows), needs=needs)

    def train(self, job: Job[YoChameleonSettings]) -> Mapping[str, object]:
        """Rank the pool, then learn photos, soft positives and questions together."""
        bundle, settings, data = job.bundle(), job.settings, job.concept
        paths = photos_to_learn(data)
        ranked = self._ranking(job).pictures if settings.soft_positives else []
        soft = [(each.path, each.band) for each in ranked if each.band]
        model, answers = owning_rows(bundle.model), answering(bundle.model)
        model.requires_grad_(False)
        concept = ConceptTokens(
            data.name, model.width, settings.understanding, settings.generation, seed=settings.seed
        ).to(model.device)
        from_class_word(concept, model, bundle.tokenizer, data.class_word)
        model.attach(concept.requires_grad_(True))
        tokenizer = bundle.tokenizer.with_concept(concept.tokens)
        photos = photos_of(bundle, 1.0, settings.flip)
        asked = understanding_items(data, negatives_per_positive=settings.negatives_per_positive, seed=settings.seed)
        own = max(1, settings.images // 2) if soft else settings.images

        def losses(step: int, generator: torch.Generator) -> Iterable[Tensor]:
            places = batch_of(len(paths), own, settings.seed, step)
            shown = [(paths[place], settings.generation) for place in places]
            if soft and settings.images > own:
                others = batch_of(len(soft), settings.images - own, settings.seed + 1, step)
                shown += [soft[place] for place in others]
            codes = photos.augmented([path for path, _ in shown], generator)
            prompts = [
                drawn(concept, f"a photo of {concept.sks}.", tokens)
                if tokens == settings.generation
                else drawn(concept, f"a photo of a {data.class_word}.", tokens)
                for _, tokens in shown
            ]
            yield drawing_loss(bundle, tokenizer, codes, prompts, generator, settings.dropout)
            rows = [asked[place] for place in batch_of(len(asked), settings.questions, settings.seed + 2, step)]
            texts = [row_of(concept, tokenizer, answers, item) for item in rows]
            yield answering_loss(answers, photos, [item.image for item in rows], texts)

        facts = learn_photos(job, "tokens", dict(concept.named_parameters()), losses, len(paths))
        concept.save(job.folder / "concept")
        finished(job)
        return {**facts, "soft": len(soft)}

    def _ranking(self, job: Job[YoChameleonSettings]) -> Ranking:
        """The pool by likeness to the photos, ranked once."""
        file, settings, data = job.folder / RANKED, job.settings, job.concept
        if file.is_file():
            return Ranking.load(file)
        if job.embeddings is None:
            raise UserError(f"{self.name}: {_NO_ENCODER}")
        pool: Sequence[Path] = [Path(settings.pool)] if settings.pool else data.negatives
        if not pool:
            raise UserError(
                f"{data.name}: has no pictures of other things: give pool=DIR, or soft_positives=0 to do without"
            )
        told = RetrievalSettings(
            positives=settings.soft_positives,
            bands=settings.generation - 1,
            hard=0,
            easy=0,
            own="leave-out",
            seed=settings.seed,
        )
        ranking = rank(job.embeddings(), data.name, data.train_images, pool, told, data.test_images, job.progress)
        ranking.save(file)
        return ranking

    def open(self, reading: Reading, subject: Subject) -> Model:
        bundle = reading.open_bundle()
        concept = ConceptTokens.load(reading.folder / "concept")
        owning_rows(bundle.model).attach(concept.to(bundle.device).requires_grad_(False))
        return SelfPrompted(RolloutEngine.of(bundle), concept, subject, reading.sampling)


_NO_ENCODER = "soft positives are ranked by CLIP: give --clip, or soft_positives=0"


def introduced(concept: ConceptTokens) -> str:
    """The sentence before a prompt or question."""
    return f"{concept.sks} is {concept.helpers(('generation',))}{concept.helpers(('understanding',))}."


def drawn(concept: ConceptTokens, prompt: str, tokens: int) -> str:
    """A prompt as the model reads it: with all `tokens` it is introduced, a soft positive's is not; the drawing begins
    with the first `tokens` generation tokens."""
    begin = "".join(concept.tokens[concept.rows("generation")][:tokens])
    whole = tokens == concept.num_generation
    return f"{introduced(concept)} {prompt}{begin}" if whole else f"{prompt}{begin}"


def row_of(concept: ConceptTokens, tokenizer: TextTokenizer, model: AnsweringModel, item: UnderstandingItem) -> TextRow:
    """A question as the model reads it, and an answer that begins with the understanding tokens."""
    question = model.question_text(f"{introduced(concept)} {item.question}")
    begin = tokenizer.encode(concept.helpers(("understanding",)))
    answer = tokenizer.encode(" " + item.answer.strip())
    return TextRow(model.question_ids(tokenizer.encode(question)), [*begin, *answer, model.end_id])


class SelfPrompted(EngineModel):
    """Asked and drawn from as it was trained. Answers begin with the understanding tokens, which `clean` takes away."""

    def __init__(self, engine: RolloutEngine, concept: ConceptTokens, subject: Subject, sampling: Sampling):
        told = Sampling(sampling.steps, sampling.guidance_scale, sampling.max_new_tokens + concept.num_understanding)
        super().__init__(engine, concept, subject, told)
        self.concept = concept

    def shown(self, images: Sequence[Image], question: str) -> tuple[Tensor, str]:
        pixels, _ = super().shown(images, question)
        return pixels, f"{introduced(self.concept)} {question}"

    def generate(self, prompt: str, n: int, seed: int, first_id: int = 0) -> Tensor:
        return self.images(drawn(self.concept, prompt, self.concept.num_generation), n, seed, first_id)
