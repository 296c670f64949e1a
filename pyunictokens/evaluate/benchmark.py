"""UnifyBench++ for one concept: what it knows, what it can pick from its facts, and how it draws, on the held-out half.

    recognition           is it in the picture?         weight = 0.5·positives + 0.5·negatives
    vqa, qa               questions with and without a picture                         BLEU, accuracy
    reasoning             which fact does the prompt mean? (paper: Rea.)               BLEU, accuracy of the choice
    pure                  short prompts (Pure Gen.)                                    CLIP-T, CLIP-I
    reasoning_generation  answer first, draw the compound prompt (Rea. Gen.)           CLIP-T, CLIP-I, reward
    dense                 long prompts (Dense Gen.)                                    CLIP-T by parts, CLIP-I
    dense_reasoning       long prompts that need a fact (Dense Rea. Gen.)              CLIP-T by parts, CLIP-I

Where truth.json says what a drawing should show, attribute accuracy is added. Everything is drawn from (seed, split,
item, sample), so the same call gives the same numbers and two models are compared under the same noise. The engine, the
concept and all encoders are handed in; nothing here knows training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..data.concept import Concept
from ..data.images import black_image, load_batch
from ..models.showo import prompting
from ..rewards.base import RewardBatch, plain_text
from ..rewards.ensemble import Ensemble
from ..utils.errors import UserError
from ..utils.files import read_json
from . import metrics as m
from .items import drawing_prompts, recognition_pairs
from .result import EvalResult, to_bytes

SPLITS = ("recognition", "vqa", "qa", "reasoning", "pure", "reasoning_generation", "dense", "dense_reasoning")
_PHOTOS = 8  # photos of the concept kept with the result, for the report
_ITEM_IDS, _SPLIT_IDS = 10_000, 10_000_000  # sample ids: room for samples in an item, for items in a split


class Engine(Protocol):
    """What is asked of a rollout engine (`RolloutEngine` has it)."""

    model: Any
    vq: Any

    def generate_images(self, prompts: Any, **settings: Any) -> Any:
        """A record with `pixels` [R, 3, H, W], rows prompt-major."""
        ...

    def generate_text(self, images: Tensor, questions: Any, **settings: Any) -> Any:
        """A record with `texts`, one a question."""
        ...


class Expander(Protocol):
    """What is asked of a concept's tokens (`ConceptTokens` has it)."""

    def expand(self, text: str) -> str:
        """`text` with the helper tokens before the first `<name>`."""
        ...


