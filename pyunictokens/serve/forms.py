"""What clients may send, as OpenAI's clients send it: each field checked, and what cannot be honoured refused by name.

Fields beyond OpenAI's (``extra_body`` of its client): of images `seed`, `steps`, `guidance_scale`, `temperature` and
`reason`; of answers `top_k`; of both `deadline`.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from ..utils.errors import needs

with needs("web"):
    from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MOST = 16
"""Images or answers of one request."""
LONGEST = 20_000
"""Characters of a prompt, or of all that is read of a conversation."""

Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Format = Literal["png", "jpeg", "webp"]


class Form(BaseModel):
    """A body. Unknown fields are refused: one that is misspelt would otherwise be ignored in silence."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, values: object) -> object:
        """OpenAI's fields may be null, which is as if they were left out."""
        if isinstance(values, dict):
            return {key: value for key, value in values.items() if value is not None or key == "content"}
        return values


class ImageForm(Form):
    """What drawing and painting have in common."""

    prompt: Annotated[str, Field(max_length=LONGEST)]
    model: Annotated[str, Field(max_length=300)] = "base"
    n: Annotated[int, Field(ge=1, le=MOST)] = 1
    size: str = "auto"
    """auto, or WIDTHxHEIGHT."""
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Format = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] = 90
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    user: str | None = None
    seed: Seed | None = None
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    deadline: Annotated[float, Field(gt=0, le=86_400)] | None = None
    # taken in the one meaning that is true here
    quality: Literal["auto", "standard"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto", "low"] = "auto"


class GenerationForm(ImageForm):
    """POST /v1/images/generations."""

    reason: bool = False
    """Ask first which of the concept's facts the prompt means, then draw."""


class TextPart(Form):
    type: Literal["text", "input_text"]
    text: Annotated[str, Field(max_length=LONGEST)]


class ImageUrl(Form):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Form):
    type: Literal["image_url"]
    image_url: ImageUrl


Part: TypeAlias = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _as_parts(content: object) -> object:
    """A text is one part, and null is none."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content or []


class Message(Form):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts)]
    name: str | None = None


class StreamOptions(Form):
    include_usage: bool = False


class TextFormat(Form):
    type: Literal["text"]


class ChatForm(Form):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    model: Annotated[str, Field(max_length=300)] = "base"
    n: Annotated[int, Field(ge=1, le=MOST)] = 1
    max_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Annotated[int, Field(ge=0)] = 0
    seed: Seed | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    deadline: Annotated[float, Field(gt=0, le=86_400)] | None = None
    # taken in the one meaning that is true here
    top_p: Annotated[float, Field(ge=1, le=1)] = 1
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    response_format: TextFormat | None = None
    store: Literal[False] | None = None
