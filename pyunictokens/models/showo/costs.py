"""What every phase of Show-o must cost: floating-point operations, bytes and launches, from the sizes alone.

Pure arithmetic over `ShowoConfig`; nothing is run and no machine is known. A multiply and an add count as two
operations; only matrix products and convolutions count, as `torch.utils.flop_counter` counts them (tests hold both side
by side). Bytes are an estimate: weights once a launch, and every tensor that an eager block reads or writes. What a
machine makes of it is the business of experiments/cost_tables.py; docs/cost-model.md shows its tables.

Letters: P prompt positions, N image codes, D width, I inner width, K codebook, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..costs import Cost as Cost
from ..costs import ModelCosts
from ..costs import decode_pixels as decode_pixels

if TYPE_CHECKING:
    from .sizes import ShowoConfig

BLOCK_LAUNCHES = 31
"""Kernels of one block without attention's own: two norms' worth of rotary, seven products, a cache to glue."""


def block_parameters(config: ShowoConfig) -> int:
    """Weights of one block's matrices, biases and norms left out."""
    width, inner = config.hidden_size, config.intermediate_size
    return 4 * width * width + 2 * width * inner


def parameters(config: ShowoConfig) -> int:
    """All parameters of the model, counted exactly (the CLIP projector left out)."""
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    biases = 4 * width + inner + width + 2 * width + (4 * head if config.qk_layernorm else 0)
    body = config.num_hidden_layers * (block_parameters(config) + biases) + 2 * width
    return body + 2 * config.vocab_size * width + config.vocab_size


def _block_bytes(config: ShowoConfig, tokens: float, keys: float, itemsize: int) -> float:
    """Traffic of one eager block over `tokens` positions whose rows look at `keys` positions in all.

    Per position: norm 2 D, q k v 6 D, their norms 4 D, rotary 10 D, attention 4 D, output 4 D, MLP 2 D + 4 I, sums 6 D;
    per key of a row 4 D: prompt and own positions are glued together, for keys and for values.
    """
    width, inner = config.hidden_size, config.intermediate_size
    return itemsize * (tokens * (38 * width + 4 * inner) + keys * 4 * width + block_parameters(config))


def transformer(config: ShowoConfig, rows: float, tokens: float, context: float, itemsize: int) -> Cost:
    """All blocks over `rows` rows of `tokens` positions, each looking at `context` positions (its own included)."""
    layers = config.num_hidden_layers
    return Cost(
        dense=layers * 2 * block_parameters(config) * rows * tokens,
        attention=layers * 4 * config.hidden_size * rows * tokens * context,
        bytes=layers * _block_bytes(config, rows * tokens, rows * context, itemsize),
        launches=layers * (BLOCK_LAUNCHES + 1),
    )


def _head(config: ShowoConfig, positions: float, columns: int, itemsize: int = 4) -> Cost:
    width = config.hidden_size
    moved = positions * (width + columns) + width * columns
    return Cost(head=2 * width * columns * positions, bytes=itemsize * moved, launches=2)


def prefill(config: ShowoConfig, tokens: int, rows: int = 1, itemsize: int = 2) -> Cost:
    """Keys and values of `rows` prompts of `tokens` positions (a masked product counts whole)."""
    return transformer(config, rows, tokens, tokens, itemsize)


def image_step(
    config: ShowoConfig, rows: int, prompt: int, count: int | None = None, guided: bool = True, itemsize: int = 2
) -> Cost:
    """One MaskGIT step of `rows` images over cached prompts of `prompt` positions: blocks, guidance, head, sampling."""
    count = config.num_vq_tokens if count is None else count
    both = rows * (2 if guided else 1)
    body = transformer(config, both, count + 2, prompt + count + 2, itemsize)
    logits = rows * count * config.codebook_size
    sampling = Cost(bytes=4 * logits + 4 * (3 if guided else 1) * rows * count * config.hidden_size, launches=30)
    return body + _head(config, rows * count, config.codebook_size) + sampling


def plain_image_step(
    config: ShowoConfig, rows: int, max_text: int, count: int | None = None, guided: bool = True, itemsize: int = 4
) -> Cost:
    """The same as published: the whole padded sequence under a mask, the head over the whole vocabulary everywhere.

    Logits are written, guided, and turned into probabilities, samples and ranks: ten passes over the code columns.
    """
    count = config.num_vq_tokens if count is None else count
    length, both = max_text + 1 + count + 2, rows * (2 if guided else 1)
    body = transformer(config, both, length, length, itemsize)
    head = _head(config, both * length, config.vocab_size, itemsize)
    sampling = Cost(bytes=itemsize * 10 * rows * count * config.codebook_size, launches=40)
    return body + head + sampling


