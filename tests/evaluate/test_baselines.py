"""Baselines over an engine, an endpoint and real images: a tiny random Show-o, a real local server, pictures."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pyunictokens.data.images import black_image, from_pil, load_pixels, read_image, square
from pyunictokens.evaluate.baselines import Spec, baseline, parse
from pyunictokens.evaluate.baselines.ours import EngineModel, Sampling
from pyunictokens.evaluate.baselines.prompts import described, told
from pyunictokens.evaluate.baselines.real import RealImages
from pyunictokens.evaluate.baselines.showo import ShowoImage, ShowoText
from pyunictokens.evaluate.core import Unsupported
from pyunictokens.evaluate.tasks import Subject
from pyunictokens.utils.errors import UserError
from tests.judge_server import JudgeServer, images_of, question_of
from tests.tiny import tiny_toy

SAMPLING = Sampling(steps=2, guidance_scale=1.0, max_new_tokens=4)


def picture(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        picture(number).save(path)
    return Subject("bo", "dog", "animal", "<bo> is a pink dog", ["its toy is a ball"], paths)


@pytest.fixture(scope="module")
def engine() -> Any:
    from pyunictokens.rollout.engine import RolloutEngine

    toy = tiny_toy()
    return RolloutEngine(toy.model, toy.vq, toy.tokenizer)


class Tokens:
    def expand(self, text: str) -> str:
        return text.replace("<bo>", "dog dog")


class Heard:
    """An engine that hands everything on and remembers it."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.model, self.vq = engine, engine.model, engine.vq
        self.look, self.features_side = engine.look, engine.features_side
        self.texts: list[Any] = []
        self.images: list[Any] = []

    def generate_text(self, images: Any, questions: Any, **more: Any) -> Any:
        self.texts.append((images, questions, more))
        return self.engine.generate_text(images, questions, **more)

    def generate_images(self, prompts: Any, **more: Any) -> Any:
        self.images.append((prompts, more))
        return self.engine.generate_images(prompts, **more)


# --- engines -------------------------------------------------------------------------------------------------------


def test_ours_is_the_engine_with_the_concepts_tokens(engine: Any, subject: Subject) -> None:
    model = EngineModel(engine, Tokens(), subject, SAMPLING)
    wanted = engine.generate_images(["a dog dog in the snow"], samples=3, steps=2, guidance_scale=1.0, seed=5).pixels
    assert torch.equal(model.generate("a <bo> in the snow", 3, 5), wanted.clamp(-1, 1))
    pixels = from_pil(square(picture(1), 32))[None]
    answer = engine.generate_text(pixels, ["what is dog dog?"], max_new_tokens=4, temperature=0.0).texts[0]
    assert model.answer([picture(1)], "what is <bo>?") == answer
    black = engine.generate_text(black_image(32)[None], ["what?"], max_new_tokens=4, temperature=0.0).texts[0]
    assert model.answer([], "what?") == black
    with pytest.raises(UserError, match="2 images: this model looks at one"):
        model.answer([picture(1), picture(2)], "what?")


def test_the_bare_model_reads_the_class_word(engine: Any, subject: Subject) -> None:
    heard = Heard(engine)
    EngineModel(heard, None, subject, SAMPLING).generate("a <bo>", 1, 0)  # type: ignore[arg-type]
    assert heard.images[0][0] == ["a dog"]


def test_a_text_prompt_describes_the_concept(engine: Any, subject: Subject) -> None:
    heard = Heard(engine)
    model = ShowoText(heard, subject, SAMPLING)  # type: ignore[arg-type]
    model.answer([], "what is <bo>?")
    model.generate("a photo of <bo> in the snow", 1, 0)
    assert heard.texts[0][1] == ["dog is a pink dog. its toy is a ball. what is dog?"]
    assert heard.images[0][0] == ["a photo of a pink dog in the snow"]


