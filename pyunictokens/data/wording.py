"""Every wording in one place: how facts and answers join a prompt, and the words that come with a new concept.

How facts, requests and answers are joined is the paper's (equations 2 to 4 and appendix D) and the same for every
model. The words of a new concept (questions about it, yes/no questions, prompts to draw it) are plain templates, so
that a concept made from photos alone can be trained and tested; a sheet of facts adds to them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")

_RECOGNITION = (
    "Is {sks} in this picture?",
    "Can you see {sks} here?",
    "Does this photo show {sks}?",
    "Is the {class_word} in this picture {sks}?",
    "Am I looking at {sks}?",
    "Tell me whether {sks} is in this photo.",
)
_PURE = {
    "human": (
        "A photo of {sks} on a beach.",
        "A photo of {sks} in a city street.",
        "A photo of {sks} wearing a red hat.",
        "A photo of {sks} reading a book.",
        "A portrait of {sks} in front of a mountain.",
        "A photo of {sks} in a kitchen.",
    ),
    "animal": (
        "A photo of {sks} on a beach.",
        "A photo of {sks} in fresh snow.",
        "A photo of {sks} wearing a red hat.",
        "A photo of {sks} sleeping on a sofa.",
        "A portrait of {sks} in front of a mountain.",
        "A photo of {sks} in a garden.",
    ),
    "object": (
        "A photo of {sks} on a beach.",
        "A photo of {sks} on a wooden table.",
        "A photo of {sks} in fresh snow.",
        "A photo of {sks} beside a window.",
        "A photo of {sks} in front of a mountain.",
        "A photo of {sks} on a stack of books.",
    ),
}
_DENSE = (
    "A photo of {sks} on a sandy beach at sunset, with two palm trees on the left and a white sailing boat far behind.",
    "A photo of {sks} in a small library, with a green lamp on the right, full shelves behind and a red rug in front.",
)


def text_only_question(extra_info: Sequence[str], prompt: str) -> str:
    """All facts of a concept and one request: the model is to answer with the fact that fits (paper, equation 2)."""
    facts = ". ".join(fact.strip().rstrip(".") for fact in extra_info)
    return f"Information: {facts}. Request: {prompt.strip().rstrip('.')}. Which information fits?"


def base_prompt(sks: str) -> str:
    """BP, the prompt that visual-instruct reasoning starts from (paper, equation 3)."""
    return f"A photo of {sks}."


def first_sentence(answer: str) -> str:
    """The part of an answer that goes into the compound prompt (a long one confuses drawing): its first line's first
    sentence."""
    line = answer.strip().partition("\n")[0].strip()
    end = _SENTENCE_END.search(line)
    return line[: end.end()] if end else line


def compound_prompt(prompt: str, answer: str) -> str:
    """CP = BP/IP + IR: the prompt, then the model's own answer as a sentence (paper, equations 3 and 4)."""
    prompt, answer = prompt.strip().rstrip("."), answer.strip().rstrip(".")
    return f"{prompt}. {answer}." if answer else f"{prompt}."


@dataclass(frozen=True)
class Wording:
    """The templates filled in for one concept; `info` may be empty."""

    sks: str
    kind: str
    class_word: str
    info: str

    def sentence(self) -> str:
        """What the concept is, in one sentence."""
        article = "an" if self.class_word[:1].casefold() in "aeiou" else "a"
        return f"{self.sks} is {article} {self.class_word}."

    def questions(self) -> list[tuple[str, str]]:
        """Asked about every image."""
        who = "Who" if self.kind == "human" else "What"
        pairs = [(f"{who} is {self.sks}?", self.sentence()), (f"{who} is in this picture?", f"This is {self.sks}.")]
        return [*pairs, (f"Describe {self.sks}.", self.info)] if self.info else pairs

    def text_only(self) -> list[tuple[str, str]]:
        """Asked without an image."""
        pairs = [(f"What kind of {'person' if self.kind == 'human' else self.kind} is {self.sks}?", self.sentence())]
        return [*pairs, (f"What does {self.sks} look like?", self.info)] if self.info else pairs

    def reworded(self, question: str) -> str:
        """The same question as the test half asks it."""
        return f"Think of {self.sks}. {question}"

    def recognition(self, index: int) -> list[str]:
        """Three yes/no questions for image `index`; neighbours get different ones."""
        asked = [_RECOGNITION[(3 * index + offset) % len(_RECOGNITION)] for offset in range(3)]
        return [template.format(sks=self.sks, class_word=self.class_word) for template in asked]

    def yes(self) -> str:
        return f"Yes, this is {self.sks}."

    def no(self) -> str:
        return f"No, {self.sks} is not in this picture."

    def pure_prompts(self) -> list[str]:
        """Short prompts that need no fact."""
        return [prompt.format(sks=self.sks) for prompt in _PURE[self.kind]]

    def dense_prompts(self) -> list[str]:
        """Long prompts with many details."""
        return [prompt.format(sks=self.sks) for prompt in _DENSE]


def as_json(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Questions with their answers as a concept folder has them."""
    return [{"query": query, "answer": answer} for query, answer in pairs]
