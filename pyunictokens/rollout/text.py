"""Answers token by token: all rows of all prompts decoded together over cached prompts, leaving as they end.

Prompts of different lengths share every matrix product; how a token looks at its prompt is the model's `AnswerDecoder`.
Noise is keyed by (seed, sample id, token number), so an answer is the same in any batch.

Shape suffixes: B rows, L answer tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..models import AnsweringModel, Prefix
from ..models.base import TextVocabulary
from .cuda_graphs.capture import CapturedSteps

PADDING = -1

WORTH_A_CAPTURE = 16
"""Tokens from which on a captured step earns back its warm-up on a GPU."""


@dataclass(frozen=True)
class TextSettings:
    """The numbers of one decoding, equal for all its rows."""

    max_new_tokens: int
    temperature: float
    """0 takes the likeliest token."""
    top_k: int
    """0 samples from the full distribution."""
    seed: int
    end_id: int
    backend: str | None = None


class AnswerStep:
    """One token of every row: drawn, written down, and fed back. A call waits for nothing and has static shapes.

    All state is in tensors that stay where they are, so a call can be captured and repeated until `keep_going` is 0:
    then every row has ended, or no room is left. While it is 0 a call changes nothing that matters. With
    ``sliced=True`` the host runs every step: attention is cut at the last position, and rows that ended may leave
    (:meth:`keep`).
    """

    def __init__(
        self,
        model: AnsweringModel,
        vocabulary: TextVocabulary,
        prompts: Prefix,
        last_hidden: Tensor,
        prompt_of_row: Sequence[int],
        concept_of_row: Sequence[int],
        sample_ids: Sequence[int],
        settings: TextSettings,
        sliced: bool = True,
    ):
        self.vocabulary, self.settings = vocabulary, settings
        rows, device = len(prompt_of_row), last_hidden.device

        def ints(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        self._decoder = model.decoder(prompts, prompt_of_row, settings.max_new_tokens, sliced)
        self._hidden = last_hidden[ints(prompt_of_row)]
        self._sample_ids, self._concept, self._row = ints(sample_ids), ints(concept_of_row), ints(range(rows))
        self._step = ints([0])
        self._drawn = ints([0] * rows)
        self.tokens = torch.full((rows, settings.max_new_tokens), PADDING, device=device)
        """int64 [B, L], −1 past the end."""
        self.logp = torch.zeros(rows, settings.max_new_tokens, device=device)
        """float32 [B, L], 0 past the end."""
        self.alive = torch.ones(rows, dtype=torch.bool, device=device)
        """bool: rows that are still here and have not ended."""
        self.keep_going = torch.ones(1, dtype=torch.int32, device=device)

    def __call__(self) -> None:
        self.draw()
        self.feed()

    def draw(self) -> None:
        """Draw and write down the next token of every row that has not ended."""
        settings, step = self.settings, self._step.expand(len(self._row))
        drawn, chance = ops.sample_categorical(
            self.vocabulary.logits(self._hidden, self._concept),
            temperature=settings.temperature,
            top_k=settings.top_k,
            seed=settings.seed,
            sample_ids=self._sample_ids,
            step=step,
            backend=settings.backend,
        )
        going, place = self.keep_going != 0, (self._row, step)
        on = self.alive & going
        self.tokens[place] = torch.where(on, drawn, self.tokens[place])
        self.logp[place] = torch.where(on, chance.to(self.logp.dtype), self.logp[place])
        self._drawn.copy_(drawn)
        self.alive &= ~(on & (drawn == settings.end_id))
        self.keep_going.copy_(going & self.alive.any() & (self._step + 1 < settings.max_new_tokens))

    def feed(self) -> None:
        """Take the hidden states after the tokens just drawn, unless that was the end."""
        after = self._decoder(self.vocabulary.embed(self._drawn, self._concept), self._step)
        going = self.keep_going.to(torch.int64)
        self._hidden.copy_(torch.where(going != 0, after, self._hidden))
        self._decoder.advance(going)
        self._step += going

    def keep(self, rows: list[int]) -> None:
        """Go on with the rows of these indices, in ascending order, and no others."""
        kept = torch.tensor(rows, device=self._row.device)
        self._decoder.keep_rows(rows)
        self._hidden, self._drawn = self._hidden[kept], self._drawn[kept]
        self._sample_ids, self._concept, self._row = self._sample_ids[kept], self._concept[kept], self._row[kept]
        self.alive = self.alive[kept]


def _by_the_host(step: AnswerStep) -> None:
    while True:
        step.draw()
        if not int(step.keep_going):
            break
        alive = step.alive.tolist()
        if not all(alive):
            step.keep([row for row, its in enumerate(alive) if its])
        step.feed()


def decode(
    model: AnsweringModel,
    vocabulary: TextVocabulary,
    prompts: Prefix,
    last_hidden: Tensor,
    prompt_of_row: Sequence[int],
    concept_of_row: Sequence[int],
    sample_ids: Sequence[int],
    settings: TextSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens int64 [B, L] with −1 after the end token, logp float32 [B, L] with 0 there, lengths int64 [B]).

    `last_hidden` [P, D] is each prompt's state before its first answer token; `concept_of_row` counts the concepts of
    `vocabulary`.
    """
    order = sorted(range(len(prompt_of_row)), key=lambda row: (prompt_of_row[row], row))
    prompt, concept, ids = ([its[row] for row in order] for its in (prompt_of_row, concept_of_row, sample_ids))
    captured = last_hidden.is_cuda and settings.max_new_tokens >= WORTH_A_CAPTURE
    step = AnswerStep(model, vocabulary, prompts, last_hidden, prompt, concept, ids, settings, sliced=not captured)
    if captured:
        steps = CapturedSteps(step, step.keep_going)
        steps.run(settings.max_new_tokens)
        steps.close()
    else:
        _by_the_host(step)
    back = torch.tensor(order, device=last_hidden.device).argsort()
    tokens, logp = step.tokens[back], step.logp[back]
    lengths = (tokens != PADDING).sum(1)
    longest = int(lengths.max())
    return tokens[:, :longest].clone(), logp[:, :longest].clone(), lengths
