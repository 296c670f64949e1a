"""The form in which UniCTokens trains and asks its tokens, for everything that speaks to a model that learned them.

    PublishedForm(concept).question("What is <bo>?")     "USER: <bo> is <token_0>…<token_15>.What is <bo>? ASSISTANT:"
    PublishedForm(concept).expand("<bo> and <bo>.")      all helper tokens before each "<bo>"

Tokens that its code trained give here the answers they give there. Our own form is `ConceptTokens.expand` and the
model's `question_text`.
"""

from __future__ import annotations

from .concept_tokens import ConceptTokens
from .showo.prompting import published_question


class PublishedForm:
    """A concept's tokens in that form: questions follow the sentence "<name> is <token_0>…." with the understanding
    tokens and stand behind "USER: " without a line break; prompts have all helper tokens before every `<name>`."""

    def __init__(self, tokens: ConceptTokens):
        self.tokens = tokens

    def expand(self, text: str) -> str:
        """A prompt as the model reads it."""
        return self.tokens.expand(text, every=True)

    def question(self, text: str) -> str:
        """A question as the model reads it, its wrapping included."""
        return published_question(self.tokens.introduce(text))
