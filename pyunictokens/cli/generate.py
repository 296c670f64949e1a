"""`pyunictokens generate` and `pyunictokens understand`: draw with a model, ask it about an image.

Generation may reason first: the model is shown the concept's facts and the prompt, answers with the fact that fits, and
draws from both (paper, equations 2 to 4). Sampling is `rollout`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..utils.errors import UserError
from ..utils.text import printable
from .groups import MACHINE, MODELS, Machine, Models, spread
from .shell import (
    INTERRUPTED,
    Bars,
    ConfigOption,
    OverridesArgument,
    ProfileOption,
    SeedOption,
    say,
    show_phases,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.bundle import ModelBundle
    from ..rollout.engine import RolloutEngine
    from ..runs.asking import SamplingConfig
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
    run: Run,
    bench: ModelBundle,
    engine: RolloutEngine,
    facts: list[str],
    prompt: str,
    settings: SamplingConfig,
    seed: int,
) -> tuple[str, str]:
    """(answer, prompt + answer): the fact the model takes the prompt to mean, and what to draw (equations 2 and 4)."""
    from ..data.images import black_image
    from ..data.wording import compound_prompt, first_sentence
    from ..runs.asking import reasoning_question

    question, raw = reasoning_question(facts, prompt, bench.concept, run.published)
    rollout = engine.generate_text(
        black_image(bench.size)[None].to(bench.device),
        [question],
        raw=raw,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.answer_temperature,
        top_k=settings.top_k,
        seed=seed,
    )
    answer = first_sentence(rollout.texts[0])
    return answer, compound_prompt(prompt, answer)


def _grid(size: str | None, bench: ModelBundle) -> tuple[int, int]:
    """Codes in height and width of an image of `size`, HxW in pixels."""
    import re

    from ..runs.asking import grid_of

    if size is None:
        return bench.model.grid
    found = re.fullmatch(r"([1-9][0-9]{0,4})[xX×]([1-9][0-9]{0,4})", size.strip())
    if found is None:
        raise UserError(f"--size {size}: must be HEIGHTxWIDTH in pixels, as in 384x640")
    return grid_of(int(found[1]), int(found[2]), bench.vq.downsampling, f"--size {size}")


def known_codes(image: Path, mask: Path, grid: tuple[int, int], bench: ModelBundle) -> Tensor:
    """Codes int64 [N] of `image` cut to the grid, −1 wherever `mask` is white."""
    from ..data.images import read_image
    from ..runs.asking import painted

    pixels, unknown = painted(read_image(image), read_image(mask), grid, bench.vq.downsampling, f"--mask {mask}")
    codes = bench.vq.encode(pixels[None].to(bench.device))[0].long().cpu()
    return codes.masked_fill(unknown, -1)


def save_images(pixels: Tensor, out: Path, rows: Sequence[int]) -> list[Path]:
    """Write a grid to `out` and each image to `out` with the number of its row. Returns the single files."""
    from ..data.images import make_grid, save_image

    single = [out.with_name(f"{out.stem}_{row}{out.suffix}") for row in rows]
    save_image(make_grid(pixels, min(len(pixels), 4), tile=max(128, pixels.shape[-1])), out)
    for image, file in zip(pixels, single, strict=True):
        save_image(image, file)
    return single


@spread
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
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="HxW", help="Height and width in pixels. Default: the model's own square."),
    ] = None,
    image: Annotated[
        Path | None, typer.Option("--image", help="An image to paint into: what --mask leaves black stays as it is.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option("--mask", help="Beside --image, of the same shape: what is white is painted anew.")
    ] = None,
    concept: ConceptOption = None,
    name: NameOption = None,
    models: Models = MODELS,
    config: ConfigOption = None,
    machine: Machine = MACHINE,
    seed: SeedOption = 0,
    profile: ProfileOption = None,
) -> None:
    """Draw images from a prompt, with what a run has learned or with the bare model (RUN = base).

    A model that writes (llada) prints its texts. Settings: timesteps, guidance_scale, temperature, schedule, by default
    the model's own; with --reason, and for texts, also max_new_tokens, answer_temperature, top_k.

    Examples:

        pyunictokens generate runs/bo "A photo of <bo> on the beach." -n 4 --out beach.png

        pyunictokens generate runs/bo "A photo of <bo> with its favourite toy." --reason --out toy.png

        pyunictokens generate base "A photo of a red cat wearing a blue hat in the snow." timesteps=18 guidance_scale=4

        pyunictokens generate runs/bo "A photo of <bo>." --size 384x640 --out wide.png

        pyunictokens generate runs/bo "A photo of <bo> in a red hat." --image bo.png --mask hat.png --out hat_bo.png
    """
    from ..models import WritingModel
    from ..rollout.engine import RolloutEngine
    from ..rollout.types import RolloutInterrupted
    from ..runs.asking import check_prompt, sampling
    from ..runs.run_dir import Run
    from ..utils.files import refuse_unwritable
    from ..utils.profiling import Recorder, trace

    if out.suffix.lower() not in {".png", ".jpg", ".jpeg", ".webp"}:
        raise UserError(f"--out {out}: the name must end in .png, .jpg, .jpeg or .webp")
    if (image is None) != (mask is None):
        raise UserError("--image and --mask belong together: what the mask has white is painted anew")
    refuse_unwritable(out)
    place, flags = Run.find(run), models.sources
    settings = sampling(place.sources(flags).is_toy, config, overrides)
    facts = facts_of(place, concept) if use_reason else []
    bench = place.open(flags, machine.device, machine.dtype, name)
    settings = sampling(bench.sources.is_toy, config, overrides, bench.model.rule)
    if isinstance(bench.model, WritingModel):
        written = RolloutEngine.of(bench).write(
            [prompt],
            samples=number,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.answer_temperature,
            seed=seed,
        )
        for text in written.texts:
            typer.echo(printable(text))
        return
    check_prompt(prompt, bench.concept)
    grid = _grid(size, bench)
    known = None if image is None or mask is None else known_codes(image, mask, grid, bench)
    engine = RolloutEngine.of(bench, settings.schedule)
    answer = ""
    with Bars() as bars, Recorder(bench.device) as recorder, trace(profile):
        if use_reason:
            answer, prompt = reason(place, bench, engine, facts, prompt, settings, seed)
        rows = list(range(number))
        try:
            rollout = engine.generate_images(
                [check_prompt(prompt, bench.concept, place.published)],
                samples=number,
                steps=settings.timesteps,
                guidance_scale=settings.guidance_scale,
                temperature=settings.temperature,
                seed=seed,
                grid=grid,
                known_codes=known,
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
        say(f"answer: {answer}")
    say(f"{out} ({', '.join(file.name for file in files)})")
    if len(rows) < number:
        say(f"stopped: {len(rows)} of {number} images were finished and are saved")
        raise typer.Exit(INTERRUPTED)
    if profile is not None:
        show_phases(recorder.report(bench.model.dtype))


@spread
def understand(
    run: RunArgument,
    image: Annotated[Path, typer.Argument(help="An image file.")],
    question: Annotated[str, typer.Argument(help='As in "What colour is `<bo>`?"')],
    overrides: OverridesArgument = None,
    number: Annotated[int, typer.Option("-n", "--number", min=1, max=256, help="How many answers to sample.")] = 1,
    name: NameOption = None,
    models: Models = MODELS,
    config: ConfigOption = None,
    machine: Machine = MACHINE,
    seed: SeedOption = 0,
) -> None:
    """Ask a question about an image and print the answer.

    Settings: max_new_tokens, answer_temperature, top_k. More than one answer (-n) is sampled at temperature 1 unless
    answer_temperature says otherwise.

    Examples:

        pyunictokens understand runs/bo photo.png "What colour is <bo>?"

        pyunictokens understand base photo.png "What is in the image?" -n 3 answer_temperature=0.7

        pyunictokens understand base photo.png "What is it?" --model showlab/show-o-w-clip-vit-512x512 \\
            --vq showlab/magvitv2 --tokenizer microsoft/phi-1_5
    """
    from ..data.images import load_pixels
    from ..rollout.engine import RolloutEngine
    from ..runs.asking import check_prompt, question_for, sampling
    from ..runs.run_dir import Run

    place, flags = Run.find(run), models.sources
    settings = sampling(place.sources(flags).is_toy, config, overrides)
    bench = place.open(flags, machine.device, machine.dtype, name)
    check_prompt(question, bench.concept)
    text, raw = question_for(question, bench.concept, place.published)
    temperature = settings.answer_temperature
    if number > 1 and temperature == 0:
        temperature = 1.0
    engine = RolloutEngine.of(bench)
    with Bars() as bars:
        rollout = engine.generate_text(
            load_pixels(image, engine.features_side or bench.size)[None],
            [text],
            samples=number,
            raw=raw,
            max_new_tokens=settings.max_new_tokens,
            temperature=temperature,
            top_k=settings.top_k,
            seed=seed,
        )
        bars("answering", 1, 1)
    for answer in rollout.texts:
        typer.echo(printable(answer))
