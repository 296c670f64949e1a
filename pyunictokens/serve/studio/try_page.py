"""The pages *Try* (draw, paint over, ask), *Compare* (two models, one prompt and seed) and *Rate* (what is better).

What draws or answers has no limit of Gradio's on how many do so at once: the engine shares its steps among all.
"""

from __future__ import annotations

import html
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from ...utils.errors import UserError, needs
from ..errors import Refused
from .backend import Sheet, Studio, Wish, painted_mask

with needs("studio"):
    import gradio as gr
    from PIL.Image import Image as Picture
    from pydantic import ValidationError

log = logging.getLogger(__name__)

Gallery = list[tuple[str, str]]
"""Files of pictures and what is written below each."""


@contextmanager
def told() -> Iterator[None]:
    """What goes wrong is said on the page; what nobody foresaw stands in the log as well."""
    try:
        yield
    except gr.Error:  # says already what is to be said
        raise
    except (UserError, Refused) as error:
        raise _cannot(str(error)) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _cannot(f"{where}: {first['msg']}") from None
    except Exception as error:
        log.exception("a page failed")
        raise gr.Error("This failed; the log of the studio says why.", print_exception=False) from error


def _cannot(message: str) -> gr.Error:
    """A note that stays until it is closed. Its text is read as HTML, so signs like those around `<bo>` are escaped."""
    return gr.Error(html.escape(message), duration=None, title="That cannot be done", print_exception=False)


def model_choice(studio: Studio, label: str = "Model", place: int = 0) -> gr.Dropdown:
    """A dropdown of the models there are; `place` of the one that is chosen at first."""
    names = studio.models()
    return gr.Dropdown(names, value=names[place], label=label, info="A run by its name, or base: the model without one")


def seed_of(given: float | None) -> int | None:
    """A seed as a number; None draws one at random."""
    return None if given is None or given < 0 else int(given)


def optional(label: str, info: str, placeholder: str, elem_id: str) -> gr.Textbox:
    """A field for a number that may stay empty: a gr.Number without a value turns into 0 as soon as it is shown."""
    return gr.Textbox("", label=label, info=info, placeholder=placeholder, elem_id=elem_id)


def number_of(text: str, what: str) -> float | None:
    """What was written in such a field. Raises UserError where it is no number."""
    try:
        return float(text) if text.strip() else None
    except ValueError:
        raise UserError(f"{what}: {text!r}: must be a number, or stay empty") from None


def whole_of(text: str, what: str) -> int | None:
    """The same of a whole number."""
    found = number_of(text, what)
    if found is not None and not found.is_integer():
        raise UserError(f"{what}: {text!r}: must be a whole number, or stay empty")
    return None if found is None else int(found)


def how_of(seed: str, steps: str, guidance: str) -> tuple[int | None, int | None, float | None]:
    """Seed, steps and guidance as they were written."""
    return seed_of(whole_of(seed, "Seed")), whole_of(steps, "Steps"), number_of(guidance, "Guidance")


def _gallery(studio: Studio, sheet: Sheet) -> Gallery:
    return [(studio.file(picture), f"image {place + 1}") for place, picture in sorted(sheet.pictures.items())]


def _file(studio: Studio, sheet: Sheet, place: int) -> str | None:
    return studio.file(sheet.pictures[place]) if place in sheet.pictures else None


def _status(sheet: Sheet, number: int) -> str:
    text = f"{sheet.done} of {number} drawn, seed {sheet.seed}."
    return f"{text} Drawn: {sheet.revised}" if sheet.revised else text


def try_page(studio: Studio) -> gr.Dropdown:
    """Builds the page; returns its choice of models."""
    model = model_choice(studio)
    with gr.Accordion("How it is drawn", open=False), gr.Row():
        own = "the model's own"
        seed = optional("Seed", "The same seed draws the same image; empty: a new one", "new", "seed")
        steps = optional("Steps", f"Timesteps of an image; empty: {own}", own, "steps")
        guidance = optional("Guidance", f"How closely the prompt is followed; empty: {own}", own, "guidance")
    with gr.Tab("Draw"):
        prompt = gr.Textbox(label="Prompt", placeholder="A photo of <bo> on the beach.", lines=2, elem_id="prompt")
        with gr.Row():
            number = gr.Slider(1, 8, value=2, step=1, label="Images")
            reason = gr.Checkbox(label="Reason first", info="Asks which fact of the concept the prompt means")
        with gr.Row():
            go, stop = gr.Button("Draw", variant="primary", elem_id="draw"), gr.Button("Stop", elem_id="stop")
        status = gr.Textbox(label="Status", interactive=False, elem_id="status")
        pictures = gr.Gallery(label="Images", columns=2, object_fit="contain", elem_id="pictures")
    with gr.Tab("Paint over"):
        gr.Markdown("Put a picture into the frame, and paint with the brush over what is to change.")
        canvas = gr.ImageEditor(label="Picture", type="pil", image_mode="RGBA", elem_id="canvas")
        words = gr.Textbox(
            label="What is to be there", placeholder="A photo of <bo> in a red hat.", elem_id="paint-words"
        )
        paint = gr.Button("Paint", variant="primary", elem_id="paint")
        slider = gr.ImageSlider(label="Before and after", type="pil", elem_id="before-after")
    with gr.Tab("Ask"):
        shown = gr.Image(label="Picture", type="pil", elem_id="shown")
        question = gr.Textbox(label="Question", placeholder="What colour is <bo>?", elem_id="question")
        ask = gr.Button("Ask", variant="primary", elem_id="ask")
        answer = gr.Textbox(label="Answer", interactive=False, elem_id="answer")

    async def draw(
        name: str, text: str, count: float, first: bool, key: str, t: str, s: str
    ) -> AsyncGenerator[tuple[Gallery, str], None]:
        with told():
            if not text.strip():
                raise UserError("Say first what is to be drawn.")
            wish = Wish(name, text, int(count), *how_of(key, t, s), first)
            async with aclosing(studio.draw(wish)) as sheets:
                async for sheet in sheets:
                    yield _gallery(studio, sheet), _status(sheet, wish.number)

    async def over(
        name: str, drawing: dict[str, Any] | None, text: str, key: str, t: str, s: str
    ) -> AsyncGenerator[tuple[str, str], None]:
        with told():
            if drawing is None or drawing.get("background") is None:
                raise UserError("Put a picture into the frame first, and paint over what is to change.")
            if not text.strip():
                raise UserError("Say first what is to be there.")
            before: Picture = drawing["background"].convert("RGB")
            mask = painted_mask(drawing["layers"], before.size)
            wish = Wish(name, text, 1, *how_of(key, t, s))
            async with aclosing(studio.paint(wish, before, mask)) as sheets:
                async for sheet in sheets:
                    if sheet.pictures:
                        after = sheet.pictures[0]
                        yield studio.file(before.resize(after.size)), studio.file(after)

    async def reply(name: str, image: Picture | None, text: str, key: str) -> AsyncGenerator[str, None]:
        with told():
            if not text.strip():
                raise UserError("Ask something first.")
            async with aclosing(studio.answer(name, image, text, seed_of(whole_of(key, "Seed")) or 0)) as words_so_far:
                async for so_far in words_so_far:
                    yield so_far

    how = [seed, steps, guidance]
    given = [model, prompt, number, reason, *how]
    drawing = gr.on([go.click, prompt.submit], draw, given, [pictures, status], concurrency_limit=None)
    stop.click(None, cancels=[drawing])
    gr.on([paint.click, words.submit], over, [model, canvas, words, *how], slider, concurrency_limit=None)
    gr.on([ask.click, question.submit], reply, [model, shown, question, seed], answer, concurrency_limit=None)
    return model


