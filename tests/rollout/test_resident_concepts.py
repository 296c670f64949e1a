"""Many users' concepts at once: a mixed batch is, code for code and token for token, what each would get alone."""

from pathlib import Path

import pytest
import torch

import pyunictokens
from pyunictokens import ConceptTokens, RolloutEngine, TextTokenizer
from pyunictokens.models import ShowoConfig
from pyunictokens.utils.errors import UserError

from .tiny import CONFIG, CodesAsPixels, tiny_model

SIZES = {"bo": (2, 1), "mug": (3, 2), "ann": (2, 1)}
"""K and M of each concept: two of one size, one larger."""


def concept(name):
    made = ConceptTokens(name, CONFIG.hidden_size, *SIZES[name], seed=len(name)).double()
    with torch.no_grad():
        made.embed.mul_(20)
        made.head_weight.mul_(30)
        made.head_bias.copy_(torch.linspace(-1, 2, made.num_tokens))  # so that answers do use its tokens
    return made


def resident_engine(model, names=tuple(SIZES), tokenizer=None, **options):
    engine = RolloutEngine(model, CodesAsPixels(), tokenizer, **options)
    for name in names:
        engine.add_concept(concept(name))
    return engine


def alone_engine(model, name, tokenizer=None):
    own = concept(name)
    if tokenizer is not None:
        tokenizer = tokenizer.with_concept(own.tokens)
    model.attach(own)
    return RolloutEngine(model, CodesAsPixels(), tokenizer)


PROMPTS = [
    ("bo", [60, 61, 1, 2]),
    ("mug", [65, 60, 3]),
    (None, [7, 8]),
    ("ann", [60, 61, 1, 2]),
    ("bo", [63]),
    (None, [9]),
]
"""(concept, ids): bo and ann write the same ids and mean different rows."""


@pytest.mark.parametrize("max_rows", [64, 5])
def test_images_of_a_mixed_batch_are_those_of_each_concept_alone(max_rows):
    names, prompts = [name for name, _ in PROMPTS], [ids for _, ids in PROMPTS]
    options = dict(samples=2, steps=5, guidance_scale=2.0, seed=4)
    mixed = resident_engine(tiny_model(), max_rows=max_rows).generate_images(prompts, concepts=names, **options)
    assert mixed.concepts == names
    for place, (name, ids) in enumerate(PROMPTS):
        model = tiny_model()
        engine = alone_engine(model, name) if name else RolloutEngine(model, CodesAsPixels())
        rows = [2 * place, 2 * place + 1]
        alone = engine.generate_images([ids], sample_ids=rows, **options)
        assert torch.equal(mixed.codes[rows], alone.codes)
        assert torch.equal(mixed.inputs[rows], alone.inputs) and torch.equal(mixed.chosen[rows], alone.chosen)
        assert (mixed.logp[rows] - alone.logp).abs().max() < 1e-6
    assert (mixed.logp[0, 0] - mixed.logp[6, 0]).abs().max() > 1e-3  # the same ids, another concept


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 5}])
def test_answers_of_a_mixed_batch_are_those_of_each_concept_alone(options):
    codes = torch.randint(0, 24, (len(PROMPTS), 9), generator=torch.Generator().manual_seed(1))
    names, questions = [name for name, _ in PROMPTS], [ids for _, ids in PROMPTS]
    options = dict(samples=3, max_new_tokens=9, seed=6, **options)
    mixed = resident_engine(tiny_model()).generate_text(codes, questions, concepts=names, **options)
    assert mixed.concepts == names
    drawn = set()
    for place, (name, ids) in enumerate(PROMPTS):
        model = tiny_model()
        engine = alone_engine(model, name) if name else RolloutEngine(model, CodesAsPixels())
        rows = [3 * place, 3 * place + 1, 3 * place + 2]
        alone = engine.generate_text(codes[place : place + 1], [ids], sample_ids=rows, **options)
        assert torch.equal(mixed.lengths[rows], alone.lengths)
        longest = alone.tokens.shape[1]
        assert torch.equal(mixed.tokens[rows, :longest], alone.tokens)
        assert (mixed.logp[rows, :longest] - alone.logp).abs().max() < 1e-5
        if name:
            drawn |= set(alone.tokens.flatten().tolist()) & set(range(60, 66))
    assert options.get("temperature") == 0.0 or drawn, "no answer used a concept's token"


