"""Text to ids and back, with the special ids and a concept's tokens in their published places.

A thin layer over the `tokenizers` library: it decides in which order ids are added.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..utils.errors import UserError, needs
from ..utils.files import read_json_table, refuse_lfs_pointer
from .checkpoint import resolve
from .showo.prompting import SPECIAL_TOKENS

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextTokenizer:
    """A tokenizer whose ids are: text, the ten special ids, then the tokens of at most one concept.

    ``len()`` counts all of them. `text_size` is the number of text ids alone (the model's llm_vocab_size).
    """

    def __init__(self, tokenizer: Tokenizer, bos: str, eos: str, text_size: int | None = None):
        self._tokenizer = tokenizer
        self._bos, self._eos = bos, eos
        self.bos_id, self.eos_id = (_id_of(tokenizer, token) for token in (bos, eos))
        if text_size is None:
            text_size = tokenizer.get_vocab_size()
            self._add(SPECIAL_TOKENS, special=True)
        self.text_size = text_size

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> TextTokenizer:
        """Load `tokenizer.json` from a folder or hub id; bos and eos from tokenizer_config.json, else <|endoftext|>."""
        with needs("train"):
            from tokenizers import Tokenizer

        folder = resolve(path, only=("tokenizer.json", "tokenizer_config.json"))  # beside it may lie gigabytes
        file = folder / "tokenizer.json"
        if not file.exists():
            raise UserError(f"{folder}: no tokenizer.json here: pass the folder of the language model's tokenizer")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:
            refuse_lfs_pointer(file)
            raise UserError(f"{file}: cannot be read as a tokenizer: {error}") from error
        about = read_json_table(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}

        def name(key: str) -> str:
            value = about.get(key) or "<|endoftext|>"
            return value["content"] if isinstance(value, dict) else str(value)

        return cls(tokenizer, name("bos_token"), name("eos_token"))

    def with_concept(self, tokens: Sequence[str]) -> TextTokenizer:
        """A copy that also knows a concept's tokens, as the ids right after the special ids."""
        with needs("train"):
            from tokenizers import Tokenizer

        if len(self) != self.text_size + len(SPECIAL_TOKENS):
            raise UserError("this tokenizer already knows a concept: start from the plain one")
        copy = TextTokenizer(Tokenizer.from_str(self._tokenizer.to_str()), self._bos, self._eos, self.text_size)
        copy._add(tokens, special=False)
        return copy

    def _add(self, tokens: Iterable[str], special: bool) -> None:
        with needs("train"):
            from tokenizers import AddedToken

        tokens = list(tokens)
        first = self._tokenizer.get_vocab_size()
        taken = [token for token in tokens if self._tokenizer.token_to_id(token) is not None]
        if taken or len(set(tokens)) != len(tokens):
            raise UserError(f"tokens {taken or tokens}: already in the vocabulary, or named twice: choose another name")
        added = [AddedToken(token, special=special, normalized=False) for token in tokens]
        (self._tokenizer.add_special_tokens if special else self._tokenizer.add_tokens)(added)
        if [self._tokenizer.token_to_id(token) for token in tokens] != list(range(first, first + len(tokens))):
            raise UserError("the tokenizer's ids have gaps: new tokens would not follow its text ids")

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def token_id(self, token: str) -> int | None:
        """Id of one token string, None when it is not in the vocabulary."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos or eos."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special ids, bos, eos and ids beyond the vocabulary (codes) are left out."""
        special = range(self.text_size, self.text_size + len(SPECIAL_TOKENS))
        ends = {self.bos_id, self.eos_id}
        kept = [i for i in map(int, ids) if 0 <= i < len(self) and i not in special and i not in ends]
        text = self._tokenizer.decode(kept, skip_special_tokens=False)
        if self._tokenizer.decoder is None:  # a word-level vocabulary: words joined by spaces
            text = re.sub(r" ([.,?!:;'])", r"\1", text)
            text = re.sub(r"' s\b", "'s", text)
        return text.strip()


def _id_of(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise UserError(f"the tokenizer has no token {token!r}: name its bos and eos tokens in tokenizer_config.json")
    return found
