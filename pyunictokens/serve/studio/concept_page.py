"""The page *Concept*: photos, cut where wanted, facts by a form, and what `data check` finds, ahead of any writing."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from ...data.concept import KINDS
from ...data.images import read_image
from ...data.parse import ERROR
from ...utils.errors import UserError, needs
from .concepts import ConceptForm, Concepts, Made
from .try_page import told

with needs("studio"):
    import gradio as gr
    from PIL.Image import Image as Picture

Fact = dict[str, str]
Update = dict[str, object]
"""What gradio changes in a component."""
_Filled = tuple[str, str, str, str, list[Path], list[Fact], "list[str] | None", bool]
"""What gradio hands on of the form, in the order of its fields."""

_SHOWN = 320
"""Pixels of the shorter side of photos on the page, at least."""

_LONGEST = 20
"""Characters of a file's name in its caption."""

_HELP = """About ten photos work best; of five or more, the last two are kept for testing. In texts, write the name in
angle brackets where the concept is meant: `<bo>`."""

_NO_FACTS = "None yet. Four or more are better: half of them are kept for testing."


def concept_page(concepts: Concepts) -> gr.State:
    """Builds the page; returns the name of the concept that was written last."""
    gr.Markdown(_HELP)
    photos = gr.State([])
    with gr.Row():
        name = gr.Textbox(label="Name", placeholder="bo", info="In texts: <name>", elem_id="concept-name")
        kind = gr.Dropdown(
            list(KINDS), value="animal", label="Kind", info="Of what it is", filterable=False, elem_id="concept-kind"
        )
        word = gr.Textbox(label="What it is", placeholder="dog", info="A word or two", elem_id="concept-class")
    looks = gr.Textbox(
        label="How it looks",
        placeholder="<bo> is a small brown dog.",
        info="One sentence on what the photos show",
        elem_id="concept-info",
    )
    dropped = gr.File(
        label="Photos: drop them here", file_count="multiple", file_types=["image"], height=140, elem_id="photos"
    )
    shown = gr.Gallery(
        label="Photos and what the checks say",
        columns=3,
        object_fit="contain",
        height="auto",
        visible=False,
        elem_id="photos-shown",
    )
    with gr.Accordion("Cut a photo", open=False, elem_id="cut"):
        which = gr.Dropdown([], label="Photo", type="index", elem_id="cut-photo")
        with gr.Row():
            edges = [
                gr.Slider(0, 90, value=0, step=1, label=f"Cut off {side} (%)", elem_id=f"cut-{side}")
                for side in ("left", "right", "top", "bottom")
            ]
        before = gr.Image(label="As it will be", type="pil", interactive=False, elem_id="cut-shown")
        with gr.Row():
            cut, drop = gr.Button("Cut", elem_id="cut-do"), gr.Button("Take this photo out", elem_id="cut-drop")
    facts = gr.State([])
    with gr.Accordion("Facts that no photo shows", open=True):
        told_so_far = gr.Markdown(_NO_FACTS, elem_id="facts-shown")
        with gr.Row():
            fact, prompt = (
                gr.Textbox(label=label, placeholder=shown_there, min_width=260, elem_id=key)
                for label, shown_there, key in (
                    ("Fact", "<bo>'s favourite toy is a red ball.", "fact"),
                    ("A prompt that hints at it", "A photo of <bo> with its toy.", "hint"),
                )
            )
        with gr.Row():
            question, answer = (
                gr.Textbox(label=f"{label} (optional)", placeholder=shown_there, min_width=260)
                for label, shown_there in (("Question", "What is <bo>'s favourite toy?"), ("Answer", "A red ball."))
            )
        with gr.Row():
            add, undo = gr.Button("Add this fact", elem_id="fact-add"), gr.Button("Undo the last")
    with gr.Accordion("Photos of other things", open=False):
        others = gr.File(
            label="Other things of the same class teach recognition far better than drawn patterns",
            file_count="multiple",
            file_types=["image"],
        )
    replace = gr.Checkbox(label="Replace a concept of this name", elem_id="concept-replace")
    with gr.Row():
        check = gr.Button("Check", elem_id="concept-check")
        write = gr.Button("Save the concept", variant="primary", elem_id="concept-write")
    written = gr.State("")
    said = gr.Textbox(
        label="What the checks say",
        placeholder="Check says what is missing or could be better, and saves nothing.",
        interactive=False,
        lines=2,
        max_lines=20,
        elem_id="concept-said",
    )

    def gallery(files: list[Path]) -> tuple[Update, Update]:
        pictures = [(_thumb(file), _finding(concepts, file)) for file in files]
        return (
            gr.update(value=pictures, visible=bool(files)),
            gr.update(choices=[f"{place}: {file.name}" for place, file in enumerate(files, 1)], value=None),
        )

    def take(files: list[str] | None, now: list[Path]) -> tuple[object, ...]:
        with told():
            kept = [*now, *(Path(file) for file in files or ())]
            bad = [str(problem) for file in kept if not _readable(file) for problem in concepts.findings(file)]
            kept = [file for file in kept if _readable(file)]
            return kept, None, *gallery(kept), "\n".join(f"left out: {text}" for text in bad)

    def preview(files: list[Path], place: int | None, *cuts: float) -> Picture | None:
        with told():
            if place is None:
                return None
            return concepts.cropped(files[place], *cuts)

    def cut_it(files: list[Path], place: int | None, *cuts: float) -> tuple[object, ...]:
        with told():
            if place is None:
                raise UserError("Choose a photo first.")
            new = [*files[:place], concepts.cut(files[place], *cuts), *files[place + 1 :]]
            return new, *gallery(new), None, *(0 for _ in edges)

    def drop_it(files: list[Path], place: int | None) -> tuple[object, ...]:
        with told():
            if place is None:
                raise UserError("Choose a photo first.")
            new = [*files[:place], *files[place + 1 :]]
            return new, *gallery(new), None

    def add_fact(known: list[Fact], *texts: str) -> tuple[object, ...]:
        with told():
            new = {key: text.strip() for key, text in zip(("fact", "prompt", "question", "answer"), texts, strict=True)}
            if not new["fact"] or not new["prompt"]:
                raise UserError("A fact needs its sentence, and a prompt that hints at it.")
            more = [*known, {key: text for key, text in new.items() if text}]
            return more, _listed(more), "", "", "", ""

    def back(known: list[Fact]) -> tuple[list[Fact], str]:
        return known[:-1], _listed(known[:-1])

    def form(given: tuple[object, ...]) -> ConceptForm:
        label, sort, what, sentence, files, more, apart, over = cast(_Filled, given)
        if not files:
            raise UserError("There are no photos yet: drop some first.")
        others = tuple(Path(file) for file in apart or ())
        return ConceptForm(label.strip(), sort, what.strip(), tuple(files), sentence.strip(), tuple(more), others, over)

    def try_it(*given: object) -> str:
        with told():
            return f"It can be saved. {_summary(concepts.check(form(given)))}"

    def save(*given: object) -> tuple[str, str]:
        with told():
            made = concepts.write(form(given))
            return f"Saved in {concepts.root}; now train it. {_summary(made)}", made.concept.name

    filled = [name, kind, word, looks, photos, facts, others, replace]
    dropped.upload(take, [dropped, photos], [photos, dropped, shown, which, said])
    moved = [which.change, *(edge.change for edge in edges)]
    gr.on(moved, preview, [photos, which, *edges], before, trigger_mode="always_last", show_progress="hidden")
    cut.click(cut_it, [photos, which, *edges], [photos, shown, which, before, *edges])
    drop.click(drop_it, [photos, which], [photos, shown, which, before])
    add.click(add_fact, [facts, fact, prompt, question, answer], [facts, told_so_far, fact, prompt, question, answer])
    undo.click(back, facts, [facts, told_so_far])
    check.click(try_it, filled, said)
    write.click(save, filled, [said, written])
    return written


