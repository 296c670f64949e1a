"""Sequences: lengths, cuts, masks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyunictokens.models.showo import prompting
from pyunictokens.models.showo.prompting import SpecialIds, attention_allowed, mmu, t2i, t2i_text
from pyunictokens.models.showo.sizes import ShowoConfig
from pyunictokens.utils.errors import UserError

IDS = SpecialIds.from_config(ShowoConfig(), num_new=25)


def test_ids_of_the_published_model_with_a_concept():
    assert (IDS.pad, IDS.soi, IDS.t2i, IDS.lvg) == (50295, 50296, 50300, 50304)
    assert (IDS.first_code, IDS.mask, IDS.sot, IDS.eot) == (50330, 58522, 50256, 50256)


@given(st.lists(st.integers(0, 50000), max_size=30), st.integers(3, 20))
@settings(deadline=None)
def test_text_keeps_its_first_ids_and_is_closed(text, max_text):
    ids = t2i_text(text, IDS, max_text)
    assert ids[:2] == [IDS.t2i, IDS.sot] and ids[-1] == IDS.eot and len(ids) <= max_text + 1
    whole = [IDS.t2i, *([] if text[:1] == [IDS.sot] else [IDS.sot]), *text]
    assert ids[:-1] == whole[:max_text]
    sequence = t2i(text, None, IDS, max_text, 4)
    assert len(sequence) == max_text + 1 + 4 + 2
    assert (sequence[-5:-1] == IDS.mask).all() and sequence[-6] == IDS.soi and sequence[-1] == IDS.eoi
    assert (sequence == IDS.pad).sum() == max_text + 1 - len(ids)


def test_masks_of_a_padded_drawing():
    sequence = t2i([5], torch.tensor([-1, 3]), IDS, 5)[None]  # pad pad t2i sot 5 eot | soi mask code eoi
    allowed = attention_allowed(sequence, "t2i", IDS)[0].int().tolist()
    assert allowed[4] == [0, 0, 1, 1, 1, 0, 0, 0, 0, 0]
    assert allowed[6] == allowed[7] == allowed[9] == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    assert allowed[1] == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]


def test_masks_of_an_understanding_sequence():
    sequence = mmu(torch.tensor([1, 2]), [7, 8], IDS)[None]  # mmu soi c c eoi | sot 7 8
    allowed = attention_allowed(sequence, "mmu", IDS)[0].int().tolist()
    assert allowed[0] == [1, 1, 1, 1, 1, 0, 0, 0] and allowed[6] == [1, 1, 1, 1, 1, 1, 1, 0]


def test_an_answer_follows_with_its_end():
    assert mmu([1], [7], IDS, [9]).tolist() == [IDS.mmu, IDS.soi, IDS.first_code + 1, IDS.eoi, IDS.sot, 7, 9, IDS.eot]


def test_a_question_is_wrapped_as_published():
    assert prompting.chat_question("why?") == "USER: \nwhy? ASSISTANT:"


def test_bad_input_is_named():
    with pytest.raises(UserError, match="max_text=2"):
        t2i_text([1], IDS, 2)
    with pytest.raises(UserError, match="kind='v2v'"):
        attention_allowed(torch.zeros(1, 2, dtype=torch.long), "v2v", IDS)
    with pytest.raises(UserError, match="give codes, or num_codes"):
        t2i([1], None, IDS, 5)