def compare_page(studio: Studio) -> list[gr.Dropdown]:
    """Two models draw one prompt with one seed."""
    with gr.Row():
        models = [model_choice(studio, label, place) for label, place in (("First model", 0), ("Second model", -1))]
    prompt = gr.Textbox(label="Prompt", elem_id="compare-prompt")
    seed = gr.Number(1, label="Seed", precision=0)
    go = gr.Button("Compare", variant="primary", elem_id="compare")
    status = gr.Textbox(label="Status", interactive=False, elem_id="compare-status")
    with gr.Row():
        pictures = [gr.Image(label=label, type="pil", elem_classes="drawn") for label in ("First", "Second")]
    slider = gr.ImageSlider(label="First and second", type="pil", elem_id="compared")

    async def compare(
        one: str, other: str, text: str, key: float | None
    ) -> AsyncGenerator[tuple[str, str | None, str | None, tuple[str, str] | None], None]:
        found: list[str | None] = [None, None]
        with told():
            if not text.strip():
                raise UserError("Say first what is to be drawn.")
            for place, name in enumerate((one, other)):
                async with aclosing(studio.draw(Wish(name, text, seed=seed_of(key) or 0))) as sheets:
                    async for sheet in sheets:
                        found[place] = _file(studio, sheet, 0)
                        yield f"{place} of 2 drawn", found[0], found[1], None
            first, second = found
            if first is not None and second is not None:
                yield f"2 of 2 drawn, {one} and {other}: {text}", first, second, (first, second)

    shown = [status, *pictures, slider]
    given = [*models, prompt, seed]
    gr.on([go.click, prompt.submit], compare, given, shown, show_progress_on=status, concurrency_limit=None)
    return models


def rate_page(studio: Studio) -> gr.Dropdown:
    """Two pictures of one prompt; which is better is saved."""
    model = model_choice(studio)
    prompt = gr.Textbox(label="Prompt", elem_id="rate-prompt")
    go = gr.Button("Draw two", variant="primary", elem_id="draw-two")
    with gr.Row():
        pictures = [
            gr.Image(label=label, type="pil", interactive=False, elem_classes="drawn") for label in ("Left", "Right")
        ]
    with gr.Row():
        better = [gr.Button(f"{side} is better", elem_id=f"better-{side.lower()}") for side in ("Left", "Right")]
    said = gr.Textbox(label="Saved", interactive=False, elem_id="saved")
    pair = gr.State(None)

    async def two(
        name: str, text: str
    ) -> AsyncGenerator[tuple[str | None, str | None, tuple[object, ...] | None], None]:
        with told():
            async with aclosing(studio.draw(Wish(name, text, 2))) as sheets:
                async for sheet in sheets:
                    both = [sheet.pictures[place] for place in sorted(sheet.pictures)]
                    done = (text, name, both, sheet.seed) if sheet.done == 2 else None
                    yield _file(studio, sheet, 0), _file(studio, sheet, 1), done

    def save(which: int) -> Callable[[tuple[str, str, list[Picture], int] | None], tuple[str, None]]:
        def choose(drawn: tuple[str, str, list[Picture], int] | None) -> tuple[str, None]:
            with told():
                if drawn is None:
                    raise UserError("Draw two pictures first.")
                text, name, both, seed = drawn
                file = studio.choose(text, name, both, [seed, seed], which)
                count = sum(1 for _ in file.open(encoding="utf-8"))
                return f"{count} choice{'' if count == 1 else 's'} in {file}", None  # a pair is chosen from once

        return choose

    gr.on([go.click, prompt.submit], two, [model, prompt], [*pictures, pair], concurrency_limit=None)
    for which, button in enumerate(better):
        button.click(save(which), pair, [said, pair])
    return model
