"""Answers of many requests, token by token in one batch: each with settings, a concept and a seed of its own.

Rows join and leave between any two tokens, by bookkeeping alone: keys and values move at the next token, where what
fails is told to those it concerns. How they share the transformer is the model's `JoiningDecoder`. Noise is
keyed by (seed, sample id, token number) as in rollout/text.py, so an answer is the same in any batch.

Shape suffixes: B rows, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ... import ops
from ...models import AnsweringModel, ConceptTokens, Prefix
from ...models.base import TextVocabulary


@dataclass(eq=False)
class Answer:
    """One answer in the making."""

    ticket: int
    sample: int
    sample_id: int
    max_new_tokens: int
    temperature: float
    top_k: int
    seed: int
    concept: ConceptTokens | None
    slot: int
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    finite: bool = True


class AnswerLane:
    """The answers of one model that are under way."""

    def __init__(self, model: AnsweringModel, backend: str | None):
        self.model, self._backend = model, backend
        self.rows: list[Answer] = []
        self._held: list[Answer] = []
        """Rows of the decoder, in their order: those of `rows`, and those that have left since."""
        self._coming: list[tuple[Sequence[Answer], Prefix, Tensor]] = []
        self._decoder = model.joining_decoder()
        self._hidden_BD = torch.zeros(0, model.width, dtype=model.dtype, device=model.device)
        self._vocabulary: TextVocabulary | None = None
        self._concepts: list[ConceptTokens | None] = []

    def join(self, answers: Sequence[Answer], context: Prefix, last_hidden_D: Tensor) -> None:
        """`answers` begin after the one context of `context`, whose last hidden state is given."""
        self.rows += answers
        self._coming.append((answers, context, last_hidden_D))

    def leave(self, gone: Collection[Answer]) -> None:
        """Let these answers go."""
        self.rows = [row for row in self.rows if row not in gone]

    def step(self) -> None:
        """One more token of every answer. Those that are done leave."""
        self._move()
        assert self._vocabulary is not None
        device = self._hidden_BD.device
        place = {id(concept): number for number, concept in enumerate(self._concepts)}
        concept_B = torch.tensor([place[id(row.concept)] for row in self.rows], device=device)
        drawn_B = self._draw(self._vocabulary.logits(self._hidden_BD, concept_B))
        for row, token in zip(self.rows, drawn_B.tolist(), strict=True):
            row.tokens.append(token)
            row.done = token == self.model.end_id or len(row.tokens) == row.max_new_tokens or not row.finite
        self.leave([row for row in self.rows if row.done])
        stay = self._keep()
        if stay:
            kept = torch.tensor(stay, device=device)
            self._hidden_BD = self._decoder(self._vocabulary.embed(drawn_B[kept], concept_B[kept]))

    def _move(self) -> None:
        """The decoder holds `rows`."""
        self._keep()
        coming, self._coming = self._coming, []
        for answers, context, last_hidden_D in coming:
            new = [row for row in answers if row in self.rows]
            if new:
                self._decoder.join(context, len(new), new[0].max_new_tokens)
                self._hidden_BD = torch.cat([self._hidden_BD, last_hidden_D.expand(len(new), -1)])
                self._held += new
        if any(all(row.concept is not each for each in self._concepts) for row in self.rows):
            self._concepts = list({id(row.concept): row.concept for row in self.rows}.values())
            self._vocabulary = self.model.vocabulary(self._concepts)

    def _keep(self) -> list[int]:
        """The decoder lets go who has left; returns the places of those that stay."""
        stay = [place for place, row in enumerate(self._held) if row in self.rows]
        if len(stay) < len(self._held):
            self._decoder.keep_rows(stay)
            self._hidden_BD = self._hidden_BD[torch.tensor(stay, dtype=torch.int64, device=self._hidden_BD.device)]
            self._held = [self._held[place] for place in stay]
        return stay

    def _draw(self, logits: Tensor) -> Tensor:
        """The next token int64 [B] of every row; rows of equal settings are drawn together."""
        groups: dict[tuple[float, int, int], list[int]] = {}
        for place, row in enumerate(self.rows):
            groups.setdefault((row.temperature, row.top_k, row.seed), []).append(place)
        drawn_B = torch.empty(len(self.rows), dtype=torch.int64, device=logits.device)
        for (temperature, top_k, seed), places in groups.items():
            rows = torch.tensor(places, device=logits.device)
            ids = [[self.rows[place].sample_id, len(self.rows[place].tokens)] for place in places]
            samples, steps = torch.tensor(ids, device=logits.device).unbind(1)
            drawn, logp = ops.sample_categorical(
                logits if len(groups) == 1 else logits[rows],
                temperature=temperature,
                top_k=top_k,
                seed=seed,
                sample_ids=samples,
                step=steps,
                backend=self._backend,
            )
            drawn_B[rows] = drawn
            for place, fine in zip(places, torch.isfinite(logp).tolist(), strict=True):
                self.rows[place].finite = fine
        return drawn_B
