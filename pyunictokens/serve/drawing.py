"""`/v1/images/generations` and `/v1/images/edits`: requests to the engine, and its events in OpenAI's form."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ..data.images import black_image
from ..data.wording import compound_prompt, first_sentence
from ..rollout.serving import AnswerRequest, Drawn, ImageRequest, Preview, Taken, Written
from ..runs.asking import grid_of, painted, read_prompt, reasoning_question
from .catalog import Catalog, Served
from .errors import Refused, told
from .forms import GenerationForm, ImageForm
from .gate import About
from .metrics import Metrics
from .pictures import Pictures
from .workers import Workers

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Kind = Literal["image_generation", "image_edit"]


def event(name: str | None, data: dict[str, object] | str) -> str:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n" if name is None else f"event: {name}\ndata: {text}\n\n"


@dataclass(frozen=True)
class Asked:
    """A drawing request that has been checked."""

    served: Served
    request: ImageRequest
    form: ImageForm
    size: str
    """WIDTHxHEIGHT."""
    revised: str | None = None
    """What was drawn, where the model reasoned first."""


class Drawing:
    """Draws for clients."""

    def __init__(self, catalog: Catalog, workers: Workers, pictures: Pictures, metrics: Metrics, log_prompts: bool):
        self._catalog, self._workers, self._pictures = catalog, workers, pictures
        self._metrics, self._log_prompts = metrics, log_prompts

    async def ask(self, form: ImageForm, about: About) -> Asked:
        """The request of a form. Raises Refused or UserError for what cannot be used."""
        served = await self._catalog.opened(form.model)
        about.notes |= {"model": form.model, "n": form.n}
        if self._log_prompts:
            about.notes["prompt"] = form.prompt
        prompt, revised = form.prompt, None
        seed = secrets.randbelow(2**31) if form.seed is None else form.seed
        read_prompt(prompt, served.concept)
        if isinstance(form, GenerationForm) and form.reason:
            revised = prompt = await self._reason(served, form, seed, about)
        height, width = self._grid(form.size, served)
        step = served.engine.vq.downsampling if served.engine.vq is not None else 1
        settings = served.sampling
        steps = settings.timesteps if form.steps is None else form.steps
        request = ImageRequest(
            read_prompt(prompt, served.concept, served.published),
            served.resident,
            samples=form.n,
            steps=steps,
            guidance_scale=settings.guidance_scale if form.guidance_scale is None else form.guidance_scale,
            temperature=settings.temperature if form.temperature is None else form.temperature,
            seed=seed,
            grid=(height, width),
            previews=min(form.partial_images, steps) if form.stream else 0,
        )
        return Asked(served, request, form, f"{width * step}x{height * step}", revised)

    async def paint(self, asked: Asked, read: Callable[[], tuple[Image, Image | None]]) -> Asked:
        """The same over an image, with a mask or None, both given by `read`: what the mask, or the image itself, has
        transparent is painted anew; a mask without transparency is read as black and white, white is painted."""
        shape = asked.request.grid
        assert shape is not None and asked.served.engine.vq is not None
        step = asked.served.engine.vq.downsampling
        pixels, unknown = await self._pictures.use(lambda: _painting(*read(), shape, step))
        return replace(asked, request=replace(asked.request, image=pixels, unknown=unknown))

    async def all(self, asked: Asked, about: About) -> dict[str, object]:
        """The whole answer."""
        images: dict[int, str] = {}
        async with aclosing(self.events(asked, about)) as events:
            async for each in events:
                if isinstance(each, Drawn):
                    images[each.sample] = await self._encoded(each, asked.form)
        revised = {} if asked.revised is None else {"revised_prompt": asked.revised}
        return {
            "created": int(time.time()),
            "data": [{"b64_json": images[sample], **revised} for sample in range(asked.form.n)],
            **self._said(asked),
            "usage": self._usage(asked, asked.form.n),
            "seed": asked.request.seed,
        }

    async def stream(self, asked: Asked, about: About, kind: Kind) -> AsyncGenerator[str, None]:
        """The answer as server-sent events, after an empty one when the request waits: images while they are drawn,
        then each as it is done."""
        async with aclosing(self.events(asked, about)) as events:
            await anext(events)
            yield ""
            try:
                async for each in events:
                    if not isinstance(each, (Drawn, Preview)):
                        continue
                    data: dict[str, object] = {
                        "b64_json": await self._encoded(each, asked.form),
                        "created_at": int(time.time()),
                        **self._said(asked),
                        "image_index": each.sample,
                    }
                    if isinstance(each, Preview):
                        name = f"{kind}.partial_image"
                        yield event(name, {"type": name, "partial_image_index": each.number, **data})
                    else:
                        name = f"{kind}.completed"
                        usage = {"usage": self._usage(asked, 1), "seed": asked.request.seed}
                        yield event(name, {"type": name, **data, **usage})
            except Exception as error:  # the status has been sent: the error is told as an event
                about.failed(error)
                yield event("error", told(error).table)

    async def events(self, asked: Asked, about: About) -> AsyncGenerator[Taken | Drawn | Preview, None]:
        """That it waits; then images as they are drawn: previews where the form streams, and each when it is done."""
        served, client = asked.served, about.client.settings
        stream = self._workers.stream(
            served,
            asked.request,
            user=client.name,
            priority=client.priority,
            deadline=about.left(asked.form.deadline),
        )
        async with aclosing(stream) as events:
            async for each in events:
                if isinstance(each, Drawn):
                    self._metrics.images.inc()
                if isinstance(each, (Taken, Drawn, Preview)):
                    yield each

    async def _reason(self, served: Served, form: GenerationForm, seed: int, about: About) -> str:
        """Prompt and the fact that the model takes it to mean."""
        if not served.facts:
            raise Refused(400, f"model {served.name!r} has no facts to reason with: leave out reason", param="reason")
        question, raw = reasoning_question(served.facts, form.prompt, served.concept, served.published)
        request = AnswerRequest(
            black_image(served.looks_at),
            question,
            served.resident,
            max_new_tokens=served.sampling.max_new_tokens,
            temperature=served.sampling.answer_temperature,
            top_k=served.sampling.top_k,
            seed=seed,
            raw=raw,
        )
        text, client = "", about.client.settings
        stream = self._workers.stream(
            served,
            request,
            user=client.name,
            priority=client.priority,
            deadline=about.left(form.deadline),
        )
        async with aclosing(stream) as events:
            async for each in events:
                if isinstance(each, Written) and each.done:
                    text = each.text
                    self._metrics.tokens.inc(len(each.tokens))
        return compound_prompt(form.prompt, first_sentence(text))

    def _grid(self, size: str, served: Served) -> tuple[int, int]:
        vq, model = served.engine.vq, served.engine.model
        if size == "auto" or vq is None:
            return model.grid
        found = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", size)
        own = f"{model.grid[1] * vq.downsampling}x{model.grid[0] * vq.downsampling}"
        if found is None:
            raise Refused(400, f"size={size!r}: must be auto or WIDTHxHEIGHT, as in {own}", param="size")
        grid = grid_of(int(found[2]), int(found[1]), vq.downsampling, f"size={size}")
        model.check_grid(grid)  # before a picture that is painted into is brought to that size
        return grid

    async def _encoded(self, each: Drawn | Preview, form: ImageForm) -> str:
        return await self._pictures.encode(each.pixels, form.output_format, form.output_compression)

    def _said(self, asked: Asked) -> dict[str, object]:
        streamed = {"quality": "auto"} if asked.form.stream else {}  # of a whole answer, a client knows no "auto"
        return {"size": asked.size, "background": "opaque", "output_format": asked.form.output_format, **streamed}

    def _usage(self, asked: Asked, images: int) -> dict[str, object]:
        grid, tokenizer = asked.request.grid, asked.served.tokenizer
        assert grid is not None
        text = len(tokenizer.encode(asked.request.prompt)) if tokenizer is not None else 0
        given = grid[0] * grid[1] if asked.request.image is not None else 0
        drawn = images * grid[0] * grid[1]
        return {
            "input_tokens": text + given,
            "input_tokens_details": {"text_tokens": text, "image_tokens": given},
            "output_tokens": drawn,
            "total_tokens": text + given + drawn,
        }


def _painting(image: Image, mask: Image | None, grid: tuple[int, int], step: int) -> tuple[Tensor, Tensor]:
    """Pixels and the codes that are painted anew, as of `painted`."""
    if mask is None and image.mode != "RGBA":
        raise Refused(400, "no mask, and nothing in the image is transparent: what is to be painted?", param="mask")
    white = image if mask is None else mask
    if white.mode == "RGBA":
        white = white.getchannel("A").point(lambda value: 255 if value == 0 else 0)
    return painted(image.convert("RGB"), white.convert("RGB"), grid, step, "mask")
