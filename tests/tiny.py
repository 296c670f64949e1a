"""Random models of the toy's kind, small enough for tests of everything that is built on top of them."""

from __future__ import annotations

from typing import Any

import torch


def tiny_toy(*_: Any, **__: Any) -> Any:
    """A random model of the toy's kind, small enough for tests: 16 codes, 32 pixels."""
    from pyunictokens.models import MagvitConfig, MagvitV2, ModelBundle, Showo, ShowoConfig, TextTokenizer
    from pyunictokens.toy.world import build_tokenizer

    torch.manual_seed(0)
    tokenizer = TextTokenizer(build_tokenizer(), "<|endoftext|>", "<|endoftext|>")
    config = ShowoConfig(
        vocab_size=tokenizer.text_size + 10 + 16 + 1,
        llm_vocab_size=tokenizer.text_size,
        codebook_size=16,
        num_vq_tokens=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        max_text=48,
    )
    vq_config = MagvitConfig(8, (1, 1, 1, 2), (1, 1, 1, 2), (1, 1, 1, 1), (1, 1, 1, 1), 4, 4)
    model, vq = Showo(config), MagvitV2(vq_config)
    return ModelBundle(model.requires_grad_(False).eval(), vq.requires_grad_(False).eval(), tokenizer)


def tiny_experts(*_: Any, **__: Any) -> Any:
    """The toy's reward experts with random weights."""
    from pyunictokens.toy.networks import ToyNetworks
    from pyunictokens.toy.rewards import toy_rewards
    from pyunictokens.toy.world import words

    torch.manual_seed(1)
    return toy_rewards(ToyNetworks(words()).requires_grad_(False).eval())
