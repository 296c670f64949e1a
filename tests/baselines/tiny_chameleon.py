"""A tiny random Chameleon in the library's own layout, with reserved tokens and the weights of a VQGAN decoder."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.evaluate.test_vlm import tokenizer

RESERVED = tuple(f"<reserved{number}>" for number in range(16200, 16206))


def chameleon(place: Path, decoder: bool = True) -> None:
    from transformers import (
        ChameleonConfig,
        ChameleonForConditionalGeneration,
        ChameleonImageProcessor,
        ChameleonProcessor,
        ChameleonVQVAEConfig,
    )

    from pyunictokens.baselines.chameleon import VqDecoder

    words = tokenizer("<image>", "<racm3:break>", "<eoss>", "<reserved08706>", *RESERVED)
    words.sep_token = "<reserved08706>"
    codes = {f"IMGIMG{chr(65 + i)}Z": len(words) + i for i in range(8)}
    vocabulary = {**words.get_vocab(), **codes}
    vq = ChameleonVQVAEConfig(
        embed_dim=8,
        num_embeddings=8,
        latent_channels=8,
        resolution=8,
        base_channels=32,
        channel_multiplier=[1, 2],
        num_res_blocks=1,
    )
    config = ChameleonConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vq_config=vq,
        vocabulary_map=vocabulary,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )
    images = ChameleonImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    ChameleonForConditionalGeneration(config).save_pretrained(place)
    ChameleonProcessor(images, words, image_seq_length=16).save_pretrained(place)
    if decoder:
        file = place / "model.safetensors"
        made = VqDecoder(vq).state_dict()
        weights = load_file(file) | {
            f"model.vqmodel.decoder.{name}": torch.randn_like(v) * 0.1 for name, v in made.items()
        }
        save_file(weights, file, metadata={"format": "pt"})
