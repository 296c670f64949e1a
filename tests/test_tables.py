"""The miniature of the paper's tables: which cells there are, that they are made once, what the page says of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from experiments.tables import all_numbers, page, runner, stats
from experiments.tables.all_numbers import write_all_numbers
from experiments.tables.arms import ARMS, CLAIMS, COLUMNS, KEY_MEASURES, PAPER, SCALES, TABLES, Claim
from experiments.tables.lab import (
    InWords,
    Unit,
    about_of,
    cell_file,
    config_of,
    expected_row_steps,
    read_cell,
    row_steps,
    run_unit,
    units,
)
from experiments.tables.page import write_page
from pyunictokens.runs.run_dir import RunConfig
from pyunictokens.utils.errors import UserError
from pyunictokens.utils.files import folder_lock


class FakeLab:
    """Cells at once: a value an arm, a concept and a seed have together, and a learning curve."""

    def __init__(self, better: float = 0.2, noise: float = 0.01):
        self.better, self.noise, self.made = better, noise, []

    def make(self, arm: Any, unit: Unit, scale: Any, config: Any) -> dict[str, Any]:
        self.made.append((unit.name, arm.name))
        rng = np.random.default_rng([unit.number, unit.seed, len(unit.kind), list(ARMS).index(arm.name)])
        value = 0.4 + self.better * (arm.name == "ours") + 0.05 * unit.number % 0.1
        rows = [
            {"reward": value + 0.01 * step, "spread": 0.1, "kl": 0.0, "seconds": 1.0 + (arm.name == "ours"),
             "row_steps": row_steps(config, config.grpo.group_size)}
            for step in range(config.grpo.steps if arm.words is not None else 0)
        ]  # fmt: skip
        metrics = {key: value + float(rng.normal(0, self.noise)) for key in COLUMNS}
        return {"metrics": metrics, "rows": rows, "seconds": {"grpo": 2.0, "evaluation": 1.0}}


def make_all(work: Path, arms: list[str], lab: Any = None) -> None:
    for unit, names in units(SCALES["quick"]).items():
        assert run_unit(unit, [name for name in names if name in arms], "quick", work, lab or FakeLab()) == []


def children(parent: int) -> list[int]:
    """Ids of the workers that a process has started."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes()
            up = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):  # no process, or one that has just ended
            continue
        found += [int(folder.name)] if up == parent and b"spawn_main" in words else []
    return found


@pytest.mark.slow
def test_workers_end_with_the_one_who_started_them(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from experiments.tables import runner
runner.run(runner.choose("quick", None, None), "quick", Path({str(tmp_path)!r}), 2)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1]) as tables:
        try:
            workers = wait_for(lambda: found if len(found := children(tables.pid)) == 2 else None)
        finally:
            tables.kill()
    wait_for(lambda: not [worker for worker in workers if Path(f"/proc/{worker}").exists()])


def wait_for(what: Any, seconds: float = 60.0) -> Any:
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


def test_the_plan_holds_what_the_paper_asks_for() -> None:
    full = units(SCALES["full"])
    kinds = {(unit.kind, unit.number) for unit in full}
    assert len(kinds) == 6 and {kind for kind, _ in kinds} == {"animal", "human", "object"}
    assert {unit.seed for unit in full} == {0, 1, 2}
    for names in full.values():
        assert {arm for table in TABLES for arm in table.arms} <= set(names)
        assert {arm for claim in CLAIMS for arm in (claim.arm, claim.other)} <= set(names)
    assert set(PAPER) == {arm for table in TABLES for arm in table.arms} - {"no_dsog_equal"}
    assert PAPER["ours"]["vqa.bleu"] == 0.592
    for scale in SCALES.values():
        for unit, names in list(units(scale).items())[:2]:
            settings = [config_of(ARMS[name], unit, scale) for name in names]
            assert len({repr(each) for each in settings if each.grpo.seed == unit.seed}) >= 5


def test_arms_differ_in_what_they_say_and_nothing_else() -> None:
    unit = Unit("animal", 11, 2)
    ours = config_of(ARMS["ours"], unit, SCALES["full"])
    assert config_of(ARMS["no_dsog"], unit, SCALES["full"]) == replace(
        ours, grpo=replace(ours.grpo, dsog=replace(ours.grpo.dsog, enabled=False))
    )
    assert config_of(ARMS["no_reasoning"], unit, SCALES["full"]).grpo == replace(ours.grpo, reasoning=False)
    assert ours.stages.seed == ours.grpo.seed == 2


