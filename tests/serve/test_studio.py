"""What the studio's pages ask for, and the pages themselves in a real Chromium (`make browser`)."""

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from pyunictokens import RolloutEngine
from pyunictokens.data.folder import load_concept
from pyunictokens.data.images import to_pil
from pyunictokens.rollout.serving import ServingEngine
from pyunictokens.serve.catalog import Catalog
from pyunictokens.serve.errors import Refused
from pyunictokens.serve.studio import backend
from pyunictokens.serve.studio.backend import Studio, Wish, painted_mask
from pyunictokens.toy.concept import write_toy_concept
from pyunictokens.toy.model import load_toy
from pyunictokens.utils.errors import UserError

from .world import concept_run

PROMPT = "a photo of a red cat."


def in_studio(folder, main):
    serving = ServingEngine()
    catalog = Catalog(folder=folder, device="cpu", in_use=serving.concepts_in_use)
    studio = Studio(catalog, serving, folder / "choices")
    studio.workers.start()

    async def run():
        try:
            return await main(studio)
        finally:
            await studio.workers.close(5)

    return asyncio.run(asyncio.wait_for(run(), 100))


async def last(sheets):
    seen = [(sheet.done, sorted(sheet.pictures)) async for sheet in sheets]
    return seen


def test_a_wish_is_drawn_as_the_engine_draws_it_and_can_be_painted_over(tmp_path):
    concept_run(tmp_path / "bo", "bo", 1)

    async def main(studio):
        wish = Wish("base", PROMPT, 2, seed=4, steps=4, guidance_scale=2.0)
        seen, drawn = [], None
        async for sheet in studio.draw(wish):
            seen.append(sheet.done)
            drawn = sheet
        expected = RolloutEngine.of(load_toy()).generate_images(
            [PROMPT], samples=2, steps=4, guidance_scale=2.0, seed=4
        )
        for place in range(2):
            difference = torch.tensor(list(drawn.pictures[place].tobytes())).float()
            difference -= torch.tensor(list(to_pil(expected.pixels[place]).tobytes())).float()
            assert difference.abs().mean() < 1.0
        assert seen[0] == 0 and seen[-1] == 2 and len(seen) > 3  # previews in between
        mask = Image.new("L", drawn.pictures[0].size, 0)
        mask.paste(255, (0, 0, 40, 40))
        async for sheet in studio.paint(Wish("bo", "a photo of <bo>.", seed=1, steps=2), drawn.pictures[0], mask):
            painted = sheet
        assert painted.done == 1
        said = [text async for text in studio.answer("base", drawn.pictures[0], "What is in the image?", 0)]
        assert said[-1] and len(said) > 1
        with pytest.raises((UserError, Refused), match="white all over"):
            async for _ in studio.paint(wish, drawn.pictures[0], Image.new("L", drawn.pictures[0].size, 255)):
                pass
        return drawn.pictures

    in_studio(tmp_path, main)


def test_a_picture_that_is_shown_again_is_not_written_again(tmp_path):
    async def main(studio):
        red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
        file = Path(studio.file(red))
        written = file.stat().st_mtime_ns
        assert studio.file(red.copy()) == str(file) != studio.file(blue)
        assert file.stat().st_mtime_ns == written and Image.open(file).getpixel((0, 0)) == (255, 0, 0)

    in_studio(tmp_path, main)


def test_files_of_pictures_do_not_fill_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "_KEPT", 3)

    async def main(studio):
        red, *others = (Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(6))
        for picture in others:
            studio.file(picture)
            shown = studio.file(red)
        there = list(Path(shown).parent.iterdir())
        assert len(there) == 3 and Path(shown) in there and Path(studio.file(others[-1])) in there

    in_studio(tmp_path, main)


def test_a_choice_is_a_line_with_two_pictures(tmp_path):
    async def main(studio):
        pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
        for better in (1, 0):
            file = studio.choose(PROMPT, "base", pictures, [3, 4], better)
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line["chosen_seed"] for line in lines] == [4, 3]
        assert Image.open(file.parent / lines[0]["chosen"]).getpixel((0, 0)) == (0, 0, 255)
        assert Image.open(file.parent / lines[0]["rejected"]).getpixel((0, 0)) == (255, 0, 0)
        with pytest.raises(UserError, match="draw them first"):
            studio.choose(PROMPT, "base", pictures[:1], [3], 0)

    in_studio(tmp_path, main)


