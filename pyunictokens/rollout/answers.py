"""Answers to questions about images: what is asked becomes ids and one prefix, text.py decodes, ids become text.

Each distinct pair of image and question is computed once, under the resident concept that it names.

Letters: B rows, P prompts, N image codes, E features, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import add

import torch
from torch import Tensor

from ..models import AnsweringModel, ImageTokenizer, Prefix
from ..utils import profiling
from ..utils.errors import NotFinite, UserError
from ..utils.fingerprint import bytes_of
from . import checks
from .resident_concepts import Residents
from .text import TextSettings, decode
from .types import TextRollout

NO_NUMBERS = (
    "the model gave log-probs that are not finite: its weights or activations hold NaN, or overflow in float16 (use "
    "bfloat16 or float32)"
)

Concepts = str | Sequence[str | None] | None
"""One resident's name, one for each prompt (None: the model as it is), or None: text says which it names."""


def answers(
    model: AnsweringModel,
    vq: ImageTokenizer | None,
    residents: Residents,
    images: Tensor,
    questions: str | Sequence[str] | Sequence[Sequence[int]],
    samples: int,
    settings: TextSettings,
    sample_ids: Sequence[int] | Tensor | None,
    concepts: Concepts,
    raw: bool,
) -> TextRollout:
    """Each question answered `samples` times about its image, token by token; rows are prompt-major.

    Arguments and errors are those of `RolloutEngine.generate_text`.
    """
    samples = checks.count("samples", samples)
    most = checks.count("max_new_tokens", settings.max_new_tokens, 1, checks.MAX_STEPS)
    temperature = checks.number("temperature", settings.temperature, "0 takes the likeliest token")
    checks.count("top_k", settings.top_k, 0)
    checks.count("seed", settings.seed, 0, checks.MAX_SAMPLE_ID)
    asked, names = residents.read("questions", questions, concepts, None if raw else model.question_text)
    seen = checks.looks(images, model, vq)
    if 1 not in (len(seen), len(asked)) and len(seen) != len(asked):
        raise UserError(f"{len(seen)} images and {len(asked)} questions: give one of either, or as many of both")
    pairs = max(len(seen), len(asked))
    checks.text_room(pairs * samples, most, model)
    seen = seen.expand(pairs, *seen.shape[1:])
    asked, names = (asked * pairs, names * pairs) if len(asked) == 1 else (asked, names)
    ids = checks.sample_ids(sample_ids, pairs * samples)
    prompts, last, prompt_of_pair = contexts(model, residents, seen, asked, names)
    end, limit = max(prompts.next_position) + most, model.max_positions
    if end > limit:
        raise UserError(f"context and max_new_tokens reach position {end}: this model has {limit}; ask for fewer")
    speakers = list(dict.fromkeys(names))
    prompt_index = torch.arange(pairs).repeat_interleave(samples)
    tokens, logp, lengths = decode(
        model,
        model.vocabulary([residents.rows(name) for name in speakers]),
        prompts,
        last,
        [prompt_of_pair[index] for index in prompt_index.tolist()],
        [speakers.index(names[index]) for index in prompt_index.tolist()],
        ids,
        replace(settings, temperature=temperature),
    )
    if not bool(torch.isfinite(logp).all()):
        raise NotFinite(NO_NUMBERS)
    context = max(prompts.lengths)
    profiling.count("answers", lambda: model.costs.answers(context, lengths.tolist()).flops)
    return TextRollout(
        texts=_texts(residents, tokens, lengths, [names[index] for index in prompt_index.tolist()]),
        tokens=tokens,
        logp=logp,
        lengths=lengths,
        prompt_index=prompt_index,
        sample_ids=torch.tensor(ids),
        question_ids=asked,
        image_codes=None if seen.is_floating_point() else seen.clone(),
        image_features=seen.clone() if seen.is_floating_point() else None,
        seed=settings.seed,
        temperature=temperature,
        top_k=settings.top_k,
        concepts=names,
    )


def _texts(residents: Residents, tokens: Tensor, lengths: Tensor, names: list[str | None]) -> list[str]:
    """Answers as text; none where no tokenizer is there."""
    texts = []
    for row, length, name in zip(tokens.tolist(), lengths.tolist(), names, strict=True):
        tokenizer = residents.tokenizer(name)
        if tokenizer is None:
            return []
        texts.append(tokenizer.decode(row[:length]))
    return texts


def contexts(
    model: AnsweringModel,
    residents: Residents,
    seen: Tensor,
    asked: list[list[int]],
    names: list[str | None],
) -> tuple[Prefix, Tensor, list[int]]:
    """What each answer follows: the prefix, last states [P, D], and which of them belongs to each pair of image and
    question. Equal pairs are computed once."""
    parts: list[Prefix] = []
    states: list[Tensor] = []
    place: dict[int, int] = {}

    looks = list(map(bytes_of, seen))
    for name in dict.fromkeys(names):
        members = [index for index, its in enumerate(names) if its == name]
        first, index_of = checks.unique_index([(looks[index], tuple(asked[index])) for index in members])
        some = [members[number] for number in first]
        offset = sum(map(len, parts))
        place.update({index: offset + number for index, number in zip(members, index_of, strict=True)})
        with residents.using(name):
            made, last = model.prefill_questions(seen[some], [asked[index] for index in some])
        parts.append(made)
        states.append(last)
    return reduce(add, parts), torch.cat(states), [place[index] for index in range(len(asked))]
