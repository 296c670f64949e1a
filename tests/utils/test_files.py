"""Whole-or-absent files, JSON errors with file and position, names that may become a path, and the two errors."""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from pyunictokens.utils import files as io
from pyunictokens.utils.errors import MissingExtra, UserError, require


def test_text_and_bytes_arrive_whole_in_new_folders(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "note.txt"
    io.write_text_atomic(target, "grüße ⟨bo⟩")
    assert target.read_text(encoding="utf-8") == "grüße ⟨bo⟩"
    io.write_bytes_atomic(target, b"\x00\xff")
    assert target.read_bytes() == b"\x00\xff"
    assert [p.name for p in target.parent.iterdir()] == ["note.txt"]


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        io.write_text_atomic(tmp_path / "x", "1")
    finally:
        os.umask(before)
    if sys.platform != "win32":
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    target = tmp_path / "state.json"
    io.write_text_atomic(target, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left"):
        io.write_text_atomic(target, "new")
    monkeypatch.undo()
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_the_same_tensors_and_metadata_give_the_same_file(tmp_path: Path) -> None:
    tensors = {"weight": torch.arange(6.0).view(2, 3), "ä": torch.ones(1, dtype=torch.int8)}
    about = {f"key{number}": "größer" for number in range(6)}
    files = set()
    for number in range(8):
        io.save_safetensors_atomic(
            tmp_path / "w.safetensors", tensors, dict(sorted(about.items(), reverse=bool(number % 2)))
        )
        files.add((tmp_path / "w.safetensors").read_bytes())
    assert len(files) == 1
    assert load_file(tmp_path / "w.safetensors").keys() == tensors.keys()
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata().items() >= about.items()


def test_safetensors_round_trip(tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    tensors = {"view": base[:, ::2].t(), "same": base, "half": base.bfloat16(), "codes": torch.arange(5)}
    io.save_safetensors_atomic(tmp_path / "w.safetensors", tensors, {"seed": "3"})
    loaded = load_file(tmp_path / "w.safetensors")
    assert loaded.keys() == tensors.keys()
    for key, value in tensors.items():
        assert loaded[key].dtype == value.dtype
        assert torch.equal(loaded[key], value)
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata()["seed"] == "3"


def test_json_round_trip_keeps_letters_readable(tmp_path: Path) -> None:
    value = {"prompt": "⟨bo⟩ läuft", "n": [1, 2.5, None, True]}
    io.write_json(tmp_path / "v.json", value)
    assert io.read_json(tmp_path / "v.json") == value
    assert "läuft" in (tmp_path / "v.json").read_text(encoding="utf-8")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(), _JSON, max_size=4))
def test_json_in_rows_says_the_same(tmp_path: Path, value: dict[str, object]) -> None:
    io.write_json_rows(tmp_path / "v.json", value)
    assert io.read_json(tmp_path / "v.json") == value


def test_json_in_rows_has_a_line_for_each_record(tmp_path: Path) -> None:
    io.write_json_rows(
        tmp_path / "v.json", {"scale": "full", "cells": [{"a": [1, 2]}, {"a": {"b": 3}}], "by": {"x": [4]}}
    )
    text = (tmp_path / "v.json").read_text()
    assert text == (
        '{\n "scale": "full",\n "cells": [\n  {"a": [1, 2]},\n  {"a": {"b": 3}}\n ],\n "by": {\n  "x": [4]\n }\n}\n'
    )


def test_json_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "v.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert io.read_json(tmp_path / "v.json") == [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "b": }', "not valid JSON at line 2, column 7"),
        (b"", "not valid JSON at line 1, column 1"),
        (b"abc\xff", r"not UTF-8 text \(byte 3\): save it as UTF-8"),
        (b"[" * 200_000, "JSON nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "not usable JSON: a number of 5000 digits"),
        (b"[" + b"9" * 301 + b"]", "not usable JSON: a number of 301 digits"),
        (rb'{"note": "\ud800"}', "not usable JSON: .*surrogates not allowed"),
    ],
)
def test_bad_json_names_file_and_place(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"bad\.json: {message}"):
        io.read_json(tmp_path / "bad.json")


def test_whole_characters_and_long_numbers_are_read(tmp_path: Path) -> None:
    (tmp_path / "v.json").write_text(r'["\ud83d\ude00", 123456789012345678901234567890, 1e400]')
    assert io.read_json(tmp_path / "v.json") == ["\U0001f600", 123456789012345678901234567890, float("inf")]
    io.write_json(tmp_path / "v.json", {"file": os.fsdecode(b"b\xff.png")})  # a name that is no text
    assert io.read_json(tmp_path / "v.json") == {"file": "b?.png"}