def _readable(file: Path) -> bool:
    try:
        read_image(file, at_least=1)
    except UserError:
        return False
    return True


def _thumb(file: Path) -> Picture:
    return read_image(file, at_least=_SHOWN)


def _finding(concepts: Concepts, file: Path) -> str:
    """A photo's caption: what is wrong with it, or that nothing is."""
    found = concepts.findings(file)
    name = file.name if len(file.name) <= _LONGEST else f"{file.name[: _LONGEST - 9]}…{file.name[-8:]}"
    if not found:
        return f"{name}: good"
    mark = "cannot be used" if any(problem.severity == ERROR for problem in found) else "note"
    return f"{name}: {mark}: {'; '.join(problem.message for problem in found)}"


def _listed(facts: list[Fact]) -> str:
    if not facts:
        return _NO_FACTS
    lines = [f"{place}. {each['fact']} ({each['prompt']})" for place, each in enumerate(facts, 1)]
    return "\n".join(line.replace("<", "&lt;") for line in lines)


def _summary(made: Made) -> str:
    one = made.concept
    counts = f"{one.sks}: {len(one.train_images)} photos to learn from, {len(one.test_images)} to test with, "
    counts += f"{len(one.extra_info)} fact{'' if len(one.extra_info) == 1 else 's'}."
    return "\n".join([counts, *(f"- {text}" for text in made.findings)] if made.findings else [counts])
