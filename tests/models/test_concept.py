"""A concept's rows: names, groups, files of our own and published ones."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from pyunictokens.models.concept_tokens import ConceptTokens
from pyunictokens.utils.errors import UserError


def test_tokens_and_groups():
    concept = ConceptTokens("bo", 8, 3, 2)
    assert concept.tokens == ["<bo>", "<token_0>", "<token_1>", "<token_2>", "<token_3>", "<token_4>"]
    assert [concept.rows(g) for g in ("sks", "understanding", "generation", "extra")] == [
        slice(0, 1),
        slice(1, 4),
        slice(4, 6),
        slice(6, 6),
    ]
    assert sum(p.numel() for p in concept.parameters()) == 6 * 17
    with pytest.raises(ValueError, match="must be one of"):
        concept.rows("other")


def test_expand_helps_the_first_mention_only():
    concept = ConceptTokens("bo", 8, 2, 1)
    assert concept.expand("<bo> and <bo>") == "<token_0><token_1><token_2><bo> and <bo>"
    assert concept.expand("<bo>", groups=["generation"]) == "<token_2><bo>"
    assert concept.expand("nobody") == "nobody"


def test_grown_keeps_the_old_rows():
    concept = ConceptTokens("bo", 8, 2, 1, seed=3)
    more = concept.grown(4)
    assert more.num_tokens == 8 and torch.equal(more.embed[:4], concept.embed) and more.rows("extra") == slice(4, 8)


def test_files_round_trip(tmp_path):
    concept = ConceptTokens("bo", 8, 2, 1, 1, seed=5)
    concept.save(tmp_path / "a")
    again = ConceptTokens.load(tmp_path / "a")
    assert again.name == "bo" and again.num_extra == 1
    assert all(torch.equal(a, b) for a, b in zip(concept.parameters(), again.parameters(), strict=True))


def test_published_files_round_trip(tmp_path):
    concept = ConceptTokens("bo", 2048)  # 25 rows, as published
    assert concept.embed.shape == (25, 2048)
    concept.save_published(tmp_path, 5)
    concept.save_published(tmp_path, 15)
    with torch.no_grad():
        concept.embed.add_(1)
    again = ConceptTokens.load_published(tmp_path, "bo")
    assert again.num_generation == 8 and torch.equal(again.embed + 1, concept.embed)
    assert torch.equal(again.head_bias, concept.head_bias)
    grown = ConceptTokens.load_published(tmp_path, "bo", epoch=5, num_generation=4)
    assert (grown.num_generation, grown.num_extra) == (4, 4)
    with pytest.raises(UserError, match=r"no epoch_7_embed.pt; present: \[5, 15\]"):
        ConceptTokens.load_published(tmp_path, "bo", epoch=7)
    with pytest.raises(UserError, match="K=30"):
        ConceptTokens.load_published(tmp_path, "bo", num_understanding=30)
    (tmp_path / "epoch_15_lm_head_bias.pt").write_bytes(b"half")
    with pytest.raises(UserError, match="cannot be read as weights"):
        ConceptTokens.load_published(tmp_path, "bo")


def test_files_of_another_name_are_no_epochs(tmp_path):
    concept = ConceptTokens("bo", 8, 2, 1)
    concept.save_published(tmp_path, 15)
    for name in ("epoch_best_embed.pt", "epoch_15 (1)_embed.pt", "epoch_15_embed.pt.bak", "epoch__embed.pt"):
        (tmp_path / name).write_bytes((tmp_path / "epoch_15_embed.pt").read_bytes())
    again = ConceptTokens.load_published(tmp_path, "bo", num_understanding=2)
    assert torch.equal(again.embed, concept.embed)
    (tmp_path / "epoch_15_embed.pt").unlink()
    with pytest.raises(UserError, match=r"no epoch_\*_embed\.pt; present: none"):
        ConceptTokens.load_published(tmp_path, "bo")


def test_broken_files_are_named(tmp_path):
    concept = ConceptTokens("bo", 8, 2, 1)
    concept.save(tmp_path)
    (tmp_path / "concept.json").write_text((tmp_path / "concept.json").read_text().replace('"width": 8', '"width": 9'))
    with pytest.raises(UserError, match=r"embed of shape \(4, 8\): must be \(4, 9\)"):
        ConceptTokens.load(tmp_path)
    (tmp_path / "concept.json").write_text('{"name": "bo"}')
    with pytest.raises(UserError, match="width"):
        ConceptTokens.load(tmp_path)
    (tmp_path / "concept.json").unlink()
    with pytest.raises(UserError, match="no such file"):
        ConceptTokens.load(tmp_path)


@pytest.mark.parametrize("name", ["", "..", "../bo", "a/b", "<bo>", "a\\b", "-bo", "x" * 65, "a\n"])
def test_names_that_could_be_paths_are_refused(name):
    with pytest.raises(UserError, match="concept name"):
        ConceptTokens(name, 8)


def test_bad_sizes_are_named():
    with pytest.raises(UserError, match="width=0"):
        ConceptTokens("bo", 0)
    with pytest.raises(UserError, match="K=-1"):
        ConceptTokens("bo", 8, -1)


class OfOneDevice(TorchFunctionMode):
    """What a GPU says of numbers that are asked for on it from a generator of the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        generator, device = kwargs.get("generator"), kwargs.get("device")
        if generator is not None and device is not None and torch.device(device).type != generator.device.type:
            raise RuntimeError(f"Expected a {device} device type for generator but found {generator.device}")
        return func(*args, **kwargs)


def test_a_concept_is_made_on_the_device_that_is_asked_for():
    with OfOneDevice(), torch.device("meta"):
        concept = ConceptTokens("bo", 8)
    assert {parameter.device.type for parameter in concept.parameters()} == {"meta"}
    concept, generator = ConceptTokens("bo", 8, seed=3), torch.Generator().manual_seed(3)
    for drawn in (concept.embed, concept.head_weight):
        assert torch.equal(drawn, torch.randn(25, 8, generator=generator) * 0.02)