def test_the_scales_are_the_toy_preset_but_for_their_words() -> None:
    preset = RunConfig.make("toy")
    for scale in (SCALES["full"], SCALES["quick"]):
        ours = config_of(ARMS["ours"], Unit("animal", 11, 0), scale)
        for name in ("objective", "advantage", "lr", "beta", "timesteps", "guidance_scale", "group_size", "trainable"):
            assert getattr(ours.grpo, name) == getattr(preset.grpo, name)
        assert ours.grpo.dsog.enabled and ours.grpo.dsog.initial == "auto"
        assert (ours.evaluation.timesteps, ours.evaluation.guidance_scale) == (
            ours.grpo.timesteps,
            ours.grpo.guidance_scale,
        )


def test_the_arm_without_dsog_gets_what_previews_cost() -> None:
    """Its row-steps are those of the arm with DSOG, up to half a step; a simulation says what previews cost."""
    unit, scale = Unit("animal", 11, 0), SCALES["full"]
    ours, equal = (config_of(ARMS[name], unit, scale) for name in ("ours", "no_dsog_equal"))
    assert not equal.grpo.dsog.enabled and equal.grpo.steps > ours.grpo.steps
    step = row_steps(equal, equal.grpo.groups * equal.grpo.group_size)
    assert abs(expected_row_steps(equal) - expected_row_steps(ours)) <= step / 2
    dsog, rows = ours.grpo.dsog, ours.grpo.groups * ours.grpo.group_size
    passes = np.random.default_rng(0).random((ours.grpo.steps * rows * 50, dsog.max_candidates)) < dsog.target_pass_rate
    started = np.where(passes.any(1), passes.argmax(1) + 1, dsog.max_candidates)
    first = 4 * ours.grpo.group_size * 1  # previews of four groups after a fifth of four timesteps, at least one
    drawn = sum(row_steps(ours, int(some)) for some in started.reshape(-1, rows).sum(1)) / 50
    assert expected_row_steps(ours) == pytest.approx(first + drawn, rel=0.01)
    plain = replace(ours, grpo=replace(ours.grpo, dsog=replace(dsog, enabled=False)))
    assert expected_row_steps(plain) == ours.grpo.steps * row_steps(plain, rows)


def test_cost_in_rows_is_what_a_step_puts_through_the_model() -> None:
    config = config_of(ARMS["ours"], Unit("animal", 11, 0), SCALES["full"])
    grpo = replace(
        config.grpo, groups=1, group_size=3, timesteps=10, timestep_fraction=1.0, guidance_scale=2.0, beta=0.1
    )
    guided = replace(config, grpo=grpo)
    # 5 candidates to step 2, 3 of them to step 10, a reference pass and an update (3) over 3·10, twice for guidance
    assert row_steps(guided, 5) == 2 * (5 * 2 + 3 * 8 + 4 * 30)
    half = replace(config, grpo=replace(grpo, timestep_fraction=0.5))
    assert row_steps(half, 5) == 2 * (5 * 2 + 3 * 8 + 4 * 15)
    plain = replace(config, grpo=replace(grpo, guidance_scale=0.0, beta=0.0, dsog=replace(grpo.dsog, enabled=False)))
    assert row_steps(plain, 3) == 30 + 3 * 30
    assert row_steps(replace(plain, grpo=replace(plain.grpo, groups=2)), 6) == 2 * (30 + 3 * 30)


def test_cells_are_made_once_and_anew_when_their_settings_change(tmp_path: Path, monkeypatch: Any) -> None:
    unit, lab = Unit("animal", 11, 0), FakeLab()
    for _ in range(2):
        assert run_unit(unit, ["staged", "ours"], "quick", tmp_path, lab) == []
    assert [name for _, name in lab.made] == ["staged", "ours"]
    file = cell_file(tmp_path, SCALES["quick"], unit, "ours")
    about = about_of(ARMS["ours"], unit, config_of(ARMS["ours"], unit, SCALES["quick"]))
    assert read_cell(file, about) is not None and read_cell(file, {**about, "seed": 1}) is None
    changed = replace(SCALES["quick"], words=(*SCALES["quick"].words, "grpo.lr=0.5"))
    monkeypatch.setitem(SCALES, "quick", changed)
    assert runner.gather("quick", tmp_path, [])["cells"] == []
    run_unit(unit, ["ours"], "quick", tmp_path, lab)
    file.write_text("torn")
    run_unit(unit, ["ours"], "quick", tmp_path, lab)
    assert [name for _, name in lab.made] == ["staged", "ours", "ours", "ours"]