def test_lines_that_break_their_reader_are_passed_over(tmp_path: Path) -> None:
    good = '{"step": 0}'
    lines = [good, '{"step": ' + "9" * 5000 + "}", r'{"step": 1, "answer": "\ud800"}', "[" * 100_000, "\0", good]
    (tmp_path / "log").write_text("\n".join(lines))
    assert io.read_json_lines(tmp_path / "log") == [{"step": 0}, {"step": 0}]


def test_a_seal_is_of_everything(tmp_path: Path) -> None:
    table = {"a": [1, 2.5, None, {"10": 1, "9": 2}], "é": "ü"}
    io.write_json(tmp_path / "t.json", io.sealed({**table, "b": {10: 1, 9: 2}}))
    read = io.read_json(tmp_path / "t.json")
    assert io.unsealed(read, "t") == {**table, "b": {"10": 1, "9": 2}} and io.unsealed(table, "t") == table
    for changed in ({**read, "a": [1, 2.5, None, {"10": 1, "9": 3}]}, {**read, "c": 0}, {**read, "sha256": 3}):
        with pytest.raises(UserError, match="t: is damaged"):
            io.unsealed(changed, "t")


def test_the_new_name_is_on_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, synced = os.fsync, []

    def fsync(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), (tmp_path / "v").exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    io.write_bytes_atomic(tmp_path / "v", b"x")
    assert synced == [(False, False), (True, True)], "the file before its rename, its folder after"


def test_a_sweep_leaves_what_others_are_at(tmp_path: Path) -> None:
    for place in ("", "stages", "other", "other/deep", ".folder.part"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / ".x.json.abc.part").write_text("")
    for place in ("stages", "other"):
        (tmp_path / place / ".lock").write_text("")
    with io.folder_lock(tmp_path / "other"):
        io.sweep(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.part"))
    assert left == ["other/.x.json.abc.part", "other/deep/.x.json.abc.part"]
    io.sweep(tmp_path)
    assert not list(tmp_path.rglob("*.part"))


def test_a_lock_of_the_folder_itself_leaves_nothing_and_can_be_waited_for(tmp_path: Path) -> None:
    with io.folder_lock(tmp_path, ""):
        with pytest.raises(UserError, match="another process"), io.folder_lock(tmp_path, "", wait=0.1):
            pass
        waiting = threading.Thread(target=lambda: _hold(tmp_path))
        waiting.start()
    waiting.join(10)
    assert not waiting.is_alive() and not list(tmp_path.iterdir())


def _hold(folder: Path) -> None:
    with io.folder_lock(folder, "", wait=10):
        pass


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.json: no such file"):
        io.read_json(tmp_path / "nothing.json")


@pytest.mark.parametrize("name", ["bo", "my dog", "Ändi_2", "犬", "a.b", "x" * 64])
def test_good_names_pass_unchanged(name: str) -> None:
    assert io.safe_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", ".hidden", "-rf", "a/b", "../up", "a\\b", "nul\0", "tab\t", "C:", "<bo>", "x" * 65, None, 3],
)
def test_names_that_may_not_become_a_path(name: object) -> None:
    with pytest.raises(UserError, match=r"concept .*must be 1 to 64 printable characters"):
        io.safe_name(name, "concept")  # type: ignore[arg-type]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=70))
def test_a_safe_name_is_one_part_of_a_path(name: str) -> None:
    try:
        io.safe_name(name)
    except UserError:
        return
    inside = Path("/data") / name
    assert inside.parent == Path("/data")
    assert inside.name == name


def test_user_errors_are_value_errors_and_extras_are_named() -> None:
    assert issubclass(UserError, ValueError)
    assert issubclass(MissingExtra, ImportError)
    assert require("math", "dev").sqrt(4) == 2
    with pytest.raises(MissingExtra, match=r"no_such_module is needed here.*pip install 'pyunictokens\[rewards\]'"):
        require("no_such_module.part", "rewards")


def test_a_sweep_of_the_folder_alone_goes_into_no_other(tmp_path: Path) -> None:
    for place in ("", "mine"):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / ".x.json.abc.part").write_text("")
    io.sweep(tmp_path, inside=False)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.part")] == ["mine/.x.json.abc.part"]