def test_an_image_prompt_shares_the_grid_with_the_photo(engine: Any, subject: Subject) -> None:
    heard = Heard(engine)
    model = ShowoImage(heard, subject, SAMPLING)  # type: ignore[arg-type]
    drawn = model.generate("a photo of <bo> in the snow", 2, 4)
    prompts, more = heard.images[0]
    assert prompts == ["a photo of the same dog in the snow"]
    known = more["known_codes"].view(4, 4)
    assert (known[:, 2:] == -1).all() and (known[:, :2] >= 0).all()
    whole = engine.generate_images(
        prompts, samples=2, seed=4, steps=2, guidance_scale=1.0, known_codes=more["known_codes"]
    )
    assert torch.equal(whole.codes.view(2, 4, 4)[:, :, :2], known[:, :2].expand(2, 4, 2))
    assert drawn.shape == (2, 3, 32, 32)  # the right half, stretched back
    right = torch.nn.functional.interpolate(whole.pixels.clamp(-1, 1)[..., 16:], (32, 32), mode="bicubic")
    assert torch.allclose(drawn, right.clamp(-1, 1), atol=1e-6)
    other = Subject("mam", "dog", references=subject.references[1:])
    assert not torch.equal(ShowoImage(engine, other, SAMPLING).generate("a photo of <mam> in the snow", 2, 4), drawn)
    model.answer([picture(7)], "what colour is <bo>?")
    codes, questions, _ = heard.texts[0]
    assert questions == ["The left half shows this dog. About the right half: what colour is this dog?"]
    half = (32, 16)
    both = [
        F.interpolate(from_pil(square(one, 32))[None], half, mode="bicubic", antialias=True, align_corners=False)
        for one in (read_image(subject.references[0]), picture(7))
    ]
    assert torch.equal(codes, engine.vq.encode(torch.cat(both, dim=-1).clamp(-1, 1)))
    with pytest.raises(UserError, match="no references, so there is no image prompt"):
        ShowoImage(engine, Subject("bo", "dog"), SAMPLING)


@pytest.mark.parametrize(
    ("info", "prompt", "wanted"),
    [
        ("<bo> is a pink dog.", "A photo of <bo>.", "A photo of a pink dog."),
        ("<bo> is the brown dog of a friend", "<token_0><bo> runs", "the brown dog of a friend runs"),
        ("A pink dog.", "A photo of <bo>.", "A photo of dog. A pink dog."),
        ("<bo> likes snow.", "A photo of <bo>", "A photo of dog. dog likes snow."),
        ("", "A photo of <bo>.", "A photo of dog."),
    ],
)
def test_descriptions_in_prompts(info: str, prompt: str, wanted: str) -> None:
    assert described(Subject("bo", "dog", info=info), prompt) == wanted


def test_facts_are_not_told_twice() -> None:
    subject = Subject("bo", "dog", info="<bo> is a dog", facts=["it sleeps.", "it eats"])
    assert told(subject, "what?") == "<bo> is a dog. it sleeps. it eats. what?"
    question = "Information: it sleeps. it eats. Which fits?"
    assert told(subject, question) == f"<bo> is a dog. {question}"


# --- real images ---------------------------------------------------------------------------------------------------


def test_real_images_are_the_test_images_in_turn(subject: Subject) -> None:
    model = RealImages(subject, size=16)
    drawn = model.generate("whatever", 3, 1)
    assert torch.equal(drawn, torch.stack([load_pixels(subject.references[i], 16) for i in (1, 2, 0)]))
    held = Subject("bo", "dog", references=subject.references[:1], test_images=subject.references[2:])
    assert torch.equal(RealImages(held, 16).generate("x", 2, 0)[0], load_pixels(subject.references[2], 16))
    with pytest.raises(Unsupported):
        model.answer([], "what?")
    with pytest.raises(UserError, match="no references"):
        RealImages(Subject("bo", "dog"))


# --- endpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with JudgeServer("A pink dog.") as made:
        yield made


def test_an_endpoint_is_told_in_words(server: JudgeServer, subject: Subject) -> None:
    row = baseline(parse(f"endpoint:{server.url},model=gpt-x"))
    assert row.name == "gpt-x + TP"
    model = row.load(subject)
    assert model.answer([picture(3)], "what is <bo>?") == "A pink dog."
    request = server.requests[0]
    assert question_of(request).startswith("<bo> is a pink dog. its toy is a ball. what is <bo>?")
    (url,) = images_of(request)
    sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert np.array_equal(np.asarray(sent), np.asarray(picture(3)))
    with pytest.raises(Unsupported, match="no image model"):
        model.generate("a <bo>", 1, 0)


def test_an_endpoint_is_shown_photos(server: JudgeServer, subject: Subject) -> None:
    model = baseline(parse(f"endpoint:{server.url},model=gpt-x,references=2+ip")).load(subject)
    model.answer([picture(3)], "what is <bo>?")
    assert len(images_of(server.requests[0])) == 3
    wanted = "The first 2 pictures show <bo>. The question is about the last. what is <bo>?"
    assert question_of(server.requests[0]).startswith(wanted)


def test_an_endpoint_that_fails_fails_one_question(server: JudgeServer, subject: Subject) -> None:
    model = baseline(parse(f"endpoint:{server.url},model=gpt-x")).load(subject)
    server.script("401")
    with pytest.raises(UserError, match="401") as error:
        model.answer([], "what?")
    assert "sk-test" not in str(error.value)
    assert model.answer([], "what?") == "A pink dog."


