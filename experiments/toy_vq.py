"""Stage `vq` of the toy's build: a small MAGVIT-v2 (64×64 pixels to 8×8 codes) trained on the drawn scenes.

Loss: L1 + L2 + image gradients, three times as heavy where the picture differs from its empty place, + entropy and
commitment of the look-up-free quantiser (Yu et al., 2023, eq. 6), straight-through signs.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from toy_cache import HOLD, load_cache

from pyunictokens.models.magvit import MagvitConfig, MagvitV2
from pyunictokens.toy.scene import SLOTS

CONFIG = MagvitConfig(
    ch=32,
    encoder_ch_mult=(1, 2, 2, 4),
    decoder_ch_mult=(1, 1, 2, 4),
    encoder_res_blocks=(1, 1, 1, 1),
    decoder_res_blocks=(1, 1, 1, 1),
    z_channels=10,
    norm_groups=8,
)


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float [-1, 1] [B, 3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def log_line(path: Path, text: str) -> None:
    """Append to a log and show it."""
    print(text, flush=True)
    with open(path, "a") as file:
        file.write(text + "\n")


def degrade(x: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """What generated pictures suffer from: shift, blur, loss of detail, noise, a little colour cast."""
    b = x.shape[0]
    dx, dy = (int(v) for v in torch.randint(-3, 4, (2,)))
    x = F.pad(x, (3, 3, 3, 3), mode="replicate")[:, :, 3 + dy : 67 + dy, 3 + dx : 67 + dx]
    if torch.rand(()) < 0.6 * strength:
        size = int(torch.randint(30, 60, ()))
        small = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        soft = F.interpolate(small, (64, 64), mode="bilinear")
        x = torch.where(torch.rand(b, 1, 1, 1) < 0.6, soft, x)
    if torch.rand(()) < 0.4 * strength:
        patch = F.interpolate(torch.rand(b, 1, 8, 8), (64, 64), mode="nearest") < 0.15
        x = torch.where(patch, F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1), x)
    x = x * (1 + 0.06 * torch.randn(b, 3, 1, 1)) + 0.03 * torch.randn(b, 3, 1, 1)
    return (x + 0.12 * strength * torch.rand(b, 1, 1, 1) * torch.randn_like(x)).clamp(-1, 1)


def slot_loss(logits: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Sum of the slots' cross-entropies; labels int64 [B, slots]."""
    return torch.stack([F.cross_entropy(logits[slot].float(), labels[:, k]) for k, slot in enumerate(SLOTS)]).sum()


def backgrounds(work: Path) -> torch.Tensor:
    """The median picture of each place, [places, 3, 64, 64]: what differs from it is worth three times the care."""
    images, labels = load_cache(work)
    place = labels[:3000, list(SLOTS).index("place")]
    medians = [np.median(images[:3000][place == p][:80], axis=0) for p in range(len(SLOTS["place"]))]
    return to_pixels(np.stack(medians).astype(np.uint8))


def entropy_loss(z: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean entropy of a position over the codes, entropy of the batch's mean over the codes) in bits; z [B, bits, h,
    w]."""
    logits = 2 * z.float().permute(0, 2, 3, 1).flatten(0, 2) @ codebook.T
    logp = logits.log_softmax(-1)
    p = logp.exp()
    mean = p.mean(0)
    return -(p * logp).sum(-1).mean() / math.log(2), -(mean * (mean + 1e-9).log()).sum() / math.log(2)


def train_vq(work: Path, *, seconds: float, batch: int = 24, seed: int = 0, lr: float = 1.5e-3) -> None:
    """Train for a wall time; resumes from WORK/vq.pt's weights when it is there."""
    log = work / "vq.log"
    torch.manual_seed(seed)
    images, labels = load_cache(work)
    empty = backgrounds(work)
    model = MagvitV2(CONFIG)
    if (work / "vq.pt").exists():
        model.load_state_dict(torch.load(work / "vq.pt", weights_only=True))
        log_line(log, "resumed")
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)
    rng = np.random.default_rng(seed + int(time.time()) % 1000)
    start, step = time.time(), 0
    log_line(log, f"parameters {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M")
    while (spent := time.time() - start) < seconds:
        rows = np.sort(rng.choice(len(images) - HOLD, batch, replace=False))
        x = to_pixels(images[rows]).contiguous(memory_format=torch.channels_last)
        ramp = min(1.0, step / 100)
        for group in optimizer.param_groups:
            group["lr"] = lr * ramp * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1, spent / seconds))))
        with torch.autocast("cpu", torch.bfloat16):
            z = model.encoder(x).float()
            bits = torch.where(z > 0, 1.0, -1.0)
            y = model.decoder(z + (bits - z).detach()).float()
        behind = empty[torch.from_numpy(labels[rows, -1])]
        weight = 1 + 2.0 * ((x - behind).abs().amax(1, keepdim=True) > 0.15)
        error = (y - x) * weight
        l1, l2 = error.abs().mean(), (error * (y - x)).mean()
        edge = (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2
        sure, spread = entropy_loss(z, model.quantize.embedding)
        commit = (z - bits).pow(2).mean()
        loss = l1 + l2 + 0.5 * edge + 0.01 * (sure - 1.5 * spread) + 0.02 * commit
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            log_line(
                log, f"{step} {spent:.0f}s l1 {l1:.4f} l2 {l2:.4f} edge {edge:.4f} sure {sure:.3f} spread {spread:.3f}"
            )
        if step % 300 == 0:
            torch.save(model.state_dict(), work / "vq.pt")
    torch.save(model.state_dict(), work / "vq.pt")
    encode_cache(work)


def load_vq(work: Path) -> MagvitV2:
    """The trained tokenizer, ready to use."""
    model = MagvitV2(CONFIG)
    model.load_state_dict(torch.load(work / "vq.pt", weights_only=True))
    return model.eval().requires_grad_(False)


def encode_cache(work: Path) -> None:
    """Codes of all cached scenes, as int16."""
    model = load_vq(work).to(memory_format=torch.channels_last)
    for prefix in ("", "held_out_"):
        images, _ = load_cache(work, prefix)
        with torch.autocast("cpu", torch.bfloat16):
            stacked = torch.cat([model.encode(to_pixels(images[k : k + 200])) for k in range(0, len(images), 200)])
        np.save(work / "cache" / f"{prefix}codes.npy", stacked.numpy().astype(np.int16))
        log_line(work / "vq.log", f"{prefix}codes in use {stacked.unique().numel()} of {model.codebook_size}")
