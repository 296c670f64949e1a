"""A run, a published folder or a model as one object that is called with prompts.

    pipe = uct.pipeline("runs/bo")            a run, what save_pretrained wrote, a hub id, a model's word or folder
    pipe("A photo of <bo>.").images[0]        PIL; texts of a model that writes are in .texts
    pipe.save_pretrained("published/bo")      what the run learned, with a model card; push_to_hub("owner/bo")

A published folder holds what `train.load_policy` reads (adapters in PEFT's format, concept tokens, or weights), a
config.yaml that names the base model, and the card. The concept's facts go along where that is said.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copy, copytree
from typing import TYPE_CHECKING, Literal

from ..config.settings import save_yaml
from ..models.bundle import ModelBundle, Sources
from ..models.checkpoint import resolve
from ..models.concept_tokens import published_epochs
from ..models.hub import hub_id, publish
from ..models.published_form import PublishedForm
from ..rollout.engine import RolloutEngine
from ..train.policy import copy_adapter
from ..utils.devices import pick_device, pick_dtype
from ..utils.errors import UserError
from ..utils.files import read_json, read_json_table, write_json
from .asking import grid_of
from .model_card import card_of
from .run_dir import ABOUT, BASE, CONFIG, Run

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

_LEARNED = (
    "policy.json",
    "concept",
    "concept.json",
    "concept.safetensors",
    "model",
)
"""What a run leaves of what it learned (`Policy.export`, `ConceptTokens.save`)."""
_LOCAL = ("root", "start", "rewards", "clip")
"""Keys of config.yaml that say where things lie on this machine."""


@dataclass
class PipelineOutput:
    """What a call gives: images (PIL, or one tensor [R, 3, H, W] in [−1, 1]) or texts, prompt by prompt."""

    images: list[Image] | Tensor = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


class Pipeline:
    """A model, brought to what a run learned, that is called with prompts."""

    def __init__(self, bundle: ModelBundle, run: Run | None = None):
        self.bundle, self.run = bundle, run
        self.engine = RolloutEngine.of(bundle)

    @classmethod
    def from_pretrained(
        cls, where: str | os.PathLike[str], *, device: str = "auto", dtype: str = "auto", name: str | None = None
    ) -> Pipeline:
        """Open `where`; `name` is the concept's, where it holds published tokens. Raises UserError where it is neither
        a run nor a model."""
        given = str(where)
        if given == BASE:
            return cls(Run(None).open(Sources(), device, dtype))
        folder = Path(where).expanduser()
        if not folder.is_dir():
            from ..models.registry import families

            words = {word for family in families() for word in family.words}
            if given in words or hub_id(where) is None:
                return cls(_model(given, device, dtype))
            folder = resolve(given, also=("*.yaml",))
        if Run.learned_at(folder) is None:
            return cls(_model(str(folder), device, dtype))
        run = Run.find(str(folder))
        return cls(run.open(Sources(), device, dtype, name), run)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        generator: torch.Generator | None = None,
        max_new_tokens: int | None = None,
        output_type: Literal["pil", "pt"] = "pil",
    ) -> PipelineOutput:
        """Draw (or write) `num_images_per_prompt` times for each prompt; the same seed gives the same.

        What is not given is as the run was trained, else the model's own. `generator` gives its seed. `guidance_scale`
        is read as the model reads it (docs/models.md). `max_new_tokens` is of texts alone.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        samples, seed = num_images_per_prompt, generator.initial_seed() % 2**63 if generator is not None else seed
        from ..models import WritingModel

        if isinstance(self.bundle.model, WritingModel):
            written = self.engine.write(prompts, samples=samples, max_new_tokens=max_new_tokens, seed=seed)
            return PipelineOutput(texts=written.texts)
        if output_type not in ("pil", "pt"):
            raise UserError(f"output_type={output_type!r}: must be pil or pt")
        usual = self._trained()
        steps = usual[0] if num_inference_steps is None else num_inference_steps
        scale = usual[1] if guidance_scale is None else guidance_scale
        drawn = self.engine.generate_images(
            [self._read(text) for text in prompts],
            samples=samples,
            steps=steps,
            guidance_scale=scale,
            grid=self._grid(height, width),
            seed=seed,
            record=False,
        )
        assert drawn.pixels is not None
        pixels = drawn.pixels.float().clamp(-1, 1)
        if output_type == "pt":
            return PipelineOutput(pixels)
        from ..data.images import to_pil

        return PipelineOutput([to_pil(each) for each in pixels])

    def ask(
        self,
        image: str | os.PathLike[str] | Image | None,
        question: str,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> str:
        """The answer to a question about an image (a file or a PIL image; None: about none, as facts are asked).

        Greedy unless `temperature` is above 0. `max_new_tokens`: as long as `understand` lets answers be. Raises
        UserError for a model that does not answer, an image that cannot be read, or a `<name>` it does not know.
        """
        from ..data.images import black_image, from_pil, load_pixels, square
        from .asking import check_prompt, question_for, sampling

        size, concept = self.engine.features_side or self.bundle.size, self.bundle.concept
        if image is None:
            pixels = black_image(size)
        elif isinstance(image, (str, os.PathLike)):
            pixels = load_pixels(image, size)
        else:
            pixels = from_pil(square(image.convert("RGB"), size))
        check_prompt(question, concept)
        text, raw = question_for(question, concept, self.run is not None and self.run.published)
        longest = sampling(self.bundle.sources.is_toy).max_new_tokens if max_new_tokens is None else max_new_tokens
        told = self.engine.generate_text(
            pixels[None], [text], raw=raw, max_new_tokens=longest, temperature=temperature, top_k=top_k, seed=seed
        )
        return told.texts[0]

    def _trained(self) -> tuple[int | None, float | None]:
        """Steps and guidance that the run was trained with; None: the model's own."""
        section = self.run.config.get("grpo") if self.run is not None else None
        if not isinstance(section, Mapping):
            return None, None
        from ..config.settings import from_mapping
        from ..config.training import GrpoConfig

        config = from_mapping(GrpoConfig, section, origin="config.yaml: grpo")
        return config.timesteps, config.guidance_scale

    def _read(self, prompt: str) -> str:
        """A prompt as the model reads it, the concept's helper tokens put in."""
        concept = self.bundle.concept
        if concept is None:
            return prompt
        published = self.run is not None and self.run.published
        return PublishedForm(concept).expand(prompt) if published else concept.expand(prompt)

    def _grid(self, height: int | None, width: int | None) -> tuple[int, int] | None:
        if height is None and width is None:
            return None
        step, usual = self.bundle.vq.downsampling, self.bundle.model.grid
        sides = (height or usual[0] * step, width or usual[1] * step)
        return grid_of(*sides, step, f"height={height}, width={width}")

    # --- publishing ------------------------------------------------------------------------------------------------

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, base_model: str | None = None, with_facts: bool = False
    ) -> Path:
        """Write what the run learned, with a model card, into an empty folder; returns it.

        base_model: what the card, config.yaml and the adapter name as base, where it is not what the run was made with
        (a hub id in place of a folder of this machine). with_facts: the concept's facts too, for `generate --reason`.
        """
        return Path(publish(lambda made: self._write(made, base_model, with_facts), Path(folder)))

    def push_to_hub(
        self,
        to: str | os.PathLike[str],
        *,
        base_model: str | None = None,
        with_facts: bool = False,
        private: bool = True,
    ) -> str:
        """:meth:`save_pretrained` to a hub id (or an empty folder); returns where it lies. Raises UserError where the
        base model is a folder of this machine, which nobody else could open."""
        sources = self.bundle.sources
        parts = {"base_model": base_model or sources.model, "vq": sources.vq, "tokenizer": sources.tokenizer}
        here = [f"{part} ({where})" for part, where in parts.items() if where and Path(where).expanduser().exists()]
        if hub_id(to) is not None and here:
            raise UserError(
                f"{', '.join(here)}: on this machine alone, so that nobody else could open what is published: train "
                "with hub ids, or name base_model="
            )
        return publish(lambda made: self._write(made, base_model, with_facts), to, private=private)

    def _write(self, folder: Path, base_model: str | None, with_facts: bool) -> None:
        run, model = self.run, self.bundle.model
        if run is None or run.path is None:
            raise UserError("this is a model as it is, no run: its own save_pretrained or push_to_hub writes it")
        learned = Run.learned_at(run.path)
        assert learned is not None
        for name in _LEARNED:
            if (learned / name).is_dir():
                copytree(learned / name, folder / name)
            elif (learned / name).is_file():
                copy(learned / name, folder / name)
        if self.bundle.concept is not None and published_epochs(learned):
            self.bundle.concept.save(folder)
        base = base_model if base_model is not None else self.bundle.sources.model
        config = {key: value for key, value in run.config.items() if key not in _LOCAL}
        save_yaml(folder / CONFIG, {**config, "model": base})
        policy = folder / "policy.json"
        if policy.is_file() and read_json_table(policy).get("trainable") == "lora":
            write_json(policy, {"trainable": "lora"})
            copy_adapter(model, learned, folder, base)
        if with_facts and (run.path / ABOUT).is_file():
            write_json(folder / ABOUT, read_json(run.path / ABOUT))
        from ..models import WritingModel

        family = "toy" if self.bundle.sources.is_toy else model.family
        card_of(run, learned, family, base, isinstance(model, WritingModel)).write(folder)


def pipeline(
    where: str | os.PathLike[str], *, device: str = "auto", dtype: str = "auto", name: str | None = None
) -> Pipeline:
    """Open a run, a published folder, a hub id or a model, to be called with prompts (:class:`Pipeline`).

    Args:
        where: a run's folder, what `Pipeline.save_pretrained` wrote, a hub id, or a model's folder or word
            ("show-o-512"); "base" is the embedded toy.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, float32, bfloat16 or float16.
        name: the concept's, where `where` holds published tokens.

    Raises:
        UserError: `where` is neither a run nor a model, or its files cannot be used.
    """
    return Pipeline.from_pretrained(where, device=device, dtype=dtype, name=name)


def _model(where: str, device: str, dtype: str) -> ModelBundle:
    from ..models import registry

    place = pick_device(device)
    return registry.load(where, pick_dtype(dtype, place), place)
