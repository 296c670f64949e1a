"""Ids of text, special tokens and concept tokens follow one another as published."""

import json

import pytest

from pyunictokens.models.showo.prompting import SPECIAL_TOKENS
from pyunictokens.models.tokenizer import TextTokenizer
from pyunictokens.utils.errors import UserError


@pytest.fixture
def folder(tmp_path):
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel

    words = ["<unk>", "<|endoftext|>", "a", "photo", "of", "it", "is", "red", ".", "'", "s", "toy", ","]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_ids_follow_the_published_order(folder):
    plain = TextTokenizer.from_pretrained(folder)
    assert plain.text_size == 13 and len(plain) == 23
    assert [plain.token_id(token) for token in SPECIAL_TOKENS] == list(range(13, 23))
    with_bo = plain.with_concept(["<bo>", "<token_0>"])
    assert len(with_bo) == 25 and len(plain) == 23
    assert with_bo.encode("A photo of <token_0><bo>.") == [2, 3, 4, 24, 23, 8]
    with pytest.raises(UserError, match="already knows a concept"):
        with_bo.with_concept(["<mi>"])


def test_decode_drops_special_ids_and_mends_spaces(folder):
    tokenizer = TextTokenizer.from_pretrained(folder).with_concept(["<bo>"])
    ids = tokenizer.encode("<bo>'s toy is red, it is.")
    assert tokenizer.decode([14, 1, *ids, 13, 99, 1]) == "<bo>'s toy is red, it is."


def test_bos_and_eos_come_from_the_config(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "a"}, "eos_token": "toy"}))
    tokenizer = TextTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 11)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "none"}))
    with pytest.raises(UserError, match="no token 'none'"):
        TextTokenizer.from_pretrained(folder)


def test_bad_input_is_named(folder, tmp_path):
    tokenizer = TextTokenizer.from_pretrained(folder)
    with pytest.raises(UserError, match="already in the vocabulary"):
        tokenizer.with_concept(["photo"])
    with pytest.raises(UserError, match="named twice"):
        tokenizer.with_concept(["<x>", "<x>"])
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        TextTokenizer.from_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        TextTokenizer.from_pretrained(folder)
