"""Where a concept's rows begin: class word, k-means of the images' codes, faces, or small noise.

    understanding   <name> from its class word, <token_0…K−1> from k-means centres of the images' code embeddings
    generation      <token_K…K+M−1> from the mean face embedding for humans, else N(0, 0.02)
    deepening       the added tokens from k-means over codes that stand still in the model's own images

Source: the published stages of UniCTokens (An et al., 2025).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models import ConceptModel, ConceptTokens, TextTokenizer
from ...utils.errors import UserError, needs

FaceEmbedding = Callable[[Tensor], Tensor]
"""Pixels [M, 3, H, W] in [-1, 1] → face embeddings [M, E] or [E]."""


@torch.no_grad()
def from_class_word(concept: ConceptTokens, model: ConceptModel, tokenizer: TextTokenizer, word: str) -> None:
    """Start `<name>` as the mean embedding of its class word."""
    ids = tokenizer.encode(word)
    if not ids:
        raise UserError(f"class word {word!r}: the tokenizer makes nothing of it; give an ordinary word such as 'dog'")
    concept.embed[concept.rows("sks")] = model.embed(torch.tensor(ids, device=model.device)).float().mean(0)


@torch.no_grad()
def from_codes(concept: ConceptTokens, model: ConceptModel, codes: Tensor, group: str, seed: int) -> None:
    """Start the rows of `group` as k-means centres of the embeddings of image codes int64 [...]."""
    where = concept.rows(group)
    points = model.embed_codes(codes.flatten().to(model.device)).float().cpu()
    concept.embed[where] = kmeans(points, where.stop - where.start, seed).to(concept.embed.device)


def kmeans(points: Tensor, count: int, seed: int) -> Tensor:
    """`count` centres [count, D] of points [P, D]; where there are fewer distinct points, some centres are the same."""
    with needs("train"):
        from sklearn.cluster import KMeans

    if count == 0:
        return points.new_empty(0, points.shape[1])
    distinct, weights = points.unique(dim=0, return_counts=True)
    if len(distinct) <= count:
        return distinct[torch.arange(count) % len(distinct)]
    fitted = KMeans(n_clusters=count, random_state=seed, n_init=1).fit(distinct.numpy(), sample_weight=weights.numpy())
    return torch.from_numpy(fitted.cluster_centers_).to(points.dtype)


@torch.no_grad()
def from_noise(concept: ConceptTokens, group: str, seed: int) -> None:
    """Start the embeddings of `group` from N(0, 0.02)."""
    where = concept.rows(group)
    generator = torch.Generator().manual_seed(seed)
    concept.embed[where] = (
        torch.randn(where.stop - where.start, concept.width, generator=generator).to(concept.embed) * 0.02
    )


@torch.no_grad()
def from_face(concept: ConceptTokens, pixels: Tensor, embed_faces: FaceEmbedding) -> None:
    """Start the generation rows from the mean face: its embedding cut into M parts, each stretched to the width."""
    where = concept.rows("generation")
    count = where.stop - where.start
    if count == 0:
        return
    face = torch.as_tensor(embed_faces(pixels)).float()
    face = face.mean(0) if face.ndim == 2 else face
    if face.ndim != 1 or not bool(torch.isfinite(face).all()):
        raise UserError(f"face embedding of shape {tuple(face.shape)}: must be [M, E] or [E], and finite")
    parts = F.pad(face, (0, -len(face) % count)).view(1, count, -1)
    stretched = F.interpolate(parts, size=concept.width, mode="linear")[0]
    concept.embed[where] = stretched.to(concept.embed)
