"""Yo'Chameleon (Nguyen et al., 2025): a concept as reserved tokens of a Chameleon, which answers and draws.

An identifier, sixteen tokens ⟨g⟩ for drawing and sixteen ⟨u⟩ for answering, all of the reserved ones: "⟨sks⟩ is
⟨g⟩⟨u⟩." stands before every question and every prompt. The model prompts itself: its answers begin with ⟨u⟩, its
drawings with ⟨g⟩. Only the rows of these tokens learn, on the tokens of answers and images: AdamW 1e-3, ε 1e-6, weight
decay 1e-4, batches of four, thirty epochs, images mirrored at random.

    photos            "⟨sks⟩ is ⟨g⟩⟨u⟩. A photo of ⟨sks⟩."   → ⟨g⟩, image     four photos, repeated
    soft positives    "A photo of ⟨g_1…g_b⟩."                → ⟨g_1…g_b⟩, image     bands of `data negatives`
    recognition       hard and easy negatives, five photos repeated
    conversations     of the folder

    DIR/tokens.safetensors
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..config.limits import at_least, within
from ..data.batches import understanding_items
from ..data.concept import Concept
from ..data.wording import Wording
from ..evaluate.core import Model
from ..evaluate.retrieval import Ranking
from ..evaluate.tasks import Subject
from ..utils.errors import UserError
from . import answering
from .answering import AnsweringSettings, Sample, steps_of, vlm_plan
from .base import Job, Method, Plan, Reading, Settings
from .chameleon import Chameleon, decoder_weights
from .loop import finished
from .token_rows import TokenRows

if TYPE_CHECKING:
    from PIL.Image import Image

_PHOTOS, _KNOWN = 4, 5


@dataclass(frozen=True)
class YoChameleonSettings(AnsweringSettings):
    """The published recipe."""

    ranked: str = ""
    """Folder (or ranked.json) of `pyunictokens data negatives`: soft positives and negatives; {name} is the concept."""
    generation: int = 16
    """Tokens ⟨g⟩; one more than the bands of the ranking."""
    understanding: int = 16
    """Tokens ⟨u⟩."""
    first: int = 16200
    """Number of the reserved token that is the identifier; ⟨g⟩ and ⟨u⟩ follow it."""
    decoder: str = ""
    """File with the VQGAN decoder's weights; empty: in the checkpoint."""
    epochs: int = 30
    """Passes over all samples."""
    batch: int = 4
    """Samples a step."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    eps: float = 1e-6
    """ε of AdamW."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(1, 512, generation=self.generation, understanding=self.understanding)
        at_least(0, first=self.first)


@dataclass(frozen=True)
class Drawing:
    """An image and the prompt it is drawn for; `tokens` are the ⟨g⟩ that it begins with."""

    image: Path
    prompt: str
    tokens: int


@dataclass(frozen=True)
class Tokens:
    """The reserved tokens by what they are for, as texts."""

    identifier: str
    generation: tuple[str, ...]
    understanding: tuple[str, ...]

    @classmethod
    def of(cls, settings: YoChameleonSettings) -> Tokens:
        numbers = range(settings.first + 1, settings.first + 1 + settings.generation + settings.understanding)
        names = [f"<reserved{number}>" for number in numbers]
        split = settings.generation
        return cls(f"<reserved{settings.first}>", tuple(names[:split]), tuple(names[split:]))

    @property
    def every(self) -> list[str]:
        return [self.identifier, *self.generation, *self.understanding]

    @property
    def before(self) -> str:
        """What stands before every question and prompt."""
        return f"{self.identifier} is {''.join(self.generation)}{''.join(self.understanding)}."


