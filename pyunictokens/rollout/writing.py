"""Texts by blocks as a caller of the engine asks for them: prompts or questions checked, turned into ids, and written.

How a block is unmasked is told in blocks.py.

Letters: R rows (prompts × samples), L tokens, N image codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models import BlockAnsweringModel, ImageTokenizer, MaskedModel, TextTokenizer, writing
from ..utils.errors import UserError
from ..utils.memory import RowLimit
from . import checks
from .blocks import BlockSettings, write
from .types import TextRollout


class BlockTexts:
    """The numbers of one call, and what is written with them."""

    def __init__(
        self,
        model: MaskedModel,
        tokenizer: TextTokenizer | None,
        *,
        seed: int,
        sample_ids: Sequence[int] | Tensor | None,
        length: int | None,
        block: int | None,
        steps: int | None,
        temperature: float | None,
        max_rows: int,
        backend: str | None,
        limit: RowLimit,
        head: str = "auto",
    ):
        self.writer, self.tokenizer = writing(model), tokenizer
        rule = self.writer.blocks
        for name, value in (("max_new_tokens", length), ("block_length", block), ("steps", steps)):
            if value is not None:
                checks.count(name, value, 1, checks.MAX_STEPS)
        checks.count("seed", seed, 0, checks.MAX_SAMPLE_ID)
        heat = rule.temperature if temperature is None else temperature
        heat = checks.number("temperature", heat, "0 takes the likeliest token")
        self._numbers = (*rule.plan(length, block, steps), heat)
        self._seed, self._sample_ids, self._limit = seed, sample_ids, limit
        self._max_rows, self._backend, self._head = max_rows, backend, head

    def written(self, prompts: checks.Texts, samples: int, raw: bool, record: bool) -> TextRollout:
        """Texts that follow `prompts`."""
        wrap = None if raw else self.writer.asked
        lists = checks.token_lists("prompts", prompts, self.tokenizer, self.writer, wrap)
        return self._rollout(lists, [self.writer.prompt_ids(ids) for ids in lists], samples, record, None)

    def answers(
        self,
        model: BlockAnsweringModel,
        vq: ImageTokenizer | None,
        images: Tensor,
        questions: checks.Texts,
        samples: int,
        raw: bool,
    ) -> TextRollout:
        """Answers to `questions` about `images` (pixels or codes); one of either may go with many of the other."""
        wrap = None if raw else model.question_text
        asked = checks.token_lists("questions", questions, self.tokenizer, model, wrap)
        seen = checks.images(images, model, vq)
        if 1 not in (len(seen), len(asked)) and len(seen) != len(asked):
            raise UserError(f"{len(seen)} images and {len(asked)} questions: give one of either, or as many of both")
        pairs = max(len(seen), len(asked))
        seen, asked = seen.expand(pairs, -1), asked * pairs if len(asked) == 1 else asked
        prompts = [model.question_prompt(codes, ids) for codes, ids in zip(seen.tolist(), asked, strict=True)]
        return self._rollout(asked, prompts, samples, False, seen.clone())

    def _rollout(
        self, asked: list[list[int]], prompts: list[list[int]], samples: int, record: bool, seen: Tensor | None
    ) -> TextRollout:
        samples, writer = checks.count("samples", samples), self.writer
        length, block, steps, heat = self._numbers
        end = max(map(len, prompts)) + length
        if end > writer.max_positions:
            raise UserError(
                f"prompt and max_new_tokens reach position {end}: this model has {writer.max_positions}; ask for fewer"
            )
        checks.text_room(len(prompts) * samples, length * (3 * steps if record else 1), writer)
        ids = checks.sample_ids(self._sample_ids, len(prompts) * samples)
        first, place = checks.unique_index(list(map(tuple, prompts)))
        prompt_index = torch.arange(len(prompts)).repeat_interleave(samples)
        shared = self._max_rows, self._backend, self._head
        settings = BlockSettings(length, block, steps, heat, self._seed, record, *shared)
        made = write(
            writer,
            writer.prefill([prompts[number] for number in first]),
            [place[index] for index in prompt_index.tolist()],
            ids,
            settings,
            self._limit,
        )
        longest = length if record else int(made.lengths.max())
        return TextRollout(
            texts=self._texts(made.tokens, made.lengths),
            tokens=made.tokens[:, :longest].clone(),
            logp=made.logp[:, :longest].clone(),
            lengths=made.lengths,
            prompt_index=prompt_index,
            sample_ids=torch.tensor(ids),
            question_ids=prompts if seen is None else asked,
            image_codes=seen,
            seed=self._seed,
            temperature=heat,
            top_k=0,
            concepts=[None] * len(prompts),
            steps=made.steps,
        )

    def _texts(self, tokens: Tensor, lengths: Tensor) -> list[str]:
        if self.tokenizer is None:
            return []
        left_out = {*self.writer.end_ids, self.writer.mask_id}
        rows = zip(tokens.tolist(), lengths.tolist(), strict=True)
        return [self.tokenizer.decode(id for id in row[:length] if id not in left_out) for row, length in rows]
