"""`/v1/chat/completions`: one question about one picture, answered whole or token by token.

The models read one picture and one question, no conversation: the newest text of the user is the question, the newest
picture of any message is what it is about, and without one a black picture is read, as in training for questions about
facts. Text of the system or developer stands before the question.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from ..data.images import black_image, from_pil, square
from ..rollout.serving import AnswerRequest, Taken, Written
from ..runs.asking import question_for, read_prompt
from .catalog import Catalog, Served
from .drawing import event
from .errors import Refused, told
from .forms import LONGEST, ChatForm, TextPart
from .gate import About
from .metrics import Metrics
from .pictures import Pictures
from .workers import Workers

_UNFINISHED = "\ufffd"
"""What the tokenizer gives for a character whose bytes are not all there yet."""


@dataclass(frozen=True)
class Question:
    """A chat request that has been checked."""

    served: Served
    request: AnswerRequest
    form: ChatForm


class Answering:
    """Answers clients."""

    def __init__(self, catalog: Catalog, workers: Workers, pictures: Pictures, metrics: Metrics, log_prompts: bool):
        self._catalog, self._workers, self._pictures = catalog, workers, pictures
        self._metrics, self._log_prompts = metrics, log_prompts

    async def ask(self, form: ChatForm, about: About) -> Question:
        """The request of a form. Raises Refused or UserError for what cannot be used."""
        served = await self._catalog.opened(form.model)
        about.notes |= {"model": form.model, "n": form.n}
        text, url = _read(form)
        if self._log_prompts:
            about.notes["prompt"] = text
        read_prompt(text, served.concept)
        question, raw = question_for(text, served.concept, served.published)
        if url is None:
            pixels = black_image(served.looks_at)
        else:
            of_url, side = self._pictures.of_url, served.looks_at
            pixels = await self._pictures.use(lambda: from_pil(square(of_url(url, "image_url").convert("RGB"), side)))
        settings, most = served.sampling, form.max_completion_tokens or form.max_tokens
        temperature = settings.answer_temperature if form.temperature is None else form.temperature
        if form.n > 1 and form.temperature is None and temperature == 0:
            temperature = 1.0  # as `understand -n` does: equal answers are of no use
        request = AnswerRequest(
            pixels,
            question,
            served.resident,
            samples=form.n,
            max_new_tokens=most or settings.max_new_tokens,
            temperature=temperature,
            top_k=form.top_k,
            seed=secrets.randbelow(2**31) if form.seed is None else form.seed,
            raw=raw,
            streamed=form.stream,
        )
        return Question(served, request, form)

    async def all(self, question: Question, about: About) -> dict[str, object]:
        """The whole answer."""
        found: dict[int, Written] = {}
        async with aclosing(self.events(question, about)) as events:
            async for each in events:
                if isinstance(each, Written) and each.done:
                    found[each.sample] = each
        choices = [
            {
                "index": sample,
                "message": {"role": "assistant", "content": found[sample].text, "refusal": None},
                "logprobs": None,
                "finish_reason": "length" if found[sample].cut else "stop",
            }
            for sample in range(question.form.n)
        ]
        head = _head(about, question.form.model, "chat.completion")
        return {**head, "choices": choices, "usage": _usage(list(found.values())), "seed": question.request.seed}

    async def stream(self, question: Question, about: About) -> AsyncGenerator[str, None]:
        """The answer as server-sent events, after an empty one when the request waits, as its words come."""
        head = _head(about, question.form.model, "chat.completion.chunk")
        options = question.form.stream_options
        with_usage = options is not None and options.include_usage
        nothing_yet = {"usage": None} if with_usage else {}
        said = [""] * question.form.n
        found: list[Written] = []

        def chunk(sample: int, delta: dict[str, object], finish: str | None = None) -> str:
            choice = {"index": sample, "delta": delta, "logprobs": None, "finish_reason": finish}
            return event(None, {**head, "choices": [choice], **nothing_yet})

        async with aclosing(self.events(question, about)) as events:
            await anext(events)
            yield ""
            try:
                for sample in range(question.form.n):
                    yield chunk(sample, {"role": "assistant", "content": ""})
                async for each in events:
                    if not isinstance(each, Written):
                        continue
                    more = _more(said[each.sample], each)
                    if more:
                        said[each.sample] += more
                        yield chunk(each.sample, {"content": more})
                    if each.done:
                        found.append(each)
                        yield chunk(each.sample, {}, "length" if each.cut else "stop")
                if with_usage:
                    yield event(None, {**head, "choices": [], "usage": _usage(found)})
                yield event(None, "[DONE]")
            except Exception as error:  # the status has been sent: the error is told as an event
                about.failed(error)
                yield event(None, told(error).table)

    async def events(self, question: Question, about: About) -> AsyncGenerator[Taken | Written, None]:
        """That it waits; then answers as they are written."""
        served, client = question.served, about.client.settings
        stream = self._workers.stream(
            served,
            question.request,
            user=client.name,
            priority=client.priority,
            deadline=about.left(question.form.deadline),
        )
        async with aclosing(stream) as events:
            async for each in events:
                if isinstance(each, Written) and each.done:
                    self._metrics.tokens.inc(len(each.tokens))
                if isinstance(each, (Taken, Written)):
                    yield each


def _read(form: ChatForm) -> tuple[str, str | None]:
    """(question, URL of the picture it is about) of a conversation."""
    before, question, url = [], None, None
    for message in form.messages:
        text = "\n".join(part.text for part in message.content if isinstance(part, TextPart)).strip()
        urls = [part.image_url.url for part in message.content if not isinstance(part, TextPart)]
        if len(urls) > 1:
            raise Refused(400, f"{len(urls)} pictures in one message: this model looks at one", param="messages")
        url = urls[-1] if urls else url
        if message.role in ("system", "developer") and text:
            before.append(text)
        elif message.role == "user" and text:
            question = text
    if not question:
        raise Refused(400, "messages hold no text of the user: ask something", param="messages")
    asked = "\n".join([*before, question])
    if len(asked) > LONGEST:
        raise Refused(400, f"{len(asked)} characters are asked: must be at most {LONGEST}", param="messages")
    return asked, url


def _more(said: str, written: Written) -> str:
    """What is new in an answer; the end of a character that is not whole yet waits."""
    text = written.text
    if not written.done:
        text = text.rstrip(_UNFINISHED)
    return text[len(said) :] if text.startswith(said) else ""


def _head(about: About, model: str, kind: str) -> dict[str, object]:
    return {"id": f"chatcmpl-{about.request_id}", "object": kind, "created": int(time.time()), "model": model}


def _usage(found: list[Written]) -> dict[str, int]:
    asked = found[0].context if found else 0
    answered = sum(len(each.tokens) for each in found)
    return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}
