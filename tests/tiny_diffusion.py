"""A tiny random Stable Diffusion, saved as diffusers saves it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = ["a</w>", "photo</w>", "of</w>", "dog</w>", "sks</w>", "snow</w>", "in</w>", "the</w>"]


def tiny_pipeline(place: Path) -> Path:
    """Write the pipeline into `place`; returns its folder."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    pieces = [chr(33 + i) for i in range(94)]
    vocab = {
        token: i
        for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *pieces, *(p + "</w>" for p in pieces), *WORDS])
    }
    (place / "vocab.json").write_text(json.dumps(vocab))
    (place / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(vocab=str(place / "vocab.json"), merges=str(place / "merges.txt"), model_max_length=32)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            eos_token_id=1,
            bos_token_id=0,
        )
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
    )
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False)
    pipe = diffusers.StableDiffusionPipeline(
        vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipe.save_pretrained(place / "pipe")
    return place / "pipe"
