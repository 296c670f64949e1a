"""UnifyBench++ for one concept: what a model knows, what it can pick from its facts, and what it generates, on the
held-out half (``unifybench(engine, concept, tokens)`` → EvalResult).

The tasks and their measures stand in tasks.py. All noise follows from (seed, task, item, sample), so the same call
gives the same numbers and two models are compared under the same noise. The engine, the concept and all networks are
handed in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from ..data.concept import Concept
from ..data.images import load_batch, read_image
from ..data.photographs import TRUTH
from ..rewards.base import ImageTextEncoder
from ..utils.errors import UserError
from ..utils.files import read_json
from ..utils.json import Json
from .baselines.ours import EngineModel, Expander, Sampling
from .clip import Embeddings
from .core import Asker, checked
from .protocol import DEFAULT_SAMPLES, SYNC_R1, BenchProtocol, protocol_named
from .result import EvalResult, ItemRecord, to_bytes
from .sample_cache import Record
from .scoring import AttributeReader, AttributesOf, Reward, RewardOf, Scorer
from .suites import sync_r1, unify
from .tasks import TASKS, Subject, wanted_tasks

if TYPE_CHECKING:
    from ..rollout.engine import RolloutEngine

SPLITS = tuple(TASKS)
_REFERENCES = 8  # kept with the result, for the report
_ITEM_IDS, _TASK_IDS = 10_000, 10_000_000  # sample ids: room for samples of an item, for items of a task


class Truth(TypedDict):
    """truth.json of a concept whose world is known: attributes of the subject, and of what each prompt asks for."""

    subject: dict[str, str]
    prompts: dict[str, dict[str, str]]


def unifybench(
    engine: RolloutEngine,
    concept: Concept,
    tokens: Expander | None,
    *,
    image_text: ImageTextEncoder | None = None,
    ensemble: Reward | None = None,
    reader: AttributeReader | None = None,
    truth: Truth | None = None,
    judged_as: str = "class",
    protocol: str = "ours",
    samples: int = 4,
    seed: int = 0,
    steps: int = 50,
    guidance_scale: float = 5.0,
    max_new_tokens: int = 100,
    splits: Sequence[str] = SPLITS,
    size: int | None = None,
    batch: int = 16,
    share: tuple[int, int] = (0, 1),
    progress: Callable[[str, int, int], None] | None = None,
) -> EvalResult:
    """Measure what a model knows of `concept` and how it generates it. The training half of the facts is not touched.

    Args:
        tokens: the concept's tokens; None measures a model that does not know the concept: `<name>` is then read as the
            class word.
        image_text: encoder of CLIP-I and CLIP-T. Without it they are left out and the result's notes say so.
        ensemble: reward of the images of held-out facts, each judged by the prompt with the true fact.
        reader, truth: attribute accuracy; `truth` is read from the concept's truth.json when that exists.
        judged_as: what the reward models read for `<name>`: the class word, or what info says it is.
        protocol: how is asked and scored: "ours" or "sync-r1" (protocol.py).
        samples: images of each prompt; 0 takes the numbers of a protocol that has its own.
        steps, guidance_scale: of the images. Answers are greedy.
        splits: the tasks that are measured.
        size: side of the images in pixels; by default the engine's own.
        batch: questions answered at once.
        share: (n, of): only item n, n + of, n + 2·of, … of each task, where several processes measure one model;
            `EvalResult.merged` makes the whole of their results.
        progress: called with (task, items done, items wanted).

    Raises:
        UserError: an unknown task, samples < 1, or a concept without anything to measure.
    """
    reading = protocol_named(protocol)
    least = 0 if reading.samples else 1
    if isinstance(samples, bool) or not isinstance(samples, int) or not least <= samples <= _ITEM_IDS:
        raise UserError(f"samples={samples!r}: must be an integer in 1…{_ITEM_IDS}")
    wanted = wanted_tasks(splits, "splits")
    tasks = [task for task in TASKS if task in wanted]
    start = time.perf_counter()
    file = concept.test_folder / TRUTH
    if truth is None and reader is not None and file.exists():
        truth = read_json(file)
    subject = (sync_r1 if reading is SYNC_R1 else unify).subject_of(concept, tasks)
    model = EngineModel(engine, tokens, subject, Sampling(steps, guidance_scale, max_new_tokens), size)
    asker = Asker(lambda: model, lambda path: read_image(path, at_least=model.size))
    references = load_batch(concept.train_images, model.size)
    scorer = Scorer(
        Embeddings(image_text, "CLIP", model.size, model.device) if image_text else None,
        protocol=reading,
        reward=RewardOf(ensemble, references, concept.in_words(judged_as)) if ensemble else None,
        attributes=AttributesOf(reader, truth["subject"], truth["prompts"]) if reader and truth else None,
    )
    settings: dict[str, Json] = {"samples": samples, "seed": seed, "steps": steps, "guidance_scale": guidance_scale}
    settings |= {"judged_as": judged_as, "splits": list(tasks), "protocol": reading.name}
    result = EvalResult(concept.name, settings)
    result.images["references"] = [to_bytes(references[:_REFERENCES])]
    result.notes = [
        note
        for note, there in (
            ("CLIP-I and CLIP-T: no image–text encoder was given: not measured", scorer.embeddings),
            ("reward: no reward models were given: not measured", scorer.reward),
            (
                "attribute accuracy: needs a reader and the concept's truth.json (toy concepts have one)",
                scorer.attributes,
            ),
        )
        if there is None
    ] + subject.notes

    bench = _Bench(
        subject, asker, scorer, model, result, reading, samples, seed, batch, share, progress or (lambda *_: None)
    )
    for task in tasks:
        records = bench.generated(task) if TASKS[task].images else bench.answered(task)
        if records:
            result.records[task] = records
    if not any(subject.of(task) for task in tasks):
        where = f"{', '.join(splits)}: see {concept.test_folder}"
        raise UserError(f"concept {concept.name!r} has nothing to measure in {where}")
    result.seconds = time.perf_counter() - start
    return result


@dataclass
class _Bench:
    """One evaluation on its way."""

    subject: Subject
    asker: Asker
    scorer: Scorer
    model: EngineModel
    result: EvalResult
    protocol: BenchProtocol
    samples: int
    seed: int
    batch: int
    share: tuple[int, int]
    progress: Callable[[str, int, int], None]

    def answered(self, task: str) -> list[ItemRecord]:
        """Ask all questions of a task."""
        items = self.subject.of(task)[self.share[0] :: self.share[1]]
        made: list[ItemRecord] = []
        for first in range(0, len(items), self.batch):
            part = items[first : first + self.batch]
            for item, answer in zip(part, self.asker.answers(part), strict=True):
                record = Record.of("", self.subject, item)
                record.answer = answer
                self.scorer.measure(record, item, self.subject)
                about = {"question": item.prompt or item.text, "truth": item.truth, "answer": answer}
                image = {"image": item.image.name} if item.image else {}
                group = {"group": item.group} if item.group else {}
                made.append({**image, **about, **group, "scores": record.scores})  # type: ignore[typeddict-item]
            self.progress(task, len(made), len(items))
        return made

    def generated(self, task: str) -> list[ItemRecord]:
        """Generate images of all prompts of a task; they go into the result as well."""
        items = self.subject.of(task)[self.share[0] :: self.share[1]]
        samples = self.samples or self.protocol.samples.get(task, DEFAULT_SAMPLES)
        for first in range(0, len(items), self.batch):
            self.asker.facts(items[first : first + self.batch])
        made: list[ItemRecord] = []
        for index, item in enumerate(items):
            record = Record.of("", self.subject, item)
            record.drawn, record.answer = self.asker.prompt(item)
            place = self.share[0] + index * self.share[1]
            first_id = TASKS[task].noise * _TASK_IDS + place * _ITEM_IDS
            pixels = checked(self.model.generate(record.drawn, samples, self.seed, first_id), samples, "the model")
            record.pixels = pixels
            self.scorer.measure(record, item, self.subject)
            kept: ItemRecord = {"prompt": item.text, "drawn": record.drawn, "explicit": item.meant}
            if item.correct is not None:
                kept |= {"answer": record.answer, "truth": item.facts[item.correct]}
            if record.seen:
                kept["seen"] = record.seen
            made.append({**kept, "scores": record.scores})
            self.result.images.setdefault(task, []).append(to_bytes(pixels))
            self.progress(task, len(made), len(items))
        return made
