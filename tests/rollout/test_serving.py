"""The serving engine: requests that come, go and fail at random are drawn and answered as each is alone."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyunictokens import RolloutEngine
from pyunictokens.models.showo.joining import JoinedDecoder
from pyunictokens.rollout.serving import (
    AnswerRequest,
    DeadlinePassed,
    Drawn,
    Ended,
    ImageRequest,
    Preview,
    QueueFull,
    ServingEngine,
    Written,
)
from pyunictokens.rollout.serving.images import MixedSlots
from pyunictokens.toy.model import load_toy
from pyunictokens.utils.errors import NotFinite, UserError

from .test_resident_concepts import concept, resident_engine, worded_model, words
from .tiny import CodesAsPixels

MODEL = worded_model()
ENGINE = resident_engine(MODEL, tokenizer=words())
PROMPTS = [("a photo of <bo> .", "bo"), ("<mug> on a table .", "mug"), ("a red ball .", None), ("", None)]
QUESTIONS = [("What is <bo> doing?", "bo"), ("What colour is <mug>?", "mug"), ("What is it?", None)]
IMAGE = torch.arange(9.0).reshape(1, 3, 3).expand(3, 3, 3)
UNKNOWN = torch.tensor([True, False, True] * 3)


def any_request(dice):
    if dice.random() < 0.6:
        prompt, name = dice.choice(PROMPTS)
        paint = dice.random() < 0.3
        return ImageRequest(
            prompt,
            name,
            samples=dice.randint(1, 3),
            steps=dice.choice([1, 3, 4]),
            guidance_scale=dice.choice([0.0, 1.5, 3.0]),
            temperature=dice.choice([0.0, 1.0]),
            seed=dice.randint(0, 2),
            grid=None if paint else dice.choice([None, (2, 4)]),
            image=IMAGE if paint else None,
            unknown=UNKNOWN if paint else None,
            previews=dice.choice([0, 0, 1]),
        )
    question, name = dice.choice(QUESTIONS)
    temperature, top_k = dice.choice([(1.0, 0), (0.0, 0), (0.7, 5)])
    image = IMAGE if dice.random() < 0.5 else 23 - IMAGE
    return AnswerRequest(
        image, question, name, dice.randint(1, 2), dice.randint(1, 8), temperature, top_k, seed=dice.randint(0, 2)
    )


def alone(request):
    """What the plain engine gives: codes [n, N], or the tokens of each answer."""
    if isinstance(request, ImageRequest):
        known = None
        if request.image is not None:
            known = CodesAsPixels().encode(request.image[None])[0].masked_fill(request.unknown, -1)
        return ENGINE.generate_images(
            [request.prompt],
            concepts=[request.concept],
            samples=request.samples,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            temperature=request.temperature,
            seed=request.seed,
            grid=request.grid,
            known_codes=known,
            record=False,
        ).codes
    found = ENGINE.generate_text(
        request.image[None],
        [request.question],
        concepts=[request.concept],
        samples=request.samples,
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,
        top_k=request.top_k,
        seed=request.seed,
    )
    return [tuple(row[:n]) for row, n in zip(found.tokens.tolist(), found.lengths.tolist(), strict=True)]


def check(request, events):
    assert [type(event) for event in events].count(Ended) == 1 and events[-1].error is None
    if isinstance(request, ImageRequest):
        drawn = {event.sample: event for event in events if isinstance(event, Drawn)}
        assert sorted(drawn) == list(range(request.samples))
        assert torch.equal(torch.stack([drawn[i].codes for i in range(request.samples)]), alone(request))
        height, width = request.grid or MODEL.grid
        assert all(event.pixels.shape == (3, height, width) for event in drawn.values())
        wanted = request.samples * min(request.previews, request.steps - 1)
        assert sum(isinstance(event, Preview) for event in events) == wanted
        return
    whole = {event.sample: event for event in events if isinstance(event, Written) and event.done}
    assert [whole[i].tokens for i in range(request.samples)] == alone(request)


def play(serving, plan, dice, abort=0.0):
    """Requests come at random between steps; returns the events of each, those that were aborted left out."""
    waiting, requests, events, gone = list(plan), {}, {}, set()
    while waiting or serving.busy:
        while waiting and dice.random() < 0.5:
            try:
                number = serving.add_request(ENGINE, waiting[0], user=dice.choice("ab"), priority=dice.randint(0, 1))
            except QueueFull:
                break
            requests[number], events[number] = waiting.pop(0), []
        for event in serving.step():
            assert event.ticket not in gone, "an event of a request that was aborted"
            assert not any(isinstance(old, Ended) for old in events[event.ticket]), "an event after the last"
            events[event.ticket].append(event)
        assert serving.running <= serving.max_rows
        live = [n for n, its in events.items() if n not in gone and not any(isinstance(e, Ended) for e in its)]
        if live and dice.random() < abort:
            number = dice.choice(live)
            assert serving.abort(number) and not serving.abort(number)
            gone.add(number)
    return {number: (requests[number], its) for number, its in events.items() if number not in gone}


def test_the_unconditional_prompt_is_computed_once(monkeypatch):
    asked = []

    def prefixes(texts, names, guided):
        asked.extend(texts)
        return RolloutEngine.prefixes(engine, texts, names, guided)

    engine, serving = resident_engine(MODEL, tokenizer=words()), ServingEngine()
    monkeypatch.setattr(engine, "prefixes", prefixes)
    for seed in range(3):  # nothing runs any more when the next comes
        serving.add_request(engine, ImageRequest(PROMPTS[2][0], steps=1, guidance_scale=2.0, seed=seed))
        while serving.busy:
            serving.step()
    assert asked.count([]) == 1 and len(asked) == 4


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.sampled_from([1, 3, 64]), batch_from=st.sampled_from([1, 4, 16]))
def test_whatever_else_runs_a_request_gets_what_it_gets_alone(seed, rows, batch_from):
    dice = random.Random(seed)
    serving = ServingEngine(max_rows=rows, max_waiting=9, batch_from=batch_from)
    plan = [any_request(dice) for _ in range(10)]
    found = play(serving, plan, dice, abort=0.1)
    for request, events in found.values():
        check(request, events)
    assert not serving._jobs and not serving._benches and serving.queue.waiting == 0
    assert sorted(serving._free) == list(range(rows))


def run(serving):
    events = []
    while serving.busy:
        events += serving.step()
    return events


def test_a_picture_is_the_same_to_the_last_bit_whatever_is_decoded_beside_it():
    engine = RolloutEngine.of(load_toy())
    requests = [ImageRequest("a red star", steps=1, grid=(1, 2), previews=0, seed=seed) for seed in range(7)]

    def pictures(some):
        serving = ServingEngine()
        numbers = [serving.add_request(engine, request) for request in some]
        drawn = {event.ticket: event.pixels for event in run(serving) if isinstance(event, Drawn)}
        return [drawn[number] for number in numbers]

    together = pictures(requests)
    for request, picture in zip(requests, together, strict=True):
        assert torch.equal(picture, pictures([request])[0])
    plain = engine.generate_images(["a red star"], steps=1, grid=(1, 2), seed=3, record=False)
    assert torch.equal(together[3], plain.pixels[0])


def test_a_mixed_batch_shares_its_steps():
    """Four requests with numbers of their own take as many calls of the transformer as the longest of them."""
    calls, model = [], worded_model()
    plain = model.image_hidden
    model.image_hidden = lambda codes, *rest: calls.append(len(codes)) or plain(codes, *rest)
    engine = resident_engine(model, tokenizer=words())
    serving = ServingEngine(batch_from=1)
    for seed, steps in enumerate((2, 5, 3, 5)):
        prompt, name = PROMPTS[seed]
        serving.add_request(engine, ImageRequest(prompt, name, steps=steps, guidance_scale=1.0 * (seed % 2), seed=seed))
    run(serving)
    assert len(calls) == 5 and calls[0] > calls[-1]


def test_a_few_images_on_a_cpu_are_drawn_two_at_a_time_and_many_side_by_side():
    def under_way(images, answers=0):
        """Slots held at each step, and the order in which requests of two steps end."""
        serving, held, ended = ServingEngine(batch_from=4), [], []
        for seed in range(images):
            serving.add_request(ENGINE, ImageRequest("a red ball .", steps=2, seed=seed))
        for seed in range(answers):
            serving.add_request(ENGINE, AnswerRequest(IMAGE, "What is it?", max_new_tokens=4, seed=seed))
        while serving.busy:
            ended += [event.ticket for event in serving.step() if isinstance(event, Ended)]
            held.append(serving.running)
        return held, ended

    assert under_way(3) == ([2, 0, 1, 0], [0, 1, 2])
    assert under_way(4) == ([4, 0], [0, 1, 2, 3])
    held, ended = under_way(1, answers=2)
    assert held[0] == 3 and len(ended) == 3, "answers wait for no image"
    held, _ = under_way(3, answers=2)
    assert held[0] == 4, "two images beside both answers"


def test_whose_turn_it_is_among_images_that_take_turns():
    serving, ended = ServingEngine(), []
    for user, priority in (("loud", 0), ("loud", 0), ("loud", 0), ("quiet", 0), ("paid", 1)):
        serving.add_request(ENGINE, ImageRequest("a red ball .", steps=2), user=user, priority=priority)
    while serving.busy:
        ended += [event.ticket for event in serving.step() if isinstance(event, Ended)]
    assert ended == [4, 0, 3, 1, 2]


def test_a_preview_is_what_the_codes_look_like_there():
    serving = ServingEngine()
    serving.add_request(ENGINE, ImageRequest("a red ball .", steps=4, seed=3, previews=3))
    events = run(serving)
    recorded = ENGINE.generate_images(["a red ball ."], steps=4, seed=3)
    shown = [event for event in events if isinstance(event, Preview)]
    assert [event.number for event in shown] == [0, 1, 2]
    for step, event in enumerate(shown):
        assert torch.equal(event.pixels[0].flatten().long(), recorded.chosen[0, step].long())


def test_an_answer_is_told_token_by_token():
    serving = ServingEngine()
    number = serving.add_request(
        ENGINE, AnswerRequest(IMAGE, "What is it?", max_new_tokens=5, temperature=0.0, streamed=True)
    )
    written = [event for event in run(serving) if isinstance(event, Written)]
    assert [len(event.tokens) for event in written] == list(range(1, len(written) + 1)) and len(written) > 1
    assert [event.done for event in written] == [False] * (len(written) - 1) + [True]
    assert all(event.ticket == number for event in written)
    assert written[-1].cut == (written[-1].tokens[-1] != MODEL.end_id)


def test_a_deadline_ends_a_request_wherever_it_is():
    now = [0.0]
    serving = ServingEngine(max_rows=1, clock=lambda: now[0])
    first = serving.add_request(ENGINE, ImageRequest("a red ball .", steps=9), deadline=5.0)
    second = serving.add_request(ENGINE, ImageRequest("a red ball .", steps=2), deadline=4.0)
    third = serving.add_request(ENGINE, ImageRequest("a red ball .", steps=2))
    serving.step()
    assert serving.running == 1 and serving.queue.waiting == 2
    now[0] = 6.0
    events = serving.step()
    assert {event.ticket for event in events if isinstance(event.error, DeadlinePassed)} == {first, second}
    ended = run(serving)
    assert [event.ticket for event in ended if isinstance(event, Ended) and event.error is None] == [third]


def test_too_many_are_told_to_come_back():
    serving = ServingEngine(max_rows=2, max_waiting=4)
    serving.add_request(ENGINE, ImageRequest("a red ball .", samples=3, steps=2))
    with pytest.raises(QueueFull) as full:
        serving.add_request(ENGINE, ImageRequest("a red ball .", samples=2, steps=2))
    assert full.value.retry_after >= 1
    run(serving)
    serving.add_request(ENGINE, ImageRequest("a red ball .", samples=2, steps=2))


def test_one_users_flood_does_not_keep_another_out():
    serving = ServingEngine(max_rows=2)
    for _ in range(10):
        serving.add_request(ENGINE, ImageRequest("a red ball .", samples=4, steps=2), user="loud")
    quiet = serving.add_request(ENGINE, ImageRequest("a red ball .", samples=2, steps=2), user="quiet")
    for _ in range(8):
        ended = [event.ticket for event in serving.step() if isinstance(event, Ended)]
        if quiet in ended:
            return
    pytest.fail("forty images of another user went first")


def test_a_model_that_breaks_fails_its_own_requests_and_no_others():
    bad = worded_model()
    bad.image_hidden = lambda *_: torch.full((1, 9, bad.width), float("nan"), dtype=torch.float64).expand(2, -1, -1)
    broken = resident_engine(bad, tokenizer=words())
    worse = worded_model()

    def fail(*_):
        raise RuntimeError("the device is gone")

    worse.image_hidden = fail
    gone = resident_engine(worse, tokenizer=words())
    serving = ServingEngine()
    numbers = [serving.add_request(its, ImageRequest("a red ball .", steps=2)) for its in (broken, gone, ENGINE)]
    ended = {event.ticket: event.error for event in run(serving) if isinstance(event, Ended)}
    assert isinstance(ended[numbers[0]], UserError)
    assert "device is gone" in str(ended[numbers[1]]) and ended[numbers[2]] is None
    assert sorted(serving._free) == list(range(64))


@pytest.mark.parametrize("where", ["seat", "gather", "join", "keep"])
def test_memory_that_runs_out_between_steps_loses_no_slot_and_ends_nobody_else(monkeypatch, where):
    """Rows that come and go move keys and values: what fails there is their batch's, in the next step."""
    serving = ServingEngine()
    other = resident_engine(worded_model(), tokenizer=words())
    image, answer = ImageRequest("a red ball .", steps=5), AnswerRequest(IMAGE, "What is it?", max_new_tokens=8)
    first = [serving.add_request(ENGINE, request) for request in (image, answer)]
    serving.step()
    later = [serving.add_request(engine, request) for engine in (ENGINE, other) for request in (image, answer)]

    def fail(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    part, name = {
        "seat": (MixedSlots, "place"),
        "gather": (MixedSlots, "_gather"),
        "join": (JoinedDecoder, "join"),
        "keep": (JoinedDecoder, "keep_rows"),
    }[where]
    kind = 0 if part is MixedSlots else 1
    with monkeypatch.context() as broken:
        broken.setattr(part, name, fail)
        serving.abort(first[kind])
        failed = {event.ticket for event in serving.step() if isinstance(event, Ended)}
    assert failed and failed <= set(later[kind::2])
    ended = {event.ticket: event.error for event in run(serving) if isinstance(event, Ended)}
    assert not any(ended.values()) and failed | ended.keys() == {first[1 - kind], *later}
    assert sorted(serving._free) == list(range(64))


def test_logits_that_are_not_finite_are_named():
    model = worded_model()
    model.showo.lm_head.weight.fill_(float("nan"))
    engine = RolloutEngine(model, CodesAsPixels(), words())
    serving = ServingEngine()
    serving.add_request(engine, AnswerRequest(IMAGE, "What is it?", max_new_tokens=3))
    (ended,) = [event for event in run(serving) if isinstance(event, Ended)]
    assert isinstance(ended.error, (NotFinite, UserError))
    assert sorted(serving._free) == list(range(64))


def test_concepts_under_way_are_known():
    serving = ServingEngine(max_rows=1)
    serving.add_request(ENGINE, ImageRequest(*PROMPTS[0], steps=2))
    serving.add_request(ENGINE, ImageRequest(*PROMPTS[1], steps=2))
    assert serving.concepts_in_use(ENGINE) == {"bo", "mug"}
    run(serving)
    assert serving.concepts_in_use(ENGINE) == set()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ImageRequest("a red ball .", samples=0), "n=0"),
        (ImageRequest("a red ball .", samples=1000), "n=1000: must be an integer in 1…256"),
        (ImageRequest("a red ball . " * 9), r"the prompt has \d+ tokens: this model reads 10"),
        (ImageRequest("a red ball .", "cat"), "concept 'cat' is not resident"),
        (ImageRequest("a red ball .", steps=0), "steps=0"),
        (ImageRequest("a red ball .", guidance_scale=-1.0), "guidance_scale=-1.0"),
        (ImageRequest("a red ball .", seed=-1), "seed=-1"),
        (ImageRequest("a red ball .", grid=(90, 90)), "position"),
        (ImageRequest("a red ball .", image=IMAGE), "belong together"),
        (ImageRequest("a red ball .", image=IMAGE, unknown=UNKNOWN[:4]), "mask covers 4 codes, the image has 9"),
        (AnswerRequest(IMAGE, "What is it?", max_new_tokens=1000), "1.*positions|position 1"),
        (AnswerRequest(IMAGE, "What is it?", temperature=float("nan")), "temperature=nan"),
    ],
)
def test_what_cannot_be_used_is_refused_before_it_waits(request_, message):
    serving = ServingEngine()
    with pytest.raises(UserError, match=message):
        serving.add_request(ENGINE, request_)
    assert not serving.busy and serving.queue.waiting == 0


def test_a_concept_that_is_taken_away_does_not_change_what_has_begun():
    engine = resident_engine(worded_model(), ["bo"], tokenizer=words())
    serving = ServingEngine()
    serving.add_request(engine, ImageRequest(*PROMPTS[0], steps=4, seed=1))
    serving.add_request(engine, AnswerRequest(IMAGE, *QUESTIONS[0], max_new_tokens=6))
    events = serving.step()
    other = concept("bo")
    with torch.no_grad():
        other.embed.neg_()
    engine.add_concept(other)
    (drawn,) = [event for event in events + run(serving) if isinstance(event, Drawn)]
    before = ENGINE.generate_images(*[[each] for each in PROMPTS[0][:1]], concepts="bo", steps=4, seed=1)
    assert torch.equal(drawn.codes, before.codes[0])
