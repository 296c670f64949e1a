"""The trainings of the composed world's build: image tokenizer, two spotters, a Show-o that draws.

Each goes on from WORK/NAME.pt, with its optimizer, wherever it was stopped; lengths are steps, not seconds, so a loaded
machine gives the same weights later.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_showo import Masked, noisy
from toy_vq import degrade, entropy_loss, log_line, to_pixels

from pyunictokens.models.magvit import MagvitV2
from pyunictokens.models.showo.model import Showo
from pyunictokens.models.showo.prompting import SpecialIds, attention_allowed, t2i_text
from pyunictokens.models.showo.sizes import ShowoConfig
from pyunictokens.toy.composed.prompts import caption, words
from pyunictokens.toy.composed.scene import (
    NOUNS,
    PATTERNS,
    PLACES,
    Composition,
    empty,
    random_composition,
    render,
)
from pyunictokens.toy.composed.spotter import MAP, Spotter
from pyunictokens.toy.model import toy_folder
from pyunictokens.toy.scene import COLOURS
from pyunictokens.toy.words import build_tokenizer
from pyunictokens.utils.files import read_json

SCENES, HOLD, N = 40_000, 1000, 64
AGAIN = 5000
"""Scenes that a spotter also sees as the image tokenizer reconstructs them."""
MAX_TEXT = 48
_CHUNK = 500

TEXT_SIZE = len(words()) + 2
SHOWO = ShowoConfig(
    vocab_size=TEXT_SIZE + 10 + 1024 + 1,
    llm_vocab_size=TEXT_SIZE,
    codebook_size=1024,
    num_vq_tokens=N,
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=6,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=0,
    max_text=MAX_TEXT,
)
WIDTHS = {"reader": 56, "spotter": 40}
SEEDS = {"reader": 101, "spotter": 202}


# --- scenes ----------------------------------------------------------------------------------------------------------


def _draw(job: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    seed, count = job
    rng = np.random.default_rng(seed)
    scenes = [random_composition(rng) for _ in range(count)]
    return np.stack([render(scene) for scene in scenes]), [json.dumps(scene.to_json()) for scene in scenes]


def build_cache(work: Path, seed: int, workers: int) -> None:
    """WORK/images.npy (uint8) and WORK/scenes.jsonl; the last HOLD scenes are never trained on."""
    if (work / "scenes.jsonl").exists():
        return
    jobs = [(seed * 100_000 + k, _CHUNK) for k in range((SCENES + HOLD) // _CHUNK)]
    with ProcessPoolExecutor(workers) as pool:
        images, scenes = zip(*pool.map(_draw, jobs), strict=True)
    np.save(work / "images.npy", np.concatenate(images))
    (work / "scenes.jsonl").write_text("\n".join(line for part in scenes for line in part) + "\n")


def load_cache(work: Path) -> tuple[np.ndarray, list[Composition]]:
    scenes = [Composition.from_json(json.loads(line)) for line in (work / "scenes.jsonl").read_text().splitlines()]
    return np.load(work / "images.npy", mmap_mode="r"), scenes


# --- one loop for all ------------------------------------------------------------------------------------------------


def train(
    work: Path,
    name: str,
    model: nn.Module,
    steps: int,
    lr: float,
    loss_of: Callable[[int], tuple[Tensor, dict[str, float]]],
    decay: float = 0.02,
) -> None:
    """Steps of AdamW with a warm-up and a cosine; goes on from WORK/NAME.pt. `loss_of(step)` gives loss and numbers.

    A file without an optimizer (the shipped weights, `continue_shipped`) warms up again.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.98), fused=True)
    file, step, first = work / f"{name}.pt", 0, 0
    if file.exists():
        kept = torch.load(file, weights_only=True)
        model.load_state_dict(kept["model"])
        step = kept["step"]
        if "optimizer" in kept:
            optimizer.load_state_dict(kept["optimizer"])
        else:
            first = step
    model.train()
    sums: dict[str, float] = {}
    start = time.time()
    while step < steps:
        rate = lr * min(1, (step - first + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            loss, numbers = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        for key, value in numbers.items():
            sums[key] = sums.get(key, 0.0) + value
        if step % 50 == 0:
            means = " ".join(f"{key} {value / 50:.4f}" for key, value in sums.items())
            log_line(work / f"{name}.log", f"{step}/{steps} {time.time() - start:.0f}s {means} lr {rate:.1e}")
            sums = {}
        if step % 200 == 0 or step == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, work / f".{name}.pt")
            os.replace(work / f".{name}.pt", file)
    model.eval()


def weights(work: Path, name: str) -> dict[str, Tensor]:
    """The trained weights of a stage."""
    found: dict[str, Tensor] = torch.load(work / f"{name}.pt", weights_only=True)["model"]
    return found


# --- image tokenizer -------------------------------------------------------------------------------------------------


def train_vq(work: Path, steps: int, seed: int, batch: int = 24) -> None:
    """The toy's tokenizer, trained further; its loss, but seven times as heavy on figures as on the place."""
    torch.manual_seed(seed)
    images, scenes = load_cache(work)
    behind = to_pixels(np.stack([empty(place) for place in PLACES]))
    places = np.array([PLACES.index(scene.place) for scene in scenes])
    model = MagvitV2.from_pretrained(toy_folder() / "vq").to(memory_format=torch.channels_last).requires_grad_(True)
    codebook = model.quantize.embedding

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([seed, 1, step])
        rows = np.sort(rng.choice(len(images) - HOLD, batch, replace=False))
        x = to_pixels(images[rows]).contiguous(memory_format=torch.channels_last)
        z = model.encoder(x).float()
        bits = torch.where(z > 0, 1.0, -1.0)
        y = model.decoder(z + (bits - z).detach()).float()
        weight = 0.5 + 3.0 * ((x - behind[places[rows]]).abs().amax(1, keepdim=True) > 0.1)
        error = (y - x) * weight
        l1, l2 = error.abs().mean(), (error * (y - x)).mean()
        edge = (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2
        sure, spread = entropy_loss(z, codebook)
        commit = (z - bits).pow(2).mean()
        loss = l1 + l2 + 0.5 * edge + 0.01 * (sure - 1.5 * spread) + 0.02 * commit
        return loss, {"l1": l1.item(), "sure": sure.item(), "spread": spread.item()}

    train(work, "vq", model, steps, 6e-4, loss_of)
    encode_cache(work)


def load_vq(work: Path) -> MagvitV2:
    model = MagvitV2.from_pretrained(toy_folder() / "vq")
    model.load_state_dict(weights(work, "vq"))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def encode_cache(work: Path) -> None:
    """WORK/codes.npy: codes of all scenes, int16."""
    model, (images, _) = load_vq(work), load_cache(work)
    parts = [model.encode(to_pixels(images[k : k + 250])) for k in range(0, len(images), 250)]
    codes = torch.cat(parts)
    np.save(work / "codes.npy", codes.numpy().astype(np.int16))
    log_line(work / "vq.log", f"codes in use {codes.unique().numel()} of {model.codebook_size}")


# --- spotters --------------------------------------------------------------------------------------------------------


def targets(scenes: list[Composition]) -> tuple[Tensor, Tensor]:
    """(heat [B, nouns, 16, 16] in [0, 1], a row a figure [F, 10]: image, y, x, noun, colour, pattern, four reaches)."""
    heat = torch.zeros(len(scenes), len(NOUNS), MAP, MAP)
    rows = []
    axis = torch.arange(MAP) + 0.5
    for image, scene in enumerate(scenes):
        for entity in scene.entities:
            left, top, right, bottom = (edge / 4 for edge in entity.box)
            cx, cy = (left + right) / 2, (top + bottom) / 2
            x, y = (min(MAP - 1, max(0, int(middle))) for middle in (cx, cy))
            noun = NOUNS.index(entity.noun)
            gauss = torch.exp(-((axis[None] - x - 0.5) ** 2 + (axis[:, None] - y - 0.5) ** 2) / (2 * 0.8**2))
            heat[image, noun] = torch.maximum(heat[image, noun], gauss)
            reach = (x + 0.5 - left, y + 0.5 - top, right - x - 0.5, bottom - y - 0.5)
            colour, pattern = COLOURS.index(entity.colour), PATTERNS.index(entity.pattern)
            rows.append((image, y, x, noun, colour, pattern, *reach))
    return heat, torch.tensor(rows)


@torch.no_grad()
def _reconstructed(vq: MagvitV2, codes: np.ndarray, seed: int) -> Tensor:
    """What the image tokenizer makes of codes of which up to 4 % are wrong."""
    torch.manual_seed(seed)
    told = torch.from_numpy(codes).long()
    wrong = torch.rand(told.shape) < 0.04 * torch.rand(len(told), 1)
    told = torch.where(wrong, torch.randint(1024, told.shape), told)
    return torch.cat([vq.decode(part).clamp(-1, 1).half() for part in told.split(100)])


def train_spotter(work: Path, name: str, steps: int, batch: int = 48) -> None:
    """The spotter `name` on its own half of the scenes: drawn ones, reconstructed ones, degraded ones."""
    seed, half = SEEDS[name], list(WIDTHS).index(name)
    torch.manual_seed(seed)
    images, scenes = load_cache(work)
    model = Spotter(WIDTHS[name]).to(memory_format=torch.channels_last)
    own = np.arange(half, len(images) - HOLD, 2)
    again = _reconstructed(load_vq(work), np.load(work / "codes.npy")[own[:AGAIN]], seed)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([seed, step])
        torch.manual_seed(seed * 100_000 + step)
        places = np.sort(rng.choice(AGAIN, batch // 2, replace=False))
        rows = np.concatenate([own[places], np.sort(rng.choice(own, batch - len(places), replace=False))])
        x = torch.cat([again[places].float(), to_pixels(images[rows[len(places) :]])])
        if rng.random() < 0.5:
            x = degrade(x, 0.5)
        heat, figures = targets([scenes[row] for row in rows])
        found = model(((x + 1) / 2).contiguous(memory_format=torch.channels_last))
        p = found.nouns.sigmoid().clamp(1e-4, 1 - 1e-4)
        hit = heat >= 0.999
        pull = -(((1 - p) ** 2) * p.log())[hit].sum()
        push = -(((1 - heat) ** 4) * (p**2) * (1 - p).log())[~hit].sum()
        image, y, px, _, colour, pattern = figures[:, :6].long().T
        at_colour = F.cross_entropy(found.colours[image, :, y, px], colour)
        at_pattern = F.cross_entropy(found.patterns[image, :, y, px], pattern)
        reach = F.l1_loss(found.reach[image, :, y, px], figures[:, 6:])
        spots = (pull + push) / len(figures)
        loss = spots + 0.5 * at_colour + 0.5 * at_pattern + 0.2 * reach
        numbers = {"spots": spots, "colour": at_colour, "pattern": at_pattern, "reach": reach}
        return loss, {key: value.item() for key, value in numbers.items()}

    train(work, name, model, steps, 2e-3, loss_of)


def load_spotter(work: Path, name: str) -> Spotter:
    model = Spotter(WIDTHS[name])
    model.load_state_dict(weights(work, name))
    return model.eval().requires_grad_(False)


# --- the model -------------------------------------------------------------------------------------------------------


def _begin_with_toy(model: Showo, tokenizer: Any) -> None:
    """The toy model's layers, and its rows for codes, special ids and words that both know."""
    toy = Showo.from_pretrained(toy_folder() / "showo")
    read = read_json(toy_folder() / "tokenizer" / "tokenizer.json")
    known: dict[str, int] = read["model"]["vocab"]
    tables = ("showo.model.embed_tokens.weight", "showo.lm_head.weight", "showo.lm_head.bias")
    old, new = toy.state_dict(), model.state_dict()
    pairs = [(row, known[word]) for word, row in tokenizer.get_vocab().items() if word in known]
    pairs += [(TEXT_SIZE + k, toy.config.llm_vocab_size + k) for k in range(10 + 1024 + 1)]
    to, of = (torch.tensor(side) for side in zip(*pairs, strict=True))
    for name, value in new.items():
        if name in tables:
            value[to] = old[name][of]
        else:
            value.copy_(old[name])


def _texts(scenes: list[Composition], rng: np.random.Generator, ids: SpecialIds, tokenizer: Any) -> Iterator[list[int]]:
    for scene in scenes:
        text = [] if rng.random() < 0.1 else tokenizer.encode(caption(scene, rng)[0]).ids
        yield t2i_text(text, ids, MAX_TEXT)


def train_showo(work: Path, steps: int, seed: int, batch: int = 28) -> None:
    """Captions with masked codes, half by the cosine schedule, half nearly all; text dropped in a tenth."""
    scenes = load_cache(work)[1]
    codes_all = torch.from_numpy(np.load(work / "codes.npy")).long()
    torch.manual_seed(seed)
    model = Showo(SHOWO)
    for table in (model.showo.model.embed_tokens.weight, model.showo.lm_head.weight):
        nn.init.normal_(table, 0, 0.02)  # words that the toy does not know
    ids = SpecialIds.from_config(SHOWO)
    heavy, tokenizer = _focus(scenes), build_tokenizer(words())
    _begin_with_toy(model, tokenizer)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([seed, 3, step])
        torch.manual_seed(seed * 1_000_000 + step)
        rows = rng.choice(len(scenes) - HOLD, batch, replace=False)
        texts = list(_texts([scenes[row] for row in rows], rng, ids, tokenizer))
        longest = max(map(len, texts))
        codes = codes_all[rows]
        padded = torch.tensor([[ids.pad] * (longest - len(text)) + text for text in texts])
        edge = torch.ones(batch, 1, dtype=torch.long)
        rate = torch.cos(torch.rand(batch) * math.pi / 2)
        rate[: batch // 2] = 1 - 0.3 * torch.rand(batch // 2)
        count = (N * rate).round().clamp(min=1)
        masked = torch.rand(batch, N).argsort(1).argsort(1) < count[:, None]
        image = torch.where(masked, ids.mask, codes + ids.first_code)
        input_ids = torch.cat([padded, edge * ids.soi, image, edge * ids.eoi], 1)
        begin, first = longest + 1, MAX_TEXT + 1 - longest
        text = torch.zeros_like(input_ids, dtype=torch.bool)
        text[:, : begin - 1] = input_ids[:, : begin - 1] < TEXT_SIZE
        x = noisy(model.embed(input_ids), text, 0.1)
        allowed = attention_allowed(input_ids, "t2i", ids)
        places = torch.arange(first, first + input_ids.shape[1])
        hidden = model.encode(x, places, Masked(allowed))[:, begin:-1]
        weight, bias = model.image_head()
        each = F.cross_entropy(F.linear(hidden[masked], weight, bias).float(), codes[masked], reduction="none")
        focus = heavy[rows][masked]
        loss = (each * focus).sum() / focus.sum()
        return loss, {"draw": loss.item()}

    train(work, "showo", model, steps, 1.2e-3, loss_of, decay=0.03)


def _focus(scenes: list[Composition]) -> Tensor:
    """What a position's code counts, [scenes, N]: figures more than the place behind them."""
    weight = torch.full((len(scenes), 8, 8), 0.4)
    for row, scene in enumerate(scenes):
        for entity in scene.entities:
            left, top, right, bottom = (edge / 8 for edge in entity.box)
            weight[row, max(0, int(top)) : int(bottom) + 1, max(0, int(left)) : int(right) + 1] = 1.5
    return weight.flatten(1)


def load_showo(work: Path) -> Showo:
    model = Showo(SHOWO)
    model.load_state_dict(weights(work, "showo"))
    return model.eval().requires_grad_(False)
