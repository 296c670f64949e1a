"""The page *Train*: a plan, start, live curves and grids of samples, stop, resume. training.py does the work."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from ...data.images import read_image
from ...utils.errors import UserError, needs
from .concept_page import Update
from .concepts import Concepts
from .training import TrainForm, Training, View
from .try_page import optional, told, whole_of

with needs("studio"):
    import gradio as gr
    import pandas

_Filled = tuple[str | None, str, str, bool, float | None, str]
"""What gradio hands on of the form, in the order of its fields."""
_EVERY = 2.0
"""Seconds between two looks at the run's files."""
_GRIDS = 4
"""Grids of samples that are shown."""


def train_page(training: Training, concepts: Concepts) -> tuple[gr.Dropdown, gr.Dropdown, gr.Timer]:
    """Builds the page; returns its choice of concepts, that of runs, and the clock that looks at the run."""
    gr.Markdown("### A new run")
    with gr.Row():
        there = concepts.names()
        concept = gr.Dropdown(
            there,
            value=there[0] if there else None,
            label="Concept",
            info="One that is saved",
            elem_id="train-concept",
        )
        called = gr.Textbox(label="Name of the run", info="Empty: as the concept", elem_id="train-name")
    with gr.Row():
        steps = optional(
            "Steps of reinforcement", "Empty: as the preset has it; 0: none", "as the preset", "train-steps"
        )
        seed = gr.Number(0, label="Seed", info="The same seed, the same result", precision=0)
    evaluate = gr.Checkbox(
        True, label="Measure before and after", info="Takes longer, and writes a report", elem_id="train-measure"
    )
    words = gr.Textbox(
        label="More settings",
        placeholder="stages.epochs=8 grpo.group_size=6",
        info="KEY=VALUE as `pyunictokens train` takes them, with spaces between",
        elem_id="train-words",
    )
    with gr.Row():
        plan = gr.Button("Plan", elem_id="train-plan")
        start = gr.Button("Start", variant="primary", elem_id="train-start")
    planned = gr.Textbox(
        label="What it takes",
        placeholder="Plan says it and starts nothing.",
        interactive=False,
        lines=1,
        max_lines=20,
        elem_id="train-planned",
    )
    gr.Markdown("### Runs")
    runs = training.names()
    run = gr.Dropdown(
        runs,
        value=runs[0] if runs else None,
        label="Run",
        info="State, curves and samples below are of this one",
        elem_id="train-run",
    )
    state = gr.Textbox(label="State", interactive=False, elem_id="train-state")
    with gr.Row():
        stop = gr.Button("Stop", interactive=False, elem_id="train-stop")
        resume = gr.Button("Resume", interactive=False, elem_id="train-resume")
    with gr.Row():
        learned, rewarded = (
            gr.LinePlot(
                x="step", y=y, color=color, height=300, min_width=300, label=label, visible=False, elem_id=f"train-{y}"
            )
            for y, color, label in (
                ("loss", "stage", "Concept stages: loss"),
                ("reward", "part", "Reinforcement: mean reward"),
            )
        )
    grids = gr.Gallery(
        label="Samples, the newest first",
        columns=2,
        object_fit="contain",
        height="auto",
        visible=False,
        elem_id="train-samples",
    )
    with gr.Accordion("What the run says", open=False):
        log = gr.Textbox(
            label="Log",
            placeholder="The last lines of its log come here.",
            interactive=False,
            lines=6,
            max_lines=16,
            elem_id="train-log",
        )
    clock = gr.Timer(_EVERY)
    last: gr.State = gr.State(None)

    def form(given: tuple[object, ...]) -> TrainForm:
        which, label, count, measured, key, more = cast(_Filled, given)
        if not which:
            raise UserError("Choose a concept first; the page Concept makes one.")
        return TrainForm(which, label, whole_of(count, "Steps of reinforcement"), measured, int(key or 0), more)

    def plan_it(*given: object) -> str:
        with told():
            return training.plan(form(given))

    def start_it(*given: object) -> Update:
        with told():
            name = training.start(form(given))
            return gr.update(choices=training.names(), value=name)

    def resume_it(name: str | None) -> Update:
        with told():
            return gr.update(choices=training.names(), value=training.resume(name or ""))

    def stop_it() -> None:
        with told():
            gr.Info(training.stop())

    def look(name: str | None, seen: View | None) -> tuple[object, ...]:
        """What has changed since the last look."""
        with told():
            view = training.look(name) if name else View(said="", state="")
            if view == seen:
                return tuple(gr.skip() for _ in range(8))
            grids_now: Update = gr.skip()
            if seen is None or view.samples != seen.samples:
                newest = [(read_image(file), _step(file)) for file in view.samples[:_GRIDS]]
                grids_now = gr.update(value=newest, visible=bool(newest))
            return (
                view,
                _state(name, view),
                gr.update(interactive=view.state in _STOPPABLE),
                gr.update(interactive=view.state in _RESUMABLE),
                _curve(view.stages, "stage", "loss"),
                _curve(view.rewards, "part", "reward"),
                grids_now,
                view.said,
            )

    asked = [concept, called, steps, evaluate, seed, words]
    shown = [last, state, stop, resume, learned, rewarded, grids, log]
    plan.click(plan_it, asked, planned)
    start.click(start_it, asked, run)
    resume.click(resume_it, run, run)
    stop.click(stop_it)
    gr.on([clock.tick, run.change], look, [run, last], shown, show_progress="hidden", concurrency_limit=None)
    return concept, run, clock


def _curve(points: list[tuple[int, str, float]], what: str, value: str) -> Update:
    """A line has two points at least: the first step is told by the run's state alone."""
    drawn = len({step for step, _, _ in points}) > 1
    return gr.update(value=pandas.DataFrame(points, columns=["step", what, value]), visible=drawn)


def _step(file: Path) -> str:
    return f"step {int(file.name.split('_')[1])}"


_STATES = {
    "waiting": "not begun, or begun elsewhere",
    "running": "is being trained",
    "stopping": "finishes its step and saves",
    "done": "is done; the page Try can draw with it",
    "failed": "failed; the log below says why",
    "stopped": "stopped; Resume goes on",
    "elsewhere": "another process trains it",
}


_STOPPABLE, _RESUMABLE = ("running", "stopping"), ("stopped", "failed", "waiting")
"""States in which the buttons can be pressed."""


def _state(name: str | None, view: View) -> str:
    if not name:
        return "no run yet: Start begins one"
    parts = [f"{name}: {_STATES.get(view.state, view.state)}"]
    if view.stages:
        parts.append(f"concept stages: step {len(view.stages)}, loss {view.stages[-1][2]:.3f}")
    total = [each for each in view.rewards if each[1] == "all"]
    if total:
        parts.append(f"reinforcement: step {len(total)}, mean reward {total[-1][2]:.3f}")
    return "; ".join(parts)
