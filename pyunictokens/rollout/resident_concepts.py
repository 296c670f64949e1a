"""Concepts that are at hand all at once: which one a prompt speaks of, and how its words become ids.

Each concept has the same ids after the special ids, its own tokenizer to write them, and its own rows to read them.
Only a prompt's prefix and an answer's tokens differ between concepts; image rows share everything, so prompts of any
concepts go through one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ..models import ConceptTokens, MaskedModel, TextTokenizer, owning_rows
from ..utils.errors import UserError
from . import checks


class Residents:
    """The resident concepts of one engine, by name."""

    def __init__(self, model: MaskedModel, tokenizer: TextTokenizer | None):
        self._model, self._tokenizer = model, tokenizer
        self._concepts: dict[str, ConceptTokens] = {}
        self._tokenizers: dict[str, TextTokenizer] = {}

    @property
    def names(self) -> list[str]:
        return list(self._concepts)

    def add(self, concept: ConceptTokens, name: str | None = None) -> None:
        """Keep a concept at hand under its own name or another, in place of the one that has it."""
        if self._model.concept is not None:
            raise UserError(
                f"the model has {self._model.concept.sks} attached: take it off (model.detach()) and add it beside "
                f"{concept.sks}"
            )
        if concept.width != owning_rows(self._model).width:
            raise UserError(f"concept {concept.sks} of width {concept.width}: this model has width {self._model.width}")
        name = concept.name if name is None else name
        if self._tokenizer is not None:
            self._tokenizers[name] = self._tokenizer.with_concept(concept.tokens)
        self._concepts[name] = concept

    def remove(self, name: str) -> ConceptTokens:
        """Let a concept go; returns it."""
        self._known(name)
        self._tokenizers.pop(name, None)
        return self._concepts.pop(name)

    def rows(self, name: str | None) -> ConceptTokens | None:
        """The concept of a name; for None the one attached to the model, if any."""
        return self._model.concept if name is None else self._concepts[name]

    def tokenizer(self, name: str | None) -> TextTokenizer | None:
        """The tokenizer that knows a concept's tokens."""
        return self._tokenizers.get(name, self._tokenizer) if name is not None else self._tokenizer

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Inside this context the model has that concept attached; for None it stays as it is."""
        if name is None:
            yield
            return
        with self._model.using(self._concepts[name]):
            yield

    def read(
        self,
        label: str,
        texts: checks.Texts,
        concepts: str | Sequence[str | None] | None,
        wrap: Callable[[str], str] | None = None,
    ) -> tuple[list[list[int]], list[str | None]]:
        """(ids, concept) of each text. What `concepts` does not say is read from the text: it names its concept.

        Raises:
            UserError: an unknown concept, a text that names two, or anything `checks.token_lists` refuses.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        names = self._names(label, texts, concepts)
        if not any(names):
            return checks.token_lists(label, texts, self._tokenizer, self._model, wrap), names
        lists = []
        for place, (text, name) in enumerate(zip(texts, names, strict=True)):
            with self.using(name):
                lists += checks.token_lists(label, [text], self.tokenizer(name), self._model, wrap, place)
        return lists, names

    def _names(
        self, label: str, texts: Sequence[object], concepts: str | Sequence[str | None] | None
    ) -> list[str | None]:
        if concepts is not None:
            given: list[str | None] = [*concepts] if not isinstance(concepts, str) else [concepts for _ in texts]
            if len(given) != len(texts):
                raise UserError(f"{len(given)} concepts for {len(texts)} {label}: give one name, or one for each")
            for name in given:
                if name is not None:
                    self._known(name)
            return given
        names: list[str | None] = []
        for place, text in enumerate(texts):
            named = [name for name in self._concepts if isinstance(text, str) and f"<{name}>" in text]
            if len(named) > 1:
                raise UserError(
                    f"{label}[{place}] names {' and '.join(f'<{name}>' for name in named)}: a prompt can speak of one "
                    "concept"
                )
            names.append(named[0] if named else None)
        return names

    def _known(self, name: str) -> None:
        if name not in self._concepts:
            raise UserError(
                f"concept {name!r} is not resident ({', '.join(self._concepts) or 'none is'}): add it with "
                "engine.add_concept"
            )