def test_what_was_painted_is_white():
    layer = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    layer.putpixel((1, 2), (255, 0, 0, 90))
    other = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    other.putpixel((3, 3), (0, 0, 0, 255))
    mask = painted_mask([layer, other], (4, 4))
    white = [(x, y) for x in range(4) for y in range(4) if mask.getpixel((x, y))]
    assert white == [(1, 2), (3, 3)]


# --- in a browser --------------------------------------------------------------------------------------------------

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studio")
    concept_run(folder / "runs" / "bo", "bo", 1, ("<bo> likes a red ball.",))
    concept_run(folder / "runs" / "again", "bo", 2)
    write_toy_concept(folder / "toy", seed=3, kind="animal", name="mim")
    words = [sys.executable, "-m", "pyunictokens", "studio", "--runs", str(folder / "runs"), "--port", "0"]
    words += ["--choices", str(folder / "choices"), "--data", str(folder / "data")]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder) as process:
        try:
            found = re.match(r"(http://127\.0\.0\.1:\d+)/? shows 3 models", process.stdout.readline())
            yield found[1], folder
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


@pytest.fixture
def page(address):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        elsewhere, wrong = [], []
        page.on("request", lambda request: elsewhere.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.set_default_timeout(120_000)
        page.goto(address[0])
        page.locator("#prompt textarea").wait_for()
        yield page
        assert not [url for url in elsewhere if not url.startswith((address[0], "data:", "blob:"))]
        assert not wrong
        browser.close()


def processor_seconds():
    """Of all processes that this one has started and that run: server, browser, and what drives the browser."""
    parents, used = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            words = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            parents[pid], used[pid] = int(words[1]), int(words[11]) + int(words[12])

    def ours(pid):
        return parents.get(pid) == os.getpid() or (pid in parents and ours(parents[pid]))

    return sum(ticks for pid, ticks in used.items() if ours(pid)) / os.sysconf("SC_CLK_TCK")


@pytest.mark.browser
def test_the_first_page_takes_seconds(page, address):
    """By the clock where the machine has nothing else to do, by processor time where it has. Machines on which this ran
    differed by a factor of three (1.5 to 5.3 s of processor time), so the bounds are that much above the goal: they
    hold against a page that has grown, and docs/serving.md says what was measured."""
    idle, took = os.getloadavg()[0] < (os.cpu_count() or 1) / 2, []
    for _ in range(3):
        with contextlib.closing(page.context.browser.new_context()) as fresh:  # nothing is cached
            new = fresh.new_page()
            before, begun = processor_seconds(), time.monotonic()
            new.goto(address[0])
            new.locator("#prompt textarea").wait_for()
            took.append((processor_seconds() - before, time.monotonic() - begun))
    used, seconds = (min(side) for side in zip(*took, strict=True))
    print(f"\nfirst page: {used:.2f} s of processor time, {seconds:.2f} s at load {os.getloadavg()[0]:.1f}")
    assert used <= 8.0 and (not idle or seconds <= 4.0)


def filled(page, place):
    page.wait_for_function(f"document.querySelector('{place} textarea').value.length > 0")
    return page.locator(f"{place} textarea").input_value()


@pytest.mark.browser
def test_draw_ask_and_what_cannot_be_done(page):
    box(page, "#prompt").fill(PROMPT)
    page.locator("#draw").click()
    page.wait_for_function("document.querySelector('#status textarea').value.startsWith('2 of 2')")
    assert page.locator("#pictures img").count() >= 2
    box(page, "#prompt").fill("a photo of <cat>.")
    page.locator("#draw").click()
    page.get_by_text("<cat> is not a token of this model").wait_for()
    page.get_by_role("tab", name="Ask").click()
    picture = Path(__file__).parents[2] / "docs" / "images" / "toyworld_generations.png"
    page.locator("#shown input[type=file]").set_input_files(str(picture))
    page.locator("#shown img").wait_for()
    page.locator("#question textarea").fill("What is in the image?")
    page.locator("#ask").click()
    assert filled(page, "#answer")


def shown(page, place):
    """The pictures that `place` shows, as arrays [H, W, 3], once all have come."""
    page.wait_for_function(
        "place => { const all = [...document.querySelectorAll(`${place} img`)]; "
        "return all.length && all.every(e => e.complete && e.naturalWidth) }",
        arg=place,
    )
    sources = page.eval_on_selector_all(f"{place} img", "all => all.map(e => e.src)")
    bodies = [page.request.get(source).body() for source in sources]
    return [numpy.asarray(Image.open(io.BytesIO(body)).convert("RGB"), dtype=float) for body in bodies]


@pytest.mark.browser
def test_paint_over_changes_what_was_painted_and_keeps_the_rest(page, address):
    picture = address[1] / "before.png"
    Image.open(next((address[1] / "toy").rglob("train/mim/*.png"))).resize((64, 64)).save(picture)
    page.get_by_role("tab", name="Paint over").click()
    canvas = page.locator("#canvas canvas").first
    canvas.wait_for()
    page.locator("#canvas").get_by_text(re.compile(r"\d+%")).wait_for()
    page.wait_for_timeout(1500)  # the editor takes nothing before it is drawn
    page.locator("#canvas input[type=file]").first.set_input_files(str(picture))
    page.wait_for_function(
        "/[2-9]\\d\\d%/.test(document.querySelector('#canvas').innerText)"
    )  # a small one is magnified
    page.get_by_role("button", name="Brush").first.click()
    area = canvas.bounding_box()
    middle, height = area["x"] + area["width"] / 2, area["y"] + area["height"] / 2
    page.mouse.move(middle, height)
    page.mouse.down()
    page.mouse.move(middle + 10, height + 10, steps=4)
    page.mouse.up()
    box(page, "#paint-words").fill("a photo of a red cat.")
    page.locator("#paint").click()
    page.locator("#before-after img").nth(1).wait_for()
    before, after = shown(page, "#before-after")[:2]
    changed = abs(before - after).mean(-1)
    assert changed[24:40, 24:40].mean() > 2 * changed[:8].mean()


@pytest.mark.browser
def test_compare_draws_one_prompt_with_two_runs(page):
    page.get_by_role("tab", name="Compare").click()
    for label, name in (("First model", "bo"), ("Second model", "again")):
        page.get_by_label(label, exact=True).click()
        page.get_by_role("option", name=name, exact=True).click()
        page.wait_for_function("!document.querySelector('[role=option]')")  # the list fades out
    differ = []
    for prompt in (PROMPT, "a photo of <bo>."):
        box(page, "#compare-prompt").fill(prompt)
        page.locator("#compare").click()
        reads(page, "#compare-status", prompt)
        first, second = shown(page, "#compared")[:2]
        differ.append(abs(first - second).mean())
    assert differ[0] == 0 < differ[1], "one seed is one picture; two runs know <bo> differently"


@pytest.mark.browser
def test_stop_gives_the_slots_back(page):
    page.get_by_role("button", name="How it is drawn").click()
    box(page, "#steps").fill("1000")
    page.get_by_label("number input for Images").fill("8")
    box(page, "#prompt").fill(PROMPT)
    page.locator("#draw").click()
    reads(page, "#status", "0 of 8 drawn")
    page.locator("#stop").click()
    box(page, "#steps").fill("2")
    page.locator("#draw").click()  # behind eight images of a thousand steps this would take minutes
    page.set_default_timeout(60_000)
    reads(page, "#status", "8 of 8 drawn")


@pytest.mark.browser
def test_rate_saves_which_is_better(page, address):
    page.get_by_role("tab", name="Rate").click()
    page.locator("#rate-prompt textarea").fill(PROMPT)
    page.locator("#draw-two").click()
    file = address[1] / "choices" / "preferences.jsonl"
    page.wait_for_function("document.querySelectorAll('[role=tabpanel] img').length >= 2")
    for _ in range(60):
        page.locator("#better-left").click()
        page.wait_for_timeout(500)
        if file.is_file():
            break
    line = json.loads(file.read_text().splitlines()[0])
    assert line["prompt"] == PROMPT and line["chosen"].endswith("-0.png")
    assert "choices" in filled(page, "#saved")


SHORT = "stages.max_steps=2 grpo.group_size=2 grpo.timesteps=3 grpo.max_new_tokens=3 grpo.checkpoint_every=1"


def box(page, place):
    """The field of a text box, number or dropdown."""
    return page.locator(f"{place} textarea, {place} input").first


def reads(page, place, text):
    """Wait until a text box says `text` somewhere."""
    page.wait_for_function(
        "([place, text]) => document.querySelector(`${place} textarea, ${place} input`).value.includes(text)",
        arg=[place, text],
    )


@pytest.mark.browser
def test_from_photos_to_a_trained_concept_that_is_drawn(page, address):
    page.set_default_timeout(400_000)  # training on a busy machine
    page.get_by_role("tab", name="Train").click()
    page.locator("#train-start").click()
    page.get_by_text("Choose a concept first").wait_for()
    assert page.locator("#train-stop").is_disabled(), "nothing is being trained"
    page.get_by_role("tab", name="Concept").click()
    toys = sorted((address[1] / "toy" / "concept" / "train" / "mim").glob("*.png"))[:6]
    small = address[1] / "IMG_20240817_153012_a_rather_long_name_of_a_photo.png"
    Image.open(toys.pop()).resize((24, 24)).save(small)
    toys.append(small)
    torn = address[1] / "torn.png"
    torn.write_bytes(toys[0].read_bytes()[:99])
    page.locator("#photos input[type=file]").set_input_files([*map(str, toys), str(torn)])
    page.get_by_text("4.png: good").first.wait_for()
    page.get_by_text("64 or more is better").first.wait_for()
    cut_off = "all => all.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText)"
    assert page.eval_on_selector_all("#photos-shown .caption-label", cut_off) == [], "what the checks say can be read"
    reads(page, "#concept-said", "torn.png")
    page.get_by_role("button", name="Cut a photo").click()
    page.get_by_label("Photo", exact=True).click()
    page.get_by_role("option", name="1: 0.png").click()
    page.locator("#cut-shown img").wait_for()
    page.get_by_label("Cut off left (%)").first.fill("25")
    page.locator("#cut-do").click()
    page.wait_for_function("document.querySelector('#cut-photo input').value === ''")
    box(page, "#concept-name").fill("../mim")
    box(page, "#concept-class").fill("cat")
    box(page, "#concept-info").fill("<mim> is a cat.")
    box(page, "#fact").fill("<mim> likes a red ball.")
    box(page, "#hint").fill("a photo of <mim> with its toy.")
    page.locator("#fact-add").click()
    page.get_by_text("<mim> likes a red ball. (a photo").wait_for()
    page.locator("#concept-check").click()
    page.get_by_text("concept name '../mim'").wait_for()
    box(page, "#concept-name").fill("mim")
    page.locator("#concept-check").click()
    reads(page, "#concept-said", "It can be saved")
    assert not (address[1] / "data").exists()
    page.locator("#concept-write").click()
    reads(page, "#concept-said", "Saved in")
    saved = load_concept(address[1] / "data", "mim")
    assert len(saved.train_images) == 4 and saved.extra_info == ["<mim> likes a red ball."]
    whole, cut = (Image.open(file).size for file in (toys[1], saved.train_images[0]))
    assert cut == (round(0.75 * whole[0]), whole[1]), "the first photo was cut"

    page.get_by_role("tab", name="Train").click()
    reads(page, "#train-concept", "mim")
    box(page, "#train-steps").fill("6")
    box(page, "#train-words").fill(SHORT)
    page.get_by_label("Measure before and after").uncheck()
    page.locator("#train-start").click()
    reads(page, "#train-state", "mim: is being trained")
    page.reload()  # the run does not mind
    page.get_by_role("tab", name="Train").click()
    reads(page, "#train-run", "mim")
    reads(page, "#train-state", "reinforcement: step")
    page.locator("#train-stop").click()
    page.wait_for_function("/stopped|is done/.test(document.querySelector('#train-state textarea').value)")
    if "stopped" in page.locator("#train-state textarea").input_value():
        page.locator("#train-resume").click()
    reads(page, "#train-state", "mim: is done")
    page.locator("#train-samples img").first.wait_for()
    for plot in ("#train-loss", "#train-reward"):  # legend and all
        block, drawn = page.locator(plot).bounding_box(), page.locator(f"{plot} svg.marks").bounding_box()
        assert drawn["y"] + drawn["height"] <= block["y"] + block["height"]

    page.get_by_role("tab", name="Try").click()
    page.get_by_label("Model", exact=True).first.click()
    page.get_by_role("option", name="mim").click()
    box(page, "#prompt").fill("a photo of <mim>.")
    page.locator("#draw").click()
    reads(page, "#status", "2 of 2 drawn")


@pytest.mark.browser
def test_it_fits_a_phone_and_speaks_to_a_screen_reader(page):
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input:not([type=file]), textarea, select')]
            .filter(e => e.offsetParent !== null)
            .filter(e => !(e.innerText || '').trim() && !e.getAttribute('aria-label') && !e.title
                && !(e.labels && e.labels.length) && !e.closest('label'))
            .map(e => e.outerHTML.slice(0, 120))"""
    )
    assert not unnamed
    box(page, "#prompt").focus()
    page.keyboard.type(PROMPT)
    for _ in range(9):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id || document.activeElement.closest('[id]').id") == "draw":
            break
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#status textarea').value.startsWith('2 of 2')")