def unifybench(
    engine: Engine,
    concept: Concept,
    tokens: Expander | None,
    *,
    image_text: m.ImageTextNet | None = None,
    ensemble: Ensemble | None = None,
    reader: m.AttributeNet | None = None,
    truth: Mapping[str, Any] | None = None,
    judged_as: str = "class",
    samples: int = 4,
    seed: int = 0,
    steps: int = 50,
    guidance_scale: float = 5.0,
    max_new_tokens: int = 100,
    splits: Sequence[str] = SPLITS,
    size: int | None = None,
    batch: int = 16,
    progress: Callable[[str, int, int], None] | None = None,
) -> EvalResult:
    """Measure what a model knows of `concept` and how it draws it. The training half of the facts is not touched.

    Args:
        tokens: the concept's tokens; None measures a model that does not know the concept: `<name>` is then read as the
            class word.
        image_text: encoder of CLIP-I and CLIP-T. Without it they are left out and the result's notes say so.
        ensemble: reward of the drawings of held-out facts, each judged by the prompt with the true fact.
        reader, truth: attribute accuracy; `truth` is read from the concept's truth.json when that exists.
        judged_as: what the ensemble's judges of images read for `<name>`: the class word, or what info says it is.
        samples: drawings of each prompt.
        steps, guidance_scale: of the drawings. Answers are greedy.
        size: side of the pictures in pixels; by default the engine's own.
        batch: questions answered at once.
        progress: called with (split, items done, items wanted).

    Raises:
        UserError: an unknown split, samples < 1, or a concept without anything to measure.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or not 1 <= samples <= _ITEM_IDS:
        raise UserError(f"samples={samples!r}: must be an integer in 1…{_ITEM_IDS}")
    unknown = [split for split in splits if split not in SPLITS]
    if unknown or isinstance(splits, str):
        raise UserError(f"splits={splits!r}: must be some of {', '.join(SPLITS)}")
    start = time.perf_counter()
    file = concept.test_folder / "truth.json"
    if truth is None and reader is not None and file.exists():
        truth = read_json(file)
    size = size or isqrt(engine.model.config.num_vq_tokens) * engine.vq.downsampling
    settings = {"samples": samples, "seed": seed, "steps": steps, "guidance_scale": guidance_scale}
    result = EvalResult(
        concept.name, {**settings, "judged_as": judged_as, "splits": [split for split in SPLITS if split in splits]}
    )
    photos = load_batch(concept.train_images, size)
    result.images["photos"] = [to_bytes(photos[:_PHOTOS])]
    judge = _Judge(concept, image_text, ensemble, reader, truth, judged_as, photos, result.notes)
    bench = _Bench(engine, concept, tokens, result, judge, size, batch, max_new_tokens, progress)
    bench.run()
    if not any(result.records.values()):
        where = f"{', '.join(splits)}: see {concept.test_folder}"
        raise UserError(f"concept {concept.name!r} has nothing to measure in {where}")
    result.seconds = time.perf_counter() - start
    return result


class _Bench:
    """One evaluation on its way: asks, draws, and writes records."""

    def __init__(
        self,
        engine: Engine,
        concept: Concept,
        tokens: Expander | None,
        result: EvalResult,
        judge: _Judge,
        size: int,
        batch: int,
        max_new_tokens: int,
        progress: Callable[[str, int, int], None] | None,
    ):
        self.engine, self.concept, self.tokens, self.result, self.judge = engine, concept, tokens, result, judge
        self.size, self.batch, self.max_new_tokens, self.progress = size, batch, max_new_tokens, progress
        self.settings, self.notes = result.settings, result.notes
        self.split = ""
        self._codes: dict[Path | None, Tensor] = {}
        self._chosen: dict[str, str] = {}

    def run(self) -> None:
        """All splits that are wanted, in order."""
        asking = {"recognition": self.recognition, "vqa": self.vqa, "qa": self.qa, "reasoning": self.reasoning}
        for split in self.settings["splits"]:
            self.split = split
            asking.get(split, self.drawing)()

    # --- answers ---------------------------------------------------------------------------------------------------

    def recognition(self) -> None:
        """Test pictures must be recognised, other pictures must not; negatives unseen in training come first."""
        pairs, note = recognition_pairs(self.concept)
        if note:
            self.notes.append(note)
        if not pairs:
            return self._missing("pictures with and without the concept")
        answers = self._ask([path for path, _, _ in pairs], [query for _, query, _ in pairs])
        for (path, query, yes), answer in zip(pairs, answers, strict=True):
            right = m.says_yes(answer) is yes
            record = {"image": path.name, "question": query, "truth": "yes" if yes else "no", "answer": answer}
            self._record({**record, "group": "positive" if yes else "negative"}, weight=[float(right)])
        return None

    def vqa(self) -> None:
        """Questions about the test pictures."""
        self._questions([(qa.image, qa.query, qa.answer) for qa in self.concept.vqa])

    def qa(self) -> None:
        """Questions without a picture."""
        self._questions([(None, qa.query, qa.answer) for qa in self.concept.test_text_only])

    def _questions(self, items: Sequence[tuple[Path | None, str, str]]) -> None:
        if not items:
            return self._missing("questions")
        answers = self._ask([image for image, _, _ in items], [query for _, query, _ in items])
        for (image, query, truth), answer in zip(items, answers, strict=True):
            record = {"question": query, "truth": truth, "answer": answer}
            self._record(
                {"image": image.name, **record} if image else record,
                bleu=[m.character_bleu(truth, answer)],
                word_bleu=[m.word_bleu(truth, answer)],
                exact=[m.exact(truth, answer)],
                accuracy=[m.same_answer(truth, answer)],
            )
        return None

    def reasoning(self) -> None:
        """Pick the fact a held-out prompt means."""
        facts, pairs = self.concept.extra_info, self.concept.fact_pairs_test
        if not pairs:
            return self._missing("held-out facts")
        self._choose([prompt for prompt, _ in pairs])
        for prompt, correct in pairs:
            answer = self._chosen[prompt]
            self._record(
                {"question": prompt, "truth": facts[correct], "answer": answer},
                bleu=[m.character_bleu(facts[correct], answer)],
                accuracy=[float(m.nearest(answer, facts) == correct)],
            )
        return None

    def _choose(self, prompts: Sequence[str]) -> None:
        """The model's answers to "which fact fits?", asked once a prompt."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._chosen]
        if new:
            questions = [prompting.text_only_question(self.concept.extra_info, prompt) for prompt in new]
            self._chosen.update(zip(new, self._ask([None] * len(new), questions), strict=True))

    def _ask(self, images: Sequence[Path | None], questions: Sequence[str]) -> list[str]:
        answers: list[str] = []
        for start in range(0, len(questions), self.batch):
            part = slice(start, start + self.batch)
            rollout = self.engine.generate_text(
                torch.stack([self._codes_of(path) for path in images[part]]),
                [self._expand(question) for question in questions[part]],
                max_new_tokens=self.max_new_tokens,
                temperature=0.0,
            )
            answers += [m.clean(text) for text in rollout.texts]
            self._tell(len(answers), len(questions))
        return answers

    def _codes_of(self, path: Path | None) -> Tensor:
        if path not in self._codes:
            pixels = black_image(self.size)[None] if path is None else load_batch([path], self.size)
            self._codes[path] = self.engine.vq.encode(pixels.to(self.engine.model.device))[0]
        return self._codes[path]

    # --- drawings --------------------------------------------------------------------------------------------------

    def drawing(self) -> None:
        """Draw every prompt of the split `samples` times and judge the drawings."""
        prompts, note = drawing_prompts(self.concept, self.split)
        if note:
            self.notes.append(note)
        if not prompts:
            return self._missing("prompts")
        if any(correct is not None for _, _, correct in prompts):
            self._choose([prompt for prompt, _, correct in prompts if correct is not None])
        samples = int(self.settings["samples"])
        base = SPLITS.index(self.split) * _SPLIT_IDS
        drawn: list[Tensor] = []
        for index, (prompt, explicit, correct) in enumerate(prompts):
            answer = self._chosen[prompt] if correct is not None else ""
            compound = prompting.compound_prompt(prompt, prompting.first_sentence(answer)) if answer else prompt
            pixels = self.engine.generate_images(
                [self._expand(compound)],
                samples=samples,
                steps=self.settings["steps"],
                guidance_scale=self.settings["guidance_scale"],
                seed=self.settings["seed"],
                sample_ids=list(range(base + index * _ITEM_IDS, base + index * _ITEM_IDS + samples)),
                record=False,
            ).pixels.clamp(-1, 1)
            record: dict[str, Any] = {"prompt": prompt, "drawn": compound, "explicit": explicit}
            if correct is not None:
                record |= {"answer": answer, "truth": self.concept.extra_info[correct]}
            scores, seen = self.judge.scores(self.split, pixels, prompt, explicit, answer, correct)
            self._record({**record, **({"seen": seen} if seen else {})}, **scores)
            drawn.append(to_bytes(pixels))
            self._tell(index + 1, len(prompts))
        self.result.images[self.split] = drawn
        return None

    # --- records ---------------------------------------------------------------------------------------------------

    def _expand(self, text: str) -> str:
        if self.tokens is None:
            return plain_text(text, self.concept.class_word)
        return self.tokens.expand(text)

    def _record(self, record: dict[str, Any], **scores: list[float]) -> None:
        self.result.records.setdefault(self.split, []).append({**record, "scores": scores})

    def _missing(self, what: str) -> None:
        self.notes.append(f"{self.split}: the folder has no {what}: not measured")

    def _tell(self, done: int, wanted: int) -> None:
        if self.progress is not None:
            self.progress(self.split, done, wanted)


