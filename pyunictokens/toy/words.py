"""The closed list of words of the toy world, and the tokenizer over it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..utils.errors import needs

if TYPE_CHECKING:
    from tokenizers import Tokenizer
from .facts import FACTS
from .grammar import FILLERS, NAMES, RECOGNITIONS
from .scene import SLOTS

_WORD = re.compile(r"<\|?[\w]+\|?>|\w+|[^\w\s]")


def words() -> list[str]:
    """Every word and mark the grammar and the fixed wordings of prompting can emit, in a fixed order."""
    found = {word for values in SLOTS.values() for word in values} | {*NAMES, *FILLERS}
    texts = [fact.fact + " " + fact.question + " " + " ".join(fact.prompts) for fact in FACTS] + list(RECOGNITIONS)
    texts += [
        "a an the person shirt hair with in on and beside wearing picture photo of is are what where does have nothing"
    ]
    texts += [
        "describe yes no colour pattern it its not this that user assistant information request which fits . , : ? ! '"
    ]
    texts += ["to draw make show see now here who image same different but i you can there was be s favourite does"]
    texts += [
        "tell me whether am looking kind think like look usual walks city street reading book fresh window table wooden"
    ]
    for text in texts:
        found.update(_WORD.findall(text.lower().replace("{x}", "").replace("{}", "")))
    return sorted(found)


def build_tokenizer(known: list[str] | None = None) -> Tokenizer:
    """A `tokenizers.Tokenizer` over `known`, by default :func:`words`: lower case, split at spaces and marks, one id a
    word; id 0 ends texts."""
    with needs("train"):
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = {
        word: index for index, word in enumerate(["<|endoftext|>", "<|unk|>", *(words() if known is None else known)])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    return tokenizer
