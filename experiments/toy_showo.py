"""Stage `showo` of the toy's build: a small Show-o trained on drawing, answering and choosing facts at once.

Each step takes one batch of each: captions with masked codes (half by the cosine schedule, half nearly all; text
dropped with probability 0.1), questions about pictures, facts over the black image. Pictures are read once for all
their questions, the black image once for the whole batch; nothing else differs from the published sequences.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from toy_cache import HOLD
from toy_corpus import CAPTIONS, CODE, MAX_TEXT, QUESTIONS
from toy_vq import load_vq, log_line

from pyunictokens.models.showo.model import Showo
from pyunictokens.models.showo.prompting import SpecialIds, attention_allowed, t2i_text
from pyunictokens.models.showo.sizes import ShowoConfig
from pyunictokens.toy.words import words

N = 64
TEXT_SIZE = len(words()) + 2
CONFIG = ShowoConfig(
    vocab_size=TEXT_SIZE + 10 + 1024 + 1,
    llm_vocab_size=TEXT_SIZE,
    codebook_size=1024,
    num_vq_tokens=N,
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=6,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=0,
)
_CENTRE = [row * 8 + column for row in range(2, 8) for column in range(1, 6)]
# What a position's codes count in the drawing loss: the subject most, the far background (soon learned) least.
_FOCUS = torch.tensor([[0.4, *[1.5] * 5, *([0.3, 0.3] if row < 4 else [1.0, 1.0])] for row in range(8)]).flatten()


class Masked:
    """FullAttention by plain products: at this size twice as fast in training as the CPU's fused kernel."""

    def __init__(self, allowed: torch.Tensor):
        self.bias = torch.zeros(allowed.shape, dtype=torch.bfloat16).masked_fill(~allowed, -1e4).unsqueeze(-3)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + self.bias
        return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


class AfterPrefix(Masked):
    """Text rows after a picture's keys and values: row b follows picture b // rows-per-picture, and is causal."""

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], length: int, repeat: int):
        past = keys[0].shape[2]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        super().__init__(torch.cat([causal.new_ones(length, past), causal], dim=1))
        self.keys, self.values, self.repeat = keys, values, repeat

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        old_k, old_v = (t[layer].repeat_interleave(self.repeat, 0) for t in (self.keys, self.values))
        return super().__call__(layer, q, torch.cat([old_k, k], 2), torch.cat([old_v, v], 2))


class Prefix(Masked):
    """A picture that sees all of itself; its keys and values are kept for the texts that follow."""

    def __init__(self, length: int):
        super().__init__(torch.ones(length, length, dtype=torch.bool))
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.keys.append(k)
        self.values.append(v)
        return super().__call__(layer, q, k, v)