class _Judge:
    """All scores of the drawings of one prompt."""

    def __init__(
        self,
        concept: Concept,
        image_text: m.ImageTextNet | None,
        ensemble: Ensemble | None,
        reader: m.AttributeNet | None,
        truth: Mapping[str, Any] | None,
        judged_as: str,
        photos: Tensor,
        notes: list[str],
    ):
        self.concept, self.image_text, self.ensemble, self.photos = concept, image_text, ensemble, photos
        self.reader, self.truth = reader, truth
        self.words = concept.in_words(judged_as)
        if image_text is None:
            notes.append("CLIP-I and CLIP-T: no image–text encoder was given: not measured")
        if ensemble is None:
            notes.append("reward: no experts were given: not measured")
        if reader is None or truth is None:
            notes.append("attribute accuracy: needs a reader and the concept's truth.json (toy concepts have one)")

    def scores(
        self, split: str, pixels: Tensor, prompt: str, explicit: str, answer: str, correct: int | None
    ) -> tuple[dict[str, list[float]], list[dict[str, str]]]:
        """Scores by metric, one a drawing, and what the reader saw."""
        result: dict[str, list[float]] = {}
        photos = self.photos.to(pixels.device)
        plain = plain_text(explicit, self.concept.class_word)
        if self.image_text is not None:
            by_parts = split.startswith("dense")
            result["clip_t"] = (m.clip_t_segments if by_parts else m.clip_t)(self.image_text, pixels, plain)
            result["clip_i"] = m.clip_i(self.image_text, pixels, photos)
        if self.ensemble is not None and split == "reasoning_generation":
            assert correct is not None
            rows = len(pixels)
            facts = [plain_text(fact, self.concept.class_word) for fact in self.concept.extra_info]
            answers = [plain_text(answer, self.concept.class_word)] * rows
            batch = RewardBatch(
                pixels, [plain_text(explicit, self.words)] * rows, answers, facts, correct, photos, self.concept.kind
            )
            score = self.ensemble.score(batch).require_finite()
            result["reward"] = score.total.tolist()
            result |= {name: part.tolist() for name, part in score.parts.items()}
        if self.reader is None or self.truth is None:
            return result, []
        seen = self.reader.attributes(pixels)
        subject, prompted = self.truth["subject"], self.truth["prompts"].get(prompt)
        result["subject"] = [m.attribute_accuracy(one, subject) for one in seen]
        if prompted:
            result["prompted"] = [m.attribute_accuracy(one, prompted) for one in seen]
        result["attributes"] = [m.attribute_accuracy(one, {**subject, **(prompted or {})}) for one in seen]
        return result, seen
