"""The studio's concepts and trainings without a browser: the same folders and runs as `data new` and `train` make."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pyunictokens.data.check import check_folder
from pyunictokens.data.folder import load_concept
from pyunictokens.data.new import new_concept
from pyunictokens.rollout.serving import ServingEngine
from pyunictokens.runs.run_dir import CONFIG
from pyunictokens.serve.catalog import Catalog
from pyunictokens.serve.studio.concepts import ConceptForm, Concepts
from pyunictokens.serve.studio.training import TrainForm, Training
from pyunictokens.toy.drawing import render
from pyunictokens.toy.scene import random_scene
from pyunictokens.utils.errors import UserError

FACTS = (
    {"fact": "<bo>'s favourite toy is a red ball.", "prompt": "a photo of <bo> with its favourite toy."},
    {
        "fact": "<bo> sleeps on the beach.",
        "prompt": "a photo of <bo> where it sleeps.",
        "question": "Where does <bo> sleep?",
        "answer": "On the beach.",
    },
)
SHORT = "stages.max_steps=1 stages.num_understanding=2 stages.num_generation=2 grpo.group_size=2 grpo.timesteps=2"
SHORT += " grpo.max_new_tokens=3 grpo.trainable=concept grpo.checkpoint_every=1"
TINY = """
import sys
from pyunictokens.cli import main
from pyunictokens.toy import model, rewards
from tests.tiny import tiny_experts, tiny_toy
model.load_toy, rewards.load_toy_rewards = tiny_toy, tiny_experts
main()
"""


def photographs(folder: Path, number: int = 6) -> tuple[Path, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for seed in range(number):
        files.append(folder / f"{seed}.png")
        Image.fromarray(render(random_scene(np.random.default_rng(seed), "animal"))).save(files[-1])
    return tuple(files)


@pytest.fixture
def concepts(tmp_path: Path) -> Iterator[Concepts]:
    made = Concepts(tmp_path / "data")
    yield made
    made.close()


@pytest.fixture
def form(tmp_path: Path) -> ConceptForm:
    return ConceptForm("bo", "animal", "dog", photographs(tmp_path / "photos"), "<bo> is a brown dog.", FACTS)


def files_of(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


# --- concepts --------------------------------------------------------------------------------------------------------


def test_a_concept_of_the_form_is_that_of_data_new(concepts: Concepts, form: ConceptForm, tmp_path: Path) -> None:
    tried = concepts.check(form)
    assert concepts.names() == [] and not concepts.root.exists(), "checking writes nothing"
    made = concepts.write(form)
    assert concepts.names() == ["bo"] and made.findings == tried.findings
    assert not [problem for problem in check_folder(concepts.root) if problem.severity == "error"]
    sheet = {"facts": list(FACTS)}
    words = {"kind": "animal", "class_word": "dog", "info": form.info, "spec_yaml": sheet}
    new_concept(tmp_path / "other", "bo", form.photos, **words)
    assert files_of(concepts.root) == files_of(tmp_path / "other")
    assert load_concept(concepts.root, "bo").extra_info == [each["fact"] for each in FACTS]
    with pytest.raises(UserError, match="exists already"):
        concepts.check(form)
    with pytest.raises(UserError, match="exists already"):
        concepts.write(form)
    changed = replace(form, replace=True, photos=form.photos[:5], info="<bo> is a white dog.")
    assert concepts.write(changed).concept.info == "<bo> is a white dog."


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/b", "..", ".bo", "", "sks", "<bo>"])
def test_a_name_is_no_path(concepts: Concepts, form: ConceptForm, name: str, tmp_path: Path) -> None:
    before = files_of(tmp_path)
    for ask in (concepts.check, concepts.write):
        with pytest.raises(UserError, match="name"):
            ask(replace(form, name=name))
    assert files_of(tmp_path) == before


def test_what_is_wrong_is_said_by_the_photos_names(concepts: Concepts, form: ConceptForm, tmp_path: Path) -> None:
    tiny, torn = tmp_path / "photos" / "tiny.png", tmp_path / "photos" / "torn.png"
    Image.new("RGB", (9, 40)).save(tiny)
    torn.write_bytes(form.photos[0].read_bytes()[:200])
    (found,) = concepts.findings(tiny)
    assert found.severity == "error" and "9×40 pixels" in found.message
    (found,) = concepts.findings(torn)
    assert found.severity == "error" and "damaged" in found.message
    assert concepts.findings(form.photos[0]) == []
    with pytest.raises(UserError, match="2 of 8 photos cannot be used") as caught:
        concepts.check(replace(form, photos=(*form.photos, tiny, torn)))
    assert str(tmp_path) not in str(caught.value) and "tiny.png" in str(caught.value)
    with pytest.raises(UserError, match="does not contain <bo>"):
        concepts.check(replace(form, facts=({"fact": "<bo> is old.", "prompt": "A photo."},)))
    twice = tmp_path / "photos" / "again.png"
    twice.write_bytes(form.photos[0].read_bytes())
    assert any("same file" in text for text in concepts.check(replace(form, photos=(*form.photos, twice))).findings)


def test_a_photo_is_cut(concepts: Concepts, tmp_path: Path) -> None:
    file = tmp_path / "wide.png"
    image = Image.new("RGB", (100, 50), "red")
    image.paste("blue", (0, 0, 20, 50))
    image.save(file)
    cut = Image.open(concepts.cut(file, 20, 30, 10, 0))
    assert cut.size == (50, 45) and cut.getcolors() == [(50 * 45, (255, 0, 0))]
    assert Image.open(file).size == (100, 50), "the photo stays"
    for edges in ((60, 40, 0, 0), (0, 0, 50, 50), (-1, 0, 0, 0)):
        with pytest.raises(UserError, match="nothing would be left"):
            concepts.cut(file, *edges)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def training(
    tmp_path: Path, concepts: Concepts, form: ConceptForm, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Training]:
    concepts.write(form)
    program = tmp_path / "tiny.py"
    program.write_text(TINY)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    made = Training(tmp_path / "runs", concepts.root, ("--device", "cpu"), (str(program),))
    yield made
    made.close(60)


def until(training: Training, name: str, states: set[str], seconds: float = 240) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = training.look(name).state
        if state in states:
            return state
        time.sleep(0.2)
    raise AssertionError(training.look(name))


@pytest.mark.slow
def test_a_run_is_trained_stopped_and_gone_on_with(training: Training, tmp_path: Path) -> None:
    form = TrainForm("bo", "first", steps=24, evaluate=False, words=SHORT)
    assert training.start(form) == "first" == training.running
    with pytest.raises(UserError, match="first is being trained"):
        training.start(replace(form, run="second"))
    end = time.monotonic() + 240
    while not training.look("first").rewards and training.running and time.monotonic() < end:
        time.sleep(0.2)
    assert training.names() == ["first"]
    assert "saves" in training.stop()
    assert training.look("first").state in ("stopping", "stopped")
    assert until(training, "first", {"stopped", "failed", "done"}) == "stopped", training.look("first").said
    view = training.look("first")
    done = len([each for each in view.rewards if each[1] == "all"])
    assert 1 <= done < 24 and "go on with" in view.said and view.samples
    assert {each[1] for each in view.stages} == {"understanding", "generation"}
    with pytest.raises(UserError, match="there is such a run already"):
        training.start(form)
    training.resume("first")
    assert until(training, "first", {"done", "failed", "stopped"}) == "done", training.look("first").said
    assert len([each for each in training.look("first").rewards if each[1] == "all"]) == 24
    with pytest.raises(UserError, match="is done"):
        training.resume("first")
    serving = ServingEngine()
    catalog = Catalog(folder=tmp_path / "runs", device="cpu", in_use=serving.concepts_in_use)
    assert next(iter(catalog.list())).name == "first"


@pytest.mark.slow
def test_what_fails_says_why(training: Training) -> None:
    training.start(TrainForm("bo", "odd", steps=1, evaluate=False, words="grpo.group_size=-3"))
    assert until(training, "odd", {"failed", "done", "stopped"}) == "failed"
    assert "group_size" in training.look("odd").said
    with pytest.raises(UserError, match="nothing is being trained"):
        training.stop()


def test_a_form_names_settings_alone(training: Training) -> None:
    form = TrainForm("bo", words="grpo.lr=1e-4 stages.epochs=2", steps=3, seed=5)
    wanted = [str(training.data), "bo", "grpo.lr=1e-4", "stages.epochs=2", "grpo.steps=3", "--seed", "5"]
    assert training.arguments(form) == [*wanted, "--device", "cpu"]
    assert "--no-grpo" in training.arguments(replace(form, steps=0))
    for words in ("--rewards=evil:run", "--out /etc", "extra", "grpo.objective=evil:Class", "grpo.lr='1"):
        with pytest.raises(UserError, match=r"KEY=VALUE|command line alone|close every quotation mark"):
            training.arguments(replace(form, words=words))
    with pytest.raises(UserError, match="steps=-1"):
        training.arguments(replace(form, steps=-1))
    for run in ("../up", "/abs", ".jobs"):
        with pytest.raises(UserError, match="run"):
            training.start(replace(form, run=run))
    with pytest.raises(UserError, match="concept name"):
        training.arguments(replace(form, concept="../bo"))
    with pytest.raises(UserError, match="was not begun here"):
        training.resume("nowhere")


def test_runs_of_the_command_are_seen(training: Training, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "byhand"
    (run / "final").mkdir(parents=True)
    (run / CONFIG).write_text("name: bo\n")
    (run / "metrics.jsonl").write_text(
        json.dumps({"step": 0, "reward_mean": 0.5, "parts": {"ber": 0.4}}) + '\n{"step": 1, "reward_mean": null}\n{"st'
    )
    view = training.look("byhand")
    assert view.state == "done" and view.rewards == [(1, "all", 0.5), (1, "ber", 0.4)]
    assert training.names() == ["byhand"]


@pytest.mark.slow
def test_an_empty_field_is_no_zero() -> None:
    from pyunictokens.serve.studio.try_page import how_of

    assert how_of("", " ", "") == (None, None, None)
    assert how_of("0", "12", "0") == (0, 12, 0.0)
    for seed, steps, guidance, what in (("x", "", "", "Seed"), ("", "2.5", "", "Steps"), ("", "", "much", "Guidance")):
        with pytest.raises(UserError, match=what):
            how_of(seed, steps, guidance)


@pytest.mark.slow
def test_a_plan_says_nothing_of_the_command_line(training: Training) -> None:
    lines = training.plan(TrainForm("bo", steps=1, evaluate=False, words=SHORT)).splitlines()
    assert lines[0].startswith("download") and any(line.startswith("time") for line in lines)
    assert lines[-1] == "nothing was fetched or started" and not any("--" in line for line in lines)


def test_what_is_said_already_is_not_called_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    import gradio

    from pyunictokens.serve.studio.try_page import told

    for raised, said in ((gradio.Error("Choose one."), "Choose one."), (UserError("no <bo>"), "no &lt;bo&gt;")):
        with pytest.raises(gradio.Error, match=said), told():
            raise raised
    assert not caplog.records
    with pytest.raises(gradio.Error, match="log of the studio"), told():
        raise RuntimeError("unforeseen")
    assert caplog.records
