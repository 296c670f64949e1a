"""`evaluate paper`: the plan counts what is there, runs are trained in the order they begin with one another, tables
are filled, and a second call has nothing left to do."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pyunictokens.cli import app
from pyunictokens.config.training import TrainConfig
from pyunictokens.data import load_concept
from pyunictokens.models.showo.costs import ShowoCosts
from pyunictokens.models.showo.sizes import ShowoConfig
from pyunictokens.runs import paper, rivals
from pyunictokens.runs.paper_numbers import NUMBERS
from pyunictokens.runs.sweep import Job, Status
from pyunictokens.toy.concept import write_toy_concept
from pyunictokens.train.costs import stages_flops, training_flops
from pyunictokens.utils.errors import UserError
from tests.evaluate.test_suites import write_dreambench, write_mcllava, write_yollava
from tests.judge_server import JudgeServer
from tests.tiny import tiny_experts, tiny_toy

WORDS = ("stages.max_steps=1", "num_understanding=2", "num_generation=2", "grpo.steps=1", "grpo.group_size=2")
WORDS += ("grpo.timesteps=2", "grpo.max_new_tokens=2", "table.samples=1", "table.limit=1", "table.timesteps=2")
WORDS += ("table.max_new_tokens=3",)


def call(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Jobs run in this process, on a tiny model in the toy's place; returns the runs in their order."""
    done: list[str] = []
    monkeypatch.setattr("pyunictokens.toy.model.load_toy", tiny_toy)
    monkeypatch.setattr("pyunictokens.toy.rewards.load_toy_rewards", tiny_experts)

    def at_once(jobs: Sequence[Job], workers: int, **_: Any) -> Iterator[Status]:
        for job in jobs:
            call("train", *job.arguments, "--out", job.out)
            done.append(f"{Path(job.runs).name}/{job.name}")
            yield Status(job.name, "done")

    monkeypatch.setattr("pyunictokens.runs.sweep.run_local", at_once)
    return done


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_tables_from_nothing_and_nothing_twice(here: list[str], tmp_path: Path) -> None:
    for name in ("bo", "mi"):
        write_toy_concept(tmp_path / "data", seed=len(name + name[0]), kind="animal", name=name)
    out, words = tmp_path / "paper", ("--tables", "table1,table3", "--no-rivals", *WORDS, "--device", "cpu")
    planned = call("evaluate", "paper", tmp_path / "data", "--out", out, *words, "--plan")
    assert "unictokens-r1" in planned and "joint-grpo" in planned and "no-dsog" not in planned
    assert "of reinforcement" in planned and here == [] and not out.exists()
    call("evaluate", "paper", tmp_path / "data", "--out", out, *words)
    variants = ["unictokens", "unictokens-r1", "joint", "joint-grpo"]
    assert here == [f"{variant}/{name}" for variant in variants for name in ("bo", "mi")]
    for table, rows in (("table1", 5), ("table3", 4)):
        content = json.loads((out / table / "results.json").read_text())
        assert len({record["model"] for record in content["records"]}) == rows, content["failures"]
        assert {"UniCTokens", "UniCTokens-R1"} <= {record["model"] for record in content["records"]}
        assert {record["concept"] for record in content["records"]} == {"bo", "mi"}
    begun = json.loads((out / "runs" / "unictokens-r1" / "bo" / "run.json").read_text())
    assert begun["identity"]["concept"] == "bo" and not (out / "runs" / "unictokens-r1" / "bo" / "stages").exists()
    here.clear()
    again = call("evaluate", "paper", tmp_path / "data", "--out", out, *words, "--plan")
    lines = [line.split() for line in again.splitlines() if line.startswith(("table", "runs"))]
    assert len(lines) == 4 + 5 + 4
    assert all(line[-2:] == ["2", "2"] for line in lines if line[0] == "runs")
    assert all(line[-3:] == ["0", "0", "0"] for line in lines if line[0] != "runs"), again
    assert "about 0 hours of stages, 0 of reinforcement and 0 of measuring" in again
    call("evaluate", "paper", tmp_path / "data", "--out", out, *words)
    assert here == []


def data_sets(folder: Path) -> list[str]:
    """The three data sets of Table 5, tiny, as words of the command."""
    folders = {
        "yollava": write_yollava(folder / "yollava-data"),
        "mcllava": write_mcllava(folder / "mc"),
        "dreambench": write_dreambench(folder / "db"),
    }
    return [word for name, where in folders.items() for word in (f"--{name}", str(where))]