def answers(config: ShowoConfig, rows: int, context: int, tokens: int, itemsize: int = 2) -> Cost:
    """`rows` answers of `tokens` tokens to one question after a context of `context` positions: prefill once, then one
    position a step. The first token comes from the prefill."""
    total = prefill(config, context, 1, itemsize)
    for step in range(tokens):
        if step:
            total += transformer(config, rows, 1, context + step, itemsize)
        total += _head(config, rows, config.vocab_size) + Cost(launches=15)
    return total


def answers_of(config: ShowoConfig, context: int, lengths: Sequence[int], itemsize: int = 2) -> Cost:
    """Answers of the given `lengths` to one question after a context of `context` positions: operations alone."""
    total = prefill(config, context, 1, itemsize)
    for length in lengths:
        later = length - 1
        total += transformer(config, 1, later, context + (later + 1) / 2, itemsize)
        total += _head(config, length, config.vocab_size)
    return Cost(dense=total.dense, attention=total.attention, head=total.head)


def plain_answers(config: ShowoConfig, rows: int, context: int, tokens: int, itemsize: int = 4) -> Cost:
    """The same as published: one answer at a time, and the whole sequence again for each token."""
    total = Cost()
    for step in range(tokens):
        length = context + step
        total += transformer(config, 1, length, length, itemsize)
        total += _head(config, length, config.vocab_size, itemsize) + Cost(launches=15)
    return rows * total


def reference(
    config: ShowoConfig,
    rows: int,
    timesteps: int,
    prompt: int,
    count: int | None = None,
    *,
    guided: bool = True,
    itemsize: int = 2,
) -> Cost:
    """Log-probs of all image tokens of `rows` rollouts without a graph."""
    count = config.num_vq_tokens if count is None else count
    packed = rows * timesteps
    body = transformer(config, packed * (2 if guided else 1), count + 2, prompt + count + 2, itemsize)
    return body + _head(config, packed * count, config.codebook_size, itemsize)


def update(
    config: ShowoConfig,
    rows: int,
    timesteps: int,
    prompt: int,
    count: int | None = None,
    *,
    guided: bool = True,
    trainable: str = "full",
    recompute: bool = False,
    itemsize: int = 2,
) -> Cost:
    """Forward and backward over all image tokens of `rows` rollouts.

    All weights learn ("full"): a backward pass is two forward passes. Concept rows alone ("concept"): gradients go to
    the prompts' keys and values only, so products with weights have one backward product instead of two, and the
    unconditional half has none. Adapters ("lora") cost like "concept" with both halves; their own products are left
    out. `recompute` adds a forward pass of the blocks but for their last product.
    """
    count = config.num_vq_tokens if count is None else count
    packed = rows * timesteps
    one = transformer(config, packed, count + 2, prompt + count + 2, itemsize)
    learning = 2 if guided and trainable != "concept" else 1
    still = (2 if guided else 1) - learning
    dense_backward = 2 if trainable == "full" else 1
    again = _recomputed(config) if recompute else 0.0
    body = still * one + learning * Cost(
        dense=(1 + again + dense_backward) * one.dense,
        attention=(3 + bool(again)) * one.attention,
        bytes=(3 + bool(again)) * one.bytes,
        launches=(3 + bool(again)) * one.launches,
    )
    products = 3 if trainable == "full" else 2
    return body + products * _head(config, packed * count, config.codebook_size, itemsize)


def _recomputed(config: ShowoConfig) -> float:
    """The part of a block's products that checkpointing does again: all but the last, whose result is not used."""
    return 1 - config.hidden_size * config.intermediate_size / block_parameters(config)


# --- memory of the update --------------------------------------------------------------------------------------------


def activation_bytes(
    config: ShowoConfig,
    prompt: int,
    count: int | None = None,
    *,
    guided: bool = True,
    trainable: str = "full",
    checkpointed_layers: int = 0,
    itemsize: int = 2,
) -> float:
    """What one packed row (a rollout at a timestep) keeps between forward and backward, in bytes.

    Per position and block 7 D + 2 I: the input, its norm, q and k before their norms, q after them, attention's result
    in both layouts, the MLP's inner tensor before and after its activation; and per key 2 D, the glued keys and values.
    A checkpointed block keeps its input alone; while one is recomputed its tensors exist once more.
    """
    count = config.num_vq_tokens if count is None else count
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    halves = 2 if guided and trainable != "concept" else 1
    tokens = count + 2
    block = itemsize * (tokens * (7 * width + 2 * inner) + (prompt + tokens) * 2 * width)
    entry = itemsize * tokens * width
    kept = (layers - checkpointed_layers) * block + checkpointed_layers * entry
    kept += block if checkpointed_layers else 0
    ends = itemsize * tokens * width + 12 * count * width  # the final norm's input; what the head holds in float32
    still = 6 * tokens * (width + inner) * itemsize if guided and halves == 1 else 0.0  # passes through, keeps nothing
    return halves * (kept + ends) + still