class Corpus:
    """Draws batches; the last HOLD scenes are kept for measuring."""

    def __init__(self, work: Path, seed: int):
        data = np.load(work / "corpus.npz")
        self.captions, self.questions, self.facts = (
            torch.from_numpy(data[k]).long() for k in ("captions", "questions", "facts")
        )
        self.question_starts, self.fact_starts = (
            torch.from_numpy(data[k]).long() for k in ("question_starts", "fact_starts")
        )
        self.codes = torch.from_numpy(np.load(work / "cache" / "codes.npy")).long()
        self.scenes = len(self.codes) - HOLD
        self.num_facts = len(self.facts) - HOLD
        self.black = load_vq(work).encode(torch.full((1, 3, N, N), -1.0))
        self.rng = np.random.default_rng(seed)
        self.ids = SpecialIds.from_config(CONFIG)
        self.lengths = (self.captions >= 0).sum(1)

    def drawing(self, batch: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(input ids [B, L], codes [B, N], first position). Captions of like length, padding cut to the longest."""
        rows = self.rng.choice(self.scenes, 4 * batch, replace=False)
        lines = rows * CAPTIONS + self.rng.integers(0, CAPTIONS, len(rows))
        order = np.argsort(self.lengths[lines].numpy(), kind="stable")
        at = int(self.rng.integers(0, 4)) * batch
        chosen = order[at : at + batch]
        rows, lines = rows[chosen], lines[chosen]
        texts = []
        for row, line in zip(rows, lines, strict=True):
            text = self.captions[line]
            text = text[text >= 0].tolist()
            if CODE in text:
                own = self.codes[row][_CENTRE] + self.ids.first_code
                text = [int(own[self.rng.integers(len(own))]) if i == CODE else i for i in text]
            texts.append(t2i_text([] if self.rng.random() < 0.1 else text, self.ids, MAX_TEXT))
        longest = max(map(len, texts))
        codes = self.codes[torch.from_numpy(rows)]
        padded = torch.tensor([[self.ids.pad] * (longest - len(text)) + text for text in texts])
        edge = torch.ones(batch, 1, dtype=torch.long)
        image = codes + self.ids.first_code
        return torch.cat([padded, edge * self.ids.soi, image, edge * self.ids.eoi], 1), codes, MAX_TEXT + 1 - longest

    def asking(self, pictures: int, each: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(codes [P, N], text ids [P·each, L] with −1 behind the end, answer starts [P·each])."""
        rows = self.rng.choice(self.scenes, pictures, replace=False)
        lines = np.concatenate([row * QUESTIONS + self.rng.permutation(QUESTIONS)[:each] for row in rows])
        text = self.questions[lines]
        return self.codes[rows], text[:, : int((text >= 0).sum(1).max())], self.question_starts[lines]

    def choosing(self, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As :meth:`asking`, over the black image."""
        lines = self.rng.choice(self.num_facts, batch, replace=False)
        text = self.facts[lines]
        return self.black, text[:, : int((text >= 0).sum(1).max())], self.fact_starts[lines]

    def echoing(self, batch: int, window: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A stretch of facts said twice, over the black image: copying is learned here, then used to choose."""
        text, starts = self.facts, self.fact_starts
        lines = self.rng.choice(self.num_facts, batch, replace=False)
        begins = [int(self.rng.integers(1, max(2, int(starts[line]) - window))) for line in lines]
        once = torch.stack([text[line, begin : begin + window] for line, begin in zip(lines, begins, strict=True)])
        return self.black, torch.cat([once, once], dim=1), torch.full((batch,), window + 4)


def noisy(x: torch.Tensor, where: torch.Tensor, chance: float = 0.15) -> torch.Tensor:
    """Add Gaussian noise to the embeddings `where` in some rows, so that a learned token never falls into a hole."""
    size = (
        (torch.rand(x.shape[0], 1, 1) < chance) * torch.rand(x.shape[0], 1, 1) * 0.6 * x.detach().pow(2).mean().sqrt()
    )
    return x + torch.randn_like(x) * size * where[..., None]


def drawing_loss(model: Showo, corpus: Corpus, batch: int) -> torch.Tensor:
    """Cross-entropy on masked codes, weighted by position."""
    ids, (input_ids, codes, first) = corpus.ids, corpus.drawing(batch)
    rate = torch.cos(torch.rand(batch) * math.pi / 2)
    rate[: batch // 2] = 1 - 0.3 * torch.rand(batch // 2)  # nearly empty pictures are where the text must be obeyed
    count = (N * rate).round().clamp(min=1)
    masked = torch.rand(batch, N).argsort(1).argsort(1) < count[:, None]
    begin = input_ids.shape[1] - 1 - N
    input_ids[:, begin:-1] = torch.where(masked, ids.mask, input_ids[:, begin:-1])
    allowed = attention_allowed(input_ids, "t2i", ids)
    text = torch.zeros_like(input_ids, dtype=torch.bool)
    text[:, : begin - 1] = (input_ids[:, : begin - 1] < TEXT_SIZE) | (input_ids[:, : begin - 1] >= ids.first_code)
    x = noisy(model.embed(input_ids), text)
    hidden = model.encode(x, torch.arange(first, first + input_ids.shape[1]), Masked(allowed))[:, begin:-1]
    weight, bias = model.image_head()
    each = F.cross_entropy(F.linear(hidden[masked], weight, bias).float(), codes[masked], reduction="none")
    focus = _FOCUS.expand(batch, N)[masked]
    return (each * focus).sum() / focus.sum()


def reading_loss(model: Showo, corpus: Corpus, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy on the answers' words and their end."""
    ids, (codes, text, starts) = corpus.ids, batch
    edge = torch.ones(codes.shape[0], 1, dtype=torch.long)
    image = torch.cat([edge * ids.mmu, edge * ids.soi, codes + ids.first_code, edge * ids.eoi], 1)
    seen = Prefix(N + 3)
    model.encode(model.embed(image), torch.arange(N + 3), seen)
    x = noisy(model.embed(text.clamp(min=0)), text >= 0, 0.1)
    past = AfterPrefix(seen.keys, seen.values, text.shape[1], text.shape[0] // codes.shape[0])
    hidden = model.encode(x, torch.arange(N + 3, N + 3 + text.shape[1]), past)
    target = text[:, 1:]
    answer = (target >= 0) & (torch.arange(1, text.shape[1]) >= starts[:, None])
    weight, bias = model.text_head()
    return F.cross_entropy(F.linear(hidden[:, :-1][answer], weight, bias).float(), target[answer])


def _initialise(model: Showo) -> None:
    """Small normal weights; codes start as sums of their bits, so codes that look alike begin alike."""
    for name, p in model.named_parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, 0, 0.02)
            if name.endswith(("dense.weight", "fc2.weight")):
                p.data /= math.sqrt(2 * CONFIG.num_hidden_layers)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)
    bits = (torch.arange(CONFIG.codebook_size)[:, None] >> torch.arange(9, -1, -1) & 1) * 2.0 - 1.0
    codes = slice(CONFIG.first_code_id, CONFIG.first_code_id + CONFIG.codebook_size)
    for table, size in ((model.showo.model.embed_tokens.weight, 0.02), (model.showo.lm_head.weight, 0.01)):
        table.data[codes] = bits @ torch.randn(10, CONFIG.hidden_size) * size + torch.randn_like(table[codes]) * 0.01


def train_showo(
    work: Path, *, seconds: float, seed: int = 0, lr: float = 1.2e-3, batch: int = 14, facts: int = 6, pictures: int = 4
) -> None:
    """Train for a wall time; a further leg starts from WORK/showo.pt when it is there.

    One process a core, one thread each, gradients averaged once a step: `batch`, `facts` and `pictures` are per
    process.
    """
    meeting = work / "meeting"
    meeting.unlink(missing_ok=True)
    world = os.cpu_count() or 1
    torch.multiprocessing.spawn(_worker, (world, work, seconds, seed, lr, batch, facts, pictures), nprocs=world)


def _average(parameters: list[torch.Tensor], extra: list[float], world: int) -> list[float]:
    """Mean gradients and mean extra numbers over the processes, in one message."""
    flat = torch.cat([torch.tensor(extra), *(p.grad.flatten() for p in parameters)])
    dist.all_reduce(flat)
    flat /= world
    at = len(extra)
    for p in parameters:
        p.grad.copy_(flat[at : at + p.numel()].view_as(p))
        at += p.numel()
    return flat[: len(extra)].tolist()


def _worker(
    rank: int, world: int, work: Path, seconds: float, seed: int, lr: float, batch: int, facts: int, pictures: int
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{work / 'meeting'}", rank=rank, world_size=world)
    log, path = work / "showo.log", work / "showo.pt"
    torch.manual_seed(seed)
    model = Showo(CONFIG)
    _initialise(model)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    leg = int(path.stat().st_mtime) % 100_000 if path.exists() else 0
    torch.manual_seed(seed + leg + rank)
    corpus = Corpus(work, seed + leg + 7919 * rank)
    parameters = list(model.parameters())
    decay, rest = [p for p in parameters if p.ndim == 2], [p for p in parameters if p.ndim != 2]
    groups = [{"params": decay, "weight_decay": 0.03}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.98), fused=True)
    if rank == 0:
        log_line(log, f"{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters, leg {leg}, {world} processes")
    start, step, spent, sums = time.time(), 0, 0.0, np.zeros(3)
    while spent < seconds:
        rate = min(1, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1, spent / seconds))))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        with torch.autocast("cpu", torch.bfloat16):
            drawn = drawing_loss(model, corpus, batch)
            asked = reading_loss(model, corpus, corpus.asking(pictures, QUESTIONS))
            chosen = reading_loss(model, corpus, corpus.choosing(facts))
            echoed = reading_loss(model, corpus, corpus.echoing(facts)) if spent < seconds / 3 else 0.0
        (drawn + 0.6 * asked + 0.6 * chosen + 0.5 * echoed).backward()
        *parts, spent = _average(parameters, [drawn.item(), asked.item(), chosen.item(), time.time() - start], world)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        step += 1
        sums += parts
        if rank == 0 and step % 50 == 0:
            means = " ".join(
                f"{name} {value / 50:.3f}" for name, value in zip(("draw", "ask", "choose"), sums, strict=True)
            )
            log_line(log, f"{step} {spent:.0f}s {means} lr {lr * rate:.1e}")
        if step % 50 == 0:
            sums[:] = 0
        if rank == 0 and step % 300 == 0:
            torch.save(model.state_dict(), path)
    if rank == 0:
        torch.save(model.state_dict(), path)
    dist.destroy_process_group()


def load_showo(work: Path) -> Showo:
    """The trained model, ready to use."""
    model = Showo(CONFIG)
    model.load_state_dict(torch.load(work / "showo.pt", weights_only=True))
    return model.eval().requires_grad_(False)