def test_the_plan_of_table_5_has_every_row(here: list[str], tmp_path: Path) -> None:
    """Each row of the paper is trained, asked, or left out with the reason; a plan writes nothing."""
    out, given = tmp_path / "paper", data_sets(tmp_path)
    command = ("evaluate", "paper", "--table", "5", *given, "--out", out, "--plan")
    planned = call(*command, "--model", "someone/show-o", "--vq", "someone/vq", "--tokenizer", "someone/phi")
    assert not out.exists() and here == []
    lines = [line.split() for line in planned.splitlines()]
    printed = {f"rival {row.key}": row.paper for row in rivals.PAPER}
    printed |= {name: paper.VARIANTS[name].title for name in ("unictokens", "unictokens-r1-images")}
    for layout, concepts in (("yollava", 2), ("mcllava", 3), ("dreambench", 3)):
        trained = [line[2:] for line in lines if line[:2] == ["runs", layout]]
        told = {printed[" ".join(line[:-2])] for line in trained}
        assert [layout, "Show-o", "+", "TP"] in [line[:4] for line in lines]
        assert told | {"Show-o+TP"} == {*NUMBERS[layout], "UniCTokens"}, planned  # DreamBench has no row of it
        assert all(line[-2:] == ["0", f"{concepts}"] for line in trained)
    assert "left out: mcllava Yo'LLaVA (yollava): to fetch first: llava-hf/llava-1.5-13b-hf" in planned
    assert "left out: yollava Yo'LLaVA (Phi-1.5) (yollava-phi): yollava-phi: no LLaVA with Phi-1.5" in planned
    for name in ("Chameleon + TP (chameleon-tp)", "Chameleon + IP (chameleon-ip)"):
        assert f"left out: dreambench {name}: draws no images" in planned
        assert f"left out: yollava {name}: to fetch first: facebook/chameleon-7b" in planned
    strange = call(*command, "qwen-tp.steps=1", code=2)
    assert "'qwen-tp.steps=1': names no rival of these tables: dreambooth," in strange


@pytest.mark.filterwarnings("ignore:.*rows are filled", "ignore:.*training images")
def test_table_5_is_trained_on_what_was_imported(here: list[str], tmp_path: Path) -> None:
    folder, out = write_dreambench(tmp_path / "db"), tmp_path / "paper"
    for name in ("berry_bowl", "grey_plushie"):
        shutil.rmtree(folder / "dataset" / name)
    base = ("evaluate", "paper", "--table", "5", "--dreambench", folder, "--quick", "--out", out, "--device", "cpu")
    base = (*base, "--no-rivals", "stages.num_understanding=2", "stages.num_generation=2")
    call(*base)
    assert here == ["unictokens/dog6", "unictokens-r1-images/dog6"]
    home = out / "dreambench"
    assert load_concept(home / "data", "dog6").class_word == "dog"
    run = json.loads((home / "runs" / "unictokens-r1-images" / "dog6" / "run.json").read_text())
    assert run["settings"]["visual_ratio"] == 1.0
    found = json.loads((home / "paper.json").read_text())
    assert {row["model"]: row["paper"] for row in found["rows"]} == {
        "Show-o + TP": "Show-o+TP",
        "Real images": "Real Images",
        "UniCTokens": "UniCTokens",
        "UniCTokens-R1": "UniCTokens-R1",
    }
    drawn = next(row for row in found["rows"] if row["model"] == "UniCTokens-R1")["cells"]["pure.clip_i"]
    assert drawn["difference"] == pytest.approx(drawn["mean"] - 0.808)
    assert any("no facts" in note for note in found["notes"])
    here.clear()
    again = call(*base)
    lines = [line.split() for line in again.splitlines() if line.startswith("runs ")]
    assert here == [] and len(lines) == 2 and all(line[-2:] == ["1", "1"] for line in lines)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*rows are filled", "ignore:.*training images")