def words():
    return TextTokenizer.from_pretrained(Path(pyunictokens.__file__).parent / "assets" / "toy" / "tokenizer")


def worded_model():
    size = words().text_size
    changes = dict(vocab_size=size + 10 + 24 + 1, llm_vocab_size=size, bos_token_id=0, eos_token_id=1)
    assert set(changes) < set(ShowoConfig.__dataclass_fields__)
    return tiny_model(**changes)


def test_a_prompt_names_its_concept():
    model, texts = worded_model(), ["a photo of <bo> .", "<mug> on a table .", "a red ball ."]
    engine = resident_engine(model, tokenizer=words())
    mixed = engine.generate_images(texts, steps=4, seed=2)
    assert mixed.concepts == ["bo", "mug", None]
    asked = engine.generate_text(mixed.codes[:1], ["What is <mug> doing?", "What is it?"], max_new_tokens=5)
    assert asked.concepts == ["mug", None] and len(asked.texts) == 2
    for row, name in enumerate(("bo", "mug")):
        other = worded_model()
        alone = alone_engine(other, name, words()).generate_images(texts[row], steps=4, seed=2, sample_ids=[row])
        assert alone.prompt_ids == [mixed.prompt_ids[row]]
        assert torch.equal(alone.codes[0], mixed.codes[row])
    assert model.concept is None  # as it was before


def test_concepts_come_and_go():
    engine = resident_engine(tiny_model(), ["bo"])
    assert engine.concepts == ["bo"]
    before = engine.generate_images([[60]], steps=3, concepts="bo", guidance_scale=1.0)
    other = concept("bo")
    with torch.no_grad():
        other.embed.neg_()
    engine.add_concept(other)
    after = engine.generate_images([[60]], steps=3, concepts="bo", guidance_scale=1.0)
    assert (before.logp - after.logp).abs().max() > 1e-3
    assert engine.remove_concept("bo") is other and engine.concepts == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda e: e.generate_images([[1]], steps=2, concepts="cat"),
            r"concept 'cat' is not resident \(bo, mug, ann\)",
        ),
        (lambda e: e.generate_images([[1]], steps=2, concepts=["bo", None]), "2 concepts for 1 prompts"),
        (lambda e: e.generate_images([[70]], steps=2, concepts="bo"), r"prompts\[0\] has the id 70.*are 0…63"),
        (lambda e: e.generate_images([[1], [62]], steps=2), r"prompts\[1\] has the id 62.*are 0…59"),
        (lambda e: e.generate_images(["<bo> and <mug>"], steps=2), r"prompts\[0\] names <bo> and <mug>"),
        (lambda e: e.generate_images([], steps=2), "give at least one"),
        (lambda e: e.remove_concept("cat"), "not resident"),
        (lambda e: e.add_concept(ConceptTokens("cat", 8)), "concept <cat> of width 8: this model has width 32"),
    ],
)
def test_what_cannot_be_is_named(call, message):
    with pytest.raises(UserError, match=message):
        call(resident_engine(tiny_model()))


def test_an_attached_concept_and_residents_exclude_each_other():
    model = tiny_model().attach(concept("bo"))
    with pytest.raises(UserError, match=r"the model has <bo> attached: take it off"):
        RolloutEngine(model).add_concept(concept("mug"))


def test_the_vocabulary_of_several_concepts_row_by_row():
    """Embedding and logits are those of the model with each concept attached, padded with −inf."""
    model, names = tiny_model(), [None, "mug", "bo"]
    concepts = [name and concept(name) for name in names]
    vocabulary = model.vocabulary(concepts)
    hidden = torch.randn(20, 32, dtype=torch.float64)
    which = torch.randint(0, 3, (20,))
    logits = vocabulary.logits(hidden, which)
    few = vocabulary.logits(hidden[:3], which[:3])  # the skinny product
    assert (few - logits[:3]).nan_to_num(0.0).abs().max() < 1e-12
    for row in range(20):
        with model.using(concepts[which[row]]):
            plain = torch.nn.functional.linear(hidden[row], *model.text_head())
            ids = torch.arange(len(plain))
            assert torch.equal(vocabulary.embed(ids, which[row].expand(len(plain))), model.embed(ids))
        assert (logits[row, : len(plain)] - plain).abs().max() < 1e-12
        assert bool((logits[row, len(plain) :] == -torch.inf).all())
