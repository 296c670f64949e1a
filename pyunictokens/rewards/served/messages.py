"""What served reward models and those who ask them say to each other over HTTP: bodies, and the proof of a shared key.

A body is one safetensors file: tensors, and a JSON table in its metadata. Nothing is ever unpickled. The key never
travels. A request carries ``Authorization: Bearer NONCE.PROOF`` with an HMAC-SHA256 over the nonce, the path and the
length of the body, so that it is known before the body is read, and a second one over the body (``X-Body-Digest``). The
answer carries one over the request's nonce, the status and its own body. Bodies are not encrypted.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...utils.errors import UserError, needs
from ...utils.text import read_text
from ..base import RewardBatch

KEY, KEY_FILE = "PYUNICTOKENS_REWARDS_KEY", "PYUNICTOKENS_REWARDS_KEY_FILE"
"""The environment variables that hold the shared key, or name the file that does; with EXPERTS in place of REWARDS, as
they were called, they are read as well."""
SHORTEST_KEY = 16
LIMIT = 1 << 30
"""Longest body in bytes; a group of nine images of 512² with ten references has 60 MB in float32."""
DIGEST = "x-body-digest"
"""The header with the keyed digest of a body."""
MEDIA = "application/x-safetensors"

Words = dict[str, object]
"""The JSON table of a message."""
Tensors = dict[str, Tensor]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_BEARER = re.compile(rb"[Bb]earer ([0-9a-f]{32})\.([0-9a-f]{64})")


# --- the key -------------------------------------------------------------------------------------------------------


def read_key() -> bytes:
    """The key that servers and those who ask them share, from the environment. Raises UserError."""
    text, file = (
        os.environ.get(name) or os.environ.get(name.replace("REWARDS", "EXPERTS"), "") for name in (KEY, KEY_FILE)
    )
    if not text and file:
        try:
            text = read_text(file)
        except UserError as error:
            raise UserError(f"{KEY_FILE}: {error}") from None
    return checked_key(text.strip().encode())


def checked_key(key: bytes) -> bytes:
    """`key`, if it is long enough. Raises UserError."""
    if len(key) < SHORTEST_KEY:
        raise UserError(
            f"the key of the reward models has {len(key)} characters, must have at least {SHORTEST_KEY}: set {KEY}, or "
            f'{KEY_FILE} to a file, alike on both sides; python -c "import secrets; print(secrets.token_hex(32))" '
            "makes one"
        )
    return key


def _proof(key: bytes, *parts: bytes) -> str:
    """HMAC-SHA256 over parts, each with its length before it, so that no two lists of parts are alike."""
    made = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        made.update(len(part).to_bytes(8, "big"))
        made.update(part)
    return made.hexdigest()


@dataclass(frozen=True)
class Exchange:
    """One request and its answer, under one key and one nonce."""

    key: bytes
    method: str
    path: str
    nonce: str

    @classmethod
    def begin(cls, key: bytes, method: str, path: str) -> Exchange:
        """A new request."""
        return cls(key, method, path, secrets.token_hex(16))

    @classmethod
    def of(cls, key: bytes, method: str, path: str, headers: Mapping[bytes, bytes], length: int) -> Exchange | None:
        """The request with these headers; None where they do not prove that its sender has the key."""
        found = _BEARER.fullmatch(headers.get(b"authorization", b""))
        if found is None:
            return None
        exchange = cls(key, method, path, found[1].decode())
        return exchange if hmac.compare_digest(exchange._bearer(length).encode(), found[2]) else None

    def _bearer(self, length: int) -> str:
        words = (b"request", self.method.encode(), self.path.encode(), self.nonce.encode(), b"%d" % length)
        return _proof(self.key, *words)

    def request_digest(self, body: bytes) -> str:
        return _proof(self.key, b"request body", self.nonce.encode(), body)

    def answer_digest(self, status: int, body: bytes) -> str:
        return _proof(self.key, b"answer", self.nonce.encode(), b"%d" % status, body)

    def headers(self, body: bytes) -> dict[str, str]:
        """The headers of the request."""
        return {
            "authorization": f"Bearer {self.nonce}.{self._bearer(len(body))}",
            "content-type": MEDIA,
            "content-length": str(len(body)),
            DIGEST: self.request_digest(body),
        }


# --- bodies --------------------------------------------------------------------------------------------------------


def encode(words: Mapping[str, object], tensors: Mapping[str, Tensor] | None = None) -> bytes:
    """A body. Tensors of any device, whose order in memory goes along: without it, last bits would change."""
    with needs("serve"):
        from safetensors.torch import save

    given = tensors or {}
    last = [name for name, value in given.items() if _channels_last(value)]
    flat = {
        name: value.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, value in given.items()
    }
    return save(flat, metadata={"json": json.dumps({**words, "channels_last": last})})


def decode(body: bytes) -> tuple[Words, Tensors]:
    """(words, tensors) of a body. Raises UserError where it is none."""
    with needs("serve"):
        from safetensors.torch import load

    try:
        length = int.from_bytes(body[:8], "little")
        if len(body) < 8 or length > len(body) - 8:
            raise ValueError(f"{len(body)} bytes, cut or no safetensors")
        words = json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["json"])
        tensors = load(body)
    except Exception as error:  # a stranger's bytes: whatever they do to a parser, it is told in one line
        raise UserError(f"a message that cannot be read: {type(error).__name__}: {str(error)[:200]}") from None
    if not isinstance(words, dict):
        raise UserError(f"a message's JSON is a {type(words).__name__}: must be a table")
    last = texts(words, "channels_last")
    for name, value in tensors.items():
        form = torch.channels_last if name in last and value.ndim == 4 else torch.contiguous_format
        tensors[name] = value.clone(memory_format=form)  # kernels mind where a tensor begins
    return words, tensors


def _channels_last(value: Tensor) -> bool:
    return not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last)


def texts(words: Mapping[str, object], field: str) -> list[str]:
    """A list of texts out of a message. Raises UserError."""
    found = words.get(field)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise UserError(f"a message's {field}: must be a list of texts")
    return found


def tensor(tensors: Mapping[str, Tensor], name: str, *dtypes: torch.dtype) -> Tensor:
    """A tensor out of a message, of one of `dtypes` (by default those of pixels and scores). Raises UserError."""
    found = tensors.get(name)
    if found is None or found.dtype not in (dtypes or _DTYPES):
        wanted = " or ".join(str(each)[6:] for each in dtypes or _DTYPES)
        raise UserError(f"a message's tensor {name}: {'absent' if found is None else found.dtype}: must be {wanted}")
    return found


def pack_batch(batch: RewardBatch) -> tuple[Words, Tensors]:
    """A batch as the parts of a message. Raises UserError for columns that JSON does not hold."""
    words: Words = {
        "prompts": list(batch.prompts),
        "answers": list(batch.answers),
        "facts": list(batch.facts),
        "correct": int(batch.correct),
        "kind": batch.kind,
        "columns": {name: list(values) for name, values in batch.columns.items()},
        "completions": list(batch.completions),
    }
    try:
        json.dumps(words["columns"])
    except (TypeError, ValueError) as error:
        raise UserError(f"columns for served reward models must be texts, numbers, lists or tables: {error}") from None
    return words, {"images": batch.images, "references": batch.references}


def unpack_batch(words: Mapping[str, object], tensors: Mapping[str, Tensor], device: torch.device) -> RewardBatch:
    """The batch in a message, on `device`. Raises UserError where it cannot be one."""
    correct, kind, columns = words.get("correct"), words.get("kind"), words.get("columns", {})
    if isinstance(correct, bool) or not isinstance(correct, int) or not isinstance(kind, str):
        raise UserError(f"a message's correct={correct!r}, kind={kind!r}: must be a whole number and a text")
    if not isinstance(columns, dict) or not all(isinstance(values, list) for values in columns.values()):
        raise UserError("a message's columns: must be a table of lists")
    return RewardBatch(
        images=tensor(tensors, "images").to(device),
        prompts=texts(words, "prompts"),
        answers=texts(words, "answers"),
        facts=texts(words, "facts"),
        correct=correct,
        references=tensor(tensors, "references").to(device),
        kind=kind,
        columns=columns,
        completions=texts(words, "completions") if "completions" in words else (),
    )
