"""How raw texts with `<name>` in them become what the model reads; the one place that decides it for stages and GRPO.

A text to draw or a question names the concept as `<name>`; the model reads the helper tokens before it (paper, appendix
D):

    as_prompt(concept, "A photo of <bo>.")      "A photo of <token_0>…<token_23><bo>."
    as_question(concept, "What is <bo>?")       "What is <token_0>…<token_23><bo>?"

Evaluation calls the same ``ConceptTokens.expand``.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..models import ConceptTokens

GROUPS = ("understanding", "generation", "extra")


def as_prompt(concept: ConceptTokens, text: str, groups: Sequence[str] = GROUPS) -> str:
    """A raw text as the prompt the model draws from: the first `<name>` gets the helper tokens of `groups`."""
    return concept.expand(text, groups)


def as_question(concept: ConceptTokens, question: str, groups: Sequence[str] = GROUPS, form: str = "expand") -> str:
    """A raw question as the model reads it.

    form "expand" puts the helper tokens before the first `<name>`; "prefix" puts the published sentence
    "<name> is <token_0>…." before the question. A question that does not name the concept is left alone by "expand".
    """
    if form == "expand":
        return concept.expand(question, groups)
    if form != "prefix":
        raise ValueError(f"form={form!r}: must be expand or prefix")
    return concept.introduce(question, groups)
