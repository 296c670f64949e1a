"""The rollout engine: prompts in, images or answers out, with everything the update needs to score them again.

It checks what the caller gives, turns text into ids, computes each distinct prompt once (for guidance the empty one
too), hands rows to the loops of images.py and text.py, decodes pixels, and keeps the books of DSOG around one group. It
does not know rewards beyond a scorer callback, nor training. Nothing is kept between calls, so the weights may change.

    engine = RolloutEngine(model, vq, tokenizer)
    images = engine.generate_images(["A photo of <bo>."], samples=9, seed=1)
    answers = engine.generate_text(images.pixels, "What is it?")
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import cost, profiling
from ..errors import UserError
from ..models import MagvitV2, PromptKV, Showo, TextTokenizer, prefill_mmu, prefill_mmu_clip, prefill_t2i, prompting
from . import checks
from .dsog import Dsog, Selection
from .images import ImageLoop, LoopSettings, Noise, Preview
from .text import TextSettings, decode
from .types import DsogReport, ImageRollout, TextRollout

DEFAULT_MAX_TEXT = 128


class RolloutEngine:
    """Draws images and answers from one model.

    Args:
        model: the Show-o model, a concept attached or not.
        vq: the image tokenizer; needed for pixels in or out.
        tokenizer: needed for text in or out; with a concept attached, the one that knows its tokens.
        max_text: text positions of a drawing prompt, 128 as published when None.
        schedule: cosine, linear, sigmoid or pow<k>.
        ops_backend: backend of the fused ops; None lets each op choose.
        max_rows: most images (each two rows with guidance) drawn at once; more wait their turn.
    """

    def __init__(
        self,
        model: Showo,
        vq: MagvitV2 | None = None,
        tokenizer: TextTokenizer | None = None,
        *,
        max_text: int | None = None,
        schedule: str = "cosine",
        ops_backend: str | None = None,
        max_rows: int = 64,
    ):
        self.model, self.vq, self.tokenizer = model, vq, tokenizer
        self.max_text = DEFAULT_MAX_TEXT if max_text is None else checks.count("max_text", max_text, 3)
        self.schedule = checks.schedule(schedule)
        self.ops_backend = ops_backend
        self.max_rows = checks.count("max_rows", max_rows)
        self._noise: Noise | None = None  # explicit Gumbel noise in place of the Philox keys; for replaying records

    # --- images ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate_images(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        samples: int = 1,
        steps: int = 50,
        guidance_scale: float = 5.0,
        temperature: float = 1.0,
        seed: int = 0,
        sample_ids: Sequence[int] | Tensor | None = None,
        known_codes: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        dsog: Dsog | None = None,
        record: bool = True,
        decode: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> ImageRollout:
        """Draw `samples` images of every prompt; rows are prompt-major.

        Args:
            prompts: text, or text ids without task token, sot and eot. "" draws without a prompt.
            steps: T, MaskGIT timesteps.
            guidance_scale: s in (1 + s)·cond − s·uncond; 0 turns guidance off and halves the work.
            temperature: of the re-masking noise.
            seed, sample_ids: the key of all noise. A row draws the same image in any batch; ids are 0…R−1 by default.
            known_codes: int [N], [P, N] or [R, N], −1 where unknown: the rest is painted around them.
            grid: (height, width) in codes; any size the model has positions for.
            dsog: previews and refills; the group is all rows of this call.
            record: keep every step's inputs, choices and log-probs [R, T, N].
            decode: also give pixels (needs the vq).
            progress: called with (row-steps done, row-steps wanted) after every step.

        Raises:
            UserError: for anything out of range, prompts without tokenizer, or a model whose log-probs are not finite.
        """
        samples, steps = checks.count("samples", samples), checks.count("steps", steps, 1, checks.MAX_STEPS)
        scale = checks.number("guidance_scale", guidance_scale, "0 turns guidance off")
        temperature = checks.number("temperature", temperature, "0 re-masks without noise")
        checks.count("seed", seed, 0, checks.MAX_SAMPLE_ID)
        texts = checks.token_lists("prompts", prompts, self.tokenizer, self.model)
        rows = len(texts) * samples
        known, grid = checks.known_codes(known_codes, grid, len(texts), samples, self.model)
        ids = checks.sample_ids(sample_ids, rows, checks.MAX_DSOG_ID if dsog else checks.MAX_SAMPLE_ID)
        if self.vq is None and (decode or dsog):
            raise UserError("pixels are wanted: give RolloutEngine a MagvitV2, or pass decode=False and no dsog")
        prompt_index = torch.arange(len(texts)).repeat_interleave(samples)

        prefixes, prompt_of_text = self._prefixes(texts, guided=scale > 0)
        prompt_of_row = [prompt_of_text[index] for index in prompt_index.tolist()]
        looks = zip(prompt_of_row, map(tuple, known.tolist()), strict=True)
        _, kinds = checks.unique_index(list(looks))
        settings = LoopSettings(steps, scale, temperature, self.schedule, seed, record, self.max_rows, self.ops_backend)
        preview, errors = self._preview(dsog, steps, ids, kinds, prompt_index, grid) if dsog else (None, [])
        loop = ImageLoop(
            self.model, prefixes, prompt_of_row, kinds, known, ids, settings, preview, progress, self._noise
        )
        finite = loop.run()
        profiling.count("rollout steps", lambda: self._step_flops(loop, prefixes, scale))
        if not finite:
            raise UserError("the model gave log-probs that are not finite: its weights or activations hold NaN")
        return ImageRollout(
            codes=loop.codes,
            pixels=self._pixels(loop.codes, grid) if decode else None,
            inputs=loop.inputs,
            chosen=loop.chosen,
            logp=loop.logp,
            prompt_index=prompt_index,
            sample_ids=torch.tensor([candidate.sample_id for candidate in loop.candidates]),
            prompt_ids=texts,
            seed=seed,
            steps=steps,
            guidance_scale=scale,
            temperature=temperature,
            grid=grid,
            max_text=self.max_text,
            dsog=_settle(dsog, preview.selection, loop, errors) if dsog and preview else None,
        )

    def _step_flops(self, loop: ImageLoop, prompts: PromptKV, scale: float) -> float:
        longest, count = max(prompts.lengths), loop.codes.shape[1]
        return loop.row_steps * cost.image_step(self.model.config, 1, longest, count, scale > 0).flops

    @profiling.phase("prefill")
    def _prefixes(self, texts: list[list[int]], guided: bool) -> tuple[PromptKV, list[int]]:
        """Keys and values of the distinct prompts, the empty one last when `guided`; and which of them each text is."""
        ids = prompting.SpecialIds.of(self.model)
        long = [
            place for place, text in enumerate(texts) if len(text) + 2 + (text[:1] != [ids.sot]) > self.max_text + 1
        ]
        if long:
            warnings.warn(
                f"prompts[{long[0]}] has {len(texts[long[0]])} ids: only the first {self.max_text - 2} are read "
                "(max_text of RolloutEngine)",
                stacklevel=4,
            )
        sequences = [prompting.t2i_text(text, ids, self.max_text) for text in texts]
        first, index = checks.unique_index([tuple(sequence) for sequence in sequences])
        distinct = [sequences[place] for place in first]
        if guided:
            distinct.append(prompting.t2i_text([], ids, self.max_text))
        lengths = [len(sequence) for sequence in distinct]
        profiling.count("prefill", lambda: sum(cost.prefill(self.model.config, each).flops for each in lengths))
        return prefill_t2i(self.model, distinct, self.max_text), index

    @profiling.phase("decode", unless="previews")
    def _pixels(self, codes: Tensor, grid: tuple[int, int], of: str = "decode") -> Tensor:
        assert self.vq is not None
        vq_config = getattr(self.vq, "config", None)
        if vq_config is not None:
            profiling.count(of, lambda: cost.decode_pixels(vq_config, len(codes), grid).flops)
        codes = codes.to(next(self.vq.parameters()).device)
        return torch.cat([self.vq.decode(part, grid) for part in codes.split(self.max_rows)])

    def _preview(
        self,
        dsog: Dsog,
        steps: int,
        sample_ids: list[int],
        kinds: list[int],
        prompt_index: Tensor,
        grid: tuple[int, int],
    ) -> tuple[Preview, list[str]]:
        """The loop's view of `dsog`, and the list that its scorer's failures are written to."""
        errors: list[str] = []

        def score(codes: Tensor, rows: list[int]) -> list[float]:
            failed = [math.nan] * len(rows)
            pixels = self._pixels(codes, grid, of="previews")
            try:
                scores = torch.as_tensor(dsog.scorer(pixels, prompt_index[rows])).detach().float().cpu()
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
                return failed
            if scores.shape != (len(rows),):
                errors.append(f"scores of shape {tuple(scores.shape)}: must be one for each of {len(rows)} previews")
                return failed
            bad = int((~torch.isfinite(scores)).sum())
            if bad:
                errors.append(f"{bad} of {len(rows)} scores are not finite")
            return scores.tolist()

        selection = Selection(sample_ids, kinds, dsog.threshold.value, dsog.max_candidates * len(sample_ids))
        return Preview(dsog.preview_at(steps), score, selection), errors

    # --- text ------------------------------------------------------------------------------------------------------

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
        system: str | Sequence[int] = "",
    ) -> TextRollout:
        """Answer each question about its image `samples` times; rows are prompt-major.

        Args:
            images: pixels float [B, 3, H, W], codes int [B, N], or features float [B, patches, 1024] for the CLIP
                variant. One image may serve many questions, and one question many images.
            questions: text, put into the published wording unless `raw`; or ids, taken as they are.
            temperature: 1 is the model's own distribution; 0 takes the likeliest token.
            top_k: draw among the k likeliest tokens only; 0 means all, 1 the likeliest.
            seed, sample_ids: the key of all noise, as for images.
            system: text or ids before the image, for CLIP features only.

        Raises:
            UserError: for anything out of range, text without tokenizer, or more positions than the model has.
        """
        samples = checks.count("samples", samples)
        checks.count("max_new_tokens", max_new_tokens, 1, checks.MAX_STEPS)
        temperature = checks.number("temperature", temperature, "0 takes the likeliest token")
        checks.count("top_k", top_k, 0)
        checks.count("seed", seed, 0, checks.MAX_SAMPLE_ID)
        wrap = None if raw else prompting.chat_question
        asked = checks.token_lists("questions", questions, self.tokenizer, self.model, wrap)
        clip = self.model.config.w_clip_vit and torch.is_tensor(images) and images.ndim == 3
        seen = images.to(self.model.device) if clip else checks.images(images, self.model, self.vq)
        if 1 not in (len(seen), len(asked)) and len(seen) != len(asked):
            raise UserError(f"{len(seen)} images and {len(asked)} questions: give one of either, or as many of both")
        pairs = max(len(seen), len(asked))
        seen = seen.expand(pairs, *seen.shape[1:])
        asked = asked * pairs if len(asked) == 1 else asked
        rows = pairs * samples
        ids = checks.sample_ids(sample_ids, rows)

        if clip:
            prompts, last, prompt_of_pair = self._clip_prefixes(seen, asked, system)
        else:
            if len(system):
                raise UserError("system is for CLIP features only: put the text into the question")
            places, prompt_of_pair = checks.unique_index(
                list(zip(map(tuple, seen.tolist()), map(tuple, asked), strict=True))
            )
            prompts, last = prefill_mmu(self.model, seen[places], [asked[place] for place in places])
        end, limit = max(prompts.next_position) + max_new_tokens, self.model.config.max_position_embeddings
        if end > limit:
            raise UserError(f"context and max_new_tokens reach position {end}: this model has {limit}; ask for fewer")
        eot = prompting.SpecialIds.of(self.model).eot
        prompt_index = torch.arange(pairs).repeat_interleave(samples)
        tokens, logp, lengths = decode(
            self.model,
            prompts,
            last,
            [prompt_of_pair[index] for index in prompt_index.tolist()],
            ids,
            TextSettings(max_new_tokens, temperature, top_k, seed, eot, self.ops_backend),
        )
        if not bool(torch.isfinite(logp).all()):
            raise UserError("the model gave log-probs that are not finite: its weights or activations hold NaN")
        answers = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
        context = max(prompts.lengths)
        profiling.count("answers", lambda: cost.answers_of(self.model.config, context, lengths.tolist()).flops)
        return TextRollout(
            texts=[self.tokenizer.decode(answer) for answer in answers] if self.tokenizer else [],
            tokens=tokens,
            logp=logp,
            lengths=lengths,
            prompt_index=prompt_index,
            sample_ids=torch.tensor(ids),
            question_ids=asked,
            image_codes=None if clip else seen.clone(),
            seed=seed,
            temperature=temperature,
            top_k=top_k,
        )

    def _clip_prefixes(
        self, features: Tensor, asked: list[list[int]], system: str | Sequence[int]
    ) -> tuple[PromptKV, Tensor, list[int]]:
        """Prefixes of the CLIP variant, pairs of one question together."""
        before: list[int] = []
        if len(system):
            before = checks.token_lists(
                "system", system if isinstance(system, str) else [system], self.tokenizer, self.model
            )[0]
        prompts, states, place = PromptKV([], [], []), [], {}
        for question in dict.fromkeys(map(tuple, asked)):
            members = [index for index, ids in enumerate(asked) if tuple(ids) == question]
            more, last = prefill_mmu_clip(self.model, features[members], before, list(question))
            place.update({member: len(prompts) + index for index, member in enumerate(members)})
            prompts = prompts + more
            states.append(last)
        return prompts, torch.cat(states), [place[index] for index in range(len(asked))]


def _settle(dsog: Dsog, selection: Selection, loop: ImageLoop, errors: list[str]) -> DsogReport:
    """Move the threshold, warn of rows that had to be filled, and write the report."""
    accepted, previewed = selection.accepted, selection.previewed
    if dsog.reduce is not None:
        accepted, previewed = dsog.reduce(accepted, previewed)
    pass_rate = accepted / previewed
    before = dsog.threshold.value
    if selection.filled:
        warnings.warn(
            f"{selection.filled} of {len(loop.candidates)} rows are filled with the best rejected previews: "
            f"{selection.previewed} candidates were tried, {selection.accepted} scored above {before:.3f}",
            stacklevel=4,
        )
    if errors:
        warnings.warn(f"the DSOG scorer failed {len(errors)} times, first with {errors[0]}", stacklevel=4)
    assert loop.preview_codes is not None
    return DsogReport(
        accepted=accepted,
        previewed=previewed,
        filled=selection.filled,
        pass_rate=pass_rate,
        threshold=before,
        next_threshold=dsog.threshold.update(pass_rate),
        scores=torch.tensor([candidate.score for candidate in loop.candidates]),
        attempts=torch.tensor([candidate.attempt for candidate in loop.candidates]),
        preview_codes=loop.preview_codes,
        errors=errors,
    )
