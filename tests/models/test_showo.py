"""The transformer against golden vectors, against transformers' own Phi, and its fast paths against its plain one."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

import pyunictokens as uct
from pyunictokens.models import (
    ConceptTokens,
    PromptKV,
    Showo,
    ShowoConfig,
)
from pyunictokens.models.showo.attention import DecodeAttention
from pyunictokens.models.showo.prompting import SpecialIds, attention_allowed, mmu, mmu_clip_allowed, t2i
from pyunictokens.utils.errors import UserError

SMALL = ShowoConfig(
    vocab_size=50 + 10 + 24 + 1,
    llm_vocab_size=50,
    codebook_size=24,
    num_vq_tokens=9,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=3,
    max_position_embeddings=128,
    bos_token_id=40,
    eos_token_id=41,
)


def small(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: object) -> Showo:
    torch.manual_seed(seed)
    model = Showo(dataclasses.replace(SMALL, **changes)).to(dtype).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if parameter.ndim == 1 else 0.0))
    return model


def test_logits_equal_the_golden_ones(showo_tiny, showo_cases, showo_meta):
    ids = SpecialIds.of(showo_tiny)
    cases = showo_cases
    texts = [*showo_meta["text_ids"], [], []]
    sequences = torch.stack([t2i(text, None, ids, showo_meta["max_text_tokens"], 16) for text in texts])
    assert torch.equal(sequences, cases["t2i.input_ids"])
    allowed = attention_allowed(sequences, "t2i", ids)
    assert torch.equal(allowed, cases["t2i.attention_allowed"])
    rows = sequences != ids.pad
    assert (showo_tiny(sequences, allowed) - cases["t2i.logits"])[rows].abs().max() < 1e-4
    questions = cases["mmu.input_ids"]
    logits = showo_tiny(questions, attention_allowed(questions, "mmu", ids))
    assert (logits - cases["mmu.logits"]).abs().max() < 1e-4


def test_special_ids_are_the_published_ones(showo_tiny, showo_meta):
    ids = dataclasses.asdict(SpecialIds.of(showo_tiny))
    assert {name: ids[name] for name in showo_meta["special_ids"]} == showo_meta["special_ids"]
    assert ids["first_code"] == showo_meta["first_code_id"]


def test_blocks_equal_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    model = small(dtype=torch.float32)
    c = model.config
    phi = transformers.PhiForCausalLM(
        transformers.PhiConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            max_position_embeddings=c.max_position_embeddings,
            qk_layernorm=True,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta, "partial_rotary_factor": 0.5},
            attn_implementation="eager",
        )
    ).eval()
    phi.load_state_dict(model.showo.state_dict())
    ids = torch.randint(0, c.vocab_size, (2, 11))
    causal = torch.ones(1, 11, 11, dtype=torch.bool).tril()
    assert (model(ids, causal) - phi(ids).logits).abs().max() < 1e-4


def _t2i_batch(model: Showo, texts: list[list[int]], codes: torch.Tensor, max_text: int) -> torch.Tensor:
    ids = SpecialIds.of(model)
    sequences = torch.stack([t2i(text, row, ids, max_text) for text, row in zip(texts, codes, strict=True)])
    return model(sequences, attention_allowed(sequences, "t2i", ids))


@pytest.mark.parametrize("count", [1, 9, 12])
def test_cached_image_rows_equal_the_plain_path(count):
    model, max_text = small(max_text=13), 13
    texts = [[3, 4, 5], [7], list(range(20)), [3, 4, 5], [9, 8, 2]]
    codes = torch.randint(-1, 24, (5, count))
    plain = _t2i_batch(model, texts, codes, max_text)[:, -(count + 1) : -1]
    ids = SpecialIds.of(model)
    prompts = model.prefill([model.prompt_ids(text) for text in texts])
    hidden = model.image_hidden(codes, prompts, range(5))
    weight, bias = model.image_head()
    first = ids.first_code
    assert (F.linear(hidden, weight, bias) - plain[..., first : first + 24]).abs().max() < 1e-10
    order = [4, 0, 2]
    mixed = model.image_hidden(codes[order], prompts, order)
    assert (mixed - hidden[order]).abs().max() < 1e-10


def test_gradients_through_prompt_leaves_equal_those_of_the_whole_graph():
    model = small(max_text=8).requires_grad_(True)
    texts = [model.prompt_ids(text) for text in ([1, 2, 3], [4])]
    codes = torch.randint(-1, 24, (6, 9))
    rows = [0, 1, 1, 0, 0, 1]
    weights = torch.randn(6, 9, 48, dtype=torch.float64)

    (model.image_hidden(codes, model.prefill(texts), rows) * weights).sum().backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    live = model.prefill(texts)
    leaves = live.with_tensors([tensor.detach().requires_grad_() for tensor in live.tensors()])
    for part in (slice(0, 2), slice(2, 5), slice(5, 6)):
        (model.image_hidden(codes[part], leaves, rows[part]) * weights[part]).sum().backward()
    torch.autograd.backward(live.tensors(), [leaf.grad for leaf in leaves.tensors()])
    for name, parameter in model.named_parameters():
        if name in whole:
            assert (parameter.grad - whole[name]).abs().max() < 1e-9, name


def test_cached_answers_equal_the_plain_path():
    model = small()
    ids = SpecialIds.of(model)
    codes = torch.randint(0, 24, (3, 9))
    questions = [[1, 2], [5, 6, 7, 8], [3, 3]]
    answers = torch.randint(0, 50, (3, 5))
    prompts, last = model.prefill_questions(codes, questions)
    rows = [2, 0, 1, 1]
    hidden = model.answer_hidden(answers[rows], prompts, last, rows)
    logits = F.linear(hidden, *model.text_head())
    for place, row in enumerate(rows):
        sequence = mmu(codes[row], questions[row], ids, answers[row].tolist())[None]
        plain = model(sequence, attention_allowed(sequence, "mmu", ids))[0, -7:-2]
        assert (logits[place] - plain).abs().max() < 1e-10


def test_greedy_answer_token_by_token_is_the_golden_one(showo_tiny, showo_cases):
    ids = SpecialIds.of(showo_tiny)
    sequence = showo_cases["mmu.input_ids"][0].tolist()
    soi, eoi = sequence.index(ids.soi), sequence.index(ids.eoi)
    codes = torch.tensor(sequence[soi + 1 : eoi])[None] - ids.first_code
    prompts, last = showo_tiny.prefill_questions(codes, [sequence[eoi + 1 :]])
    attend = DecodeAttention(prompts, [0], max_new=16)
    weight, bias = showo_tiny.text_head()
    tokens: list[int] = []
    for index in range(16):
        tokens.append(int(F.linear(last, weight, bias).argmax(-1)))
        position = torch.tensor([prompts.next_position[0] + index])
        x = showo_tiny.embed(torch.tensor([[tokens[-1]]]))
        last = showo_tiny.encode(x, position, attend)[:, 0]
        attend.advance()
    assert tokens == showo_cases["mmu.greedy"].tolist()


def test_clip_variant_equals_the_plain_path():
    model = small(w_clip_vit=True)
    features = torch.randn(2, 4, 1024, dtype=torch.float64)
    system, question = [1, 2, 3], [4, 5]
    model.system_ids = system
    prompts, last = model.prefill_questions(features, [question, question])
    assert prompts.next_position == [12, 12] and prompts.lengths == [12, 12]
    ids = SpecialIds.of(model)
    text = model.embed(torch.tensor([ids.mmu, *system, ids.soi, ids.eoi, *question])).expand(2, -1, -1)
    x = torch.cat([text[:, :5], model.project_clip(features), text[:, 5:]], dim=1)
    plain = model(None, mmu_clip_allowed(3, 4, 2), inputs_embeds=x)[:, -1]
    assert (F.linear(last, *model.text_head()) - plain).abs().max() < 1e-10
    with pytest.raises(UserError, match="mm_projector"):
        small().project_clip(features)


def test_a_concept_moves_the_codes_and_leaves_the_weights():
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    concept = ConceptTokens("bo", 48, 2, 1).double()
    plain_ids = torch.tensor([[3, 51, 60, 70, 84]])
    plain = model(plain_ids)
    model.attach(concept)
    assert (model.num_new, model.first_code_id, model.mask_token_id) == (4, 64, 88)
    logits = model(torch.tensor([[3, 51, 64, 74, 88]]))
    moved = torch.cat([logits[..., :60], logits[..., 64:]], dim=-1)
    assert torch.allclose(moved, plain, rtol=1e-12)
    row = model.embed(torch.tensor([60, 63]))
    assert torch.equal(row, concept.embed[[0, 3]])
    model(torch.tensor([[60, 61, 70]])).sum().backward()
    assert concept.embed.grad[0].abs().sum() > 0 and concept.embed.grad[3].abs().sum() == 0
    assert concept.head_weight.grad.abs().sum() > 0
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.detach()
    assert torch.equal(model(plain_ids), plain)
    with pytest.raises(UserError, match="width"):
        model.attach(ConceptTokens("bo", 32))


def test_codes_embed_as_their_ids_do():
    model = small().attach(ConceptTokens("bo", 48, 2, 1).double())
    codes = torch.tensor([-1, 0, 23])
    ids = torch.tensor([model.mask_token_id, model.first_code_id, model.first_code_id + 23])
    assert torch.equal(model.embed_codes(codes), model.embed(ids))


def test_layer_checkpointing_changes_no_gradient():
    model = small().requires_grad_(True)
    ids = torch.randint(0, 85, (2, 7))
    model(ids).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.checkpoint_layers = True
    model(ids).square().sum().backward()
    assert all(torch.allclose(p.grad, plain[name], rtol=1e-12) for name, p in model.named_parameters())


def test_too_long_sequences_are_refused():
    model = small()
    with pytest.raises(UserError, match="129 positions: this model has 128"):
        model(torch.zeros(1, 129, dtype=torch.long))
    model.max_text = 100
    prompts = model.prefill([[1, 2]])
    with pytest.raises(UserError, match="use a smaller grid"):
        model.image_hidden(torch.zeros(1, 36, dtype=torch.long), prompts, [0])
    with pytest.raises(UserError, match="at most max_text"):
        small(max_text=4).prefill([[1] * 6])
    with pytest.raises(UserError, match="attention_allowed of shape"):
        model(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 3, 3, dtype=torch.bool))


def test_config_says_what_is_wrong():
    with pytest.raises(UserError, match="must be llm_vocab_size"):
        dataclasses.replace(SMALL, vocab_size=90)
    with pytest.raises(UserError, match="multiple of num_attention_heads"):
        dataclasses.replace(SMALL, num_attention_heads=5)


def test_full_size_keys_map_exactly(golden, tmp_path):
    listed = json.loads((golden / "checkpoint_show-o-512x512.json").read_text())
    extra = json.loads((golden / "checkpoint_show-o-w-clip-vit_extra.json").read_text())
    published = {"codebook_size": 8192, "llm_vocab_size": 50295, "num_vq_tokens": 1024, "vocab_size": 58498}
    for keys in (listed, {**listed, **extra}):
        shapes = {key: tuple(shape) for key, (shape, _) in keys.items()}
        config = ShowoConfig.from_checkpoint(published, shapes, tmp_path)
        with torch.device("meta"):
            model = Showo(config)
        assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes
        assert dataclasses.replace(config, w_clip_vit=False) == ShowoConfig()


def test_saved_model_loads_back(tmp_path):
    model = small(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again = Showo.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert isinstance(uct.Showo.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype, torch.dtype)
    assert uct.Showo.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_prompts_select_and_add_without_copies():
    model = small(max_text=8)
    prompts = model.prefill([[1, 2], [1, 2, 3], [1, 2]])
    assert prompts.lengths == [2, 3, 2] and prompts.keys[0][0] is prompts.keys[2][0]
    both = prompts.select([1]) + prompts.select([0])
    assert isinstance(both, PromptKV) and both.lengths == [3, 2] and both.keys[0][0] is prompts.keys[1][0]
