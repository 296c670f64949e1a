"""Tiny random LLaDA and MMaDA checkpoints in the published layout, and their plain definition in float64.

The definition shares nothing with the package: it reads the weights by their published names and computes one sequence
at a time, with complex rotations, logits of every position and every id, and loops over single tokens.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WORDS = [
    "a",
    "photo",
    "of",
    "dog",
    "red",
    "cat",
    "in",
    "snow",
    "big",
    "what",
    "is",
    "the",
    "colour",
    "?",
    ".",
    "1",
    "2",
]
RESERVED = 10
CODES, SIDE, TEXT = 32, 4, 9
WIDTH, HEADS, GROUPS, INNER, LAYERS, THETA, EPS = 24, 4, 2, 40, 2, 500.0, 1e-5
CHAT = (
    "{% for message in messages %}{{ bos_token + '<|start_header_id|>' + message['role'] + '<|end_header_id|> ' + "
    "message['content'] + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|> ' }}{% endif %}"
)


def write_tokenizer(folder: Path) -> int:
    """The tokenizer of both; returns how many ids it has."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    first = ["<unk>", "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"]
    reserved = [f"<|reserved_token_{number}|>" for number in range(RESERVED)]
    last = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "user", "assistant", "<eot_id>"]
    vocabulary = {token: place for place, token in enumerate([*first, *WORDS, *reserved, *last])}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    made.add_special_tokens([*first[1:], *reserved, *last[:3]])
    words = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<unk>"
    )
    words.chat_template = CHAT
    words.save_pretrained(folder)
    return len(words)


def write_checkpoint(folder: Path, kind: str, seed: int = 0) -> Path:
    """A tiny random "llada" or "mmada", saved under the names of the published checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    count = write_tokenizer(folder)
    rows = count + (CODES + 3 if kind == "mmada" else 0)  # some ids that nobody uses, as in the published one
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int, scale: float = 0.35) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    narrow = WIDTH // HEADS * GROUPS
    weights = {"wte.weight": noise(rows, WIDTH, scale=1.0), "ff_out.weight": noise(rows, WIDTH)}
    weights["ln_f.weight"] = 1 + noise(WIDTH)
    for layer in range(LAYERS):
        shapes = {
            "q_proj": (WIDTH, WIDTH),
            "k_proj": (narrow, WIDTH),
            "v_proj": (narrow, WIDTH),
            "attn_out": (WIDTH, WIDTH),
            "ff_proj": (INNER, WIDTH),
            "up_proj": (INNER, WIDTH),
            "ff_out": (WIDTH, INNER),
        }
        for name, shape in shapes.items():
            weights[f"blocks.{layer}.{name}.weight"] = noise(*shape)
        for name in ("attn_norm", "ff_norm"):
            weights[f"blocks.{layer}.{name}.weight"] = 1 + noise(WIDTH)
    save_file({f"model.transformer.{name}": value for name, value in weights.items()}, folder / "model.safetensors")
    config = {"model_type": kind, "n_heads": HEADS, "rope_theta": THETA, "rms_norm_eps": EPS, "max_sequence_length": 64}
    config |= {"mask_token_id": 3, "eos_token_id": 2}
    if kind == "mmada":
        config |= {"codebook_size": CODES, "num_vq_tokens": SIDE * SIDE, "max_text": TEXT}
        config |= {"first_reserved_id": 4 + len(WORDS), "llm_vocab_size": count + 3}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Plain:
    """The definition: logits of one sequence of ids, in float64."""

    def __init__(self, folder: Path):
        read = load_file(folder / "model.safetensors")
        self.weights = {key.removeprefix("model.transformer."): value.double() for key, value in read.items()}

    def logits(self, ids: list[int]) -> Tensor:
        """[L, V]."""
        w = self.weights
        x = w["wte.weight"][torch.tensor(ids)]
        for layer in range(LAYERS):
            h = norm(x, w[f"blocks.{layer}.attn_norm.weight"])
            q, k, v = (
                (h @ w[f"blocks.{layer}.{name}_proj.weight"].T).view(len(ids), -1, WIDTH // HEADS) for name in "qkv"
            )
            q, k = turned(q), turned(k)
            heads = []
            for head in range(HEADS):
                group = head * GROUPS // HEADS
                scores = q[:, head] @ k[:, group].T / math.sqrt(WIDTH // HEADS)
                heads.append(scores.softmax(-1) @ v[:, group])
            x = x + torch.cat(heads, -1) @ w[f"blocks.{layer}.attn_out.weight"].T
            h = norm(x, w[f"blocks.{layer}.ff_norm.weight"])
            gate, up = (h @ w[f"blocks.{layer}.{name}_proj.weight"].T for name in ("ff", "up"))
            x = x + (gate * torch.sigmoid(gate) * up) @ w[f"blocks.{layer}.ff_out.weight"].T
        return norm(x, w["ln_f.weight"]) @ w["ff_out.weight"].T


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()


def turned(x: Tensor) -> Tensor:
    """[L, heads, E] turned by position: entry j and entry j + E/2 are one complex number."""
    half = x.shape[-1] // 2
    speed = torch.tensor([THETA ** (-2 * j / x.shape[-1]) for j in range(half)], dtype=torch.float64)
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * speed
    spun = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([spun.real, spun.imag], -1)


def plain_text(
    plain: Plain, prompt: list[int], length: int, block: int, steps: int, heat: float, noise: object, mask_id: int
) -> tuple[list[int], list[list[int]], Tensor]:
    """(tokens, tokens before each step with −1 unknown, log-prob of each token when it became known): the published
    loop, one token at a time. `noise(step)` is Gumbel noise [block, V]."""
    x, trail, logp = [-1] * length, [], torch.zeros(length, dtype=torch.float64)
    each = steps // (length // block)
    for number in range(length // block):
        counts = [block // each + (1 if step < block % each else 0) for step in range(each)]
        for step in range(each):
            trail.append(list(x))
            logits = plain.logits(prompt + [mask_id if token < 0 else token for token in x])[len(prompt) :]
            gumbel = noise(number * each + step)
            found = []
            for inside in range(block):
                place = number * block + inside
                if x[place] >= 0:
                    continue
                token = int((logits[place] + heat * gumbel[inside]).argmax())
                sure = float(logits[place].log_softmax(-1)[token])
                found.append((-sure, place, token))
            for _, place, token in sorted(found)[: counts[step]]:
                x[place] = token
                logp[place] = (logits[place] / (heat or 1.0)).log_softmax(-1)[token]
    return x, trail, logp
