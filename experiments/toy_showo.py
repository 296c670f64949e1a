"""Stage `showo` of the toy's build: a small Show-o trained on drawing, answering and choosing facts at once.

Each step takes one batch of each: captions with masked codes (cosine schedule, text dropped with probability 0.1),
questions about pictures, facts over the black image. Pictures are read once for all their questions, the black image once
for the whole batch; nothing else differs from the published sequences.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from toy_cache import HOLD
from toy_corpus import CAPTIONS, CODE, MAX_TEXT, QUESTIONS
from toy_vq import load_vq, log_line

from pyunictokens.data.toygrammar import words
from pyunictokens.models.attention import FullAttention
from pyunictokens.models.prompting import SpecialIds, attention_allowed, t2i_text
from pyunictokens.models.showo import Showo, ShowoConfig

N = 64
TEXT_SIZE = len(words()) + 2
CONFIG = ShowoConfig(
    vocab_size=TEXT_SIZE + 10 + 1024 + 1,
    llm_vocab_size=TEXT_SIZE,
    codebook_size=1024,
    num_vq_tokens=N,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=8,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=0,
)
_CENTRE = [row * 8 + column for row in range(2, 8) for column in range(1, 6)]


class AfterPrefix:
    """Text rows after a picture's keys and values: row b follows picture b // rows-per-picture, and is causal."""

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], length: int, repeat: int):
        self.keys, self.values, self.repeat = keys, values, repeat
        past = keys[0].shape[2]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        self.mask = torch.cat([causal.new_ones(length, past), causal], dim=1)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        old_k, old_v = (t[layer].repeat_interleave(self.repeat, 0) for t in (self.keys, self.values))
        return F.scaled_dot_product_attention(
            q, torch.cat([old_k, k], 2), torch.cat([old_v, v], 2), attn_mask=self.mask
        )


class Corpus:
    """Draws batches; the last HOLD scenes are kept for measuring."""

    def __init__(self, work: Path, seed: int):
        data = np.load(work / "corpus.npz")
        self.captions, self.questions, self.facts = (torch.from_numpy(data[k]).long() for k in ("captions", "questions", "facts"))
        self.question_starts, self.fact_starts = (torch.from_numpy(data[k]).long() for k in ("question_starts", "fact_starts"))
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


def noisy(x: torch.Tensor, where: torch.Tensor, chance: float = 0.15) -> torch.Tensor:
    """Add Gaussian noise to the embeddings `where` in some rows, so that a learned token never falls into a hole."""
    size = (torch.rand(x.shape[0], 1, 1) < chance) * torch.rand(x.shape[0], 1, 1) * 0.6 * x.detach().pow(2).mean().sqrt()
    return x + torch.randn_like(x) * size * where[..., None]


def drawing_loss(model: Showo, corpus: Corpus, batch: int) -> torch.Tensor:
    """Cross-entropy on masked codes."""
    ids, (input_ids, codes, first) = corpus.ids, corpus.drawing(batch)
    rate = torch.cos(torch.rand(batch) * math.pi / 2)
    count = (N * rate).round().clamp(min=1)
    masked = torch.rand(batch, N).argsort(1).argsort(1) < count[:, None]
    begin = input_ids.shape[1] - 1 - N
    input_ids[:, begin:-1] = torch.where(masked, ids.mask, input_ids[:, begin:-1])
    allowed = attention_allowed(input_ids, "t2i", ids)
    text = torch.zeros_like(input_ids, dtype=torch.bool)
    text[:, : begin - 1] = (input_ids[:, : begin - 1] < TEXT_SIZE) | (input_ids[:, : begin - 1] >= ids.first_code)
    x = noisy(model.embed(input_ids), text)
    hidden = model.encode(x, torch.arange(first, first + input_ids.shape[1]), FullAttention(allowed))[:, begin:-1]
    weight, bias = model.image_head()
    return F.cross_entropy(F.linear(hidden[masked], weight, bias).float(), codes[masked])


def reading_loss(model: Showo, corpus: Corpus, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy on the answers' words and their end."""
    ids, (codes, text, starts) = corpus.ids, batch
    edge = torch.ones(codes.shape[0], 1, dtype=torch.long)
    image = torch.cat([edge * ids.mmu, edge * ids.soi, codes + ids.first_code, edge * ids.eoi], 1)
    seen = FullAttention(record=True)
    model.encode(model.embed(image), torch.arange(N + 3), seen)
    x = noisy(model.embed(text.clamp(min=0)), text >= 0, 0.1)
    past = AfterPrefix(seen.keys, seen.values, text.shape[1], text.shape[0] // codes.shape[0])
    hidden = model.encode(x, torch.arange(N + 3, N + 3 + text.shape[1]), past)
    target = text[:, 1:]
    answer = (target >= 0) & (torch.arange(1, text.shape[1]) >= starts[:, None])
    weight, bias = model.text_head()
    return F.cross_entropy(F.linear(hidden[:, :-1][answer], weight, bias).float(), target[answer])


def _initialise(model: Showo) -> None:
    for name, p in model.named_parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, 0, 0.02)
            if name.endswith(("dense.weight", "fc2.weight")):
                p.data /= math.sqrt(2 * CONFIG.num_hidden_layers)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)


def train_showo(
    work: Path, *, seconds: float, seed: int = 0, lr: float = 1.5e-3, batch: int = 48, facts: int = 8, pictures: int = 6
) -> None:
    """Train for a wall time; a further leg starts from WORK/showo.pt when it is there."""
    log, path = work / "showo.log", work / "showo.pt"
    torch.manual_seed(seed)
    model = Showo(CONFIG)
    _initialise(model)
    if path.exists():
        model.load_state_dict(torch.load(path))
        log_line(log, "resumed")
    corpus = Corpus(work, seed + int(time.time()) % 10_000)
    decay = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.03}, {"params": rest, "weight_decay": 0.0}], lr, betas=(0.9, 0.98), fused=True
    )
    log_line(log, f"parameters {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M")
    start, step, sums = time.time(), 0, np.zeros(3)
    while (spent := time.time() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1, spent / seconds))))
        parts = []
        with torch.autocast("cpu", torch.bfloat16):
            loss = drawing_loss(model, corpus, batch)
        loss.backward()
        parts.append(loss.item())
        with torch.autocast("cpu", torch.bfloat16):
            asked = reading_loss(model, corpus, corpus.asking(pictures, QUESTIONS))
            chosen = reading_loss(model, corpus, corpus.choosing(facts))
        (0.4 * asked + 0.4 * chosen).backward()
        parts += [asked.item(), chosen.item()]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        sums += parts
        if step % 50 == 0:
            draw, ask, choose = sums / 50
            sums[:] = 0
            log_line(log, f"{step} {spent:.0f}s draw {draw:.3f} ask {ask:.3f} choose {choose:.3f} lr {optimizer.param_groups[0]['lr']:.1e}")
        if step % 300 == 0:
            torch.save(model.state_dict(), path)
    torch.save(model.state_dict(), path)


def load_showo(work: Path) -> Showo:
    """The trained model, ready to use."""
    model = Showo(CONFIG)
    model.load_state_dict(torch.load(work / "showo.pt"))
    return model.eval().requires_grad_(False)
