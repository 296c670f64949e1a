"""What reward experts in a process of their own and those who ask them say to each other, as bytes.

A message is a JSON table and some tensors: four bytes with the length of the JSON, the JSON (UTF-8), and one
safetensors file. Nothing is ever pickled. Connections, length limits and the proof of the shared key (HMAC, both ways)
are those of `multiprocessing.connection`, whose `send` and `recv` (they pickle) are never called. Bytes are not
encrypted. What is asked and answered is the business of server.py and client.py.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...utils.errors import UserError, needs
from ..base import RewardBatch

KEY, KEY_FILE = "PYUNICTOKENS_EXPERTS_KEY", "PYUNICTOKENS_EXPERTS_KEY_FILE"
"""The environment variables that hold the shared key, or name the file that does."""
SHORTEST_KEY = 16
LIMIT = 1 << 30
"""Longest message in bytes; a group of nine drawings of 512² with ten photos has 60 MB in float32."""
HANDSHAKE = 10.0
"""Seconds a peer may take for each part of proving that it has the key."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_key() -> bytes:
    """The key that servers and those who ask them share, from the environment. Raises UserError."""
    text, file = os.environ.get(KEY, ""), os.environ.get(KEY_FILE, "")
    if not text and file:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{KEY_FILE}={file}: cannot be read: {error}") from None
    text = text.strip()
    if len(text) < SHORTEST_KEY:
        raise UserError(
            f"the experts' key has {len(text)} characters, must have at least {SHORTEST_KEY}: set {KEY}, or {KEY_FILE} "
            'to a file, alike on both sides; python -c "import secrets; print(secrets.token_hex(32))" makes one'
        )
    return text.encode()


def encode(message: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> bytes:
    """A message as bytes. Tensors of any device, whose order in memory goes along: with it, last bits would change."""
    with needs("rewards"):
        from safetensors.torch import save

    given = tensors or {}
    last = [name for name, value in given.items() if _channels_last(value)]
    words = json.dumps({**message, "channels_last": last}).encode()
    flat = {
        name: value.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, value in given.items()
    }
    return struct.pack("!I", len(words)) + words + save(flat)


def decode(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(message, tensors) of bytes. Raises UserError where they are no message."""
    with needs("rewards"):
        from safetensors import SafetensorError

        with needs("rewards"):
            from safetensors.torch import load

    if len(data) < 4:
        raise UserError(f"a message of {len(data)} bytes: must begin with the length of its JSON (4 bytes)")
    (length,) = struct.unpack_from("!I", data)
    if length > len(data) - 4:
        raise UserError(f"a message of {len(data)} bytes says that its JSON alone has {length}: it was cut or is none")
    try:
        message = json.loads(data[4 : 4 + length].decode("utf-8"))
        tensors = load(data[4 + length :])
    except (ValueError, RecursionError, SafetensorError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise UserError(f"a message that cannot be read: {type(error).__name__}: {error}") from None
    if not isinstance(message, dict):
        raise UserError(f"a message's JSON is a {type(message).__name__}: must be a table")
    last = texts(message, "channels_last")
    for name, value in tensors.items():
        form = torch.channels_last if name in last and value.ndim == 4 else torch.contiguous_format
        tensors[name] = value.clone(memory_format=form)
    return message, tensors


def _channels_last(value: Tensor) -> bool:
    return not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last)


def texts(message: Mapping[str, Any], field: str) -> list[str]:
    """A list of texts out of a message. Raises UserError."""
    found = message.get(field)
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


def pack_batch(batch: RewardBatch) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A batch as the parts of a message."""
    words = {
        "prompts": list(batch.prompts),
        "answers": list(batch.answers),
        "facts": list(batch.facts),
        "correct": int(batch.correct),
        "kind": batch.kind,
    }
    return words, {"images": batch.images, "references": batch.references}


def unpack_batch(message: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> RewardBatch:
    """The batch in a message, on `device`. Raises UserError where it cannot be one."""
    correct, kind = message.get("correct"), message.get("kind")
    if isinstance(correct, bool) or not isinstance(correct, int) or not isinstance(kind, str):
        raise UserError(f"a message's correct={correct!r}, kind={kind!r}: must be a whole number and a text")
    return RewardBatch(
        images=tensor(tensors, "images").to(device),
        prompts=texts(message, "prompts"),
        answers=texts(message, "answers"),
        facts=texts(message, "facts"),
        correct=correct,
        references=tensor(tensors, "references").to(device),
        kind=kind,
    )


def shake_hands(raw: socket.socket, key: bytes, *, serving: bool, silence: float = 0.0) -> Connection:
    """Both sides prove that they have `key`; only then is more than 256 bytes read of either.

    silence: seconds the connection may then say nothing, or take nothing, before reads and writes fail; 0 waits for
    ever. Takes the socket over. Raises AuthenticationError, and OSError or EOFError where the connection is lost.
    """
    raw.settimeout(None)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a peer whose machine is gone is noticed some day
    _patience(raw, HANDSHAKE)
    twin = raw.dup()  # the same socket, to set its patience once the connection owns the descriptor
    connection: Connection = Connection(raw.detach())
    try:
        steps = (deliver_challenge, answer_challenge) if serving else (answer_challenge, deliver_challenge)
        for step in steps:
            step(connection, key)
        _patience(twin, silence)
    except AssertionError as error:  # how older Pythons say that a greeting is none
        connection.close()
        raise AuthenticationError(str(error)) from None
    except BaseException:
        connection.close()
        raise
    finally:
        twin.close()
    return connection


def _patience(raw: socket.socket, seconds: float) -> None:
    """Let the system end reads and writes of `raw` that stand still for `seconds`."""
    span = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        raw.setsockopt(socket.SOL_SOCKET, option, span)
