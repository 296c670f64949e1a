"""Stage `experts` of the toy's build: train the five small networks of toy/networks.py on shared batches.

Pictures are degraded the way generated ones are. Similarities are taught by value: the cosine of two subjects is to
be the share of attributes they have in common, so a group of near misses gets graded scores instead of all or
nothing.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_cache import HOLD, load_cache
from toy_vq import degrade, log_line, slot_loss, to_pixels

from pyunictokens.toy import grammar as grammar
from pyunictokens.toy.networks import ImageText, ToyNetworks
from pyunictokens.toy.scene import HAIR_STYLES, SLOTS, SUBJECT_SLOTS, Attributes, from_labels, random_scene
from pyunictokens.toy.words import words

_NAMES = list(SLOTS)
_SUBJECT = [_NAMES.index(slot) for slot in SUBJECT_SLOTS]
_WEIGHT = torch.tensor([0.4, 0.25, 0.25, 0.1])
_FILL = {"a", "an", "the", "it", "its", "is", "was", "are", "in", "on", "at", "of", "to", "and", "with", "what"}
_FILL |= {"where", "does", "have", "favourite", "photo", "picture", "this"}


class _Pairs:
    """Batches in which every subject appears at two moments."""

    def __init__(self, work: Path, seed: int):
        self.images, self.labels = load_cache(work)
        self.rng = np.random.default_rng(seed)
        keys = self.labels[: len(self.labels) - HOLD, _SUBJECT] @ np.array([4096, 256, 16, 1])
        order = np.argsort(keys, kind="stable")
        self.groups = np.split(order, np.flatnonzero(np.diff(keys[order])) + 1)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        chosen = [self.groups[k] for k in self.rng.choice(len(self.groups), size // 2, replace=False)]
        rows = np.concatenate([self.rng.choice(group, 2) for group in chosen])
        return to_pixels(self.images[rows]), torch.from_numpy(self.labels[rows])


def one_slot_changed(scene: Attributes, rng: np.random.Generator) -> Attributes:
    """The scene with exactly one thing wrong."""
    choices = (
        ["subject", "subject", "place"]
        + ["wear", "wear_colour"] * (scene.wear > 0)
        + ["item", "item_colour"] * (scene.item > 0)
    )
    slot = str(choices[rng.integers(len(choices))])
    if slot == "subject":
        return grammar.change_subject(scene, rng)
    low = 0 if slot == "place" else 1
    others = [k for k in range(low, len(SLOTS[slot])) if k != getattr(scene, slot)]
    return replace(scene, **{slot: int(rng.choice(others))})


def captions(labels: Tensor, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """For each scene a caption and the same sentence about a scene with one thing wrong."""
    right, wrong = [], []
    for row in labels.numpy():
        scene = from_labels(row)
        other, seed = one_slot_changed(scene, rng), int(rng.integers(1 << 31))
        make = (grammar.caption, grammar.bag_caption, grammar.any_caption)[int(rng.integers(3))]
        right.append(make(scene, np.random.default_rng(seed)))
        wrong.append(make(other, np.random.default_rng(seed)))
    return right, wrong


def image_text_loss(
    model: ImageText, heads: nn.ModuleDict, x: Tensor, labels: Tensor, rng: np.random.Generator
) -> Tensor:
    """Contrast over the batch's captions and their spoiled twins; slot heads (not kept) help the pictures along."""
    hidden = F.relu(model.backbone(x))
    image = F.normalize(model.project(hidden), dim=-1).float()
    right, wrong = captions(labels, rng)
    text = model.encode_text(right + wrong).float()
    scale = model.log_scale.exp().clamp(max=40)
    logits = scale * image @ text.T
    n = len(right)
    twin = torch.tensor([a == b for a, b in zip(right, wrong, strict=True)])
    same = torch.tensor([[a == b for b in right] for a in right]) & ~torch.eye(n, dtype=torch.bool)
    logits[:, n:] = logits[:, n:].masked_fill(torch.diag(twin), -1e4)
    own = torch.arange(n)
    to_text = F.cross_entropy(torch.cat([logits[:, :n].masked_fill(same, -1e4), logits[:, n:]], 1), own)
    to_image = F.cross_entropy(logits[:, :n].T.masked_fill(same, -1e4), own)
    pair = torch.stack([logits.diagonal(), logits[:, n:].diagonal()], 1)[~twin]
    hard = F.cross_entropy(pair, torch.zeros(len(pair), dtype=torch.long))
    slots = slot_loss({slot: head(hidden) for slot, head in heads.items()}, labels)
    return to_text + 0.5 * to_image + hard + 0.15 * slots


