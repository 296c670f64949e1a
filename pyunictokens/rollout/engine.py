"""The rollout engine: prompts in, images or answers out, with everything the update needs to score them again.

It checks what the caller gives, turns text into ids, computes each distinct prompt once (for guidance the unconditional
one too), hands rows to the loops of loop.py and text.py, and decodes pixels. What a prompt is and how it is sampled it
asks of the model (models/base.py). Between calls it keeps the resident concepts and nothing of a rollout, so the
weights may change.

    engine = RolloutEngine(model, vq, tokenizer)
    images = engine.generate_images(["A photo of <bo>."], samples=9, seed=1)
    answers = engine.generate_text(images.pixels, "What is it?")
    texts = engine.write(["What is 3 + 4?"])                             # a model that writes by blocks
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from operator import add
from typing import Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from ..models import (
    BlockAnsweringModel,
    CapturableModel,
    ConceptTokens,
    ImageTokenizer,
    MaskedModel,
    ModelBundle,
    Prefix,
    TextTokenizer,
    WritingModel,
    answering,
)
from ..models.base import features_side
from ..models.fp8 import Fp8Products
from ..utils import profiling
from ..utils.errors import NotFinite, UserError
from ..utils.memory import RowLimit
from . import checks
from .answers import NO_NUMBERS, Concepts, answers
from .cuda_graphs.capture import MODES, CaptureCache, Mode
from .cuda_graphs.slots import Bucket, CapturedSlots
from .dsog import Dsog, settle
from .head import check_head
from .loop import ImageLoop
from .previews import Previews
from .resident_concepts import Residents
from .sampler import EagerSlots, LoopSettings, Noise
from .scheduler import Scheduler
from .text import TextSettings
from .types import ImageRollout, RolloutInterrupted, TextRollout
from .writing import BlockTexts

log = logging.getLogger(__name__)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _as_asked(
    method: Callable[Concatenate[RolloutEngine, Arguments], Result],
) -> Callable[Concatenate[RolloutEngine, Arguments], Result]:
    """The method with products and blocks as the engine was asked for."""

    def run(engine: RolloutEngine, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with engine.products, engine.blocks:
            return method(engine, *args, **kwargs)

    functools.update_wrapper(run, method)
    return run


class RolloutEngine:
    """Draws images and answers from one model.

    Args:
        model: any masked model, a concept attached or not.
        vq: the image tokenizer; needed for pixels in or out.
        tokenizer: needed for text in or out; with a concept attached, the one that knows its tokens.
        schedule: cosine, linear, sigmoid or pow<k>; the model's own when None.
        ops_backend: backend of the fused ops; None lets each op choose.
        max_rows: slots: most images (each two rows with guidance) drawn at once; more wait their turn. What does not
            fit into memory is split further by itself, with one warning.
        capture: how image steps run: "auto" captures them on a GPU (rollout/cuda_graphs/capture.py) and lets the host
            run them elsewhere; "loop", "replay" or "eager" by name; "off" lets the host run them always. Only a
            `CapturableModel` takes the named ones.
        repeats: calls of one kind follow one another, as in training: "auto" then captures at first sight.
        products: "same" as the model's precision, or "fp8" in the linear layers of its blocks (models/fp8.py).
        head: how the head of the codes is applied (head.py): "16bit" multiplies the 16-bit hidden states of either half
            and guides the logits, "float32" guides hidden states and multiplies in float32; both give float32 logits.
            "auto" is 16bit on a GPU where the model is of 16 bits.
        blocks: "eager", or "compiled" by torch.compile where images are drawn (models/showo/compiled.py); the first
            step of a size then takes as long as compiling does.
    """

    def __init__(
        self,
        model: MaskedModel,
        vq: ImageTokenizer | None = None,
        tokenizer: TextTokenizer | None = None,
        *,
        schedule: str | None = None,
        ops_backend: str | None = None,
        max_rows: int = 64,
        capture: str = "auto",
        repeats: bool = False,
        products: str = "same",
        head: str = "auto",
        blocks: str = "eager",
    ):
        if blocks not in ("eager", "compiled"):
            raise UserError(f"blocks={blocks!r}: must be eager or compiled")
        if blocks == "compiled" and products == "fp8":
            raise UserError("blocks=compiled with products=fp8: torch.compile would compile each layer apart; use one")
        if products not in ("same", "fp8"):
            raise UserError(f"products={products!r}: must be same or fp8")
        self.repeats, self.head = repeats, check_head(model, head)
        self.products: Fp8Products | nullcontext[None] = Fp8Products(model) if products == "fp8" else nullcontext()
        self.blocks: AbstractContextManager[None] = model.compiled_blocks() if blocks == "compiled" else nullcontext()
        self.model, self.vq, self.tokenizer = model, vq, tokenizer
        self.schedule = checks.schedule(model.rule.schedule if schedule is None else schedule)
        self.ops_backend = ops_backend
        self.max_rows = checks.count("max_rows", max_rows)
        if capture not in (*MODES, "off"):
            raise UserError(f"capture={capture!r}: must be off or one of {', '.join(MODES)}")
        if capture not in ("auto", "off") and not isinstance(model, CapturableModel):
            raise UserError(f"capture={capture!r}: image steps of {model.family} cannot be captured; use auto or off")
        self.capture: Mode | None = None if capture == "off" else cast(Mode, capture)
        self._captures: CaptureCache[Bucket] = CaptureCache()
        self.residents = Residents(model, tokenizer)
        self.limit = RowLimit()
        self._said_eager = False
        self._noise: Noise | None = None  # explicit Gumbel noise in place of the Philox keys; for replaying records

    @classmethod
    def of(cls, bundle: ModelBundle, schedule: str | None = None) -> RolloutEngine:
        """An engine over the parts as they are now, an attached concept included."""
        tokenizer = bundle.tokenizer
        if bundle.concept is not None:
            tokenizer = tokenizer.with_concept(bundle.concept.tokens)
        return cls(bundle.model, bundle.vq, tokenizer, schedule=schedule)

    # --- looking at images -----------------------------------------------------------------------------------------

    @property
    def features_side(self) -> int | None:
        """Pixels along one side of the squares whose features the model takes; None where it takes codes."""
        return features_side(self.model)

    @torch.no_grad()
    def look(self, pixels: Tensor) -> Tensor:
        """What questions are asked about of pixels float [B, 3, H, W] in [−1, 1]: codes int64 [B, N], or features
        [B, patches, E] where the model takes those."""
        return checks.looks(pixels, self.model, self.vq)

    # --- concepts --------------------------------------------------------------------------------------------------

    @property
    def concepts(self) -> list[str]:
        """Names of the resident concepts."""
        return self.residents.names

    def add_concept(self, concept: ConceptTokens, name: str | None = None) -> None:
        """Keep a concept at hand: prompts that name it, or are given with `concepts`, are read with its tokens.

        Many may be resident at once (each is its few rows), and rows of different ones share a batch. A concept of the
        same name is replaced; `name` keeps it under another one, which `concepts` then says. Needs a model without an
        attached concept and a tokenizer that knows none (or no tokenizer, for ids only).

        Raises:
            UserError: a concept of another width, one attached to the model, or tokens that the tokenizer already has.
        """
        self.residents.add(concept, name)

    def remove_concept(self, name: str) -> ConceptTokens:
        """Let a resident concept go; returns it."""
        return self.residents.remove(name)

    # --- images ----------------------------------------------------------------------------------------------------

    @_as_asked
    @torch.no_grad()
    def generate_images(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        samples: int = 1,
        steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        seed: int = 0,
        sample_ids: Sequence[int] | Tensor | None = None,
        known_codes: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        dsog: Dsog | None = None,
        record: bool = True,
        decode: bool = True,
        progress: Callable[[int, int], None] | None = None,
        concepts: Concepts = None,
    ) -> ImageRollout:
        """Draw `samples` images of every prompt; rows are prompt-major.

        Args:
            prompts: text, or text ids without special ids. "" draws without a prompt.
            steps: T, MaskGIT timesteps. What is not given is the model's own (`SamplingRule`; Show-o: 50, 5.0 and 1.0).
            guidance_scale: as the model's rule reads it: s in (1 + s)·cond − s·uncond for Show-o. Turned off (0 there)
                it halves the work.
            temperature: of the re-masking noise.
            seed, sample_ids: the key of all noise. A row draws the same image in any batch; ids are 0…R−1 by default.
            known_codes: int [N], [P, N] or [R, N], −1 where unknown: the rest is painted around them.
            grid: (height, width) in codes; any size the model has positions for.
            dsog: previews and refills; the group is all rows of this call.
            record: keep every step's inputs, choices and log-probs [R, T, N].
            decode: also give pixels (needs the vq).
            progress: called with (row-steps done, row-steps wanted) after every step.
            concepts: which resident concept each prompt speaks of, where its text does not say so.

        Returns:
            ImageRollout: codes int64 [R, N], pixels float [R, 3, H, W] in about [−1, 1], and with `record` the steps.

        Raises:
            UserError: for anything out of range, or prompts without tokenizer.
            NotFinite: a model whose log-probs are not finite.
            RolloutInterrupted: Ctrl-C; it carries the images that were finished.
        """
        if isinstance(self.model, WritingModel):
            raise UserError(f"{self.model.family} writes text and draws nothing: use RolloutEngine.write")
        rule, samples = self.model.rule, checks.count("samples", samples)
        steps = checks.count("steps", rule.steps if steps is None else steps, 1, checks.MAX_STEPS)
        guidance_scale = rule.guidance_scale if guidance_scale is None else guidance_scale
        strength = rule.strength(guidance_scale)
        temperature = rule.temperature if temperature is None else temperature
        temperature = checks.number("temperature", temperature, "0 re-masks without noise")
        checks.count("seed", seed, 0, checks.MAX_SAMPLE_ID)
        texts, names = self.residents.read("prompts", prompts, concepts)
        rows = len(texts) * samples
        side = self.vq.downsampling if self.vq is not None and decode else 0
        room = partial(checks.image_room, rows, steps=steps, record=record, side=side, device=self.model.device)
        known, grid = checks.known_codes(known_codes, grid, len(texts), samples, self.model, room)
        self.model.check_grid(grid)
        ids = checks.sample_ids(sample_ids, rows, checks.MAX_DSOG_ID if dsog else checks.MAX_SAMPLE_ID)
        if self.vq is None and (decode or dsog):
            raise UserError("pixels are wanted: give RolloutEngine an image tokenizer, or decode=False and no dsog")
        settings = LoopSettings(
            steps, strength, temperature, self.schedule, seed, record, self.max_rows, self.ops_backend, self.head
        )
        judging = dsog.judging(steps, rows) if dsog else None
        prompt_index = torch.arange(len(texts)).repeat_interleave(samples)

        prefixes, prompt_of_text = self.prefixes(texts, names, guided=strength > 0)
        prompt_of_row = [prompt_of_text[index] for index in prompt_index.tolist()]
        _, looks = checks.unique_index(list(map(tuple, known.tolist())))
        _, kinds = checks.unique_index(list(zip(prompt_of_row, looks, strict=True)))
        count = min(rows, self.max_rows)
        slots = self._slots(prefixes, prompt_of_row, looks, count, known.shape[1], settings, dsog is not None)
        previews = (
            Previews(lambda codes: self.pixels(codes, grid, of="previews"), dsog.scorer, prompt_index, dsog.overlap)
            if dsog
            else None
        )
        loop = ImageLoop(slots, Scheduler(ids, kinds, count, steps, judging), known, previews, progress)

        def rollout(chosen: Tensor | slice, pixels: bool = decode) -> ImageRollout:
            """The rows `chosen`, which are finished."""
            records = [record[chosen] for record in loop.records]
            inputs, picked, logp = records if records else (None, None, None)
            codes, index = loop.codes[chosen], prompt_index[chosen]
            ended = [loop.ended[row] for row in torch.arange(rows)[chosen].tolist()]
            return ImageRollout(
                codes=codes,
                pixels=self.pixels(codes, grid) if pixels and len(codes) else None,
                inputs=inputs,
                chosen=picked,
                logp=logp,
                prompt_index=index,
                sample_ids=torch.tensor([candidate.sample_id for candidate in ended], dtype=torch.int64),
                prompt_ids=texts,
                seed=seed,
                steps=steps,
                guidance_scale=float(guidance_scale),
                temperature=temperature,
                grid=grid,
                concepts=names,
            )

        try:
            with previews or nullcontext():
                loop.run()
            profiling.count("rollout steps", lambda: self._step_flops(loop, prefixes, strength > 0))
            if not slots.finite:
                raise NotFinite(NO_NUMBERS)
            result = rollout(slice(None))
        except KeyboardInterrupt as stop:
            kept, decoding = loop.rows(), len(loop.ended) == rows
            raise RolloutInterrupted(rollout(kept, decode and not decoding), kept.tolist()) from stop
        if dsog and previews:
            assert loop.preview_codes is not None
            result.dsog = settle(dsog, loop.scheduler, loop.candidates, loop.preview_codes, previews.errors)
        return result

    def _slots(
        self,
        prefixes: Prefix,
        prompt_of_row: list[int],
        looks: list[int],
        slots: int,
        count: int,
        settings: LoopSettings,
        judged: bool,
    ) -> EagerSlots:
        """Slots that run without the host where that can be and is wanted, else slots that the host runs."""
        keep_first = judged or slots < len(prompt_of_row)
        wanted = self.model.device.type == "cuda" if self.capture == "auto" else self.capture is not None
        fixed = (prefixes, prompt_of_row, looks, slots, count, settings)
        if wanted and self.capture is not None and self._noise is None:
            if isinstance(self.model, CapturableModel):
                return CapturedSlots(
                    self.model,
                    *fixed,
                    self._captures,
                    self.capture,
                    repeats=self.repeats,
                    limit=self.limit,
                    keep_first=keep_first,
                )
            if not self._said_eager:
                log.info("image steps of %s cannot be captured: the host runs them", self.model.family)
                self._said_eager = True
        return EagerSlots(self.model, *fixed, limit=self.limit, keep_first=keep_first, noise=self._noise)

    def _step_flops(self, loop: ImageLoop, prompts: Prefix, guided: bool) -> float:
        longest, count = max(prompts.lengths), loop.codes.shape[1]
        return loop.scheduler.row_steps * self.model.costs.image_step(1, longest, count, guided).flops

    @profiling.phase("prefill")
    def prefixes(self, texts: list[list[int]], names: list[str | None], guided: bool) -> tuple[Prefix, list[int]]:
        """The distinct prompts of texts' ids, each under its resident concept, the unconditional one last when
        `guided`; and which of them each text is."""
        long = [place for place, text in enumerate(texts) if self.model.cut_ids(text)]
        if long:
            text = texts[long[0]]
            warnings.warn(
                f"prompts[{long[0]}] has {len(text)} ids: only the first {len(text) - self.model.cut_ids(text)} are "
                "read (max_text of the model)",
                stacklevel=4,
            )
        sequences = [tuple(self.model.prompt_ids(text)) for text in texts]
        order = {name: place for place, name in enumerate(dict.fromkeys(names))}
        members = sorted(range(len(texts)), key=lambda place: order[names[place]])
        first, index = checks.unique_index([(names[place], sequences[place]) for place in members])
        parts: list[Prefix] = []
        for name in order:
            distinct = [list(sequences[members[place]]) for place in first if names[members[place]] == name]
            if guided and name == names[members[-1]]:
                distinct.append(self.model.prompt_ids([]))
            with self.residents.using(name):
                parts.append(self.model.prefill(distinct))
        total = reduce(add, parts)
        costs = self.model.costs
        profiling.count("prefill", lambda: sum(costs.prefill(each).flops for each in total.lengths))
        return total, [number for _, number in sorted(zip(members, index, strict=True))]

    @profiling.phase("decode", unless="previews")
    def pixels(self, codes: Tensor, grid: tuple[int, int], of: str = "decode") -> Tensor:
        """Codes int [B, N] of a `grid` (height, width) to pixels float [B, 3, H, W]; the time counts for phase `of`."""
        vq = self.vq
        assert vq is not None
        profiling.count(of, lambda: vq.decode_cost(len(codes), grid).flops)
        codes = codes.to(next(vq.parameters()).device)
        return torch.cat([vq.decode(part, grid) for part in codes.split(self.max_rows)])

    # --- text ------------------------------------------------------------------------------------------------------

    @_as_asked
    @torch.no_grad()
    @profiling.phase("answers")
    def generate_text(
        self,
        images: Tensor,
        questions: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        samples: int = 1,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        sample_ids: Sequence[int] | Tensor | None = None,
        raw: bool = False,
        concepts: Concepts = None,
        block_length: int | None = None,
        steps: int | None = None,
    ) -> TextRollout:
        """Answer each question about its image `samples` times; rows are prompt-major.

        Args:
            images: pixels float [B, 3, H, W], codes int [B, N], or features float [B, patches, E] for a model that
                takes them. One image may serve many questions, and one question many images.
            questions: text, put into the model's wording unless `raw`; or ids, taken as they are.
            temperature: 1 is the model's own distribution; 0 takes the likeliest token.
            top_k: draw among the k likeliest tokens only; 0 means all, 1 the likeliest.
            seed, sample_ids: the key of all noise, as for images.
            concepts: which resident concept each question speaks of, where its text does not say so.
            block_length, steps: as in :meth:`write`, for a model that writes by blocks.

        Returns:
            TextRollout: tokens int64 [R, L] with −1 after the end token, their log-probs [R, L], and the texts.

        Raises:
            UserError: for anything out of range, text without tokenizer, more positions than the model has, or a model
                that does not answer.
        """
        if isinstance(self.model, BlockAnsweringModel):
            if top_k > 1:
                raise UserError(f"top_k={top_k}: {self.model.family} draws from all tokens; leave it out")
            heat = 0.0 if top_k == 1 else temperature
            texts = self._texts_by_blocks(seed, sample_ids, max_new_tokens, block_length, steps, heat)
            return texts.answers(self.model, self.vq, images, questions, samples, raw)
        if block_length is not None or steps is not None:
            raise UserError(f"block_length and steps: {self.model.family} writes token by token; leave them out")
        model = answering(self.model)
        settings = TextSettings(max_new_tokens, temperature, top_k, seed, model.end_id, self.ops_backend)
        return answers(model, self.vq, self.residents, images, questions, samples, settings, sample_ids, concepts, raw)

    @_as_asked
    @torch.no_grad()
    @profiling.phase("answers")
    def write(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        *,
        samples: int = 1,
        max_new_tokens: int | None = None,
        block_length: int | None = None,
        steps: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
        sample_ids: Sequence[int] | Tensor | None = None,
        raw: bool = False,
        record: bool = False,
    ) -> TextRollout:
        """Write `samples` texts for every prompt by blocks; rows are prompt-major.

        Args:
            prompts: text, put into the model's chat template unless `raw`; or ids, taken as they are.
            max_new_tokens, block_length, steps: L, the tokens of a block, and the steps of the whole text; L is a
                multiple of the block, and steps one of the number of blocks. What is not given is the model's own
                (`BlockRule`).
            temperature: of the tokens; 0 takes the likeliest.
            seed, sample_ids: the key of all noise, as for images.
            record: keep every step's inputs, choices and log-probs [R, T, L].

        Raises:
            UserError: for anything out of range, or a model that does not write by blocks.
            NotFinite: a model whose log-probs are not finite.
        """
        texts = self._texts_by_blocks(seed, sample_ids, max_new_tokens, block_length, steps, temperature)
        return texts.written(prompts, samples, raw, record)

    def _texts_by_blocks(
        self,
        seed: int,
        sample_ids: Sequence[int] | Tensor | None,
        length: int | None,
        block: int | None,
        steps: int | None,
        temperature: float | None,
    ) -> BlockTexts:
        return BlockTexts(
            self.model,
            self.tokenizer,
            seed=seed,
            sample_ids=sample_ids,
            length=length,
            block=block,
            steps=steps,
            temperature=temperature,
            max_rows=self.max_rows,
            backend=self.ops_backend,
            limit=self.limit,
            head=self.head,
        )
