"""A tiny random aMUSEd, saved as the library that publishes it saves its pipelines."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = ["a</w>", "photo</w>", "of</w>", "dog</w>", "red</w>", "cat</w>", "in</w>", "snow</w>", "big</w>"]
CODES, SIDE, PLACES = 24, 4, 12


def write_pipeline(
    place: Path,
    seed: int = 0,
    halved: bool = True,
    codes: int = CODES,
    side: int = SIDE,
    places: int = PLACES,
    **other: int,
) -> Path:
    """The folder of a pipeline; `halved`: the transformer works on a quarter of the positions, as in the 512² model.
    `other`: sizes of the transformer that are not to be tiny, by the names of its config."""
    import diffusers
    from diffusers.pipelines.deprecated.amused.pipeline_amused import AmusedPipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(seed)
    place.mkdir(parents=True, exist_ok=True)
    letters = [chr(33 + i) for i in range(94)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters), *WORDS]
    tokens += ["".join(pair) for pair in _merges()]
    vocabulary = {token: place for place, token in enumerate(dict.fromkeys(tokens))}
    words = CLIPTokenizer(vocab=vocabulary, merges=_merges(), model_max_length=places, pad_token="!")
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            projection_dim=12,
            intermediate_size=20,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=places,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    sizes = {
        "hidden_size": 24,
        "cond_embed_dim": 12,
        "micro_cond_encode_dim": 8,
        "micro_cond_embed_dim": 40,
        "encoder_hidden_size": 16,
        "vocab_size": codes + 8,
        "codebook_size": codes,
        "in_channels": 20,
        "block_out_channels": 16,
        "num_res_blocks": 2,
        "block_num_heads": 2,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 28,
        "sample_size": side,
    }
    net = diffusers.UVit2DModel(downsample=halved, upsample=halved, **sizes | other)
    with torch.no_grad():  # weights of the usual size would give flat distributions, which prove little
        for name, parameter in net.named_parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
            if "channelwise_norm" in name:
                parameter.normal_(0.0, 0.3)
    vq = diffusers.VQModel(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=6,
        num_vq_embeddings=codes,
        norm_num_groups=4,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )
    pipe = AmusedPipeline(vq, words, text, net, diffusers.AmusedScheduler(mask_token_id=codes + 3))
    pipe.save_pretrained(place / "pipe")
    return place / "pipe"


def _merges() -> list[tuple[str, str]]:
    """Merges that put whole words of WORDS together from their letters."""
    found: list[tuple[str, str]] = []
    for word in (token.removesuffix("</w>") for token in WORDS):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in found:
                found.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
    return found
