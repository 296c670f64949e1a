"""The routes: FastAPI around drawing, answering and the catalog. Keys and limits are the gate's business."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, TypeVar

from ..utils.errors import needs
from .answering import Answering
from .catalog import Catalog, Listed
from .drawing import Drawing
from .errors import Refused, Told, told
from .forms import ChatForm, GenerationForm, ImageForm
from .gate import About, Receive, Scope, Send
from .metrics import Metrics
from .pictures import Pictures

with needs("web"):
    from fastapi import Depends, FastAPI, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, StreamingResponse
    from pydantic import ValidationError
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

AnyForm = TypeVar("AnyForm", bound=ImageForm)

_FILES = 4
"""Files of one form: a picture and a mask, and what a client adds by mistake."""


def _about(request: Request) -> About:
    about = request.state.about
    assert isinstance(about, About)
    return about


Asking = Annotated[About, Depends(_about)]


def make_app(catalog: Catalog, drawing: Drawing, answers: Answering, pictures: Pictures, metrics: Metrics) -> FastAPI:
    """The application."""
    app = FastAPI(title="pyunictokens", docs_url=None, redoc_url=None, openapi_url="/openapi.json")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def counted() -> Response:
        text, media = metrics.text()
        return Response(text, media_type=media)

    @app.get("/v1/models")
    def models(about: Asking) -> dict[str, object]:
        listed = [each for each in catalog.list() if about.client.may_ask(each.name)]
        return {"object": "list", "data": [_model(each) for each in listed]}

    @app.get("/v1/models/{name}")
    def model(name: str, about: Asking) -> dict[str, object]:
        _allow(about, name)
        return _model(catalog.find(name))

    @app.post("/v1/images/generations", response_model=None)
    async def generations(form: GenerationForm, about: Asking) -> dict[str, object] | Response:
        _allow(about, form.model)
        asked = await drawing.ask(form, about)
        if form.stream:
            return await _events(drawing.stream(asked, about, "image_generation"))
        return await drawing.all(asked, about)

    @app.post("/v1/images/edits", response_model=None)
    async def edits(request: Request, about: Asking) -> dict[str, object] | Response:
        form, files = await _edit_form(request)
        _allow(about, form.model)

        def read() -> tuple[Image, Image | None]:
            mask = pictures.decoded(files["mask"], "mask") if "mask" in files else None
            return pictures.decoded(files["image"], "image"), mask

        asked = await drawing.paint(await drawing.ask(form, about), read)
        if form.stream:
            return await _events(drawing.stream(asked, about, "image_edit"))
        return await drawing.all(asked, about)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(form: ChatForm, about: Asking) -> dict[str, object] | Response:
        _allow(about, form.model)
        question = await answers.ask(form, about)
        if form.stream:
            return await _events(answers.stream(question, about))
        return await answers.all(question, about)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _answer(_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> Response:
        message = {404: "no such address", 405: "this address is asked in another way"}.get(error.status_code)
        return _answer(Told(error.status_code, message or str(error.detail), headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _fail(request, error)

    for kind in (Refused, ValueError, ImportError):
        app.add_exception_handler(kind, failed)
    return app


def _fail(request: Request, error: Exception) -> Response:
    _about(request).failed(error)
    return _answer(told(error))


def _answer(error: Told) -> Response:
    return JSONResponse(error.table, error.status, headers=error.headers)


class _Events(StreamingResponse):
    """Server-sent events. However the answer ends, their generator is closed: what it holds in the engine is free."""

    def __init__(self, stream: AsyncGenerator[str, None]):
        super().__init__(stream, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._stream):
            await super().__call__(scope, receive, send)


async def _events(stream: AsyncGenerator[str, None]) -> Response:
    """The answer begins when the request waits: what is refused until then keeps its status."""
    await anext(stream)
    return _Events(stream)


def _model(listed: Listed) -> dict[str, object]:
    return {"id": listed.name, "object": "model", "created": listed.created, "owned_by": "pyunictokens"}


def _allow(about: About, model: str) -> None:
    """Raises Refused as for a model that is not there: a key does not learn what others have."""
    if not about.client.may_ask(model):
        names = ", ".join(about.client.settings.models)
        raise Refused(404, f"no model {model!r} for this key: there are {names}", param="model", code="model_not_found")


def _validation(errors: object) -> Told:
    """The first of pydantic's complaints, with the name of the field."""
    assert isinstance(errors, (list, tuple))
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query")]
    if first["type"] == "json_invalid":
        return Told(400, "the body is not JSON", None, "invalid_json")
    name = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        return Told(400, f"{name}: this server knows no such field", name, "unknown_parameter")
    message = f"{name}: {first['msg']}" if name else str(first["msg"])
    return Told(400, message, name, "missing_parameter" if first["type"] == "missing" else "invalid_value")


async def _edit_form(request: Request) -> tuple[ImageForm, dict[str, bytes]]:
    """Fields and files of a multipart form."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refused(400, "send a multipart form with image, mask and prompt", code="invalid_form")
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    async with request.form(max_files=_FILES, max_fields=40) as form:
        for key, value in form.multi_items():
            name = key.removesuffix("[]")
            if name in fields or name in files:
                raise Refused(400, f"{name} is given twice: this model paints into one picture", param=name)
            if isinstance(value, UploadFile):
                files[name] = await value.read()
            else:
                fields[name] = value
    if "image" not in files:
        raise Refused(400, "image: a file is needed", param="image", code="missing_parameter")
    strange = sorted(files.keys() - {"image", "mask"})
    if strange:
        raise Refused(400, f"{strange[0]}: this server knows no such file", param=strange[0], code="unknown_parameter")
    try:
        return ImageForm.model_validate(fields), files
    except ValidationError as error:
        raise _refused(_validation(error.errors())) from None


def _refused(error: Told) -> Refused:
    return Refused(error.status, error.message, param=error.param, code=error.code)
