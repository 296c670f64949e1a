"""OpenAI's own client against a real server on the shipped toy: draw, paint, ask, stream, and what the models are."""

import asyncio
import base64
import io

import httpx
import openai
import pytest
import torch
from PIL import Image

from pyunictokens import RolloutEngine
from pyunictokens.data.images import from_pil, load_pixels, square, to_pil
from pyunictokens.models import ConceptTokens
from pyunictokens.rollout.serving import Written
from pyunictokens.serve.catalog import Catalog
from pyunictokens.serve.drawing import Drawing
from pyunictokens.serve.forms import GenerationForm
from pyunictokens.serve.gate import About
from pyunictokens.serve.keys import Client, KeySettings
from pyunictokens.serve.metrics import Metrics
from pyunictokens.serve.pictures import Pictures
from pyunictokens.serve.workers import Workers
from pyunictokens.toy.model import load_toy

from .world import concept_run, running, weights_run

PROMPT = "a photo of a red cat."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    concept_run(folder / "bo", "bo", 1, ("<bo> likes a red ball.", "<bo> sleeps in a box."))
    concept_run(folder / "bo-of-ben", "bo", 2)
    weights_run(folder / "ann")
    (folder / "not a run").mkdir()
    (folder / "note.txt").write_text("nothing")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with running(folder) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        yield client


def picture(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


def file_of(image: Image.Image, name: str = "image.png") -> tuple[str, bytes, str]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return name, buffer.getvalue(), "image/png"


def data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(file_of(image)[1]).decode()


def engine_of(folder=None):
    bundle = load_toy()
    if folder is not None:
        bundle.model.attach(ConceptTokens.load(folder / "concept"))
    return RolloutEngine.of(bundle), bundle


def near(image: Image.Image, pixels: torch.Tensor) -> None:
    """Equal but for rounding: an 8-bit level or two of a pixel."""
    assert (from_pil(image) - from_pil(to_pil(pixels))).abs().mean() < 0.01


def test_models_are_the_runs_of_the_folder(client, server):
    assert [model.id for model in client.models.list()] == ["ann", "bo", "bo-of-ben", "base"]
    assert client.models.retrieve("bo").owned_by == "pyunictokens"
    with pytest.raises(openai.NotFoundError, match="no model 'cat' is served here: there are ann, bo"):
        client.models.retrieve("cat")
    for name in ("../bo", "..%2Fbo", "bo/concept", "/etc/passwd"):
        assert httpx.get(f"{server.address}/v1/models/{name}").status_code == 404


def test_a_seed_draws_what_the_engine_draws(client):
    answer = client.images.generate(
        model="base", prompt=PROMPT, n=2, extra_body={"seed": 5, "steps": 4, "guidance_scale": 2.0}
    )
    assert (answer.created and answer.size == "128x128") or answer.size
    expected = engine_of()[0].generate_images([PROMPT], samples=2, steps=4, guidance_scale=2.0, seed=5)
    for each, pixels in zip(answer.data, expected.pixels, strict=True):
        near(picture(each.b64_json), pixels)
    assert answer.usage.output_tokens == 2 * expected.codes.shape[1]


def test_a_concept_is_drawn_with_its_own_tokens_even_where_two_have_one_name(client, folder):
    drawn = {}
    for name in ("bo", "bo-of-ben"):
        answer = client.images.generate(model=name, prompt="a photo of <bo>.", extra_body={"seed": 3, "steps": 3})
        engine, bundle = engine_of(folder / name)
        text = bundle.concept.expand("a photo of <bo>.")
        pixels = engine.generate_images([text], steps=3, guidance_scale=3.0, seed=3).pixels[0]
        drawn[name] = picture(answer.data[0].b64_json)
        near(drawn[name], pixels)
    assert (from_pil(drawn["bo"]) - from_pil(drawn["bo-of-ben"])).abs().mean() > 0.02


def test_a_run_with_weights_of_its_own_is_a_model_of_its_own(client):
    options = {"prompt": PROMPT, "extra_body": {"seed": 3, "steps": 3}}
    own, base = (client.images.generate(model=name, **options).data[0].b64_json for name in ("ann", "base"))
    assert own != base
    client.images.generate(model="ann", prompt="a photo of <ann>.", extra_body={"steps": 1})


def test_previews_come_before_the_image(client):
    events = list(
        client.images.generate(
            model="base", prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 5, "steps": 6}
        )
    )
    kinds = [event.type for event in events]
    assert kinds[-1] == "image_generation.completed" and set(kinds[:-1]) <= {"image_generation.partial_image"}
    whole = client.images.generate(model="base", prompt=PROMPT, extra_body={"seed": 5, "steps": 6})
    assert events[-1].b64_json == whole.data[0].b64_json
    assert events[-1].usage.total_tokens == whole.usage.total_tokens and events[-1].size == whole.size
    for place, event in enumerate(events[:-1]):
        assert picture(event.b64_json).size == picture(events[-1].b64_json).size
        assert event.partial_image_index >= place and event.output_format == "png"