def state_bytes(config: ShowoConfig, trainable: str = "full", itemsize: int = 2, rows: int = 25) -> float:
    """Weights, gradients, AdamW's moments and float32 master weights of what learns, in bytes."""
    total = parameters(config)
    if trainable != "full":
        return itemsize * total + 4 * 4 * rows * 2 * config.hidden_size
    twins = 12 if itemsize == 4 else 16  # moments 8, gradient 4, and for lower precision a twin of 4
    return total * (itemsize + twins)


def learned_parameters(config: ShowoConfig, trainable: str = "full", *, rows: int = 25, rank: int = 8) -> int:
    """How many parameters learn: all ("full"), adapters of `rank` on every matrix of the blocks ("lora"), or `rows`
    concept rows of embedding and head with their biases ("concept")."""
    width, inner = config.hidden_size, config.intermediate_size
    if trainable == "full":
        return parameters(config)
    if trainable == "lora":
        return config.num_hidden_layers * rank * (4 * 2 * width + 2 * (width + inner))
    return rows * (2 * width + 1)


def sharded_state_bytes(
    config: ShowoConfig,
    trainable: str = "full",
    *,
    ranks: int = 1,
    rows: int = 25,
    rank: int = 8,
    itemsize: int = 2,
    block_bits: float | None = None,
) -> float:
    """What one of `ranks` holds between steps, in bytes: all weights and float32 gradients of what learns; of float32
    twins and AdamW's moments (12 bytes a parameter) its share. `block_bits`: of a weight of the blocks, where they are
    quantised."""
    learned = learned_parameters(config, trainable, rows=rows, rank=rank)
    saved = 0.0
    if block_bits is not None:
        saved = config.num_hidden_layers * block_parameters(config) * (itemsize - block_bits / 8)
    return itemsize * parameters(config) - saved + learned * (4 + 12 / ranks)


def exchanged_bytes(learned: float, ranks: int, itemsize: int = 2) -> float:
    """What each of `ranks` sends in one step, in bytes, by rings: float32 gradients summed everywhere (twice around),
    and new weights from the rank that made them (once around)."""
    return (2 * 4 + itemsize) * learned * (ranks - 1) / ranks


class ShowoCosts(ModelCosts):
    """The arithmetic of this file, as engine and trainers ask for it."""

    def __init__(self, config: ShowoConfig, itemsize: int):
        super().__init__(
            parameters(config),
            config.num_hidden_layers,
            config.hidden_size,
            config.codebook_size,
            config.num_vq_tokens,
            itemsize,
        )
        self.config = config

    def prefill(self, tokens: int) -> Cost:
        return prefill(self.config, tokens)

    def image_step(self, rows: int, prompt: int, count: int, guided: bool) -> Cost:
        return image_step(self.config, rows, prompt, count, guided)

    def answers(self, context: int, lengths: Sequence[int]) -> Cost:
        return answers_of(self.config, context, lengths)

    def reference(self, rows: int, timesteps: int, prompt: int, count: int, guided: bool) -> Cost:
        return reference(self.config, rows, timesteps, prompt, count, guided=guided)

    def update(self, rows: int, timesteps: int, prompt: int, count: int, guided: bool, trainable: str) -> Cost:
        return update(self.config, rows, timesteps, prompt, count, guided=guided, trainable=trainable)

    def step_bytes(self, count: int) -> int:
        config = self.config
        return (count + 2) * (10 * config.hidden_size + 3 * config.intermediate_size) * self.itemsize

    def scoring_bytes(self, prompt: int, count: int, guided: bool) -> float:
        """Nothing is kept: two blocks' worth of tensors, and float32 states for the head."""
        width, halves = self.config.hidden_size, 2 if guided else 1
        tensors = (count + 2) * (24 * width + 4 * self.config.intermediate_size) * self.itemsize
        return halves * tensors + 12 * count * width

    def activation_bytes(
        self, prompt: int, count: int, guided: bool, trainable: str, checkpointed_layers: int = 0
    ) -> float:
        return activation_bytes(
            self.config,
            prompt,
            count,
            guided=guided,
            trainable=trainable,
            checkpointed_layers=checkpointed_layers,
            itemsize=self.itemsize,
        )