def test_committed_cells_are_not_made_again_elsewhere(tmp_path: Path, monkeypatch: Any) -> None:
    units_of = [Unit("animal", 31, 0), Unit("object", 32, 0)]
    for unit in units_of:
        run_unit(unit, ["staged", "ours"], "quick", tmp_path / "here", FakeLab())
    committed = json.loads(json.dumps(runner.gather("quick", tmp_path / "here", [])))
    runner.restore(committed, tmp_path / "there")
    lab = FakeLab()
    for unit in units_of:
        run_unit(unit, ["staged", "ours"], "quick", tmp_path / "there", lab)
    assert lab.made == []
    assert runner.gather("quick", tmp_path / "there", [])["cells"] == committed["cells"]
    words = (*SCALES["quick"].words, "grpo.lr=0.5")
    monkeypatch.setitem(SCALES, "quick", replace(SCALES["quick"], words=words))
    run_unit(units_of[0], ["ours"], "quick", tmp_path / "there", lab)
    assert lab.made == [(units_of[0].name, "ours")], "cells of other settings are made again"


def test_two_processes_do_not_make_one_unit(tmp_path: Path) -> None:
    unit, lab = Unit("animal", 11, 0), FakeLab()
    run_unit(unit, ["staged"], "quick", tmp_path, lab)
    with folder_lock(tmp_path / "quick" / "units" / unit.name), pytest.raises(UserError, match="another process"):
        run_unit(unit, ["ours"], "quick", tmp_path, lab)
    assert lab.made == [(unit.name, "staged")]


def test_a_setting_that_this_version_does_not_have_is_told_of(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(ARMS, "no_visual", replace(ARMS["no_visual"], words=("grpo.no_such=1",)))
    (problem,) = run_unit(Unit("human", 11, 0), ["no_visual"], "quick", tmp_path, FakeLab())
    assert "no_visual: not measured" in problem and "no_such" in problem


def test_numbers_are_those_of_the_plain_formulas(tmp_path: Path) -> None:
    make_all(tmp_path, ["ours", "staged"])
    cells = runner.gather("quick", tmp_path, [])["cells"]
    found = stats.compare(cells, "ours", "staged", "vqa.bleu")
    assert found is not None
    values = [
        [cell["metrics"]["vqa.bleu"] for cell in cells if cell["arm"] == arm and (cell["kind"], cell["number"]) == who]
        for who in SCALES["quick"].concepts
        for arm in ("ours", "staged")
    ]
    ours, staged = values[::2], values[1::2]
    differences = [np.mean(a) - np.mean(b) for a, b in zip(ours, staged, strict=True)]
    assert found.difference.mean == pytest.approx(np.mean(differences)) and found.difference.n == 6
    t = np.mean(differences) / (np.std(differences, ddof=1) / np.sqrt(6))
    assert found.t_test == pytest.approx(2 * scipy_stats.t.sf(abs(t), 5))
    assert found.wilcoxon == pytest.approx(2 / 2**6), "all six the same way"
    assert found.clear and found.difference.low > 0


def cell(arm: str, number: int, value: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    whose = {"arm": arm, "kind": "animal", "number": number, "seed": seed}
    return {**whose, "metrics": {"vqa.bleu": value}, "rows": [], "seconds": {}, **more}


def test_seeds_are_averaged_and_only_common_concepts_compared() -> None:
    cells = [cell("ours", 1, 0.2), cell("ours", 1, 0.4, seed=1), cell("ours", 2, 1.0), cell("staged", 1, 0.1)]
    assert stats.by_concept(cells, "ours", "vqa.bleu") == {"animal-1": pytest.approx(0.3), "animal-2": 1.0}
    found = stats.compare(cells, "ours", "staged", "vqa.bleu")
    assert found is not None and found.difference.mean == pytest.approx(0.2) and found.t_test is None
    assert not found.clear, "one concept says nothing"
    assert stats.compare(cells, "ours", "joint", "vqa.bleu") is None and stats.mean(cells, "joint", "vqa.bleu") is None
    equal = [cell(arm, number, 0.5) for arm in ("ours", "staged") for number in range(4)]
    same = stats.compare(equal, "ours", "staged", "vqa.bleu")
    assert same is not None and same.t_test is None and same.wilcoxon is None


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.5, 0.6, 0.7), "agrees"),
        ((0.01, 0.6, 0.7), "leans the same way"),
        ((-0.5, -0.6, -0.7), "disagrees"),
        ((0.5, -0.3, 0.1), "leans the same way"),
        ((-0.5, 0.3, -0.1), "leans the other way"),
        ((0.0, 0.0, 0.0), "no difference"),
    ],
)
def test_every_verdict(values: tuple[float, ...], verdict: str) -> None:
    cells = [cell("staged", n, 1.0) for n in range(3)] + [cell("ours", n, 1.0 + v) for n, v in enumerate(values)]
    (found,) = stats.agreements(cells, ("staged", "ours"), "ours", PAPER)
    assert found.verdict == verdict and found.paper == pytest.approx(0.592 - 0.505)


