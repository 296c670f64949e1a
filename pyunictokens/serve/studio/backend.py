"""What the studio's pages ask for: pictures, answers, choices. It uses the engine and is independent of the page.

Everything goes the way of the server's requests (serve/drawing.py, serve/answering.py): the same checks, the same
engine, and for the same seed the same picture.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import secrets
import tempfile
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ...data.images import save_image, to_pil
from ...rollout.serving import Drawn, ServingEngine, Taken, Written
from ...utils.errors import UserError, needs
from ...utils.files import write_bytes_atomic
from ..answering import Answering
from ..catalog import Catalog
from ..drawing import Asked, Drawing
from ..forms import ChatForm, GenerationForm, ImagePart, ImageUrl, Message, TextPart
from ..gate import About
from ..keys import Client, KeySettings
from ..metrics import Metrics
from ..pictures import Pictures
from ..workers import OwnProcess, Workers

with needs("studio"):
    from PIL import Image

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

_KEPT = 256
"""Files of pictures that are kept."""


@dataclass(frozen=True)
class Wish:
    """What is to be drawn. What is None is the model's own, and a seed that is None is drawn at random."""

    model: str
    prompt: str
    number: int = 1
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    reason: bool = False


@dataclass
class Sheet:
    """Pictures on their way: how they look now."""

    seed: int
    pictures: dict[int, Picture] = field(default_factory=dict)
    """By their number; one that is missing is not begun."""
    done: int = 0
    revised: str | None = None
    """What was drawn, where the model reasoned first."""


class Studio:
    """One catalog and one engine for all pages. choices: the folder that choices between pictures are saved in."""

    def __init__(self, catalog: Catalog, serving: ServingEngine, choices: Path):
        self.catalog, self.choices = catalog, choices
        self._files: OrderedDict[Path, None] = OrderedDict()
        """Pictures of the folder, the one that was shown last at the end."""
        self._room = tempfile.TemporaryDirectory(prefix="pyunictokens-studio-")
        self.workers = Workers([OwnProcess(catalog, serving)])
        parts = (catalog, self.workers, Pictures(), Metrics(self.workers), False)
        self._drawing, self._answering = Drawing(*parts), Answering(*parts)
        self._client = Client(KeySettings("studio"))

    def models(self) -> list[str]:
        """Names of the models, those with a concept first."""
        return [listed.name for listed in self.catalog.list()]

    async def draw(self, wish: Wish) -> AsyncGenerator[Sheet, None]:
        """The pictures of a wish while they are drawn."""
        about = self._about()
        asked = await self._drawing.ask(_form(wish), about)
        async with aclosing(self._sheets(asked, about)) as sheets:
            async for sheet in sheets:
                yield sheet

    async def paint(self, wish: Wish, image: Picture, mask: Picture) -> AsyncGenerator[Sheet, None]:
        """The same into `image`, where `mask` (gray) is white."""
        about = self._about()
        asked = await self._drawing.ask(_form(wish), about)
        asked = await self._drawing.paint(asked, lambda: (image.convert("RGB"), mask.convert("L")))
        async with aclosing(self._sheets(asked, about)) as sheets:
            async for sheet in sheets:
                yield sheet

    async def answer(self, model: str, image: Picture | None, question: str, seed: int) -> AsyncGenerator[str, None]:
        """The answer to a question about a picture, word by word."""
        content: list[TextPart | ImagePart] = [TextPart(type="text", text=question)]
        if image is not None:
            content.append(ImagePart(type="image_url", image_url=ImageUrl(url=_data_url(image))))
        form = ChatForm(messages=[Message(role="user", content=content)], model=model, seed=seed, stream=True)
        about = self._about()
        asked = await self._answering.ask(form, about)
        async with aclosing(self._answering.events(asked, about)) as events:
            async for each in events:
                if isinstance(each, Written):
                    yield each.text

    def file(self, picture: Picture) -> str:
        """A PNG file of a picture, for a page. It is written once and whole: Gradio writes a picture that it is given
        again over the file that a browser may be reading. It stays until Gradio has long copied it."""
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        file = Path(self._room.name, f"{hashlib.sha256(buffer.getvalue()).hexdigest()[:32]}.png")
        if not file.exists():
            write_bytes_atomic(file, buffer.getvalue())
        self._files[file] = None
        self._files.move_to_end(file)
        while len(self._files) > _KEPT:
            self._files.popitem(last=False)[0].unlink()
        return str(file)

    def choose(self, prompt: str, model: str, pictures: Sequence[Picture], seeds: Sequence[int], better: int) -> Path:
        """Save two pictures and which of them is the better one (0, 1); returns the file of choices."""
        if len(pictures) != 2 or better not in (0, 1):
            raise UserError("a choice is between two pictures: draw them first")
        self.choices.mkdir(parents=True, exist_ok=True)
        mark = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        names = [f"{mark}-{place}.png" for place in range(2)]
        for picture, name in zip(pictures, names, strict=True):
            save_image(picture, self.choices / name)
        line = {
            "prompt": prompt,
            "model": model,
            "chosen": names[better],
            "rejected": names[1 - better],
            "chosen_seed": seeds[better],
            "rejected_seed": seeds[1 - better],
        }
        file = self.choices / "preferences.jsonl"
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
        return file

    async def _sheets(self, asked: Asked, about: About) -> AsyncGenerator[Sheet, None]:
        sheet = Sheet(asked.request.seed, revised=asked.revised)
        yield sheet
        async with aclosing(self._drawing.events(asked, about)) as events:
            async for each in events:
                if isinstance(each, Taken):
                    continue
                sheet.pictures[each.sample] = to_pil(each.pixels)
                sheet.done += isinstance(each, Drawn)
                yield sheet

    def _about(self) -> About:
        return About(secrets.token_hex(8), self._client)


def _form(wish: Wish) -> GenerationForm:
    return GenerationForm(
        prompt=wish.prompt,
        model=wish.model,
        n=wish.number,
        seed=wish.seed,
        steps=wish.steps,
        guidance_scale=wish.guidance_scale,
        reason=wish.reason,
        stream=True,
        partial_images=3,
    )


def _data_url(image: Picture) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def painted_mask(layers: Sequence[Picture], size: tuple[int, int]) -> Picture:
    """What was painted over, white on black, of an editor's layers."""
    mask = Image.new("L", size, 0)
    for layer in layers:
        alpha = layer.convert("RGBA").getchannel("A").resize(size)
        mask.paste(255, (0, 0), alpha.point(lambda value: 255 if value > 0 else 0))
    return mask