class Painter:
    """A server of images/generations."""

    def __init__(self, pictures: list[str], status: int = 200) -> None:
        self.asked: list[dict[str, Any]] = []
        painter = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                painter.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                body = {"created": 0, "data": [{"b64_json": data} for data in pictures]}
                data = json.dumps(body if status == 200 else {"error": {"message": "sk-test is wrong"}}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def model(self, subject: Subject) -> Any:
        url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        return baseline(parse(f"endpoint:{url},model=m,draw=painter")).load(subject)


def encoded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_an_endpoint_draws(monkeypatch: pytest.MonkeyPatch, subject: Subject) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    painter = Painter([encoded(picture(1)), encoded(picture(2, (64, 64)))])
    drawn = painter.model(subject).generate("a photo of <bo> on the beach", 2, 0)
    assert drawn.shape == (2, 3, 32, 32) and torch.equal(drawn[0], from_pil(square(picture(1), 32)))
    asked = painter.asked[0]
    assert (asked["prompt"], asked["n"], asked["model"]) == ("a photo of a pink dog on the beach", 2, "painter")
    for pictures, status, message in (
        (["AAAA", "AAAA"], 200, "cannot be read"),
        ([encoded(picture(1))], 200, "gave 1 images, 2 were asked for"),
        ([], 403, "no image.*HTTP 403"),
    ):
        with pytest.raises(UserError, match=message) as error:
            Painter(pictures, status).model(subject).generate("a <bo>", 2, 0)
        assert "sk-test" not in str(error.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        painter.model(subject).generate("a <bo>", 2, 0)


# --- words of the command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spec", "name"),
    [
        ("ours", Spec("ours"), "ours"),
        ("ours:runs/{name}", Spec("ours", "runs/{name}"), "ours (runs/{name})"),
        ("showo-ip", Spec("showo-ip"), "Show-o + IP"),
        ("real", Spec("real"), "Real images"),
        ("transformers:Qwen/Q-3B", Spec("transformers", "Qwen/Q-3B"), "Q-3B + TP"),
        ("transformers:Qwen/Q-3B+ip", Spec("transformers", "Qwen/Q-3B", image=True), "Q-3B + IP"),
        ("diffusers:a/sd,lora=b/bo", Spec("diffusers", "a/sd", {"lora": "b/bo"}), "sd (lora bo)"),
        ("endpoint:http://h:1/v1,model=g", Spec("endpoint", "http://h:1/v1", {"model": "g"}), "g + TP"),
    ],
)
def test_specs(text: str, spec: Spec, name: str) -> None:
    assert parse(text) == spec and parse(text).name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpt4", "must begin with one of ours"),
        ("real:x", "takes nothing after it"),
        ("transformers:", "needs a folder or hub id"),
        ("diffusers:x,lora", "'lora' must be KEY=VALUE"),
        ("endpoint:http://h/v1", "needs model=NAME"),
        ("endpoint:http://h/v1,model=m,price=1", "knows draw, key, model, quality, references, size, timeout"),
        ("endpoint:http://h/v1,model=m,references=0+ip", "references=0"),
    ],
)
def test_bad_specs(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        baseline(parse(text))


def test_identities_tell_models_apart(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"1")
    texts = [f"transformers:{tmp_path}", f"transformers:{tmp_path}+ip", f"diffusers:{tmp_path}", "real"]
    texts.append(f"diffusers:{tmp_path},steps=3")
    assert len({baseline(parse(text)).identity for text in texts}) == 5
    before = baseline(parse(texts[0])).identity
    (tmp_path / "w.safetensors").write_bytes(b"12")
    assert baseline(parse(texts[0])).identity != before


# --- tokens that UniCTokens published ------------------------------------------------------------------------------


def test_published_tokens_are_asked_as_they_were_trained(subject: Subject) -> None:
    from pyunictokens.models import ConceptTokens
    from pyunictokens.models.published_form import PublishedForm
    from pyunictokens.models.showo import prompting
    from pyunictokens.rollout.engine import RolloutEngine

    toy = tiny_toy()
    concept = ConceptTokens("bo", toy.model.width, num_understanding=3, num_generation=2, seed=1)
    toy.model.attach(concept.requires_grad_(False))
    tokenizer = toy.tokenizer.with_concept(concept.tokens)
    engine = RolloutEngine(toy.model, toy.vq, tokenizer)
    heard = Heard(engine)
    model = EngineModel(heard, PublishedForm(concept), subject, SAMPLING)  # type: ignore[arg-type]
    answer = model.answer([picture(1)], "what is <bo>?")
    text = "USER: <bo> is <token_0><token_1><token_2>.what is <bo>? ASSISTANT:"
    ((codes, questions, _),) = heard.texts
    assert questions == [text] and "\n" not in text
    # by the plain definition: one sequence, the likeliest token again and again
    ids, said = prompting.SpecialIds.of(toy.model), []
    for _ in range(SAMPLING.max_new_tokens):
        sequence = prompting.mmu(codes[0].tolist(), tokenizer.encode(text), ids, said or None)[None]
        sequence = sequence[:, : -1 if said else None]  # without the end that `mmu` closes an answer with
        allowed = prompting.attention_allowed(sequence, "mmu", ids)
        logits = toy.model(sequence, allowed)[0, -1]
        logits[ids.first_code :] = -torch.inf
        token = int(logits.argmax())
        if token == toy.model.end_id:
            break
        said.append(token)
    assert answer == " ".join(tokenizer.decode(said).split())
    model.generate("a <bo> beside <bo>", 1, 0)
    helpers = "".join(f"<token_{number}>" for number in range(5))
    assert heard.images[0][0] == [f"a {helpers}<bo> beside {helpers}<bo>"]


# --- image models as they are --------------------------------------------------------------------------------------


class GptImage:
    """A server that takes and refuses what gpt-image-1's does: no response_format, at most ten images a request, sizes
    and qualities of its own, images through images/edits as a form."""

    SIZES, QUALITIES = {"1024x1024", "1024x1536", "1536x1024", "auto"}, {"low", "medium", "high", "auto"}

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str], int]] = []
        gpt = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                fields, images = self._form(body) if self.path.endswith("/edits") else (json.loads(body), 0)
                fields = {name: str(value) for name, value in fields.items()}
                gpt.asked.append((self.path, fields, images))
                wrong = sorted(set(fields) - {"model", "prompt", "n", "size", "quality"})
                if wrong:
                    return self._reply(400, {"error": {"message": f"Unknown parameter: '{wrong[0]}'."}})
                if fields.get("size", "auto") not in gpt.SIZES or fields.get("quality", "auto") not in gpt.QUALITIES:
                    return self._reply(400, {"error": {"message": "Invalid value"}})
                if not 1 <= int(fields["n"]) <= 10 or (self.path.endswith("/edits") and not images):
                    return self._reply(400, {"error": {"message": "Invalid n or image"}})
                data = [{"b64_json": encoded(picture(n, (64, 64)))} for n in range(int(fields["n"]))]
                return self._reply(200, {"created": 0, "data": data})

            def _form(self, body: bytes) -> tuple[dict[str, str], int]:
                kind, _, boundary = self.headers["Content-Type"].partition("boundary=")
                assert kind.startswith("multipart/form-data")
                fields: dict[str, str] = {}
                images = 0
                for part in body.split(b"--" + boundary.encode())[1:-1]:
                    head, _, value = part.strip(b"\r\n").partition(b"\r\n\r\n")
                    if b"filename=" in head:
                        Image.open(io.BytesIO(value)).load()
                        images += 1
                    else:
                        fields[head.split(b'name="')[1].split(b'"')[0].decode()] = value.decode()
                return fields, images

            def _reply(self, status: int, value: dict[str, Any]) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def model(self, subject: Subject, more: str = "") -> Any:
        url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        return baseline(parse(f"endpoint:{url},model=gpt-4o,draw=gpt-image-1{more}")).load(subject)