def test_the_ablations_with_a_judge(here: list[str], tmp_path: Path) -> None:
    """Table 2; the plan counts what the judge is then asked."""
    write_toy_concept(tmp_path / "data", seed=3, kind="animal", name="bo")
    out = tmp_path / "paper"
    with JudgeServer() as server:
        judge = ("--judge-url", server.url, "--judge-model", "m", "--judge-key-env", "none")
        command = ("evaluate", "paper", tmp_path / "data", "--out", out, "--tables", "table2", *judge, *WORDS)
        command = (*command, "--device", "cpu", "table.tasks=[vqa,recognition,pure,dense,reasoning_generation]")
        planned = numbers_of(call(*command, "--plan"))
        assert server.requests == []
        call(*command)
        asked = len(server.requests)
        again = numbers_of(call(*command, "--plan"))
    ablations = ["no-reasoning", "no-visual", "no-text-only", "no-dsog"]
    assert here == [f"{name}/bo" for name in ["unictokens", "unictokens-r1", *ablations]]
    for name, key, value in (
        ("no-reasoning", "reasoning", False),
        ("no-visual", "visual_ratio", 0.0),
        ("no-text-only", "visual_ratio", 1.0),
        ("unictokens-r1", "visual_ratio", 0.5),
    ):
        run = json.loads((out / "runs" / name / "bo" / "run.json").read_text())
        assert run["settings"][key] == value, name
    for table, models in (("table2", {"w/o Und. Rea.", "w/o VIA", "w/o TIA", "w/o DSOG", "UniCTokens-R1"}),):
        content = json.loads((out / table / "results.json").read_text())
        assert {record["model"] for record in content["records"]} == models, table
        assert content["failures"] == [], table
        assert (out / table / "table.md").read_text().count("|") > 10
    assert planned["judge"] > 0 and planned["judge"] - planned["answers"] <= asked <= planned["judge"]
    assert planned["stages"] > 0 and planned["grpo"] > 0 and planned["measuring"] > 0
    assert again == {**dict.fromkeys(again, 0.0)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_a_trial_on_the_toy_fills_six_trained_rows_beside_the_papers(here: list[str], tmp_path: Path) -> None:
    out = tmp_path / "paper"
    base = ("evaluate", "paper", "--table", "1", "--toy", "--quick", "--out", out, "--device", "cpu")
    base = (*base, "stages.num_understanding=2", "stages.num_generation=2", "yochameleon.generation=3")
    said = call(*base, "yochameleon.soft_positives=4", "yochameleon.understanding=2")
    assert here == [f"{variant}/{name}" for variant in ("unictokens", "unictokens-r1") for name in ("bo", "cup")]
    found = json.loads((out / "table1" / "paper.json").read_text())
    trained = {row["model"]: row["paper"] for row in found["rows"] if row["trained"]}
    assert trained == {
        "Textual inversion (Show-o)": "Text inversion",
        "DreamBooth (Show-o)": "DreamBooth (SD)",
        "DreamBooth (Show-o, LoRA)": "DreamBooth (SD)",
        "Yo'Chameleon's recipe (Show-o)": "Yo'Chameleon",
        "UniCTokens": "UniCTokens",
        "UniCTokens-R1": "UniCTokens-R1",
    }
    assert [row["model"] for row in found["rows"] if not row["trained"]] == [
        "Show-o + TP",
        "Show-o + IP",
        "Real images",
    ]
    drawn = found["rows"][1]["cells"]
    assert drawn["pure.clip_i"]["difference"] == pytest.approx(drawn["pure.clip_i"]["mean"] - 0.645)
    assert drawn["vqa.bleu"]["mean"] is None  # DreamBooth is not asked
    assert found["rows"][3]["cells"]["vqa.bleu"]["paper"] == 0.470
    page = (out / "table1" / "paper.html").read_text()
    assert "paper 0.645" in page and "6 trained rows and 3 others on" in page and "paper.html" in said
    here.clear()
    again = call(*base, "yochameleon.soft_positives=4", "yochameleon.understanding=2")
    lines = [line.split() for line in again.splitlines() if line.startswith("runs ")]
    assert here == [] and len(lines) == 6 and all(line[-2:] == ["2", "2"] for line in lines)


def test_what_the_tables_are_called(here: list[str], tmp_path: Path) -> None:
    base = ("evaluate", "paper", "--out", tmp_path / "paper", "--plan")
    assert "--table 4: must be one of 1, 2, 3, 5" in call(*base, "--toy", "--table", "4", code=2)
    assert "give the folders of its data sets" in call(*base, "--toy", "--table", "5", code=2)
    assert "which data folder" in call(*base, "--table", "1", code=2)
    assert "leave --model" in call(*base, "--toy", "--model", "show-o-512", code=2)
    assert "did you mean 'steps'" in call(*base, "--toy", "--table", "1", "dreambooth.stepz=1", code=2)
    planned = call(*base, "--toy", "--table", "1", "--no-rivals")
    assert "rival " not in planned


def numbers_of(plan: str) -> dict[str, float]:
    """The last lines of a plan as numbers; with the answers whose score a judge may have been spared."""
    words = re.search(r"about (\S+) hours of stages, (\S+) of reinforcement and (\S+) of measuring", plan)
    calls = re.search(r"and (\d+) calls of the judge", plan)
    assert words is not None and calls is not None, plan
    rows = [line.split() for line in plan.splitlines() if line.startswith("table")]
    assert sum(int(row[-1]) for row in rows) == int(calls[1])
    hours = dict(zip(("stages", "grpo", "measuring"), map(float, words.groups()), strict=True))
    return {**hours, "judge": float(calls[1]), "answers": float(sum(int(row[-3]) for row in rows))}


@pytest.mark.parametrize("stage", ["understanding", "generation", "deepening", "joint"])
def test_the_hours_of_stages_are_near_the_operations_they_take(stage: str, tmp_path: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from pyunictokens.models.showo.costs import ShowoCosts as Costs
    from pyunictokens.train import as_question, train_concept_tokens
    from pyunictokens.train.concept_tokens.stages import PLANS, questions_of
    from tests.train.world import stage_config, world

    here = world(tmp_path / "data")
    config = stage_config(stages=(stage,), flip=False, crop=1.0)
    with FlopCounterMode(display=False) as counter:
        train_concept_tokens(here.model, here.vq, here.tokenizer, here.data, config, tmp_path / "run")
    of_images = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "convolution" in str(op))
    tokenizer, items = here.tokenizer.with_concept(here.concept.tokens), questions_of(here.data, config)
    asked = [
        tokenizer.encode(
            here.model.question_text(as_question(here.concept, item.question, PLANS[stage].question_groups))
        )
        for item in items
    ]
    said = [tokenizer.encode(item.answer) for item in items]
    lengths = (sum(map(len, asked)) // len(asked) + 1, sum(map(len, said)) // len(said) + 1)
    planned = stages_flops(Costs(here.model.config, 4), config, here.data, question=lengths)
    assert 0.75 < planned / (counter.get_total_flops() - of_images) < 1.3, lengths


def test_what_cannot_be_done_is_said_first(here: list[str], tmp_path: Path) -> None:
    write_toy_concept(tmp_path / "data", seed=5, kind="animal", name="bo")
    base = ("evaluate", "paper", tmp_path / "data", "--out", tmp_path / "out")
    assert "table 'table4': must be one of table1" in call(*base, "--tables", "table4", code=2)
    flags = ("--model", "someone/show-o", "--vq", "someone/vq", "--tokenizer", "someone/phi")
    planned = call(*base, *flags, "--plan")
    assert "to fetch first: model: someone/show-o" in planned and "to fetch first: tokenizer" in planned
    assert "left out: Qwen2.5-VL + TP (qwen-tp): to fetch first: Qwen/Qwen2.5-VL-7B-Instruct" in planned
    assert "GPT-4o + TP (gpt-tp): the endpoint's key: set OPENAI_API_KEY" in planned or "OPENAI_API_KEY" in os.environ


def test_variants_stand_behind_what_they_begin_with() -> None:
    order = list(paper.VARIANTS)
    assert all(order.index(each.begins) < order.index(name) for name, each in paper.VARIANTS.items() if each.begins)
    assert paper.wanted_variants(["table2"])[0] == "unictokens"  # the ablations begin with its tokens
    assert {name for table in paper.TABLES.values() for name in table.variants} == set(paper.VARIANTS)
    with pytest.raises(UserError, match="must be one of"):
        paper.wanted_variants(["nine"])


def test_the_hours_are_those_of_a_step_as_it_is_counted_elsewhere() -> None:
    """A rollout of nine images without previews costs about 2.4 PFLOP, the update over all timesteps about 7.2."""
    costs, grpo = ShowoCosts(ShowoConfig(), 2), TrainConfig.preset("paper").override(["dsog.enabled=false"]).grpo
    step = training_flops(costs, grpo) / grpo.steps
    assert 0.8 * (2.4 + 7.2 + 2.4) < step / 1e15 < 1.25 * (2.4 + 7.2 + 2.4)
    with_previews = training_flops(costs, TrainConfig.preset("paper").grpo) / grpo.steps
    assert with_previews - step == pytest.approx(costs.image_step(9, 64, 1024, True).flops * 30)
