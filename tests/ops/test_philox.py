"""Philox4x32-10 against the published vectors, in both implementations, and the noise layout built on it."""

from __future__ import annotations

import math

import pytest
import torch

from pyunictokens.ops import philox
from pyunictokens.ops.backends import cpu as _native

# kat_vectors of Random123, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN_ANSWERS)
def test_known_answers(counter: list[int], key: list[int], wanted: list[int]) -> None:
    core = _native.core()
    assert core is not None
    assert list(core.philox4x32(*counter, *key)) == wanted
    assert philox.philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() == wanted


def test_both_implementations_agree_on_random_counters() -> None:
    core = _native.core()
    assert core is not None
    counters, keys = torch.randint(0, 2**32, (200, 4)), torch.randint(0, 2**32, (200, 2))
    wanted = [list(core.philox4x32(*c, *k)) for c, k in zip(counters.tolist(), keys.tolist(), strict=True)]
    assert philox.philox4x32(counters, keys).tolist() == wanted


def test_every_part_of_the_address_lands_where_the_layout_says() -> None:
    seed, sample, step, position, lanes, stream = (0x89ABCDEF << 32) | 0x1234567, (5 << 32) | 77, 513, 1021, 11, 2
    # The largest seed of the API has 63 bits; the layout itself has 64.
    words = philox.words(seed, torch.tensor([sample]), torch.tensor([step]), torch.tensor([position]), lanes, stream)
    assert words.shape == (1, lanes)
    for lane in range(lanes):
        counter = torch.tensor([77, 5, step * 65536 + position, (stream << 28) + lane // 4])
        block = philox.philox4x32(counter, torch.tensor([0x1234567, 0x89ABCDEF]))
        assert words[0, lane] == block[lane % 4]


def test_extreme_words_stay_inside_the_open_interval() -> None:
    words = torch.tensor([0, 1, 2**31, 2**32 - 129, 2**32 - 2, 2**32 - 1])
    variates = philox.exponential(words)
    wanted = [-math.log1p(-min((w + 0.5) / 2**32, 1 - 2**-24)) for w in words.tolist()]
    assert torch.allclose(variates.double(), torch.tensor(wanted, dtype=torch.float64), rtol=3e-7, atol=0)
    assert torch.isfinite(-variates.log()).all()
    assert (variates > 0).all()


def test_noise_has_the_moments_of_its_distribution() -> None:
    rows = 64
    noise = philox.gumbel(11, torch.arange(rows), torch.zeros(rows).long(), torch.zeros(rows).long(), 4001).double()
    count = noise.numel()
    euler, variance = 0.57721566, math.pi**2 / 6
    assert abs(noise.mean() - euler) < 5 * math.sqrt(variance / count)
    assert abs(noise.var() - variance) < 5 * math.sqrt(4.4 * variance**2 / count)  # kurtosis 5.4
    neighbours = ((noise[:, 1:] - euler) * (noise[:, :-1] - euler)).mean() / variance
    assert abs(neighbours) < 5 / math.sqrt(count)


def test_streams_steps_positions_and_samples_do_not_share_numbers() -> None:
    one = torch.tensor([1])
    base = philox.words(3, one, one, one, 64, 0)
    others = [
        philox.words(4, one, one, one, 64, 0),
        philox.words(3 + 2**32, one, one, one, 64, 0),
        philox.words(3, one + 2**32, one, one, 64, 0),
        philox.words(3, one + 1, one, one, 64, 0),
        philox.words(3, one, one + 1, one, 64, 0),
        philox.words(3, one, one, one + 1, 64, 0),
        philox.words(3, one, one, one, 64, 1),
    ]
    for other in others:
        assert not torch.isin(base, other).any()
