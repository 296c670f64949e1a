"""One reader for the text files that people write: what an editor or a shell puts in front of the text is no part of
it."""

from __future__ import annotations

import codecs
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pyunictokens.data import read_facts
from pyunictokens.data.images import read_image
from pyunictokens.data.prompts import read_prompts
from pyunictokens.evaluate.suites.dreambench import _classes
from pyunictokens.rewards.served.messages import KEY_FILE, read_key
from pyunictokens.runs.sweep import choose
from pyunictokens.utils.errors import UserError
from pyunictokens.utils.files import read_json
from pyunictokens.utils.text import read_text

FORMS = {
    "utf-8": lambda text: text.encode(),
    "utf-8 with a mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "PowerShell": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "big-endian": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
}


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\r\ufeff")))
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_text(tmp_path: Path, form: str, text: str) -> None:
    (tmp_path / "a.txt").write_bytes(FORMS[form](text))
    assert read_text(tmp_path / "a.txt") == text
    (tmp_path / "a.txt").write_bytes(FORMS[form](text.replace("\n", "\r\n")))
    assert read_text(tmp_path / "a.txt") == text


@pytest.mark.parametrize("form", FORMS)
def test_whoever_reads_a_file_of_the_user_reads_every_form(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["bo", "Ünïque"]
    (tmp_path / "list.txt").write_bytes(FORMS[form]("Ünïque\r\nbo\r\n"))
    assert choose(names, str(tmp_path / "list.txt")) == ["Ünïque", "bo"]
    (tmp_path / "a.json").write_bytes(FORMS[form](json.dumps({"class": "dög"}, ensure_ascii=False)))
    assert read_json(tmp_path / "a.json") == {"class": "dög"}
    (tmp_path / "sheet.yaml").write_bytes(FORMS[form]("info: <bo> is a dög.\n"))
    assert read_facts(tmp_path / "sheet.yaml", "bo").info == "<bo> is a dög."
    (tmp_path / "key").write_bytes(FORMS[form]("0123456789abcdef" * 4 + "\r\n"))
    monkeypatch.setenv(KEY_FILE, str(tmp_path / "key"))
    assert read_key() == b"0123456789abcdef" * 4
    (tmp_path / "prompts.txt").write_bytes(FORMS[form]("a réd cat\r\n"))
    assert [prompt.text for prompt in read_prompts(tmp_path / "prompts.txt")] == ["a réd cat"]
    (tmp_path / "prompts_and_classes.txt").write_bytes(FORMS[form]("dog2,dog\r\nPrompts\r\n"))
    assert _classes(tmp_path) == {"dog2": "dog"}


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.txt: no such file"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(UserError, match="is a folder"):
        read_text(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 text \(byte 2\): save it as UTF-8"):
        read_text(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF16_LE + b"a")
    with pytest.raises(UserError, match="not UTF-16 text"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(UserError, match="3 bytes: must be at most 2"):
        read_text(tmp_path / "a.txt", largest=2)
    if os.geteuid() != 0:
        (tmp_path / "a.txt").chmod(0)
        with pytest.raises(UserError, match="cannot be read: Permission denied"):
            read_text(tmp_path / "a.txt")


def test_the_case_of_a_file_name_does_not_matter(tmp_path: Path) -> None:
    Image.effect_noise((20, 20), 50).convert("RGB").save(tmp_path / "Photo.JPG")
    with pytest.warns(UserWarning, match=r"photo\.jpg is spelled Photo\.JPG on disk: it is read"):
        assert read_image(tmp_path / "photo.jpg").size == (20, 20)
    (tmp_path / "RW.YAML").write_text("a: 1\n")
    with pytest.warns(UserWarning, match=r"rw\.yaml is spelled RW\.YAML on disk: it is read"):
        assert read_text(tmp_path / "rw.yaml") == "a: 1\n"
    (tmp_path / "rw.YAML").write_text("a: 2\n")
    with pytest.raises(UserError, match="no such file"):
        read_text(tmp_path / "rw.yaml")