def subject_loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Cosine = weighted share of equal subject attributes, plus reading them from the embedding."""
    e = model(x).float()
    own = labels[:, _SUBJECT]
    wanted = ((own[:, None] == own[None]) * _WEIGHT).sum(-1)
    read = sum(F.cross_entropy(10 * model.heads[slot](e), own[:, k]) for k, slot in enumerate(SUBJECT_SLOTS))
    return 10 * F.mse_loss(e @ e.T, wanted) + 0.3 * read


def face_loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Presence for all, identity (hair style 0.55, hair colour 0.45) among humans."""
    logit, e = model(x)
    logit, e = logit.float(), e.float()
    human = labels[:, 0] < len(HAIR_STYLES)
    loss = F.binary_cross_entropy_with_logits(logit, human.float())
    if human.sum() > 1:
        e, own = e[human], labels[human][:, [0, 3]]
        wanted = ((own[:, None] == own[None]) * torch.tensor([0.55, 0.45])).sum(-1)
        loss = loss + 5 * F.mse_loss(e @ e.T, wanted)
        loss = loss + 0.3 * sum(
            F.cross_entropy(10 * model.heads[s](e), own[:, k]) for k, s in enumerate(("shape", "hair"))
        )
    return loss


def sentences(rng: np.random.Generator, count: int) -> list[str]:
    """Facts, short answers, captions, cut and doubled sentences: what an answer may look like."""
    out: list[str] = []
    while len(out) < count:
        scene = random_scene(rng)
        values = grammar.draw_facts(rng)
        k = int(rng.integers(len(values)))
        fact = grammar.FACTS[k]
        out += [fact.sentence(values[k]), fact.short(values[k])]
        other = grammar.FACTS[int(rng.integers(len(values)))]
        if other.slot == fact.slot:
            out.append(other.sentence({**other.draw(rng), **({} if fact.slot == "item" else values[k])}))
        pairs = grammar.questions(scene, rng)
        out += [pairs[int(rng.integers(len(pairs)))][1], grammar.caption(scene, rng)]
        text = out[int(rng.integers(len(out)))].split()
        out.append(" ".join(text[: int(rng.integers(0, len(text) + 1))]))
        out.append(f"{out[int(rng.integers(len(out)))]} {out[int(rng.integers(len(out)))]}")
    return out[:count]


def sentence_loss(model: nn.Module, rng: np.random.Generator, count: int = 128) -> Tensor:
    """Cosine = overlap of the words that carry meaning, to the power 1.5 so that near misses stay apart."""
    texts = sentences(rng, count)
    index = model.index
    bags = torch.zeros(count, len(index) + 1)
    for row, text in enumerate(texts):
        for word in text.replace(".", " ").split():
            if word in index and word not in _FILL:
                bags[row, index[word]] = 1.0
    bags = F.normalize(bags, dim=-1)
    wanted = (bags @ bags.T).pow(1.5)
    e = model(texts).float()
    empty = bags.sum(1) == 0
    keep = ~(empty[:, None] & empty[None])
    return 10 * F.mse_loss((e @ e.T)[keep], wanted[keep])


_SHARES = (("reader", "subject", "face"), ("image_text", "sentence"))
"""Which networks each process trains; they have nothing in common but the pictures."""


def train_experts(work: Path, *, seconds: float, seed: int = 0, batch: int = 96) -> None:
    """Train all five for a wall time, in two processes, and write WORK/experts.pt."""
    torch.multiprocessing.spawn(_worker, (work, seconds, seed, batch), nprocs=len(_SHARES))
    whole: dict[str, Tensor] = {}
    for rank in range(len(_SHARES)):
        whole |= torch.load(work / f"experts_{rank}.pt", weights_only=True)
    torch.save(whole, work / "experts.pt")


