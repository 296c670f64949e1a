"""A judge for the toy world on this machine: an OpenAI-compatible server that scores answers and drawings by rule.

    python experiments/local_judge.py --port 8808
    pyunictokens evaluate table runs/bo --judge-url http://127.0.0.1:8808/v1 --judge-model toy --judge-key-env none

Answers: the share of words that answer and truth have in common (F1). Parts of a prompt: the toy's attribute reader
looks at the drawing, and the score is the share of the things the part names (an animal, a colour, a hat …) that it
sees. So it is a judge whose every score can be checked, for tests and for trying the tables without a paid endpoint; it
reads nothing but what `evaluate/judge_prompts.py` writes, and says so otherwise. It listens on the local machine alone.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from pyunictokens.data.images import from_pil
from pyunictokens.evaluate import judge_prompts as judging
from pyunictokens.evaluate.metrics import normalise
from pyunictokens.toy.networks import ToyNetworks
from pyunictokens.toy.scene import COLOURS, SLOTS

BEST = 10.0
_THINGS = ("shape", "wear", "item", "place")


def wanted(part: str) -> dict[str, str]:
    """The slots a part of a prompt names, with the words: "wearing a red hat" is {wear: hat, wear_colour: red}."""
    words = re.findall(r"[a-z]+", part.lower())
    found: dict[str, str] = {}
    colour = ""
    for word in words:
        if word in COLOURS:
            colour = word
            continue
        if word in SLOTS["pattern"]:
            found["pattern"] = word
            continue
        slot = next((slot for slot in _THINGS if word in SLOTS[slot] and word != "none"), None)
        if slot is None:
            continue
        found[slot] = word
        own = {"shape": "colour", "wear": "wear_colour", "item": "item_colour"}.get(slot)
        if colour and own:
            found[own] = colour
        colour = ""
    return found


def word_f1(truth: str, answer: str) -> float:
    """Harmonic mean of the shares of common words; 1 for the same words in any order."""
    a, b = Counter(normalise(truth).split()), Counter(normalise(answer).split())
    common = sum((a & b).values())
    return 2 * common / (sum(a.values()) + sum(b.values())) if common else 0.0


class ToyJudge:
    """Scores one request."""

    def __init__(self) -> None:
        self.reader = ToyNetworks.from_pretrained().reader
        self.asked = 0
        self._lock = threading.Lock()

    def score(self, text: str, images: list[str]) -> tuple[float, str]:
        """(score from 0 to 10, why). Raises ValueError for what is not a question of `judging`."""
        with self._lock:
            self.asked += 1
            part = judging.field(text, judging.PART)
            if part is not None and images:
                return self._part(part, images[-1])
            truth, answer = judging.field(text, judging.REFERENCE), judging.field(text, judging.GIVEN)
            if truth is None or answer is None:
                raise ValueError("this judge scores answers and parts of descriptions alone")
            return BEST * word_f1(truth, answer), "share of common words"

    def _part(self, part: str, url: str) -> tuple[float, str]:
        slots = wanted(part)
        if not slots:
            return BEST, "the part names nothing that could be missing"
        data = base64.b64decode(url.partition(",")[2], validate=True)
        with Image.open(io.BytesIO(data)) as image, torch.no_grad():
            seen = self.reader.attributes(from_pil(image)[None])[0]
        right = [slot for slot, word in slots.items() if seen[slot] == word]
        said = ", ".join(f"{slot} {seen[slot]}" for slot in slots)
        return BEST * len(right) / len(slots), f"seen: {said}"


def make_server(port: int = 0, judge: ToyJudge | None = None) -> ThreadingHTTPServer:
    """A server bound to this machine's loopback; `port` 0 takes a free one (`server.server_address[1]`)."""
    return ThreadingHTTPServer(("127.0.0.1", port), _handler(judge or ToyJudge()))


def _handler(judge: ToyJudge) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path.rstrip("/") != "/v1/chat/completions":
                return self._reply(404, {"error": {"message": f"{self.path}: only /v1/chat/completions is here"}})
            try:
                request = json.loads(body)
                content = request["messages"][-1]["content"]
                parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
                text = "\n".join(part["text"] for part in parts if part["type"] == "text")
                images = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
                score, why = judge.score(text, images)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, UnidentifiedImageError) as error:
                return self._reply(400, {"error": {"message": f"{type(error).__name__}: {error}"}})
            said = json.dumps({"reason": why, "score": round(score, 4)})
            message = {"role": "assistant", "content": said}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
            made = {"id": "toy", "object": "chat.completion", "created": 0, "model": request.get("model", "toy")}
            return self._reply(200, {**made, "choices": [choice], "usage": usage})

        def _reply(self, status: int, value: dict[str, Any]) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Says nothing for each request."""

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8808)
    server = make_server(parser.parse_args().port)
    print(f"judging at http://127.0.0.1:{server.server_address[1]}/v1; stop with Ctrl-C", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
