"""Textual inversion (Gal et al., 2022) on Stable Diffusion: an embedding of the text encoder, learned from the photos.

    DIR/learned_embeds.safetensors      {"<name>": [D] or [n, D]}, as diffusers' `load_textual_inversion` reads it

The embedding starts as the class word's first token. It is kept beside the encoder's table and put in its place where
its ids stand: the same gradient as training the whole table and restoring every other row, without the table's moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config.limits import at_least
from ..utils.errors import UserError
from ..utils.files import save_safetensors_atomic
from .base import Job, Method, PhotoSettings, Plan, Trained
from .loop import batch_of, finished, learn_photos, photos_to_learn
from .planning import lacking
from .showo_inversion import PROMPTS
from .stable_diffusion import Parts, costs_of, photos

FILE = "learned_embeds.safetensors"


@dataclass(frozen=True)
class TextualInversionSettings(PhotoSettings):
    """How the embedding is learned."""

    tokens: int = 1
    """Embeddings of the concept."""
    batch: int = 4
    """Photos a step."""
    size: int = 0
    """Pixels along one side of the photos; 0 takes the pipeline's own."""
    flip: bool = True
    """Mirror photos at random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, tokens=self.tokens, batch=self.batch)
        at_least(0, size=self.size)


class TextualInversion(Method[TextualInversionSettings]):
    """An embedding of Stable Diffusion's text encoder."""

    name, title, answers = "textual-inversion", "Textual inversion", False
    about = "one embedding of Stable Diffusion's text encoder, from the photos alone; it draws"
    model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    settings = TextualInversionSettings

    def plan(self, job: Job[TextualInversionSettings]) -> Plan:
        settings, model = job.settings, job.sources.model or self.model
        one, memory = costs_of(model, settings.batch, job.dtype, settings.tokens * 1024, 1.0)
        return Plan(settings.steps, one * settings.steps, memory, lacking([model]))

    def train(self, job: Job[TextualInversionSettings]) -> Mapping[str, object]:
        """Learn the rows of the embedding."""
        settings, data, model = job.settings, job.concept, job.sources.model or self.model
        paths = photos_to_learn(data)
        parts = Parts(model, job.device, job.dtype)
        names = [data.sks, *(f"{data.sks}_{place}" for place in range(1, settings.tokens))]
        rows = new_rows(parts, names, data.class_word)
        size = settings.size or parts.size

        def losses(step: int, generator: torch.Generator) -> Iterable[Tensor]:
            places = batch_of(len(paths), settings.batch, settings.seed, step)
            pixels = photos([paths[place] for place in places], size, settings.flip, generator)
            chosen = torch.randint(0, len(PROMPTS), (len(places),), generator=generator).tolist()
            prompts = [PROMPTS[place].format(" ".join(names)) for place in chosen]
            yield parts.loss(parts.latents(pixels, generator), parts.states(prompts), generator)

        facts = learn_photos(job, "embedding", {"embedding": rows}, losses, len(paths))
        learned = rows.detach().float().cpu()
        save_safetensors_atomic(job.folder / FILE, {data.sks: learned[0] if len(learned) == 1 else learned})
        finished(job)
        return facts

    def words(self, folder: Path, trained: Trained) -> str:
        return f"diffusers:{trained.model or self.model},embedding={folder / FILE}"


def new_rows(parts: Parts, names: list[str], word: str) -> nn.Parameter:
    """Give the tokenizer the tokens `names`, which start as the first token of `word`; returns their rows [n, D], which
    stand in the text encoder's table wherever those tokens are read."""
    ids = parts.tokenizer(word, add_special_tokens=False).input_ids
    if not ids:
        raise UserError(f"class word {word!r}: the tokenizer makes nothing of it; give an ordinary word such as 'dog'")
    if parts.tokenizer.add_tokens(names) != len(names):
        raise UserError(f"{', '.join(names)}: some of these tokens are in the tokenizer already: rename the concept")
    first = int(parts.tokenizer.convert_tokens_to_ids(names[0]))
    table = parts.text.get_input_embeddings()
    start = table.weight[ids[0]].detach().clone()
    parts.text.resize_token_embeddings(len(parts.tokenizer), mean_resizing=False)
    parts.text.requires_grad_(False)
    rows = nn.Parameter(start.repeat(len(names), 1))

    def put(module: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> Tensor:
        place = given[0] - first
        mine = (place >= 0) & (place < len(rows))
        return torch.where(mine[..., None], rows[place.clamp(0, len(rows) - 1)].to(found.dtype), found)

    parts.text.get_input_embeddings().register_forward_hook(put)
    return rows
