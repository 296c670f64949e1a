"""The report of a made-up run: every section is there, words follow numbers, nothing comes from elsewhere."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from pyunictokens.evaluate import write_report
from pyunictokens.evaluate.report import plots
from pyunictokens.evaluate.report.page import _table
from pyunictokens.evaluate.report.run_files import read_run
from pyunictokens.evaluate.report.summary import health, summarize
from pyunictokens.evaluate.tasks import ALL_SAMPLES, MEASURES, TASKS, label
from pyunictokens.runs.demo import headline_rows
from pyunictokens.utils.errors import UserError
from tests.curves import painted

from .synthetic import metrics, result, write_run


class Page(HTMLParser):
    """Ids, sources and text of a page; checks that tags are closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.ids: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"]] if values.get("id") else []
        self.sources += [values[key] or "" for key in ("src", "href", "srcset") if key in values]
        if tag not in {"meta", "img", "source", "link", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), steps=24)


@pytest.fixture
def looked_at() -> Iterator[None]:
    with painted():
        yield


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    with painted():
        path = write_report(run)
    assert path == run / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_every_section_is_there(page: Page) -> None:
    wanted = ["summary", "concept", "images", "measures", "answers", "training", "samples", "settings"]
    assert [name for name in page.ids if not name.startswith("plot-")] == wanted
    assert [name for name in page.ids if name.startswith("plot-")] == [
        "plot-stages",
        "plot-reward",
        "plot-rewards",
        "plot-policy",
        "plot-dsog",
    ]
    assert page.open == []  # every tag is closed


def test_one_label_stands_for_one_number_in_the_report_and_in_the_table_of_a_command(run: Path) -> None:
    keys = [f"{task}.{name}" for task in (*TASKS, ALL_SAMPLES) for name in (*MEASURES, "tier", "ber", "der", "fer")]
    assert len({label(key) for key in keys}) == len(keys)
    files = read_run(run)
    shown: dict[str, list[str]] = {}
    for group in _table(files):
        for line in group["lines"]:
            means = [f"{cell.mean:.3f}" if cell is not None else "" for cell in line["cells"]]
            title = line["label"] if ": " in line["label"] else f"{group['title']}: {line['label']}"
            assert shown.setdefault(title, means) == means, f"{title} has two numbers"
    rows = headline_rows(files.results)
    assert len(rows) > 5 and any("CLIP-I" in row[0] for row in rows)
    for title, *cells, _ in rows:
        assert shown[title] == cells, title


