"""`pyunictokens generate` and `pyunictokens understand`: draw with a model, ask it about an image.

Generation may reason first: the model is shown the concept's facts and the prompt, answers with the fact that fits, and
draws from both (paper, equations 2 to 4). Sampling is `rollout`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..utils.errors import UserError
from ..utils.text import printable
from .shell import (
    INTERRUPTED,
    Bars,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    OverridesArgument,
    ProfileOption,
    SeedOption,
    TokenizerOption,
    VqOption,
    console,
    show_phases,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.bundle import ModelBundle
    from ..rollout.engine import RolloutEngine
    from ..runs.run_dir import Run

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run of `train`, a folder of concept tokens, or `base`.")
]
NameOption = Annotated[
    str | None, typer.Option("--name", help="The concept's name, where RUN holds published tokens (epoch_*_embed.pt).")
]
ConceptOption = Annotated[
    tuple[Path, str] | None,
    typer.Option("--concept", metavar="ROOT NAME", help="The concept folder. Default: the one the run was trained on."),
]


@dataclass(frozen=True)
class SamplingConfig:
    """How images and answers are sampled."""

    timesteps: int = 50
    """MaskGIT timesteps of an image."""
    guidance_scale: float = 5.0
    """Classifier-free guidance; 0 turns it off."""
    temperature: float = 1.0
    """Temperature of the re-masking noise."""
    schedule: str = "cosine"
    """How the number of unknown codes falls: cosine, linear, sigmoid, or pow2 and the like."""
    max_new_tokens: int = 100
    """Longest answer."""
    answer_temperature: float = 0.0
    """Temperature of answers; 0 takes the likeliest token each time."""
    top_k: int = 0
    """Answers are drawn from the k likeliest tokens; 0 takes all."""


def sampling(is_toy: bool, config: Path | None, words: list[str] | None) -> SamplingConfig:
    """Defaults of the toy or of the published model, then the file, then the words."""
    from ..config.settings import from_mapping, load_yaml, with_overrides

    base = SamplingConfig(timesteps=12, guidance_scale=3.0, max_new_tokens=24) if is_toy else SamplingConfig()
    if config is not None:
        base = from_mapping(SamplingConfig, load_yaml(config), base=base, origin=str(config))
    return with_overrides(base, words or [])


def check_prompt(prompt: str, bench: ModelBundle) -> str:
    """The prompt with the concept's helper tokens put in. Raises UserError for a `<name>` that is not the concept's.

    Warns where the prompt names the concept without its token.
    """
    import re
    import warnings

    from ..data.parse import TextFix

    if bench.concept is not None and bench.concept.sks not in prompt:
        name = bench.concept.name
        meant = TextFix(name).strange(prompt) or re.search(
            rf"(?<![\w<]){re.escape(name)}(?![\w>])", prompt, re.IGNORECASE
        )
        if meant:
            warnings.warn(f"{prompt!r} holds no {bench.concept.sks}: did you mean {bench.concept.sks}?", stacklevel=2)
    known = set(bench.concept.tokens) if bench.concept is not None else set()
    strange = [token for token in re.findall(r"<[^<>|\s]+>", prompt) if token not in known]
    if strange:
        have = f"this run knows {bench.concept.sks}" if bench.concept is not None else "no concept is attached"
        raise UserError(f"{prompt!r}: {strange[0]} is not a token of this model; {have}")
    return bench.concept.expand(prompt) if bench.concept is not None else prompt


def facts_of(run: Run, concept: tuple[Path, str] | None) -> list[str]:
    """The facts to reason with: of the folder named, else of the run. Raises UserError when there are none."""
    if concept is not None:
        from ..data.folder import load_concept

        facts = load_concept(*concept).extra_info
    else:
        facts = list(run.facts)
    if not facts:
        raise UserError("--reason needs the concept's facts: name its folder with --concept ROOT NAME")
    return facts


def reason(
    bench: ModelBundle, engine: RolloutEngine, facts: list[str], prompt: str, settings: SamplingConfig, seed: int
) -> tuple[str, str]:
    """(answer, prompt + answer): the fact the model takes the prompt to mean, and what to draw (equations 2 and 4)."""
    from ..data.images import black_image
    from ..data.wording import compound_prompt, first_sentence, text_only_question

    question = text_only_question(facts, prompt)
    concept = bench.concept
    rollout = engine.generate_text(
        black_image(bench.size)[None].to(bench.device),
        [concept.expand(question) if concept is not None else question],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.answer_temperature,
        top_k=settings.top_k,
        seed=seed,
    )
    answer = first_sentence(rollout.texts[0])
    return answer, compound_prompt(prompt, answer)


def save_images(pixels: Tensor, out: Path, rows: Sequence[int]) -> list[Path]:
    """Write a grid to `out` and each image to `out` with the number of its row. Returns the single files."""
    from ..data.images import make_grid, save_image

    single = [out.with_name(f"{out.stem}_{row}{out.suffix}") for row in rows]
    save_image(make_grid(pixels, min(len(pixels), 4), tile=max(128, pixels.shape[-1])), out)
    for image, file in zip(pixels, single, strict=True):
        save_image(image, file)
    return single


def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Argument(help='What to draw, as in "A photo of `<bo>` on the beach."')],
    overrides: OverridesArgument = None,
    number: Annotated[int, typer.Option("-n", "--number", min=1, max=256, help="How many images.")] = 1,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The grid; single images get _0, _1, … in their names.")
    ] = Path("out.png"),
    use_reason: Annotated[
        bool, typer.Option("--reason", help="Ask first which fact of the concept the prompt means, then draw.")
    ] = False,
    concept: ConceptOption = None,
    name: NameOption = None,
    model: ModelOption = None,
    vq: VqOption = None,
    tokenizer: TokenizerOption = None,
    config: ConfigOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
    profile: ProfileOption = None,
) -> None:
    """Draw images from a prompt, with what a run has learned or with the bare model (RUN = base).

    Settings: timesteps, guidance_scale, temperature, schedule; with --reason also max_new_tokens, answer_temperature,
    top_k.

    Examples:

        pyunictokens generate runs/bo "A photo of <bo> on the beach." -n 4 --out beach.png

        pyunictokens generate runs/bo "A photo of <bo> with its favourite toy." --reason --out toy.png

        pyunictokens generate base "A photo of a red cat wearing a blue hat in the snow." timesteps=18 guidance_scale=4
    """
    from ..models.bundle import Sources
    from ..rollout.engine import RolloutEngine
    from ..rollout.types import RolloutInterrupted
    from ..runs.run_dir import Run
    from ..utils.files import refuse_unwritable
    from ..utils.profiling import Recorder, trace

    if out.suffix.lower() not in {".png", ".jpg", ".jpeg", ".webp"}:
        raise UserError(f"--out {out}: the name must end in .png, .jpg, .jpeg or .webp")
    refuse_unwritable(out)
    place, flags = Run.find(run), Sources(model, vq, tokenizer)
    settings = sampling(place.sources(flags).is_toy, config, overrides)
    facts = facts_of(place, concept) if use_reason else []
    bench = place.open(flags, device, dtype, name)
    check_prompt(prompt, bench)
    engine = RolloutEngine.of(bench, settings.schedule)
    out_console = console()
    answer = ""
    with Bars() as bars, Recorder(bench.device) as recorder, trace(profile):
        if use_reason:
            answer, prompt = reason(bench, engine, facts, prompt, settings, seed)
        rows = list(range(number))
        try:
            rollout = engine.generate_images(
                [check_prompt(prompt, bench)],
                samples=number,
                steps=settings.timesteps,
                guidance_scale=settings.guidance_scale,
                temperature=settings.temperature,
                seed=seed,
                record=False,
                progress=bars.counter("generating"),
            )
        except RolloutInterrupted as stopped:  # what is finished is kept
            rollout, rows = stopped.rollout, stopped.rows
            if rollout.pixels is None:
                raise
    assert rollout.pixels is not None
    files = save_images(rollout.pixels, out, rows)
    if answer:
        out_console.print(f"answer: {answer}", markup=False)
    out_console.print(f"{out} ({', '.join(file.name for file in files)})", markup=False)
    if len(rows) < number:
        out_console.print(f"stopped: {len(rows)} of {number} images were finished and are saved", markup=False)
        raise typer.Exit(INTERRUPTED)
    if profile is not None:
        show_phases(recorder.report(bench.model.dtype))


def understand(
    run: RunArgument,
    image: Annotated[Path, typer.Argument(help="An image file.")],
    question: Annotated[str, typer.Argument(help='As in "What colour is `<bo>`?"')],
    overrides: OverridesArgument = None,
    number: Annotated[int, typer.Option("-n", "--number", min=1, max=256, help="How many answers to sample.")] = 1,
    name: NameOption = None,
    model: ModelOption = None,
    vq: VqOption = None,
    tokenizer: TokenizerOption = None,
    config: ConfigOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
) -> None:
    """Ask a question about an image and print the answer.

    Settings: max_new_tokens, answer_temperature, top_k. More than one answer (-n) is sampled at temperature 1 unless
    answer_temperature says otherwise.

    Examples:

        pyunictokens understand runs/bo photo.png "What colour is <bo>?"

        pyunictokens understand base photo.png "What is in the image?" -n 3 answer_temperature=0.7
    """
    from ..data.images import load_pixels
    from ..models.bundle import Sources
    from ..rollout.engine import RolloutEngine
    from ..runs.run_dir import Run

    place, flags = Run.find(run), Sources(model, vq, tokenizer)
    settings = sampling(place.sources(flags).is_toy, config, overrides)
    bench = place.open(flags, device, dtype, name)
    text = check_prompt(question, bench)
    pixels = load_pixels(image, bench.size)[None].to(bench.device)
    temperature = settings.answer_temperature
    if number > 1 and temperature == 0:
        temperature = 1.0
    with Bars() as bars:
        rollout = RolloutEngine.of(bench).generate_text(
            pixels,
            [text],
            samples=number,
            max_new_tokens=settings.max_new_tokens,
            temperature=temperature,
            top_k=settings.top_k,
            seed=seed,
        )
        bars("answering", 1, 1)
    for answer in rollout.texts:
        typer.echo(printable(answer))
