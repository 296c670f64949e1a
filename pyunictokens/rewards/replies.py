"""What a stranger's reply is turned into before anything reads it: the few fields that are used, and no key in them.

A model or a proxy behind an endpoint may answer with anything: the request's own headers, other shapes, numbers of four
hundred digits, half characters. Each function takes the bytes of a reply and gives the bytes of a plain, small one.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from urllib.parse import quote, quote_plus

_WORDS = 2000
"""Longest complaint that is handed on."""


class NoAnswer(Exception):
    """A reply without an answer in it."""


def without(key: str, text: str) -> str:
    """`text` with `key` replaced by [key], also where it is URL-coded, in base64 (wherever it begins) or in hex."""
    if not key:
        return text
    data = key.encode()
    forms = {key, quote(key, safe=""), quote_plus(key), data.hex(), data.hex().upper(), json.dumps(key)[1:-1]}
    for ahead in range(3):  # base64 of a text in which the key begins after 0, 1 or 2 bytes of a group of three
        coded = base64.b64encode(bytes(ahead) + data).decode()
        whole = coded[(0, 2, 3)[ahead] : 4 * ((ahead + len(data)) // 3)]  # what depends on the key alone
        forms |= {whole, whole.replace("+", "-").replace("/", "_")}
    for form in sorted(forms, key=len, reverse=True):
        if len(form) >= min(8, len(key)):
            text = re.sub(re.escape(form), "[key]", text, flags=re.IGNORECASE if "%" in form else 0)
    return text


def _clean(text: str, key: str) -> str:
    """`text` without the key, and without half characters, which no file takes."""
    return without(key, text.encode("utf-8", "replace").decode("utf-8"))


def _loaded(body: bytes) -> object:
    try:
        return json.loads(body.decode("utf-8", "replace"))
    except Exception as error:  # nesting, numbers of any length: whatever a parser meets
        raise NoAnswer(f"a reply that is no JSON ({type(error).__name__})") from None


def _count(usage: object, name: str) -> int:
    found = usage.get(name) if isinstance(usage, dict) else None
    return found if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < 1 << 40 else 0


def completion(body: bytes, key: str) -> bytes:
    """A chat completion with one choice. Raises NoAnswer where `body` holds no text."""
    made = _loaded(body)
    choices = made.get("choices") if isinstance(made, dict) else None
    if not isinstance(choices, list) or not choices:
        raise NoAnswer("the reply holds no choices: is this a chat completions endpoint?")
    message = choices[0].get("message") if isinstance(choices[0], dict) else None
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str):
        raise NoAnswer(f"the reply holds no text (finish_reason {str(_of(choices[0], 'finish_reason'))[:40]})")
    usage = made.get("usage") if isinstance(made, dict) else None
    sent, got = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    answer = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": _clean(text, key)}}
    tokens = {"prompt_tokens": sent, "completion_tokens": got, "total_tokens": sent + got}
    whole = {"id": "", "object": "chat.completion", "created": 0, "model": "", "choices": [answer], "usage": tokens}
    return json.dumps(whole).encode()


def images(body: bytes, key: str) -> bytes:
    """Images as base64 texts. Raises NoAnswer where `body` holds none."""
    made = _loaded(body)
    data = made.get("data") if isinstance(made, dict) else None
    found = [_of(each, "b64_json") for each in data] if isinstance(data, list) else []
    if not found or not all(isinstance(each, str) for each in found):
        raise NoAnswer("the reply holds no images in base64")
    return json.dumps({"created": 0, "data": [{"b64_json": _clean(str(each), key)} for each in found]}).encode()


def complaint(body: bytes, key: str, headers: Mapping[str, str]) -> tuple[bytes, dict[str, str]]:
    """(an error's message and code, the headers that say whether and when to try again) of a reply that is an error."""
    text, code = body.decode("utf-8", "replace"), None
    try:
        error = _of(json.loads(text), "error")
        text = error if isinstance(error, str) else str(_of(error, "message") or text)
        code = _of(error, "code")
    except Exception:  # no JSON: its own words, then
        pass
    kept = {name: value for name, value in headers.items() if name in {"retry-after", "retry-after-ms"}}
    if code == "insufficient_quota":
        kept["x-should-retry"] = "false"
    said = _clean(text, key)[:_WORDS] or "no word"
    return json.dumps({"error": {"message": said, "code": code if isinstance(code, str) else None}}).encode(), kept


def own_words(text: str) -> bytes:
    """The body of an error of our own making."""
    return json.dumps({"error": {"message": text, "code": None}}).encode()


def _of(table: object, name: str) -> object:
    return table.get(name) if isinstance(table, dict) else None
