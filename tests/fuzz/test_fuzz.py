"""Seconds of fuzzing with hypothesis in the normal tests, and what once broke a reader. `make fuzz` is longer.

Bytes, mutations of good files, and JSON values put in place of parts of good JSON.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, check, kept, seeds

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["bo", "<bo>", "../x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def mutated(data: bytes) -> st.SearchStrategy[bytes]:
    """`data` with a slice cut, repeated or replaced."""

    def change(where: tuple[int, int], what: bytes) -> bytes:
        first, last = sorted(where)
        return data[:first] + what + data[last:]

    place = st.integers(0, len(data))
    return st.builds(change, st.tuples(place, place), st.binary(max_size=12))


def grafted(data: bytes) -> st.SearchStrategy[bytes]:
    """`data` as JSON with another value somewhere, where it is JSON."""
    try:
        value = json.loads(data)
    except ValueError:
        return mutated(data)
    paths: list[tuple[Any, ...]] = []

    def walk(node: Any, path: tuple[Any, ...]) -> None:
        paths.append(path)
        inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, each in list(inner)[:6]:
            walk(each, (*path, key))

    walk(value, ())

    def graft(path: tuple[Any, ...], new: Any) -> bytes:
        copy = json.loads(data)
        if not path:
            return json.dumps(new).encode()
        node = copy
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = new
        return json.dumps(copy).encode()

    return st.builds(graft, st.sampled_from(paths), JSON)


def inputs(name: str) -> st.SearchStrategy[bytes]:
    good = seeds(name)
    parts = [strategy for data in good for strategy in (mutated(data), grafted(data), grafted(data))]
    return st.one_of(st.binary(max_size=64), JSON.map(lambda value: json.dumps(value).encode()), *parts)


@pytest.mark.parametrize("name", TARGETS)
def test_good_files_are_read(name: str) -> None:
    for data in seeds(name):
        TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
def test_what_once_broke_a_reader(name: str) -> None:
    for data in kept(name):
        check(name, data)


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_comes_out_but_clear_errors(name: str) -> None:
    @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs(name))
    def run(data: bytes) -> None:
        check(name, data)

    run()


@pytest.mark.fuzz
@pytest.mark.parametrize("name", TARGETS)
def test_nothing_comes_out_but_clear_errors_for_long(name: str) -> None:
    @settings(max_examples=3000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs(name))
    def run(data: bytes) -> None:
        check(name, data)

    run()


def test_the_table_of_a_full_run_is_that_of_its_numbers() -> None:
    from experiments.cost_tables import updated
    from tests.fuzz.record import PAGE, executed, table

    assert executed("x\nstat::number_of_executed_units: 275430\nstat::average_exec_per_sec:     10593") == 275430
    assert executed("nothing") == 0
    text = PAGE.read_text(encoding="utf-8")
    assert updated(text, {"fuzz": table}) == text
    assert all(f"| {name} |" in table() for name in TARGETS), "a reader that no full run has seen: --record"