def test_gpt_image_is_asked_for_what_it_takes(monkeypatch: pytest.MonkeyPatch, subject: Subject) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    server = GptImage()
    drawn = server.model(subject, ",size=1024x1024,quality=low").generate("a photo of <bo> on the beach", 12, 0)
    assert drawn.shape == (12, 3, 64, 64)
    assert [(path, fields["n"]) for path, fields, _ in server.asked] == [
        ("/v1/images/generations", "10"),
        ("/v1/images/generations", "2"),
    ]
    wanted = {"model": "gpt-image-1", "prompt": "a photo of a pink dog on the beach", "n": "10"}
    assert server.asked[0][1] == {**wanted, "size": "1024x1024", "quality": "low"}
    with pytest.raises(UserError, match="Invalid value"):
        server.model(subject, ",quality=standard").generate("<bo>", 1, 0)


def test_gpt_image_is_shown_the_references(monkeypatch: pytest.MonkeyPatch, subject: Subject) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    server = GptImage()
    drawn = server.model(subject, ",references=2+ip").generate("a photo of <bo> on the beach", 3, 0)
    ((path, fields, images),) = server.asked
    assert (path, images, drawn.shape) == ("/v1/images/edits", 2, (3, 3, 64, 64))
    assert fields["prompt"] == "The first 2 pictures show <bo>. a photo of <bo> on the beach"