def _worker(rank: int, work: Path, seconds: float, seed: int, batch: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(seed + 3 + rank)
    log, names = work / "experts.log", _SHARES[rank]
    model = ToyNetworks(words())
    if (work / "experts.pt").exists():
        model.load_state_dict(torch.load(work / "experts.pt", weights_only=True))
    for part in (model.reader, model.image_text.backbone, model.subject, model.face):
        part.to(memory_format=torch.channels_last)
    heads = nn.ModuleDict({slot: nn.Linear(256, len(values)) for slot, values in SLOTS.items()})
    data = _Pairs(work, seed + 3 + rank)
    parts = [getattr(model, name) for name in names]
    parameters = [p for part in (*parts, heads) for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, 2e-3, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    start, step = time.time(), 0
    while (spent := time.time() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 30) * max(0.01, 1 - spent / seconds)
        x, labels = data.batch(batch)
        x = degrade(x).contiguous(memory_format=torch.channels_last)
        losses: dict[str, Tensor] = {}
        with torch.autocast("cpu", torch.bfloat16):
            if "reader" in names:
                losses["reader"] = slot_loss(model.reader(x), labels)
                losses["subject"] = subject_loss(model.subject, x, labels)
                losses["face"] = face_loss(model.face, x, labels)
            else:
                losses["image_text"] = image_text_loss(model.image_text, heads, x, labels, data.rng)
                losses["sentence"] = sentence_loss(model.sentence, data.rng)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        for part in parts:
            nn.utils.clip_grad_norm_(part.parameters(), 2.0)
        optimizer.step()
        step += 1
        if step % 25 == 0:
            log_line(log, f"{step} {spent:.0f}s " + " ".join(f"{k} {v.item():.3f}" for k, v in losses.items()))
    kept = {key: value for key, value in model.state_dict().items() if key.split(".")[0] in names}
    torch.save(kept, work / f"experts_{rank}.pt")


def load_experts(work: Path) -> ToyNetworks:
    """The trained experts, ready to use."""
    model = ToyNetworks(words())
    model.load_state_dict(torch.load(work / "experts.pt", weights_only=True))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def measure_experts(work: Path, model: ToyNetworks) -> dict[str, object]:
    """What each expert can do on scenes it never saw (the last HOLD, and held-out subjects)."""
    rng = np.random.default_rng(11)
    out: dict[str, object] = {}
    for prefix, where in (("", slice(-1000, None)), ("held_out_", slice(0, 1000))):
        images, labels = load_cache(work, prefix)
        x, y = to_pixels(images[where]), torch.from_numpy(labels[where])
        read = torch.cat([model.reader.read(part) for part in x.split(250)])
        found: dict[str, object] = {"reader": dict(zip(SLOTS, (read == y).float().mean(0).tolist(), strict=True))}
        right, wrong = captions(y, rng)
        image = torch.cat([model.image_text.encode_image(part) for part in x.split(250)])
        a, b = model.image_text.encode_text(right), model.image_text.encode_text(wrong)
        told = torch.tensor([p != q for p, q in zip(right, wrong, strict=True)])
        good, bad = (image * a).sum(1)[told], (image * b).sum(1)[told]
        found["image_text"] = {
            "right_over_wrong": (good > bad).float().mean().item(),
            "right": good.mean().item(),
            "one_thing_wrong": bad.mean().item(),
            "other_picture": (image @ a.T).mean().item(),
        }
        e, own = model.subject(x), y[:, _SUBJECT]
        wanted = ((own[:, None] == own[None]) * _WEIGHT).sum(-1)
        cosine = e @ e.T
        off = ~torch.eye(len(e), dtype=torch.bool)
        found["subject"] = {
            "same_subject": cosine[(wanted > 0.99) & off].mean().item(),
            "one_attribute_wrong": cosine[(wanted > 0.7) & (wanted < 0.8)].mean().item(),
            "unrelated": cosine[wanted < 0.15].mean().item(),
            "correlation": torch.corrcoef(torch.stack([cosine[off], wanted[off]]))[0, 1].item(),
        }
        logit, _ = model.face(x)
        found["face"] = {"presence_accuracy": ((logit > 0) == (y[:, 0] < 3)).float().mean().item()}
        out[prefix + "scenes"] = found
    hits = total = 0
    for _ in range(300):
        values = grammar.draw_facts(rng)
        facts = [fact.sentence(value) for fact, value in zip(grammar.FACTS, values, strict=True)]
        e = model.sentence(facts)
        short = model.sentence([fact.short(value) for fact, value in zip(grammar.FACTS, values, strict=True)])
        hits += int(((short @ e.T).argmax(1) == torch.arange(len(facts))).sum())
        total += len(facts)
    out["sentence"] = {
        "short_answer_finds_its_fact": hits / total,
        "red_vs_blue": float(model.sentence(["red"]) @ model.sentence(["blue"]).T),
        "red_vs_it_is_red": float(model.sentence(["red"]) @ model.sentence(["it is red"]).T),
    }
    return out
