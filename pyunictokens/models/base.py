"""What engine, trainers and evaluation ask of a model that draws by unmasking image codes; they know nothing else.

    prompt  →  prompt_ids  →  prefill  →  Prefix          what a prompt is to the model, computed once
    codes, Prefix  →  image_hidden  →  image_head         logits are one matrix product away: hidden · weightᵀ + bias

`MaskedModel` is the whole of it for a model that draws. `AnsweringModel` adds text, `ConceptModel` rows that a concept
may own, `CapturableModel` image steps that a CUDA graph can hold. `WritingModel` is a model of text that unmasks tokens
block after block: to engine and update its tokens are codes. `BlockAnsweringModel` draws, and has such a model inside.
Callers ask with :func:`answering`, :func:`writing` and :func:`owning_rows`, which refuse with one clear sentence. A new
model is a subclass in a file of its own and a line in models/registry.py.

Shape suffixes: B rows, N image codes, L text positions, D width, K codebook, V vocabulary.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..utils.errors import UserError
from .concept_tokens import ConceptTokens
from .costs import Cost, ModelCosts
from .prefix import Prefix
from .sampling_rule import BlockRule, SamplingRule

AnyModel = TypeVar("AnyModel", bound="MaskedModel")
AnyConceptModel = TypeVar("AnyConceptModel", bound="ConceptModel")


class MaskedModel(nn.Module, ABC):
    """A model that draws by unmasking: codes of an image, some unknown, to a distribution over each of them.

    A subclass sets the attributes below in its constructor and writes the abstract methods. Image rows never change
    their prompt, so a prompt is computed once (:meth:`prefill`) and serves all rows and steps.
    """

    family: ClassVar[str]
    """What the registry and messages call this kind of model."""
    lora_targets: ClassVar[tuple[str, ...]] = ()
    """Names of the modules that LoRA goes to; empty: no adapters."""

    rule: SamplingRule = SamplingRule()
    codebook_size: int
    """K: how many codes there are."""
    grid: tuple[int, int]
    """(height, width) in codes of the images the model was made for."""
    width: int
    """D: of the hidden states before the heads, and of a concept's rows."""
    max_text: int
    """Text positions of an image prompt. It belongs to the weights: with another one the image stands elsewhere."""
    num_text_ids: int
    """Ids 0…num_text_ids − 1 may stand in a prompt, an attached concept's included."""
    checkpoint_layers: bool | int = False
    """Layers, counted from the first, that are recomputed in the backward pass; True means all."""
    prompt_mask_id: int | None = None
    """The id that hides a token of a prompt, where the model reads such prompts."""
    concept: ConceptTokens | None = None
    """The attached concept (`ConceptModel`)."""

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    # --- images ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def prompt_ids(self, text_ids: Sequence[int]) -> list[int]:
        """What is prefilled for a text's ids, cut to what the model reads; [] gives the unconditional prompt."""

    def cut_ids(self, text_ids: Sequence[int]) -> int:
        """How many ids at the end of a text :meth:`prompt_ids` leaves out."""
        return max(0, len(text_ids) - self.max_text)

    @abstractmethod
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Prefix:
        """What image rows need of prompts (of :meth:`prompt_ids`), one entry a prompt in their order. Differentiable.
        Raises UserError for a prompt that is too long."""

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raises UserError where the model cannot draw `grid` (height, width) codes. By default any grid will do."""

    @abstractmethod
    def image_hidden(
        self, codes_BN: Tensor, prefix: Prefix, prefix_of_row: Sequence[int], timestep_B: Tensor
    ) -> Tensor:
        """What the last linear layer multiplies, [B, N, D], at image codes int [B, N] (−1 unknown). Differentiable.

        Row b reads prompt `prefix_of_row[b]` of `prefix`, and stands at `timestep_B[b]`, float32: the part t/T of the
        steps that are done, 0 where all is unknown. A model without an embedding of time ignores it.
        """

    @abstractmethod
    def image_head(self) -> tuple[Tensor, Tensor | None]:
        """(weight [K, D], bias [K] or None) of the last linear layer."""

    @property
    def costs(self) -> ModelCosts:
        """Operations and bytes of what the model does; by default estimated from its number of parameters."""
        itemsize = self.image_head()[0].element_size()
        total = sum(parameter.numel() for parameter in self.parameters())
        return ModelCosts(total, 1, self.width, self.codebook_size, math.prod(self.grid), itemsize)

    def shardable_layers(self) -> nn.ModuleList | None:
        """The transformer's layers, where each may be computed with weights that are spread over ranks; None where they
        may not. Nothing but a layer's output may be kept of a call for the backward pass."""
        return None

    # --- files -----------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, object]:
        """What must agree before trained weights may be put into a model: sizes, as JSON values."""
        return {
            "family": self.family,
            "codebook_size": self.codebook_size,
            "grid": list(self.grid),
            "width": self.width,
        }

    @classmethod
    @abstractmethod
    def from_pretrained(
        cls: type[AnyModel],
        path: str | os.PathLike[str],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> AnyModel:
        """Load a folder or hub id, frozen and in eval mode. Raises UserError for files that do not fit."""

    @abstractmethod
    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a folder that :meth:`from_pretrained` reads. An attached concept is saved on its own."""

    def push_to_hub(self, to: str | os.PathLike[str], *, private: bool = True) -> str:
        """:meth:`save_pretrained` with a model card, to a hub id or an empty folder (hub.py); returns where it lies."""
        from .hub import model_card, publish

        def write(folder: Path) -> None:
            self.save_pretrained(folder)
            model_card(self.family, self.identity(), isinstance(self, WritingModel)).write(folder)

        return publish(write, to, private=private)

    def compiled_blocks(self) -> AbstractContextManager[None]:
        """A context in which image steps run blocks that torch.compile made, where no gradient is formed. Raises
        UserError for a model that has none."""
        raise UserError(f"blocks=compiled: {self.family} has no compiled blocks; use blocks=eager")

    # --- a concept's rows: see ConceptModel --------------------------------------------------------------------------

    @property
    def num_new(self) -> int:
        """Rows of the attached concept, 0 without one."""
        return 0 if self.concept is None else self.concept.num_tokens

    @contextmanager
    def using(self: AnyModel, concept: ConceptTokens | None) -> Iterator[AnyModel]:
        """Inside this context `concept` is the attached one (None: none is)."""
        before = self.concept
        self.__dict__["concept"] = None
        try:
            if concept is not None:
                owning_rows(self).attach(concept)
            yield self
        finally:
            self.__dict__["concept"] = before


class ConceptModel(MaskedModel):
    """A model in which a concept may own rows: ids of its own, with embeddings and, where there is text, head rows.

    The rows are attached beside the weights, never written into them; only they need training.
    """

    def attach(self: AnyConceptModel, concept: ConceptTokens) -> AnyConceptModel:
        """Use `concept`'s rows for its ids. Its tensors stay its own. Raises UserError for rows of another width."""
        if concept.width != self.width:
            raise UserError(f"concept of width {concept.width}: this model has width {self.width}")
        self.__dict__["concept"] = concept  # not a submodule: the model's own weights stay the published ones
        return self

    def detach(self) -> ConceptTokens | None:
        """Take the attached concept off and return it."""
        concept = self.concept
        self.__dict__["concept"] = None
        return concept

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Token ids int64 [...] to embeddings [..., D], the concept's rows included. A concept's rows start from
        those of words."""

    @abstractmethod
    def embed_codes(self, codes: Tensor) -> Tensor:
        """Image codes int [...], −1 where unknown, to embeddings [..., D]. A concept's rows start from those of its
        images."""


class TextVocabulary(Protocol):
    """Embedding and head of the whole vocabulary for rows that speak of different concepts. It gives no gradients."""

    def embed(self, ids_B: Tensor, concept_B: Tensor) -> Tensor:
        """Embeddings [B, D] of ids int64 [B], each of its row's concept."""
        ...

    def logits(self, hidden_BD: Tensor, concept_B: Tensor) -> Tensor:
        """Logits [B, V] in at least float32 of hidden states [B, D], each of its row's concept."""
        ...


class AnswerDecoder(Protocol):
    """Token-by-token text over a prefix: one new position a call for every row. A call waits for nothing."""

    def __call__(self, x_BD: Tensor, step: Tensor) -> Tensor:
        """Hidden states [B, D] at token embeddings [B, D], the tokens of number `step` int64 [1] of their answers."""
        ...

    def advance(self, going: Tensor | int = 1) -> None:
        """The position just computed becomes part of the past, unless `going` (0 or 1) is 0."""
        ...

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop every row but those of the given indices, in ascending order."""
        ...


class JoiningDecoder(Protocol):
    """Token-by-token text of rows that join and leave at any time, each at its own token. It gives no gradients."""

    def join(self, prefix: Prefix, rows: int, max_new: int) -> None:
        """`rows` answers of at most `max_new` tokens begin over the one prompt of `prefix`; they stand behind the
        others."""
        ...

    def __call__(self, x_BD: Tensor) -> Tensor:
        """Hidden states [B, D] after the next token of every row, given as embeddings [B, D]."""
        ...

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop every row but those of the given indices, in ascending order."""
        ...


class AnsweringModel(MaskedModel):
    """A model that also answers questions about an image, token by token."""

    end_id: int
    """The id that ends an answer."""
    max_positions: int
    """Positions of the longest sequence."""
    takes_features: bool = False
    """Whether questions are about the features of an image encoder in place of codes."""

    @property
    def encoder(self) -> ImageEncoder:
        """The image encoder whose features questions are about. Raises UserError where there is none."""
        raise UserError(f"{self.family} reads image codes, not features")

    @abstractmethod
    def question_text(self, question: str) -> str:
        """A question in the wording the model was trained with."""

    @abstractmethod
    def question_ids(self, text_ids: Sequence[int]) -> list[int]:
        """What is read for the ids of a question, its first special ids included."""

    @abstractmethod
    def prefill_questions(self, seen: Tensor, questions: Sequence[Sequence[int]]) -> tuple[Prefix, Tensor]:
        """(prefix, hidden state [B, D] from which the first token of each answer is drawn) of what :func:`looked_at`
        gives of B images, and the ids of a question about each. Differentiable."""

    @abstractmethod
    def prefill_images(self, seen: Tensor) -> Prefix:
        """The part of :meth:`prefill_questions` that no text changes: B images, before any question."""

    @abstractmethod
    def text_hidden(self, ids_BL: Tensor, prefix: Prefix, prefix_of_row: Sequence[int]) -> Tensor:
        """Hidden states [B, L, D] at text ids int64 [B, L] that follow the prompts. Differentiable."""

    def answer_hidden(
        self, tokens_BL: Tensor, prefix: Prefix, last_hidden: Tensor, prefix_of_row: Sequence[int]
    ) -> Tensor:
        """Hidden states [B, L, D] that predict answer tokens int64 [B, L] (any id past an answer's end is ignored by
        the caller's mask): the prompt's last state for token 0, then the state at each token for the next."""
        first = last_hidden[torch.as_tensor(list(prefix_of_row), device=last_hidden.device)][:, None]
        if tokens_BL.shape[1] == 1:
            return first
        return torch.cat([first, self.text_hidden(tokens_BL[:, :-1].clamp(min=0), prefix, prefix_of_row)], dim=1)

    @abstractmethod
    def text_parts(self) -> tuple[Tensor, ...]:
        """The tensors of the text head that may learn, as :meth:`text_logprob` takes them."""

    @abstractmethod
    def text_logprob(
        self, hidden: Tensor, target: Tensor, *, temperature: float = 1.0, parts: Sequence[Tensor] | None = None
    ) -> Tensor:
        """log p(target) under the full distribution of tokens, fp32, shaped like `target` int64 [...], of hidden
        [..., D]. `parts` replaces :meth:`text_parts` by copies. Differentiable."""

    @abstractmethod
    def vocabulary(self, concepts: Sequence[ConceptTokens | None]) -> TextVocabulary:
        """The vocabulary under each of `concepts` (None: without one)."""

    @abstractmethod
    def decoder(self, prefix: Prefix, prefix_of_row: Sequence[int], max_new: int, sliced: bool) -> AnswerDecoder:
        """Decoding of answers of at most `max_new` tokens; rows of one prompt stand together. Not `sliced`: shapes are
        static, so that a step can be captured."""

    def joining_decoder(self) -> JoiningDecoder:
        """Decoding of answers that join while others are under way. By default those that joined together share a
        batch, and no others."""
        from .joining import SeparateDecoders

        return SeparateDecoders(self)


class WritingModel(MaskedModel):
    """A model of text that writes by unmasking tokens, block after block (rollout/blocks.py).

    Its codes are token ids: `image_hidden` and `image_head` are those of text positions, and `codebook_size` is the
    vocabulary. A prompt is a list of ids, an image's among them where the model reads images.
    """

    blocks: BlockRule = BlockRule()
    mask_id: int
    """The id that stands for an unknown token."""
    end_ids: tuple[int, ...]
    """Ids that end a text."""
    max_positions: int
    """Positions of the longest sequence, prompt and text together."""

    @property
    def drawing(self) -> BlockAnsweringModel | None:
        """The model that this one is the writer of, and that says how a question about an image is read."""
        return None

    @abstractmethod
    def asked(self, text: str) -> str:
        """A question or task in the wording the model was trained with."""

    @abstractmethod
    def block_hidden(self, codes_BN: Tensor, prefix: Prefix, prefix_of_row: Sequence[int], place: slice) -> Tensor:
        """`image_hidden` at the positions `place` alone, [B, b, D], where the time is of no account. Differentiable."""


class BlockAnsweringModel(MaskedModel):
    """A model that draws, and answers questions about an image by unmasking blocks of text."""

    @property
    @abstractmethod
    def writer(self) -> WritingModel:
        """The same weights as a model of text."""

    @abstractmethod
    def question_text(self, question: str) -> str:
        """A question about an image in the wording the model was trained with."""

    @abstractmethod
    def question_prompt(self, codes_N: Sequence[int], question_ids: Sequence[int]) -> list[int]:
        """What the writer reads of an image's codes and a question's ids."""


class ImageStep(Protocol):
    """`image_hidden` with prefix and rows fixed: codes [B, N] and timesteps [B] to hidden states [B, N, D]. A call
    waits for nothing and makes nothing on the host, so it can be captured."""

    def __call__(self, codes_BN: Tensor, timestep_B: Tensor) -> Tensor: ...

    def refresh(self) -> None:
        """Take what now lies in the tensors of the prefix. It is called between captured steps, never inside one."""
        ...


class CapturableModel(MaskedModel):
    """A model whose image steps can be captured as a CUDA graph."""

    @abstractmethod
    def image_step(self, prefix: Prefix, prefix_of_row: Sequence[int], count: int) -> ImageStep:
        """The step of rows of `count` codes over the tensors of `prefix` where they lie: others may be copied in, and
        the step's `refresh` is called then."""

    def padded(self, prefix: Prefix) -> Prefix:
        """`prefix` for :meth:`image_step` alone, in tensors of few different shapes: prompts of different lengths fit
        into the same ones, and what is behind a prompt's own positions is seen by nobody. By default as it is: each
        length then has a capture of its own."""
        return prefix


class ImageTokenizer(nn.Module, ABC):
    """Pixels to codes and back."""

    codebook_size: int
    downsampling: int
    """Pixels along one side of a code."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [−1, 1] to codes int64 [B, N], row by row."""

    @abstractmethod
    def decode(self, codes: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """Codes int64 [B, N] of a grid `shape` (height, width; a square by default) to pixels [B, 3, H, W]."""

    def decode_cost(self, rows: int, grid: tuple[int, int]) -> Cost:
        """What :meth:`decode` costs; unknown by default."""
        return Cost()


class ImageEncoder(Protocol):
    """What a model looks at where that is no codes (models/vision.py)."""

    @property
    def size(self) -> int:
        """Pixels along one side of the squares it looks at."""
        ...

    def features(self, pixels: Tensor) -> Tensor:
        """Features [B, patches, E] of pixels [B, 3, H, H] in [−1, 1]."""
        ...


def looked_at(model: MaskedModel, vq: ImageTokenizer, pixels: Tensor) -> Tensor:
    """What questions are asked about, on the model's device, of pixels [B, 3, H, W] in [−1, 1]: codes int64 [B, N], or
    features [B, patches, E] where the model takes those."""
    if isinstance(model, AnsweringModel) and model.takes_features:
        return model.encoder.features(pixels).to(model.device)
    weight = next(vq.parameters())
    return vq.encode(pixels.to(weight.device, weight.dtype)).to(model.device)


def features_side(model: MaskedModel) -> int | None:
    """Pixels along one side of the squares whose features a model takes; None where it takes codes."""
    return model.encoder.size if isinstance(model, AnsweringModel) and model.takes_features else None


def answering(model: MaskedModel) -> AnsweringModel:
    """`model`, where it answers questions; UserError where it does not."""
    if isinstance(model, (WritingModel, BlockAnsweringModel)):
        raise UserError(
            f"{model.family} writes text by blocks, not token by token: RolloutEngine.generate_text and .write and "
            "reinforcement on prompts can use it; what was asked for here needs show-o"
        )
    if not isinstance(model, AnsweringModel):
        raise UserError(
            f"{model.family} draws but does not answer: it has no text head. Use a model that has one (show-o), or "
            "leave out what asks for answers"
        )
    return model


def writing(model: MaskedModel) -> WritingModel:
    """`model`, or the writer inside it, where it writes text by blocks; UserError where it does not."""
    if isinstance(model, BlockAnsweringModel):
        return model.writer
    if not isinstance(model, WritingModel):
        raise UserError(f"{model.family} does not write text by blocks: use a model that does (llada, mmada)")
    return model


def owning_rows(model: MaskedModel) -> ConceptModel:
    """`model`, where a concept may own rows in it; UserError where none may."""
    if not isinstance(model, ConceptModel):
        raise UserError(
            f"{model.family} has no rows that a concept may own: use a model that has (show-o), or train without a "
            "concept"
        )
    return model