def test_other_sizes_and_formats(client):
    side = load_toy().vq.downsampling
    answer = client.images.generate(
        model="base",
        prompt=PROMPT,
        size=f"{4 * side}x{3 * side}",
        output_format="webp",
        output_compression=50,
        extra_body={"steps": 2},
    )
    image = picture(answer.data[0].b64_json)
    assert (image.size, image.format) == ((4 * side, 3 * side), "WEBP")


def test_what_the_mask_has_transparent_is_painted_and_the_rest_stays(client):
    engine, bundle = engine_of()
    first = client.images.generate(model="base", prompt=PROMPT, extra_body={"seed": 1, "steps": 4})
    image = picture(first.data[0].b64_json).convert("RGB")
    side = image.width
    mask = Image.new("RGBA", image.size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, side, side // 2))
    answer = client.images.edit(
        model="base",
        image=file_of(image),
        mask=file_of(mask, "mask.png"),
        prompt="a photo of a blue dog.",
        extra_body={"seed": 2, "steps": 4},
    )
    height, width = bundle.model.grid
    known = bundle.vq.encode(from_pil(image)[None])[0]
    known[: height * width // 2] = -1
    pixels = engine.generate_images(
        ["a photo of a blue dog."], steps=4, guidance_scale=3.0, seed=2, known_codes=known
    ).pixels[0]
    edited = picture(answer.data[0].b64_json)
    near(edited, pixels)
    white = Image.new("L", image.size, 0)
    white.paste(255, (0, 0, side, side // 2))
    again = client.images.edit(
        model="base",
        image=file_of(image),
        mask=file_of(white, "mask.png"),
        prompt="a photo of a blue dog.",
        extra_body={"seed": 2, "steps": 4},
    )
    assert again.data[0].b64_json == answer.data[0].b64_json
    transparent = image.convert("RGBA")
    transparent.putalpha(mask.getchannel("A"))
    events = list(
        client.images.edit(
            model="base",
            image=file_of(transparent),
            prompt="a photo of a blue dog.",
            stream=True,
            partial_images=1,
            extra_body={"seed": 2, "steps": 4},
        )
    )
    assert events[-1].type == "image_edit.completed" and events[-1].b64_json == answer.data[0].b64_json


def question(text: str, image: Image.Image | None = None) -> list[dict[str, object]]:
    if image is None:
        return [{"role": "user", "content": text}]
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": data_url(image)}}]
    return [{"role": "user", "content": parts}]


def test_a_question_about_a_picture_is_answered_as_the_engine_answers(client):
    image = to_pil(load_pixels("docs/images/toyworld_generations.png", 200))
    found = client.chat.completions.create(
        model="base", messages=question("What is in the image?", image), max_tokens=8, seed=3, temperature=0.7, n=2
    )
    engine, bundle = engine_of()
    seen = from_pil(square(image, bundle.size))[None]
    expected = engine.generate_text(
        seen, ["What is in the image?"], samples=2, max_new_tokens=8, temperature=0.7, seed=3
    )
    assert [choice.message.content for choice in found.choices] == expected.texts
    assert found.usage.completion_tokens == int(expected.lengths.sum()) and found.usage.prompt_tokens > 8
    reasons = [
        "length" if length == 8 and row[7] != bundle.model.end_id else "stop"
        for length, row in zip(expected.lengths.tolist(), expected.tokens.tolist(), strict=True)
    ]
    assert [choice.finish_reason for choice in found.choices] == reasons


def test_a_picture_may_follow_its_question(client):
    image = Image.new("RGB", (64, 64), "red")
    picture = question("What is it?", image)[0]["content"][1]
    apart = [{"role": "user", "content": "What is it?"}, {"role": "user", "content": [picture]}]
    options = {"model": "base", "max_tokens": 6, "seed": 1}
    together, later = (
        client.chat.completions.create(messages=messages, **options).choices[0].message.content
        for messages in (question("What is it?", image), apart)
    )
    assert together == later


def test_an_answer_streams_to_the_same_words(client):
    options = {"model": "bo", "messages": question("What is <bo>?"), "max_tokens": 8, "seed": 3, "temperature": 1.0}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    said = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(said) == whole.choices[0].message.content and len([word for word in said if word]) > 1
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_reasoning_asks_first_and_says_what_was_drawn(client):
    answer = client.images.generate(
        model="bo", prompt="a photo of <bo> with its toy.", extra_body={"reason": True, "steps": 2, "seed": 1}
    )
    assert answer.data[0].revised_prompt.startswith("a photo of <bo> with its toy.")
    with pytest.raises(openai.BadRequestError, match="has no facts to reason with"):
        client.images.generate(model="base", prompt=PROMPT, extra_body={"reason": True})


def test_reasoning_takes_of_the_time_until_the_deadline(folder):
    given = []

    class Slow:
        async def stream(self, model, request, *, deadline, **options):
            given.append(deadline)
            await asyncio.sleep(0.2)
            yield Written(0, 0, "It is a red ball.", (1, 2), True, False, 0)

    async def main():
        catalog, metrics = Catalog(folder=folder, device="cpu"), Metrics(Workers([]))
        drawing, about = Drawing(catalog, Slow(), Pictures(), metrics, False), About("1", Client(KeySettings()))
        form = GenerationForm(model="bo", prompt="a photo of <bo>.", reason=True, deadline=30.0)
        async for _ in drawing.events(await drawing.ask(form, about), about):
            pass
        assert "pyunictokens_answer_tokens_total 2.0" in metrics.text()[0].decode()

    asyncio.run(main())
    assert 0 < given[0] <= 30 and given[1] <= given[0] - 0.2


def test_a_run_that_comes_later_is_served(client, folder):
    concept_run(folder / "late", "late", 9)
    client.images.generate(model="late", prompt="a photo of <late>.", extra_body={"steps": 1})
    assert "late" in [model.id for model in client.models.list()]


def test_health_and_metrics(server, client):
    assert httpx.get(f"{server.address}/health").json() == {"status": "ok"}
    client.images.generate(model="base", prompt=PROMPT, n=2, extra_body={"steps": 1})
    text = httpx.get(f"{server.address}/metrics").text
    assert 'pyunictokens_requests_total{route="/v1/images/generations",status="200"}' in text
    drawn = next(line for line in text.splitlines() if line.startswith("pyunictokens_images_total"))
    assert float(drawn.split()[1]) >= 2
    for name in ("rows_running 0.0", "rows_waiting 0.0", "concepts_resident"):
        assert f"pyunictokens_{name}" in text
    assert PROMPT not in text
