"""RAP (Hao et al., 2025): a LLaVA that looks a concept up in a database, which costs no training per concept.

The database has an image and a line about each concept. Whose name is in a question comes first; then come those whose
images are nearest to the one asked about, in CLIP's space, up to `top_k`. They stand before the question, each with its
image: "[1.<image> Name: <bo>, Info: …]". The published model was post-trained on such prompts; `post_train=true` does
that here with LoRA (peft), on the questions about the *other* concepts of the data folder, so that this one stays
unseen.

    DIR/database.json           concept_dict {<bo>: {name, image, info, category}}, path_to_concept {image: <bo>}
    DIR/index.safetensors       embed [n, D], the images in the order of path_to_concept
    DIR/adapter/                the LoRA, as peft saves it; with post_train

Distances are computed by faiss where it is installed (extra `faiss`), else by torch: the same numbers, slower for
databases of many thousands.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..config.limits import MOST, within
from ..data.concept import Concept
from ..data.folder import list_concepts, load_concept
from ..data.images import from_pil, read_image
from ..evaluate.baselines.vlm import Backbone
from ..evaluate.clip import Embeddings, OpenClip
from ..evaluate.core import AnswersOnly, Model
from ..evaluate.tasks import Subject
from ..models.checkpoint import load_tensors
from ..utils.errors import UserError, needs
from ..utils.files import AnyJson, read_json, save_safetensors_atomic, write_json
from . import answering
from .answering import AnsweringSettings, Sample, steps_of, vlm_plan
from .base import Job, Method, Plan, Reading, Settings
from .loop import finished
from .planning import lacking

if TYPE_CHECKING:
    from peft import PeftModel
    from PIL.Image import Image
    from transformers import PreTrainedModel

_DATABASE, _INDEX, _ADAPTER = "database.json", "index.safetensors", "adapter"


@dataclass(frozen=True)
class RapSettings(AnsweringSettings):
    """The published recipe."""

    top_k: int = 2
    """Concepts that are shown with a question, at most."""
    clip: str = "timm/vit_large_patch14_clip_336.openai"
    """CLIP of open_clip for retrieval: a folder, a hub id, or ARCHITECTURE=FILE."""
    everyone: bool = True
    """Whether the database has all concepts of the data folder, or this one alone."""
    facts: bool = True
    """Whether the line about a concept has its facts too."""
    post_train: bool = False
    """Whether the model is post-trained with LoRA on the other concepts of the folder."""
    rank: int = 128
    """Rank of the LoRA."""
    alpha: int = 256
    """Scale of the LoRA, divided by its rank."""
    dropout: float = 0.05
    """Dropout before the LoRA."""
    epochs: int = 1
    """Passes over all questions."""
    batch: int = 16
    """Questions a step."""
    lr: float = 1e-4
    """Learning rate of AdamW: a warm-up over 3 % of the steps, then half a cosine to 0."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    flip: float = 0.0
    """Share of the images that are mirrored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(1, MOST, top_k=self.top_k, rank=self.rank, alpha=self.alpha)
        within(0, 1, dropout=self.dropout)


@dataclass(frozen=True)
class Entry:
    """A concept in the database."""

    token: str
    """`<name>`."""
    image: Path
    info: str
    category: str


class Database:
    """Entries and the embeddings of their images."""

    def __init__(self, entries: Sequence[Entry], embed_ND: Tensor):
        self.entries, self.embed_ND = list(entries), embed_ND.float()
        self._faiss: Any = None
        if importlib.util.find_spec("faiss") is not None:
            with needs("faiss"):
                import faiss

            self._faiss = faiss.IndexFlatL2(embed_ND.shape[1])
            self._faiss.add(self.embed_ND.numpy())

    @classmethod
    def of(cls, concepts: Sequence[Concept], embeddings: Embeddings, facts: bool) -> Database:
        """One entry a concept, with its first training image."""
        entries = []
        for concept in concepts:
            about = concept.info or f"{concept.sks} is a {concept.class_word}."
            info = " ".join([about, *(concept.extra_info if facts else [])])
            entries.append(Entry(concept.sks, concept.train_images[0], info, concept.class_word))
        return cls(entries, embeddings.references([entry.image for entry in entries]))

    def nearest(self, query_D: Tensor, count: int) -> list[tuple[float, int]]:
        """(squared distance, place) of the nearest entries, the nearest first."""
        count = min(count, len(self.entries))
        if self._faiss is not None:
            far, places = self._faiss.search(query_D.float()[None].numpy(), count)
            return [(float(a), int(b)) for a, b in zip(far[0], places[0], strict=True)]
        far_N = (self.embed_ND - query_D.float()).square().sum(dim=1)
        chosen = far_N.topk(count, largest=False)
        return [(float(a), int(b)) for a, b in zip(chosen.values, chosen.indices, strict=True)]

    def retrieve(self, question: str, queries: Sequence[Tensor], top_k: int) -> list[Entry]:
        """The entries to show: those named in the question, then the nearest to the images asked about."""
        found = [entry for entry in self.entries if entry.token in question]
        for _, place in sorted(pair for query in queries for pair in self.nearest(query, 2)):
            if len(found) >= top_k:
                break
            if self.entries[place] not in found:
                found.append(self.entries[place])
        return found

    def save(self, folder: Path, root: Path) -> None:
        """Write both files; images are named as seen from the data folder `root`."""
        names = {entry.token: entry.image.absolute().relative_to(root.absolute()).as_posix() for entry in self.entries}
        table = {
            entry.token: {
                "name": entry.token.strip("<>"),
                "image": names[entry.token],
                "info": entry.info,
                "category": entry.category,
            }
            for entry in self.entries
        }
        write_json(
            folder / _DATABASE,
            {"concept_dict": table, "path_to_concept": {path: token for token, path in names.items()}},
        )
        save_safetensors_atomic(folder / _INDEX, {"embed": self.embed_ND})

    @classmethod
    def load(cls, folder: Path, root: Path) -> Database:
        """What :meth:`save` wrote. Raises UserError for files that do not belong together."""
        content: AnyJson = read_json(folder / _DATABASE)
        try:
            entries = [
                Entry(str(token), root / str(row["image"]), str(row["info"]), str(row["category"]))
                for token, row in content["concept_dict"].items()
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / _DATABASE}: is no database of RAP ({type(error).__name__}: {error})") from None
        embed = load_tensors(folder / _INDEX).get("embed")
        if embed is None or len(embed) != len(entries):
            raise UserError(f"{folder / _INDEX}: does not belong to {_DATABASE} beside it: train again")
        return cls(entries, embed)

    @property
    def search(self) -> str:
        """How distances are computed, in words."""
        if self._faiss is not None:
            return "faiss"
        return "torch, as faiss is not installed (the same result; pip install 'pyunictokens[faiss]')"


def prompt_of(entries: Sequence[Entry], question: str, asked: bool, token: str) -> str:
    """The published prompt; `token` stands for an image, the one asked about first where there is one."""
    lines = [
        f"{number}.{token}\n Name: {entry.token}, Info: {entry.info}\n" for number, entry in enumerate(entries, start=1)
    ]
    return f"{token if asked else ''}\n[{''.join(lines)}]{question}".lstrip("\n")


class Rap(Method[RapSettings]):
    """A database, and where wanted a LoRA."""

    name, title, model, generates = "rap", "RAP-MLLM", "llava-hf/llava-1.5-13b-hf", False
    about = "a database that a LLaVA looks concepts up in by CLIP, and where wanted LoRA post-training; it answers"
    settings: ClassVar[type[Settings]] = RapSettings

    def plan(self, job: Job[RapSettings]) -> Plan:
        """The database costs one pass of CLIP an image; post-training is counted."""
        job, settings = self.named(job), job.settings
        clip = [] if "=" in settings.clip else [settings.clip]
        if not settings.post_train:
            absent = lacking([job.sources.model, *clip])
            return Plan(0, downloads=absent, notes=("nothing is trained: a database is made",))
        steps = steps_of(len(_questions(_others(job))), settings)
        return replace(
            vlm_plan(job, steps, settings.batch, lambda width: 14 * settings.rank * width),
            downloads=lacking([job.sources.model, *clip]),
        )

    def train(self, job: Job[RapSettings]) -> Mapping[str, object]:
        """Make the database; post-train where wanted."""
        job, settings = self.named(job), job.settings
        embeddings = _embeddings(settings.clip, job.device)
        others = [one for one in _concepts(job) if one.name != job.concept.name]
        database = Database.of([job.concept, *(others if settings.everyone else [])], embeddings, settings.facts)
        database.save(job.folder, job.concept.root)
        facts = {"concepts": len(database.entries), "search": database.search, "steps": 0}
        return {**facts, **self._post_train(job, embeddings)} if settings.post_train else facts

    def open(self, reading: Reading, subject: Subject) -> Model:
        settings, root = reading.trained.settings, Path(reading.trained.root)
        backbone = Backbone(str(reading.trained.model or self.model), reading.device, reading.dtype)
        if (reading.folder / _ADAPTER).is_dir():
            with needs("train"):
                from peft import PeftModel

            backbone.model = PeftModel.from_pretrained(backbone.model, str(reading.folder / _ADAPTER)).eval()
        embeddings = _embeddings(str(settings["clip"]), reading.device)
        database = Database.load(reading.folder, root)
        return Asked(backbone, database, embeddings, int(str(settings["top_k"])), reading.sampling.max_new_tokens)

    def _post_train(self, job: Job[RapSettings], embeddings: Embeddings) -> dict[str, object]:
        """LoRA on questions about other concepts, each with its own entry and another one in random order."""
        settings, others = job.settings, _others(job)
        if not others:
            raise UserError(
                f"{job.concept.root}: has no concept beside {job.concept.name}: post-training learns from others, so "
                "that this one stays unseen; leave post_train out, or put more concepts into the folder"
            )
        database = Database.of(others, embeddings, settings.facts)
        backbone = Backbone(str(job.sources.model), job.device, job.dtype)
        torch.manual_seed(settings.seed)  # peft draws its starting values from it
        backbone.model = with_lora(backbone.model, settings)
        named = {name: value for name, value in backbone.model.named_parameters() if value.requires_grad}
        samples = _questions(others)

        def losses(step: int, generator: torch.Generator) -> Iterator[Tensor]:
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))  # dropout
            batch = []
            for place in answering.picked(len(samples), settings, step):
                owner, sample = samples[place]
                entries = [database.entries[owner]]
                if len(database.entries) > 1 and settings.top_k > 1:
                    other = int(torch.randint(len(database.entries) - 1, (), generator=generator))
                    entries.insert(
                        int(torch.randint(2, (), generator=generator)), database.entries[other + (other >= owner)]
                    )
                shown = answering.shown(sample.image, settings.flip, generator)
                text = prompt_of(entries, sample.question, bool(shown), backbone.token)
                batch.append(([*shown, *(read_image(entry.image) for entry in entries)], text, sample.answer))
            return answering.losses(backbone, batch, placed=True)

        backbone.model.train()
        steps = answering.learn_samples(job, "post_training", named, losses, len(samples), schedule="cosine")
        aside = job.folder / f".{_ADAPTER}.part"
        shutil.rmtree(aside, ignore_errors=True)
        backbone.model.save_pretrained(str(aside))
        shutil.rmtree(job.folder / _ADAPTER, ignore_errors=True)
        aside.rename(job.folder / _ADAPTER)
        finished(job)
        return {"steps": steps, "learned": sum(value.numel() for value in named.values())}


def with_lora(model: PreTrainedModel, settings: RapSettings) -> PeftModel:
    """`model` with a LoRA on every linear layer of its language model; the image encoder, the projector and the head
    have none, as published."""
    with needs("train"):
        from peft import LoraConfig, get_peft_model

    language = {
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and "language_model" in name and not name.endswith("lm_head")
    }
    if not language:
        raise UserError(f"{type(model).__name__}: has no language model inside that LoRA could go to: give a LLaVA")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=sorted(language),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


class Asked(AnswersOnly):
    """A model that is shown what the database has on a question."""

    def __init__(self, backbone: Backbone, database: Database, embeddings: Embeddings, top_k: int, max_new_tokens: int):
        self.backbone, self.database, self.embeddings = backbone, database, embeddings
        self.top_k, self.max_new_tokens = top_k, max_new_tokens

    def answer(self, images: Sequence[Image], question: str) -> str:
        """The likeliest answer, after the entries that were retrieved."""
        queries = [self.embeddings.samples(from_pil(image)[None])[0] for image in images]
        entries = self.database.retrieve(question, queries, self.top_k)
        text = prompt_of(entries, question, bool(images), self.backbone.token)
        shown = [*images, *(read_image(entry.image) for entry in entries)]
        return self.backbone.answer(shown, text, self.max_new_tokens, placed=True)


def _embeddings(clip: str, device: torch.device) -> Embeddings:
    return Embeddings(OpenClip(clip, device), clip, device=device)


def _concepts(job: Job[RapSettings]) -> list[Concept]:
    return [load_concept(job.concept.root, name) for name in list_concepts(job.concept.root)]


def _others(job: Job[RapSettings]) -> list[Concept]:
    return [concept for concept in _concepts(job) if concept.name != job.concept.name]


def _questions(concepts: Sequence[Concept]) -> list[tuple[int, Sample]]:
    """(whose, question) of all concepts."""
    return [(place, each) for place, concept in enumerate(concepts) for each in answering.samples_of(concept)]