def cells_of(arm: str, values: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A cell a concept, with a value of each measure."""
    count = max(map(len, values.values()))
    return [cell(arm, n, 0.0, metrics={key: of[n] for key, of in values.items()}) for n in range(count)]


ATTRIBUTES, REWARD, FACT, RECOGNITION = KEY_MEASURES
LEVEL = {key: [0.5] * 6 for key in KEY_MEASURES}
UP, NOISE = [0.61, 0.60, 0.59, 0.60, 0.62, 0.61], [0.53, 0.46, 0.52, 0.49, 0.45, 0.54]
DOWN = [1 - value for value in UP]
FAINT = [0.58, 0.57, 0.51, 0.52, 0.56, 0.50]
"""Clear by itself (p = 0.03), not as the smallest of four."""


@pytest.mark.parametrize(
    ("values", "verdict", "said"),
    [
        (
            {ATTRIBUTES: UP, RECOGNITION: NOISE},
            "agrees",
            "higher in attributes +0.105 [+0.097, +0.113]; no clear difference in reward, right fact and recognition.",
        ),
        ({REWARD: DOWN}, "disagrees", "lower in reward -0.105 [-0.113, -0.097]; no clear difference in"),
        (
            {ATTRIBUTES: UP, REWARD: DOWN},
            "disagrees",
            "higher in attributes +0.105 [+0.097, +0.113], lower in reward -0.105 [-0.113, -0.097]; no clear",
        ),
        ({ATTRIBUTES: NOISE}, "open", "no clear difference; attributes -0.002 [-0.030, +0.025] and reward +0.000 ["),
        ({ATTRIBUTES: FAINT, REWARD: NOISE, FACT: NOISE, RECOGNITION: NOISE}, "open", "no clear difference; attr"),
        (dict.fromkeys(KEY_MEASURES, UP), "agrees", "recognition +0.105 [+0.097, +0.113]."),
    ],
)
def test_a_sentence_says_what_the_numbers_say(values: dict[str, list[float]], verdict: str, said: str) -> None:
    cells = cells_of("ours", {**LEVEL, **values}) + cells_of("staged", LEVEL)
    found = stats.judge(cells, "ours", "staged", list(KEY_MEASURES))
    assert found.verdict == verdict
    assert said in page.sentence(Claim("Training helps", "ours", "staged"), found)


def test_a_measure_that_is_clear_by_itself_need_not_be_among_four() -> None:
    values = {ATTRIBUTES: FAINT, REWARD: NOISE, FACT: NOISE, RECOGNITION: NOISE}
    cells = cells_of("ours", {**LEVEL, **values}) + cells_of("staged", LEVEL)
    assert stats.judge(cells, "ours", "staged", [ATTRIBUTES]).verdict == "agrees"
    assert stats.judge(cells, "ours", "staged", list(KEY_MEASURES)).verdict == "open"
    steps = {ATTRIBUTES: UP, REWARD: UP, FACT: NOISE, RECOGNITION: FAINT}  # Holm: 0.05/4, 0.05/3, then 0.05/2
    cells = cells_of("ours", steps) + cells_of("staged", LEVEL)
    assert stats.judge(cells, "ours", "staged", list(KEY_MEASURES)).clear == {ATTRIBUTES, REWARD}


def test_what_was_not_measured_is_open() -> None:
    found = stats.judge(cells_of("ours", LEVEL), "ours", "staged", list(KEY_MEASURES))
    assert found.verdict == "open" and not found.differences
    assert page.sentence(CLAIMS[0], found) == f"**{CLAIMS[0].says}**: not measured."


def test_the_page_groups_claims_and_shows_three_figures(tmp_path: Path) -> None:
    make_all(tmp_path / "work", sorted(set(ARMS) - {"joint"}), FakeLab(better=0.2))
    stored = json.loads(json.dumps(runner.gather("quick", tmp_path / "work", ["object-12: broke"])))
    text = write_page(stored, tmp_path)
    agree, rest = text.split("## What agrees")[1].split("## What does not")
    against, still_open = rest.split("## What is open")
    assert "**DSOG helps**: higher in attributes +0." in agree and "Nothing is clear against" in against
    assert "**Reinforcement improves tokens of the joint stage**: not measured." in still_open
    assert "6 concepts that pre-training never saw (2 animals, 2 humans, 2 objects), 1 training seed each" in text
    assert "Not made: object-12: broke." in text and "earlier settings" not in text
    assert "40 s of a thread against 25 s." in text, "20 steps of two seconds, 25 of one"
    assert text.index("experiments_gains.png") < text.index("## What agrees")
    for name in ("methods", "parts", "gains"):
        assert (tmp_path / "images" / f"experiments_{name}.png").stat().st_size > 10_000
    worse = make_worse(stored)
    text = write_page(worse, tmp_path)
    assert "**DSOG helps**: lower in" in text.split("## What does not")[1].split("## What is open")[0]
    assert "Nothing was measured yet" in write_page({**stored, "cells": []}, tmp_path / "none")


def make_worse(stored: dict[str, Any]) -> dict[str, Any]:
    cells = [
        {**each, "metrics": {key: value - 0.4 * (each["arm"] == "ours") for key, value in each["metrics"].items()}}
        for each in stored["cells"]
    ]
    return {**stored, "cells": cells}


def test_cells_of_earlier_settings_are_called_so(tmp_path: Path) -> None:
    cells = cells_of("ours", LEVEL) + cells_of("group_3", LEVEL)
    stored = {"scale": "full", "command": "make it", "machine": "a machine", "cells": cells}
    text = write_page({**stored, "measured": "commit 1234567"}, tmp_path)
    assert "**These numbers were measured with earlier settings (commit 1234567); `make it` has others now.**" in text
    assert "6 models" in text, "arms that are no more do not count"
    assert "earlier settings" in write_all_numbers(stored)
    assert "earlier settings" not in write_page({**stored, "words": list(SCALES["full"].words)}, tmp_path)


@pytest.mark.slow
def test_all_numbers_are_on_the_page_of_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_numbers, "COLUMNS", {key: COLUMNS[key] for key in PAPER["ours"]})
    make_all(tmp_path / "work", sorted(set(ARMS) - {"joint"}))
    stored = json.loads(json.dumps(runner.gather("quick", tmp_path / "work", [])))
    text = write_all_numbers(stored)
    assert "Not measured: joint stage (0 of 6 cells)." in text
    assert "20 comparisons that the paper reports too: 20 agrees" in text
    ours = stats.mean(stored["cells"], "ours", "vqa.bleu")
    assert ours is not None and f"| VQA BLEU | not measured | {ours.mean:.3f} [" not in text
    assert f"{ours.mean:.3f} [{ours.low:.3f}, {ours.high:.3f}]" in text


def test_shared_stages_are_counted_once() -> None:
    cells = [
        cell("staged", 1, 0.0, seconds={"stages": 10.0, "evaluation": 1.0}),
        cell("ours", 1, 0.0, seconds={"stages": 10.0, "grpo": 50.0, "evaluation": 1.0}),
        cell("unic", 1, 0.0, seconds={"stages": 14.0, "evaluation": 1.0}),
        cell("joint", 1, 0.0, seconds={"stages": 8.0, "evaluation": 1.0}),
        cell("text", 1, 0.0, seconds={"evaluation": 1.0}),
    ]
    assert stats.thread_seconds(cells) == 14.0 + 8.0 + 50.0 + 5.0


def test_names_of_measures_in_earlier_cells() -> None:
    cells = [cell("ours", 1, 0.0, metrics={"drawings.attributes": 0.9, "dense_reasoning.clip_i": 0.5})]
    assert stats.by_concept(cells, "ours", "samples.attributes") == {"animal-1": 0.9}
    assert stats.by_concept(cells, "ours", "dense_reasoning_generation.clip_i") == {"animal-1": 0.5}


def test_looks_in_words() -> None:
    words = InWords("<bo>", "<bo> is a striped purple dog.")
    assert words.expand("what colour is <bo>? <bo>") == "what colour is a striped purple dog? a striped purple dog"


def test_units_and_arms_on_the_command_line(tmp_path: Path) -> None:
    chosen = runner.choose("quick", ["animal-31-seed0"], ["ours", "staged"])
    assert {unit.name: names for unit, names in chosen.items()} == {"animal-31-seed0": ["staged", "ours"]}
    with pytest.raises(SystemExit, match="unit cat: scale quick has animal-31-seed0"):
        runner.choose("quick", ["cat"], None)
