"""Which family a checkpoint belongs to, what a word implies, and that nobody outside `models/` names a model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import pyunictokens as uct
from pyunictokens.models import MagvitV2, Showo, Sources, registry
from pyunictokens.rollout import RolloutEngine
from pyunictokens.toy.model import toy_folder
from pyunictokens.utils.errors import UserError

from .second_model import SecondModel

PACKAGE = Path(uct.__file__).parent


def test_show_o_is_known_by_its_config_and_comes_with_its_tokenizers() -> None:
    toy = toy_folder()
    bundle = uct.models.load(toy / "showo", vq=toy / "vq", tokenizer=toy / "tokenizer")
    assert isinstance(bundle.model, Showo) and isinstance(bundle.vq, MagvitV2)
    assert bundle.model.max_text == 48 and bundle.size == 64
    assert not any(parameter.requires_grad for parameter in bundle.model.parameters())
    drawn = RolloutEngine.of(bundle).generate_images(["A red cat."], steps=2, seed=1)
    assert drawn.pixels is not None and drawn.pixels.shape == (1, 3, 64, 64)


def test_what_is_missing_or_does_not_fit_is_said() -> None:
    toy = toy_folder()
    with pytest.raises(UserError, match="vq and tokenizer missing: give the image tokenizer"):
        uct.models.load(toy / "showo")
    with pytest.raises(UserError, match="no such folder"):
        uct.models.load(toy / "nothing")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "UVit2DModel"}, "'_class_name': 'UVit2DModel'"),
        ({"architectures": ["OlmoForCausalLM"]}, "OlmoForCausalLM"),
        ({}, "which names no class"),
    ],
)
def test_an_unknown_family_is_an_error_that_names_the_families(config: dict, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError,
        match=r"is of no family known here: show-o, amused, lumina-dimoo, mmada, llada\. Known by name: sh",
    ) as error:
        uct.models.load(tmp_path)
    assert said in str(error.value)


def test_a_word_implies_the_tokenizers_and_what_is_given_goes_first() -> None:
    known = Sources.choose(Sources("show-o-512"))
    assert known == Sources("showlab/show-o-512x512", "showlab/magvitv2", "microsoft/phi-1_5")
    assert Sources.choose(Sources("show-o-512", vq="mine")).vq == "mine"
    assert Sources.choose(Sources(), Sources("a", "b", "c")) == Sources("a", "b", "c")
    with pytest.raises(UserError, match="--vq and --tokenizer missing"):
        Sources.choose(Sources("some/model"))
    assert Sources.choose(Sources()).is_toy


def test_a_new_family_is_a_module_and_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(registry.FAMILIES, "second", "tests.models.second_model")
    SecondModel.random(2).save_pretrained(tmp_path)
    bundle = uct.models.load(tmp_path)
    assert isinstance(bundle.model, SecondModel)
    drawn = RolloutEngine.of(bundle).generate_images(["a cat"], seed=1)
    assert drawn.pixels is not None and drawn.pixels.shape == (1, 3, 3, 5)


def test_nobody_outside_models_reaches_into_a_model() -> None:
    """The door alone names one."""
    reaches = re.compile(r"\bShowo\b|lm_head|model\.showo|\bnum_vq_tokens\b|\.model\.config\b|\bmodel\.config\b")
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        name = str(file.relative_to(PACKAGE))
        of_others = name.startswith("baselines/") and "showo" not in name  # transformers' models, by their own names
        if not name.startswith("models/") and name != "__init__.py" and not of_others:
            lines = file.read_text(encoding="utf-8").splitlines()
            found += [f"{name}:{number}: {line}" for number, line in enumerate(lines, 1) if reaches.search(line)]
    assert not found, "\n".join(found)


def test_the_table_of_models_tells_the_size_of_their_files() -> None:
    root = Path(uct.__file__).parent.parent
    told = re.findall(r"`(\w+\.py)`(?:, | \()(\d+)", (root / "docs" / "models.md").read_text())
    assert {name for name, _ in told} == {
        *("amused.py", "uvit.py", "mmada.py", "llada.py", "dimoo.py", "llama_body.py")
    }
    for name, lines in told:
        true = len((root / "pyunictokens" / "models" / name).read_text().splitlines())
        assert abs(int(lines) - true) <= 0.1 * true and true < 400, f"{name}: {lines} told, {true} found"
    several = re.search(r"`showo/`, (\d+) files of at most (\d+)", (root / "docs" / "models.md").read_text())
    own = [file for file in (root / "pyunictokens" / "models" / "showo").glob("*.py") if file.stem != "__init__"]
    longest = max(len(file.read_text().splitlines()) for file in own)
    assert several is not None and int(several[1]) == len(own)
    assert longest < 400 and abs(int(several[2]) - longest) <= 0.1 * longest
