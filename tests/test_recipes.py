"""Recipes: bash reads them, and the commands they would run are commands and settings that this version has."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from pyunictokens.runs.run_dir import RunConfig

FOLDER = Path(__file__).parent.parent / "experiments" / "recipes"
RECIPES = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")])
GIVEN = {
    "DRY_RUN": "1",
    "DATA": "some data",
    "CONCEPT": "mug",
    "SHOWO": "show-o",
    "VQ": "vq",
    "PHI": "phi",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_ARRAY_TASK_MAX": "40",
    "N": "4",
    "SLURM_JOB_ID": "77",
    "SLURM_NNODES": "2",
}


def dry(recipe: Path, where: Path) -> list[list[str]]:
    """The words of each command of this package that a recipe would run."""
    name = {"OUT": str(where / "runs")}
    made = subprocess.run(
        ["bash", str(recipe)],
        capture_output=True,
        text=True,
        env={**os.environ, **GIVEN, **name},
        cwd=FOLDER.parent.parent,
    )
    assert made.returncode == 0, made.stderr
    lines = [line.removeprefix("+ ").removeprefix("srun ") for line in made.stdout.splitlines()]
    words = [line.replace("some data", "some_data").split() for line in lines]
    return [each[each.index("-m") + 1 :] if each[0] == "torchrun" else each for each in words]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_bash_can_read_it(recipe: Path) -> None:
    subprocess.run(["bash", "-n", str(recipe)], check=True)
    text = recipe.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ") and "set -euo pipefail" in text


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_its_commands_exist(recipe: Path, tmp_path: Path) -> None:
    import typer.main

    from pyunictokens.cli import app

    found = 0
    root = typer.main.get_command(app)
    for words in dry(recipe, tmp_path):
        if words[0] != "pyunictokens":
            assert words[:2] in (["bash", "experiments/recipes/one_gpu.sh"], ["scontrol", "requeue"])
            continue
        found += 1
        command = root.commands[words[1]]  # type: ignore[attr-defined]
        rest = words[2:]
        if hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        context = command.make_context("recipe", list(rest), resilient_parsing=False)
        settings = [word for word in rest if "=" in word and not word.startswith("-")]
        RunConfig.make("toy", words=settings)
        if words[1] == "train":
            assert settings and (context.params["out"] is not None or context.params["plan"])
    assert found or recipe.name == "slurm_one.sbatch"


def test_a_recipe_goes_on_with_a_run_that_is_there(tmp_path: Path) -> None:
    check, plan, first = dry(FOLDER / "one_gpu.sh", tmp_path)
    assert check[:3] == ["pyunictokens", "data", "check"] and "--plan" in plan and "--out" not in plan
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "config.yaml").write_text("")
    again = dry(FOLDER / "one_gpu.sh", tmp_path)[-1]
    assert "--resume" not in first and [word for word in again if word != "--resume"] == first and "--resume" in again
    assert shlex.join(first).startswith("pyunictokens train some_data mug --out")


@pytest.mark.parametrize("recipe", ["torchrun.sh", "slurm_torchrun.sbatch"])
def test_torchrun_knows_its_options(recipe: str, tmp_path: Path) -> None:
    from torch.distributed.run import get_args_parser

    made = subprocess.run(
        ["bash", str(FOLDER / recipe)],
        capture_output=True,
        text=True,
        env={**os.environ, **GIVEN, "DATA": "data", "OUT": str(tmp_path), "GPUS": "4", "RESTARTS": "5"},
        check=True,
    )
    (line,) = [line for line in made.stdout.splitlines() if "torchrun" in line]
    options = get_args_parser().parse_args(line.removeprefix("+ ").removeprefix("srun ").split()[1:])
    assert options.module and options.training_script == "pyunictokens" and options.training_script_args[0] == "train"
    assert options.nproc_per_node == "4" and options.max_restarts == 5
    if recipe.endswith(".sbatch"):
        assert options.nnodes == "2" and options.rdzv_backend == "c10d" and options.rdzv_id == "77"
    else:
        assert options.standalone


def test_a_job_array_shares_the_concepts_out(tmp_path: Path) -> None:
    (words,) = dry(FOLDER / "slurm_array.sbatch", tmp_path)
    assert words[words.index("--shard") + 1] == "3/40"


def test_what_is_missing_is_named() -> None:
    environment = {key: value for key, value in os.environ.items() if key not in GIVEN}
    made = subprocess.run(["bash", str(FOLDER / "one_gpu.sh")], capture_output=True, text=True, env=environment)
    assert made.returncode != 0 and "DATA: the data folder" in made.stderr


def test_one_gpu_needs_no_more_than_data_and_a_name(tmp_path: Path) -> None:
    told = {key: value for key, value in GIVEN.items() if key in {"DRY_RUN", "DATA", "CONCEPT"}}
    plain = {key: value for key, value in os.environ.items() if key not in GIVEN}
    made = subprocess.run(
        ["bash", str(FOLDER / "one_gpu.sh")], capture_output=True, text=True, env={**plain, **told}, check=True
    )
    last = made.stdout.splitlines()[-1]
    assert "--model show-o-512 --rewards paper --preset paper" in last and "--vq" not in last and "--dtype" not in last


def test_the_shipped_rewards_are_the_papers_where_the_docs_put_them() -> None:
    from pyunictokens.rewards.registry import weight_status
    from pyunictokens.runs.bundle import paper_rewards

    models = paper_rewards()["models"]
    assert isinstance(models, dict) and list(models) == ["tier", "ber", "der", "fer"]
    assert all(settings == {"path": "auto"} for settings in models.values())
    homes = {status.looked_in[0] for status in weight_status(dict.fromkeys(models, "auto"))}
    docs = (FOLDER.parent.parent / "docs" / "real-weights.md").read_text(encoding="utf-8")
    assert len(homes) == 4 and all(home in docs for home in homes)
    for recipe in RECIPES:
        text = recipe.read_text()
        assert "--rewards" not in text or "REWARDS:-paper" in text or "rewards serve" in text, recipe.name