class YoChameleon(Method[YoChameleonSettings]):
    """Reserved tokens of a Chameleon."""

    name, title, model = "yochameleon", "Yo'Chameleon", "leloy/Anole-7b-v0.1-hf"
    about = "reserved tokens of a Chameleon, from soft positives ranked by likeness; it answers and draws"
    settings: ClassVar[type[Settings]] = YoChameleonSettings

    def plan(self, job: Job[YoChameleonSettings]) -> Plan:
        """Counted from the ranking, the folder's questions and the sizes of the model."""
        job, settings = self.named(job), job.settings
        rows = 1 + settings.generation + settings.understanding
        if not settings.ranked:
            told = vlm_plan(job, 0, settings.batch, lambda width: 2 * rows * width)
            return replace(told, needs=("ranked=DIR, made by `pyunictokens data negatives`",))
        samples = samples_of(job.concept, ranking_of(job), settings)
        steps = steps_of(len(samples), settings)
        return vlm_plan(job, steps, settings.batch, lambda width: 2 * rows * width)

    def train(self, job: Job[YoChameleonSettings]) -> Mapping[str, object]:
        """Learn the rows; they are saved when all steps are taken."""
        job, settings = self.named(job), job.settings
        samples = samples_of(job.concept, ranking_of(job), settings)
        chameleon = Chameleon(str(job.sources.model), job.device, job.dtype, settings.decoder)
        tokens = Tokens.of(settings)
        rows = TokenRows(chameleon.model, tokens.every, reserved_ids(chameleon, tokens))

        def losses(step: int, generator: torch.Generator) -> Iterator[Tensor]:
            batch = [samples[place] for place in answering.picked(len(samples), settings, step)]
            made = [sequence(chameleon, tokens, job.concept, each, settings.flip, generator) for each in batch]
            total = sum(len(answer) for _, answer in made)
            for prompt, answer in made:
                yield chameleon.loss(prompt, answer) / total

        steps = answering.learn_samples(job, "tokens", rows.named(), losses, len(samples), settings.eps)
        rows.save(job.folder)
        finished(job)
        drawn = sum(isinstance(each, Drawing) for each in samples)
        has_decoder = bool(decoder_weights(settings.decoder or str(job.sources.model)))
        return {"rows": len(rows.ids), "steps": steps, "drawings": drawn, "decoder": has_decoder}

    def open(self, reading: Reading, subject: Subject) -> Model:
        from ..config.settings import from_mapping

        settings = from_mapping(YoChameleonSettings, dict(reading.trained.settings), origin=str(reading.folder))
        model = str(reading.trained.model or self.model)
        chameleon = Chameleon(model, reading.device, reading.dtype, settings.decoder)
        tokens = Tokens.of(settings)
        rows = TokenRows(chameleon.model, tokens.every, reserved_ids(chameleon, tokens))
        rows.restore(reading.folder)
        return Asked(chameleon, tokens, subject, reading.sampling.max_new_tokens)


def ranking_of(job: Job[YoChameleonSettings]) -> Ranking:
    """The ranking that the settings name. Raises UserError for none, another concept's, or one of other bands."""
    settings, name = job.settings, job.concept.name
    if not settings.ranked:
        raise UserError(
            "ranked is empty: Yo'Chameleon learns from pictures ranked by their likeness: make them with "
            "`pyunictokens data negatives` and give ranked=DIR"
        )
    found = Ranking.load(settings.ranked.replace("{name}", name))
    if found.concept != name:
        raise UserError(f"{settings.ranked}: ranks pictures for <{found.concept}>, not for <{name}>")
    if found.bands >= settings.generation:
        raise UserError(
            f"{settings.ranked}: has {found.bands} bands for {settings.generation} generation tokens: make it with "
            f"--bands {settings.generation - 1}, as the photos alone have all tokens"
        )
    return found


