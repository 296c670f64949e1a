"""Answers: the golden greedy tokens, the plain loop token for token, rows that end at different times, log-probs."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.baselines import showo_plain
from pyunictokens import RolloutEngine, ops
from pyunictokens.models import Showo
from pyunictokens.models.showo import prompting
from pyunictokens.models.showo.attention import DecodeAttention
from pyunictokens.models.showo.prompting import SpecialIds
from pyunictokens.rollout.text import AnswerStep, TextSettings, decode
from pyunictokens.utils.errors import UserError

from .tiny import CodesAsPixels, tiny_engine, tiny_model

END = 41


def pictures(count, seed=0):
    return torch.randint(0, 24, (count, 9), generator=torch.Generator().manual_seed(seed))


def text_noise(seed, sample_ids, vocabulary):
    ids = torch.tensor(sample_ids)
    zero = torch.zeros_like(ids)
    return lambda step: ops.philox.gumbel(seed, ids, zero + step, zero, vocabulary, ops.philox.STREAM_TEXT)


def ending_model(seed=0):
    """A model that ends its answers now and then."""
    model = tiny_model(seed)
    model.showo.lm_head.bias[END] += 7.0
    return model


def test_greedy_answer_is_the_golden_one(showo_tiny, showo_cases):
    ids = SpecialIds.of(showo_tiny)
    sequence = showo_cases["mmu.input_ids"][0].tolist()
    soi, eoi = sequence.index(ids.soi), sequence.index(ids.eoi)
    codes = torch.tensor(sequence[soi + 1 : eoi])[None] - ids.first_code
    question = sequence[eoi + 1 :]
    for options in ({"temperature": 0.0}, {"top_k": 1}):
        rollout = RolloutEngine(showo_tiny).generate_text(codes, [question], max_new_tokens=16, samples=2, **options)
        assert torch.equal(rollout.tokens, showo_cases["mmu.greedy"].expand(2, -1))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 3, "temperature": 1.5}, {"temperature": 0.0}])
def test_equals_the_plain_loop_token_for_token(options):
    model = ending_model()
    codes, questions = pictures(3), [[1, 2], [3, 4], [5, 6]]
    ours = tiny_engine(model).generate_text(codes, questions, max_new_tokens=12, seed=7, samples=2, **options)
    pairs = [pair for pair in range(3) for _ in range(2)]
    tokens, logp = showo_plain.generate_text(
        model,
        codes[pairs],
        [questions[pair] for pair in pairs],
        max_new_tokens=12,
        noise=text_noise(7, list(range(6)), model.config.vocab_size),
        **options,
    )
    for row, length in enumerate(ours.lengths.tolist()):
        assert torch.equal(ours.tokens[row, :length], tokens[row, :length])
        assert (ours.logp[row, :length] - logp[row, :length]).abs().max() < 1e-5
        assert bool((ours.tokens[row, length:] == -1).all()) and bool((ours.logp[row, length:] == 0).all())
        ended = (tokens[row] == END).nonzero()
        assert length == (int(ended[0]) + 1 if len(ended) else 12)
    if not options:
        assert len(set(ours.lengths.tolist())) > 1, "rows should end at different times for this test to mean much"


def test_questions_of_different_lengths_share_a_batch_and_change_nothing():
    engine = tiny_engine(ending_model(3))
    codes, questions = pictures(4), [[1, 2, 3, 4], [5], [6, 7], [8]]
    ids = [30, 31, 1, 2, 7, 7, 2**35, 5, 6, 9, 4, 3]
    together = engine.generate_text(codes, questions, samples=3, max_new_tokens=10, seed=2, sample_ids=ids)
    assert together.prompt_index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    for row, sample in enumerate(ids):
        pair = row // 3
        alone = engine.generate_text(
            codes[pair : pair + 1], [questions[pair]], max_new_tokens=10, seed=2, sample_ids=[sample]
        )
        length = int(together.lengths[row])
        assert alone.tokens[0].tolist() == together.tokens[row, :length].tolist()
        assert (alone.logp[0] - together.logp[row, :length]).abs().max() < 1e-6
    assert torch.equal(together.tokens[4], together.tokens[5])  # the same question, id and seed


def test_equal_questions_about_one_image_are_computed_once(monkeypatch):
    computed, real = [], Showo.prefill_questions

    def counted(model, codes, questions):
        computed.append(len(questions))
        return real(model, codes, questions)

    monkeypatch.setattr(Showo, "prefill_questions", counted)
    codes = pictures(1).expand(4, -1)
    rollout = tiny_engine().generate_text(codes, [[1], [2], [1], [1]], samples=2, max_new_tokens=3)
    assert computed == [2] and len(rollout) == 8


def test_an_image_is_read_once_for_all_its_questions(monkeypatch):
    seen, real = [], Showo.encode
    monkeypatch.setattr(
        Showo,
        "encode",
        lambda self, x, positions, attend: (seen.append(x.shape[:2]), real(self, x, positions, attend))[1],
    )
    codes = pictures(2)
    tiny_engine().generate_text(codes[[0, 0, 1, 0]], [[1], [2, 3], [1], [4, 5]], samples=2, max_new_tokens=1)
    assert seen == [(2, 12), (2, 2), (2, 3)]  # both images; then questions of one id, of two, each with its sot


def test_one_image_serves_many_questions_and_one_question_many_images():
    engine, codes = tiny_engine(), pictures(3)
    many = engine.generate_text(codes[:1], [[1], [2, 3], [4]], max_new_tokens=4)
    assert torch.equal(many.image_codes, codes[:1].expand(3, -1))
    spread = engine.generate_text(codes, [[1, 2]], max_new_tokens=4)
    assert spread.question_ids == [[1, 2]] * 3
    single = engine.generate_text(codes[2:], [[1, 2]], max_new_tokens=4, sample_ids=[2])
    assert torch.equal(single.tokens[0], spread.tokens[2, : single.tokens.shape[1]])


def test_log_probs_are_those_of_the_full_distribution_whatever_top_k():
    model, codes, question = tiny_model(1), pictures(1), [3, 9]
    ids = SpecialIds.of(model)
    for options in ({"top_k": 2}, {"temperature": 2.0}, {"temperature": 0.0}):
        rollout = tiny_engine(model).generate_text(codes, [question], max_new_tokens=6, **options)
        tokens = rollout.tokens[0]
        sequence = torch.cat([torch.tensor(prompting.mmu_prefix(codes[0], question, ids)), tokens])[None]
        logits = model(sequence, prompting.attention_allowed(sequence, "mmu", ids))[0, -len(tokens) - 1 : -1]
        plain = F.log_softmax(logits / (options.get("temperature") or 1.0), -1).gather(1, tokens[:, None])[:, 0]
        assert (plain - rollout.logp[0]).abs().max() < 1e-5


def test_pixels_are_read_through_the_tokenizer():
    codes = pictures(2)
    engine = tiny_engine()
    pixels = engine.vq.decode(codes, (3, 3))
    a = engine.generate_text(pixels, [[1], [2]], max_new_tokens=3)
    b = engine.generate_text(codes, [[1], [2]], max_new_tokens=3)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.image_codes, codes)


def test_questions_are_wrapped_unless_raw_and_answers_read_without_their_end():
    class Letters:
        def __init__(self):
            self.asked = []

        def encode(self, text):
            self.asked.append(text)
            return [7, 8]

        def decode(self, ids):
            return " ".join(str(i) for i in ids if i != END)

    words = Letters()
    engine = RolloutEngine(ending_model(), CodesAsPixels(), words)
    rollout = engine.generate_text(pictures(1), "What is it?", samples=4, max_new_tokens=8)
    engine.generate_text(pictures(1), "What is it?", raw=True, max_new_tokens=1)
    assert words.asked == ["USER: \nWhat is it? ASSISTANT:", "What is it?"]
    for row, text in enumerate(rollout.texts):
        kept = [token for token in rollout.tokens[row].tolist() if token not in (-1, END)]
        assert text == " ".join(map(str, kept))


def test_clip_features_equal_the_plain_sequence():
    model = tiny_model(w_clip_vit=True)
    features = torch.randn(2, 4, 1024, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    engine, ids = tiny_engine(model), SpecialIds.of(model)
    system, questions = [1, 2, 3], [[4, 5], [6]]
    model.system_ids = system
    rollout = engine.generate_text(features, questions, temperature=0.0, max_new_tokens=5)
    assert rollout.image_codes is None and torch.equal(rollout.image_features, features)
    for row, question in enumerate(questions):
        tokens: list[int] = []
        for _ in range(int(rollout.lengths[row])):
            text = model.embed(torch.tensor([ids.mmu, *system, ids.soi, ids.eoi, *question, *tokens]))[None]
            x = torch.cat([text[:, :5], model.project_clip(features[row : row + 1]), text[:, 5:]], dim=1)
            allowed = prompting.mmu_clip_allowed(3, 4, len(question) + len(tokens))
            tokens.append(int(model(None, allowed, inputs_embeds=x)[0, -1].argmax()))
        assert tokens == rollout.tokens[row, : len(tokens)].tolist()


def test_text_and_image_noise_of_one_id_are_not_the_same_numbers():
    ids = torch.tensor([3])
    zero = torch.zeros_like(ids)
    image = ops.philox.gumbel(0, ids, zero, zero, 24, ops.philox.STREAM_TOKEN)
    assert not torch.equal(image, text_noise(0, [3], 24)(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": []}, "give at least one"),
        ({"questions": [[1], [2], [3]]}, "2 images and 3 questions"),
        ({"questions": "What?"}, "give RolloutEngine a tokenizer"),
        ({"questions": [[99]]}, "text ids of this model are 0…59"),
        ({"samples": 0}, "samples=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 120}, "this model has 128"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"sample_ids": [1]}, "1 sample_ids for 2 rows"),
        ({"sample_ids": [1, -4]}, "sample_ids hold -4"),
        ({"images": torch.full((2, 9), 24)}, "reach from 24 to 24"),
        ({"images": torch.full((2, 9), -1)}, "generate it first"),
        ({"images": torch.full((2, 3, 3, 3), float("nan"))}, "NaN"),
        ({"images": torch.zeros(2, 3, 3, 3, dtype=torch.long)}, "must be pixels float"),
        ({"images": torch.zeros(0, 9, dtype=torch.long)}, "give at least one"),
        ({"images": torch.zeros(0, 3, 3, 3)}, "give at least one"),
        ({"questions": [1, 2]}, "give a list of prompts, not one's ids"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    given = {"images": pictures(2), "questions": [[1], [2]], "max_new_tokens": 2, **change}
    with pytest.raises(UserError, match=message):
        tiny_engine().generate_text(given.pop("images"), given.pop("questions"), **given)


def test_a_model_of_nan_is_reported():
    model = tiny_model()
    model.showo.lm_head.bias[3] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        tiny_engine(model).generate_text(pictures(1), [[1]], max_new_tokens=2)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_step_of_static_shapes_gives_the_same_answers(mixed):
    """As a captured step runs: buffers of full length, ended rows still there, called again after the end."""
    model = ending_model(1)
    questions = [[1, 2], [5], [6, 7, 8]] if mixed else [[1, 2]] * 3
    prompts, last = model.prefill_questions(pictures(3), questions)
    rows, ids, cut = [0, 0, 0, 1, 2, 2], [5, 9, 2, 0, 1, 7], TextSettings(10, 1.0, 0, 3, END)
    vocabulary = model.vocabulary([None])
    tokens, logp, lengths = decode(model, vocabulary, prompts, last, rows, [0] * 6, ids, cut)
    step = AnswerStep(model, vocabulary, prompts, last, rows, [0] * 6, ids, cut, sliced=False)
    step.keep_going.zero_()
    step()  # a warm-up: nothing that matters may change
    step.keep_going.fill_(1)
    taken = 0
    while int(step.keep_going):
        places = (step.tokens.data_ptr(), step._hidden.data_ptr(), step.alive.data_ptr())
        step()
        assert places == (step.tokens.data_ptr(), step._hidden.data_ptr(), step.alive.data_ptr())
        taken += 1
    step()
    assert taken == int(lengths.max()) and len(set(lengths.tolist())) > 1
    assert torch.equal(step.tokens[:, :taken], tokens) and bool((step.tokens[:, taken:] == -1).all())
    assert (step.logp[:, :taken] - logp).abs().max() < 1e-6


def test_prompts_are_read_where_they_lie():
    """The decoder's own buffers hold answers alone, however long the prompts are."""
    model = tiny_model()
    prompts, _ = model.prefill_questions(pictures(2), [[1, 2], [3, 4, 5]])
    attend = DecodeAttention(prompts, [0, 0, 1], max_new=4)
    assert all(buffer.shape == (3, 2, 4, 16) for buffer in attend._keys + attend._values)
    with pytest.raises(ValueError, match="rows of one prompt must stand together"):
        DecodeAttention(prompts, [0, 1, 0], max_new=4)
