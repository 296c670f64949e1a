"""Tables from cells: means against a plain definition, the files, the comparison, the pages."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pyunictokens.evaluate.report.gallery import write_gallery
from pyunictokens.evaluate.sample_cache import Record, SampleCache
from pyunictokens.evaluate.scoring import Failure
from pyunictokens.evaluate.table_files import Table, told
from pyunictokens.evaluate.tables import TABLE_1, TABLES, compare, metric_of, rows, seed_means
from pyunictokens.evaluate.tasks import IMAGE_TASKS, TASKS
from pyunictokens.utils.errors import UserError


def cells(model: str, lift: float = 0.0, concepts: int = 3, seeds: int = 2, samples: int = 3) -> list[Record]:
    """Random scores for every task, unevenly many items a concept."""
    rng = np.random.default_rng(5)
    made = []
    for concept in range(concepts):
        for task in TASKS:
            for number in range(3 + concept):
                group = ("positive", "negative")[number % 2] if task == "recognition" else ""
                for seed in range(seeds if task in IMAGE_TASKS else 1):
                    count = samples if task in IMAGE_TASKS else 0
                    scores = {n: (rng.random(max(count, 1)) * 0.5 + lift).tolist() for n in TASKS[task].measures}
                    kind = "animal" if concept else "human"
                    made.append(
                        Record(
                            model,
                            f"c{concept}",
                            kind,
                            task,
                            f"{task}{number}",
                            f"p{number}",
                            f"p{number}",
                            group,
                            seed=seed,
                            count=count,
                            scores=scores,
                        )
                    )
    return made


def test_means_are_those_of_concepts_of_items() -> None:
    made = cells("m")
    for key in ("vqa.bleu", "pure.clip_i"):
        task, _, name = key.partition(".")
        by_concept = []
        for concept in ("c0", "c1", "c2"):
            items: dict[str, list[float]] = {}
            for cell in made:
                if cell.concept == concept and cell.task == task:
                    items.setdefault(cell.item, []).append(float(np.mean(cell.scores[name])))
            by_concept.append(np.mean([np.mean(values) for values in items.values()]))
        metric = metric_of(made, key)
        assert metric is not None and metric.mean == pytest.approx(np.mean(by_concept))
        assert metric.low < metric.mean < metric.high and metric.n == 3 + 4 + 5
    rec = metric_of(made, "recognition.weight")
    halves = [
        np.mean(
            [c.scores["weight"][0] for c in made if (c.task, c.concept, c.group) == ("recognition", concept, group)]
        )
        for concept in ("c0", "c1", "c2")
        for group in ("positive", "negative")
    ]
    assert rec is not None and rec.mean == pytest.approx(np.mean(halves))


def test_half_of_recognition_is_no_recognition() -> None:
    assert metric_of([cell for cell in cells("m") if cell.group != "negative"], "recognition.weight") is None
    assert metric_of([], "vqa.bleu") is None


def test_drawings_of_one_prompt_do_not_narrow_the_interval() -> None:
    few, many = (metric_of(cells("m", samples=n, seeds=1), "pure.clip_t") for n in (1, 200))
    assert few is not None and many is not None and few.n == many.n


def test_the_columns_are_those_of_the_paper() -> None:
    heads = [f"{column.heading} {column.label}" for column in TABLE_1]
    assert len(heads) == 15 and heads[:3] == ["Rec. Weight", "Rea. BLEU", "Dense Rea. Judge"]
    assert [h for h in heads if h.startswith("Dense Rea. Gen.")] == ["Dense Rea. Gen. Judge", "Dense Rea. Gen. CLIP-I"]
    assert [c.label for c in TABLES["yollava"]] == ["Weight", "Acc.", "Acc.", "CLIP-I"]
    assert [c.label for c in TABLES["mcllava"]] == ["Weight", "BLEU", "Acc."]
    assert [c.label for c in TABLES["dreambench"]] == ["CLIP-I", "CLIP-T"]
    for columns in TABLES.values():
        assert all(column.metric in TASKS[column.task].measures for column in columns)


def table() -> Table:
    failure = Failure("b", "c0", "dense", "judge", "out of range", "p0")
    return Table("unify", cells("a") + cells("b & 50 %", 0.2), [failure], ["a note"], {"samples": 3})


def test_the_files_hold_the_same_numbers(tmp_path: Path) -> None:
    made = table()
    paths = made.save(tmp_path)
    assert [path.name for path in paths] == ["results.json", "table.csv", "table.md", "table.tex"]
    wanted = metric_of(made.of("a"), "pure.clip_i")
    assert wanted is not None
    lines = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    (line,) = [x for x in lines if (x["model"], x["part"], x["measure"]) == ("a", "all", "pure.clip_i")]
    assert float(line["mean"]) == pytest.approx(wanted.mean, abs=1e-6) and int(line["n"]) == wanted.n
    assert {x["part"] for x in lines} == {"all", "c0", "c1", "c2", "human", "animal"}
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["rows"]["all"][0]["metrics"]["pure.clip_i"]["mean"] == wanted.mean
    assert set(content["rows"]) == {"all", "by_concept", "by_kind"} and set(content["seeds"]["a"]) >= {"pure.clip_t"}
    text = (tmp_path / "table.md").read_text()
    assert f"{wanted.mean:.3f} [{wanted.low:.3f}, {wanted.high:.3f}] ({wanted.n})" in text
    assert "## By concept" in text and "## By kind" in text and "out of range" in text and "a note" in text
    first = text.splitlines()[0]
    assert all(f"{column.heading} {column.label}" in first for column in TABLE_1)
    widths = {line.count("|") for line in text.splitlines()[:4]}
    assert len(widths) == 1
    tex = (tmp_path / "table.tex").read_text()
    assert r"b \& 50 \%" in tex and tex.count(r"\textbf") == 15 and r"\multicolumn{2}{c}{VQA}" in tex
    body = [line for line in tex.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.count("&") - line.count(r"\&") for line in body} == {15}


def test_a_table_reads_back(tmp_path: Path) -> None:
    made = table()
    made.save(tmp_path / "x")
    read = Table.load(tmp_path / "x")
    assert read.models == made.models and read.failures == made.failures and read.settings == made.settings
    assert [row.metrics for row in rows(read.records)] == [row.metrics for row in rows(made.records)]
    (tmp_path / "bad.json").write_text('{"format": 1, "layout": "unify", "cells": [{"x": 1}]}')
    (tmp_path / "other.json").write_text("[]")
    for name, message in (("bad.json", "not a whole table"), ("other.json", "not a table"), ("none", "no such file")):
        with pytest.raises(UserError, match=message):
            Table.load(tmp_path / name)
    with pytest.raises(UserError, match="no model 'c' in the table; there are a, b"):
        read.of("c")


def test_comparison_is_on_pairs() -> None:
    a, b = cells("a"), cells("b", 0.125)
    changes = compare(a, b)
    assert set(changes) == {f"{task}.{name}" for task in TASKS for name in TASKS[task].measures}
    for change in changes.values():  # the same noise lifted: the difference has no spread at all
        assert change.mean == change.low == change.high == pytest.approx(0.125) or change.high - change.low < 1e-12
    fewer = [cell for cell in b if cell.item != "vqa0"]
    assert compare(a, fewer)["vqa.bleu"].n == changes["vqa.bleu"].n - 3
    with pytest.raises(UserError, match="share no scored item"):
        compare(a, cells("b", concepts=0))


def test_means_by_seed() -> None:
    made = cells("a")
    means = seed_means(made, "pure.clip_t")
    wanted = metric_of([cell for cell in made if cell.seed == 1], "pure.clip_t")
    assert set(means) == {0, 1} and wanted is not None and means[1] == wanted.mean
    assert seed_means(made, "vqa.bleu") == {}


def test_failures_of_one_reason_are_told_together() -> None:
    found = [Failure("a", "bo", "vqa", "judge", "no key", f"q{n}") for n in range(5)]
    found.append(Failure("a", "bo", "pure", "a drawing", "odd", "p"))
    assert told(found) == ["a, vqa: judge of 5 items: no key", "a, bo, pure: a drawing of 'p': odd"]
    many = [Failure("a", "bo", "vqa", "judge", f"why {n}") for n in range(30)]
    assert len(told(many)) == 21 and told(many)[-1].startswith("and 10 more")


def test_pages_need_nothing_else(tmp_path: Path) -> None:
    made = []
    for model in ("a", "<b>"):
        for number in range(2):
            path = tmp_path / "cells" / f"{model.strip('<>')}{number}.json"
            cell = Record(
                model,
                "bo",
                "animal",
                "pure",
                f"i{number}",
                f"<bo> & {number}",
                f"<bo> & {number}",
                count=2,
                scores={"clip_t": [0.25, 0.5]},
                path=path,
            )
            SampleCache.write(cell, torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8))
            made.append(cell)
    shown = Table("unify", made)
    shown.save(tmp_path)
    index = write_gallery(Table.load(tmp_path), tmp_path / "pages")
    assert index is not None and sorted(path.name for path in index.parent.iterdir()) == [
        "000.html",
        "001.html",
        "index.html",
    ]
    page = (index.parent / "000.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "&lt;bo&gt; &amp; 0" in page and "&lt;b&gt;" in page
    assert "0.25" in page and 'href="001.html"' in page
    for file in index.parent.iterdir():
        text = file.read_text()
        assert not re.search(r'(?:src|href)="(?:https?:|//)', text) and "<script" not in text
    assert write_gallery(Table("unify", cells("a", samples=0)), tmp_path / "none") is None