def samples_of(concept: Concept, ranking: Ranking, settings: YoChameleonSettings) -> list[Sample | Drawing]:
    """All that is learned from, in the published proportions: as many photos as a band has soft positives; each
    negative once, and as many positives as negatives and photos together."""
    tokens = Tokens.of(settings)
    photos = concept.train_images[:_PHOTOS]
    full = f"{tokens.before} A photo of {tokens.identifier}."
    made: list[Sample | Drawing] = []
    for number in range(1, ranking.bands + 1):
        prompt = f"A photo of {''.join(tokens.generation[:number])}."
        made += [Drawing(picture.path, prompt, number) for picture in ranking.band(number)]
    repeats = max([len(photos), *(len(ranking.band(number)) for number in range(1, ranking.bands + 1))])
    made += [Drawing(photos[place % len(photos)], full, settings.generation) for place in range(repeats)]
    words = Wording(concept.sks, concept.kind, concept.class_word, concept.info)
    negatives = [*ranking.negatives("hard"), *ranking.negatives("easy")]
    made += [Sample(picture.path, words.recognition(place)[0], words.no()) for place, picture in enumerate(negatives)]
    known = concept.train_images[:_KNOWN]
    for place in range(len(negatives) + len(known) if negatives else len(known)):
        made.append(Sample(known[place % len(known)], words.recognition(place)[0], words.yes()))
    asked = understanding_items(concept, recognitions=False) if concept.conversations or concept.text_only else []
    return [*made, *(Sample(item.image, item.question, item.answer) for item in asked)]


def sequence(
    chameleon: Chameleon,
    tokens: Tokens,
    concept: Concept,
    sample: Sample | Drawing,
    flip: float,
    generator: torch.Generator,
) -> tuple[list[int], list[int]]:
    """Ids of (what is said to the model, what it learns to say), the ends of turns included."""
    images = answering.shown(sample.image, flip, generator)
    if isinstance(sample, Drawing):
        begin = chameleon.ids("".join(tokens.generation[: sample.tokens]))
        answer = [*begin, *chameleon.image_ids(images[0])]
        return chameleon.turn_ids([], sample.prompt), [*answer, chameleon.end_of_turn]
    question = f"{tokens.before} {sample.question}".replace(concept.sks, tokens.identifier)
    said = f"{''.join(tokens.understanding)}{sample.answer.replace(concept.sks, tokens.identifier)}"
    return chameleon.turn_ids(images, question), [*chameleon.ids(said), chameleon.end_of_turn]


def reserved_ids(chameleon: Chameleon, tokens: Tokens) -> list[int]:
    """Ids of the reserved tokens. Raises UserError where the tokenizer lacks one."""
    known = chameleon.tokenizer.get_vocab()
    lacking = [token for token in tokens.every if token not in known]
    if lacking:
        raise UserError(f"{chameleon.path}: its tokenizer has no {lacking[0]}: choose another `first`, or fewer tokens")
    return [int(known[token]) for token in tokens.every]


class Asked:
    """A Chameleon with a concept's tokens."""

    def __init__(self, chameleon: Chameleon, tokens: Tokens, subject: Subject, max_new_tokens: int):
        self.chameleon, self.tokens, self.subject = chameleon, tokens, subject
        self.max_new_tokens = max_new_tokens

    def answer(self, images: Sequence[Image], question: str) -> str:
        """The likeliest answer, after the tokens of understanding, which it is made to begin with."""
        words = f"{self.tokens.before} {question}".replace(self.subject.sks, self.tokens.identifier)
        begin = self.chameleon.ids("".join(self.tokens.understanding))
        ids = torch.tensor([[*self.chameleon.turn_ids(images, words), *begin]], device=self.chameleon.device)
        made = self.chameleon.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            eos_token_id=self.chameleon.end_of_turn,
        )
        text = str(self.chameleon.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=False))
        text = text.partition(self.chameleon.tokenizer.sep_token)[0]
        for helper in (*self.tokens.generation, *self.tokens.understanding):
            text = text.replace(helper, "")
        return " ".join(text.replace(self.tokens.identifier, self.subject.sks).split())

    def generate(self, prompt: str, n: int, seed: int) -> Tensor:
        """`n` images [n, 3, H, W], after the tokens of generation, which they are made to begin with."""
        self.chameleon.decoder()  # before the codes are drawn: they would be drawn for nothing
        words = f"{self.tokens.before} {prompt}".replace(self.subject.sks, self.tokens.identifier)
        begin = self.chameleon.ids("".join(self.tokens.generation))
        start = int(self.chameleon.processor.image_start_token_id)
        ids = [*self.chameleon.turn_ids([], words), *begin, start]
        return self.chameleon.decode(self.chameleon.sample_codes(ids, n, seed)).cpu()