def test_the_page_needs_no_other_file(run: Path, page: Page) -> None:
    assert page.sources and all(source.startswith("data:image/") for source in page.sources)
    html = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(|<script", html)


def test_words_follow_numbers(run: Path, page: Page) -> None:
    before, after = result(0.0), result(0.08)
    change = before.compare(after)["reasoning_generation.reward"]
    first, second = (each.metrics["reasoning_generation.reward"].mean for each in (before, after))
    assert (
        f"It improved: the mean reward of images of held-out prompts rose from {first:.3f} to {second:.3f}" in page.text
    )
    assert f"{change.mean:+.3f}, 95 % interval {change.low:+.3f} to {change.high:+.3f}, 9 pairs" in page.text
    assert "1 of 24 steps were left out because a number was not finite." in page.text
    metric = after.metrics["samples.clip_t"]
    assert f"{metric.mean:.3f}" in page.text and f"{metric.low:.3f} … {metric.high:.3f} · n {metric.n}" in page.text
    assert "recognition: every negative picture was also seen in training" in page.text
    for words in ("a photo of <bo>, reasoning_generation number 2", "its favourite toy is a red ball", "green <b>"):
        assert words in page.text  # also proves that < is escaped
    for words in ("group size 9", "lr 2e-05", "steps 24", "41.5 s (3 images a prompt, 12 timesteps)"):
        assert words in page.text


@pytest.mark.parametrize(
    ("lift", "outcome", "opening"),
    [
        (0.08, "better", "It improved: the"),
        (-0.08, "worse", "It got worse: the"),
        (0.0, "unclear", "No clear change: the"),
    ],
)
def test_summaries(tmp_path: Path, lift: float, outcome: str, opening: str) -> None:
    result(0.0).save(tmp_path / "before.json")
    result(lift).save(tmp_path / "after.json")
    found, sentences = summarize(read_run(tmp_path))
    assert found == outcome and sentences[0].startswith(opening)


def test_nothing_is_claimed_that_was_not_measured(tmp_path: Path) -> None:
    result(0.0).save(tmp_path / "before.json")
    outcome, sentences = summarize(read_run(tmp_path))
    assert outcome == "unmeasured" and sentences == ["Nothing can be said about improvement: after.json missing."]
    result(0.1, samples=2).save(tmp_path / "after.json")  # other numbers of images: no pairs of images
    outcome, sentences = summarize(read_run(tmp_path))
    assert not any("reward" in sentence for sentence in sentences)


def test_a_spread_that_teaches_nothing_is_told(run: Path) -> None:
    files = read_run(run)
    assert not any("hardly differed" in sentence for sentence in health(files))
    for row in files.rows:
        row["within_group_std"] = 0.002
        row["no_face"] = 1
    assert "Rewards hardly differed inside a group (spread 0.0020)" in health(files)[0]
    assert not any("face" in sentence for sentence in health(files))  # an animal
    files.about["kind"] = "human"
    assert "No face was found in 24 training images; their FER is 0." in health(files)


def test_plots_lie_beside_the_page(run: Path, page: Page) -> None:
    for name in ("stages", "reward", "rewards", "policy", "dsog"):
        with Image.open(run / "plots" / f"{name}.png") as image:
            assert image.mode == "RGB" and image.width >= 1200
            assert len(image.convert("L").getcolors() or range(300)) > 8  # something is drawn
            assert image.getpixel((2, 2)) == (255, 255, 255)


@pytest.mark.usefixtures("looked_at")
def test_plots_differ_where_numbers_differ() -> None:
    rows = metrics(12)
    drawn = {key: getattr(plots, key)(rows, plots.LIGHT) for key in ("reward", "rewards", "policy", "dsog")}
    assert drawn["dsog"] == plots.dsog(rows, plots.LIGHT)
    assert drawn["dsog"] != plots.dsog(rows, plots.LIGHT, target=0.25)
    for key, change in {
        "reward": {"reward_mean": 0.9},
        "rewards": {"parts": {"tier": 0.1, "ber": 0.2, "der": 0.3, "fer": 0.4}},
        "policy": {"kl": 0.5},
        "dsog": {"threshold": 0.9},
    }.items():
        changed = [*rows[:6], {**rows[6], **change}, *rows[7:]]
        assert getattr(plots, key)(changed, plots.LIGHT) != drawn[key]


@pytest.mark.usefixtures("looked_at")
def test_plots_of_a_run_of_one_step_and_of_missing_numbers() -> None:
    for draw in (plots.reward, plots.rewards, plots.policy, plots.dsog):
        for rows in (metrics(1), [{"step": 0}], [{"step": 0, "kl": None, "parts": None}]):
            assert draw(rows, plots.DARK).startswith(b"\x89PNG")
    for rows in ([{"step": 0, "stage": "joint", "loss_understanding": 1.0}], [{"step": 0}]):
        assert plots.stages(rows, plots.DARK).startswith(b"\x89PNG")


def test_numbers_and_averages() -> None:
    rows = [{"a": {"b": 1}}, {"a": {"b": None}}, {}, {"a": {"b": 4.0}}, {"a": {"b": True}}]
    found = plots.numbers(rows, "a", "b")
    assert [value if value == value else None for value in found] == [1, None, None, 4, None]
    nan = float("nan")
    assert plots.smooth([2, nan, 2], 3) == [2, 2, 2]
    # span 3 keeps one half: (0.5·1 + 3) / 1.5
    assert plots.smooth([nan, 1, 3], 3)[1:] == pytest.approx([1, 3.5 / 1.5])


def test_a_run_that_is_not_finished(tmp_path: Path, run: Path) -> None:
    shutil.copy(run / "metrics.jsonl", tmp_path)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.ids[0] == "summary" and "before.json and after.json missing" in page.text
    assert "training" in page.ids and "measures" not in page.ids and "samples" not in page.ids
    assert "steps 24" in page.text  # the line that a kill cut off is left out


def test_base_is_a_column_of_its_own(tmp_path: Path) -> None:
    for name, lift in (("base", -0.2), ("before", 0.0), ("after", 0.1)):
        result(lift).save(tmp_path / f"{name}.json")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "Base model Before After Change" in page.text
    assert "training" not in page.ids and "Images: base model, before, after" in page.text


def test_a_folder_without_anything(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl, before\.json or after\.json"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "nowhere")


def test_broken_files_are_named(tmp_path: Path) -> None:
    result(0.0).save(tmp_path / "before.json")
    (tmp_path / "config.yaml").write_text("a: [1", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.yaml: not valid YAML"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("just words", encoding="utf-8")
    write_report(tmp_path)
    (tmp_path / "after.json").write_text(json.dumps({"format": 1}), encoding="utf-8")
    with pytest.raises(UserError, match=r"after\.json: not a whole evaluation result"):
        write_report(tmp_path)


@pytest.mark.parametrize("content", ["[1]", '{"prompts": 5}'])
def test_a_damaged_text_of_samples_is_named(tmp_path: Path, content: str) -> None:
    run = write_run(tmp_path, steps=2)
    file = sorted((run / "samples").glob("*.json"))[0]
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"{file.name}: .*must be"):
        write_report(run)


def test_names_cannot_smuggle_markup(tmp_path: Path) -> None:
    made = result(0.0)
    made.concept = "<script>alert(1)</script>"
    made.records["vqa"][0]["answer"] = '"><img src=x onerror=alert(1)>'
    made.save(tmp_path / "before.json")
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<script" not in html and "<img src=x" not in html
    assert "<script>alert(1)</script>" in Page(html).text


def test_the_page_says_how_many_previews_passed_and_whether_the_policy_moved(run: Path) -> None:
    files = read_run(run)
    files.config = {"grpo": {"dsog": {"target_pass_rate": 0.25}}}
    for place, row in enumerate(files.rows):
        row["pass_rate"], row["kl"] = (0.0 if place < 12 else 0.5), 1e-3
    said = " ".join(health(files))
    assert "DSOG: 25% of the previews passed, 25% were wanted; none passed in the first 12 steps" in said
    assert "hardly moved" not in said
    for row in files.rows:
        row["pass_rate"], row["kl"] = 0.3, 2e-9
    said = " ".join(health(files))
    assert "DSOG: 30% of the previews passed, 25% were wanted." in said and "below 2e-09" in said
