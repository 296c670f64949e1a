"""Answers that join and leave a running batch have, token for token, the hidden states that each has alone."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyunictokens.models.joining import SeparateDecoders

from ..rollout.tiny import tiny_model

MODEL = tiny_model()
PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10], [11]]


def alone(prompt, x_TD, dtype_model):
    """Hidden states of one answer's tokens, by a decoder that has this one row."""
    prefix = dtype_model.prefill([dtype_model.prompt_ids(prompt)])
    decoder = dtype_model.decoder(prefix, [0], len(x_TD), True)
    found = []
    for step, x in enumerate(x_TD):
        found.append(decoder(x[None], torch.tensor([step]))[0])
        decoder.advance()
    return torch.stack(found)


@pytest.mark.parametrize("make", [lambda model: SeparateDecoders(model), lambda model: model.joining_decoder()])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
@torch.no_grad()
def test_rows_come_and_go_and_each_is_as_it_is_alone(make, seed):
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    decoder, live, ended = make(MODEL), [], []
    for _ in range(12):
        if not live or (len(ended) + len(live) < 12 and dice.random() < 0.5):
            prompt, rows, most = dice.choice(PROMPTS), dice.randint(1, 3), dice.randint(1, 7)
            decoder.join(MODEL.prefill([MODEL.prompt_ids(prompt)]), rows, most)
            for _ in range(rows):
                x = torch.randn(most, MODEL.width, dtype=torch.float64, generator=generator)
                live.append((prompt, x, []))
        out = decoder(torch.stack([x[len(seen)] for _, x, seen in live]))
        for (_, _, seen), hidden in zip(live, out, strict=True):
            seen.append(hidden)
        stay = [row for row, (_, x, seen) in enumerate(live) if len(seen) < len(x) and dice.random() < 0.8]
        ended += [row for place, row in enumerate(live) if place not in stay]
        if len(stay) < len(live):
            decoder.keep_rows(stay)
        live = [live[row] for row in stay]
    for prompt, x, seen in ended + live:
        assert (torch.stack(seen) - alone(prompt, x[: len(seen)], MODEL)).abs().max() < 1e-12


@torch.no_grad()
def test_in_bfloat16_it_stays_close_to_separate_decoders():
    model = tiny_model(dtype=torch.bfloat16)
    one, other = model.joining_decoder(), SeparateDecoders(model)
    for step, prompt in enumerate(PROMPTS):
        for decoder in (one, other):
            decoder.join(model.prefill([model.prompt_ids(prompt)]), 2, 6)
        x = torch.randn(2 * step + 2, model.width).bfloat16()
        first, second = one(x).float(), other(x).float()
        assert (first - second).abs().max() < 0.1 * second.abs().max()
