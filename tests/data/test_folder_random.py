"""Reading concept folders whose files hold anything: JSON of any shape, and bytes. Nothing but problems comes of it.

Longer, and over every reader of the library, this is `make fuzz` (tests/fuzz).
"""

from __future__ import annotations

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyunictokens.data import load_concept, read_concept
from pyunictokens.data.parse import Problem
from pyunictokens.utils.errors import UserError

FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["0.png", "../x", "/"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "0",
                    "bo",
                    "text_only",
                    "query",
                    "answer",
                    "question",
                    "image",
                    "conversations",
                    "from",
                    "value",
                    "class",
                ]
                + [
                    "info",
                    "extra_info",
                    "conversation_type",
                    "personalized_driven_generation",
                    "prompt",
                    "num_testing_info",
                ]
            )
            | st.text(max_size=5),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)
FILES = st.sampled_from(
    [
        "concept/train/train_images.json",
        "concept/train/bo/info.json",
        "concept/train/bo/conversations.json",
        "concept/train/bo/positive_recognitions.json",
        "concept/train/bo/random_recognitions.json",
        "concept/test/bo/vqa.json",
        "concept/test/bo/text_only.json",
        "concept/test/bo/t2i_conditions.json",
        "concepts_list.json",
    ]
)


@FUZZ
@given(contents=st.dictionaries(FILES, JSON, min_size=1, max_size=4))
def test_no_json_content_gets_past_as_anything_but_problems(folder, contents):
    kept = {file: (folder.root / file).read_bytes() for file in contents}
    try:
        for file, value in contents.items():
            folder.json(folder.root / file, json.dumps(value))
        concept, problems = read_concept(folder.root, "bo")
        assert all(isinstance(problem, Problem) for problem in problems)
        "\n".join(str(problem) for problem in problems).encode("utf-8")
        inside = [*concept.train_images, *(item.image for item in concept.recognitions)]
        assert all(path.resolve().is_relative_to(folder.root.resolve()) for path in inside)
        assert all(0 <= fact < len(concept.extra_info) for _, fact in concept.fact_pairs)
        try:
            load_concept(folder.root, "bo")
        except UserError:
            assert any(problem.severity == "error" for problem in problems)
        else:
            assert all(problem.severity == "warning" for problem in problems)
    finally:
        for file, value in kept.items():
            (folder.root / file).write_bytes(value)


@FUZZ
@given(content=st.binary(max_size=60), file=FILES)
def test_no_bytes_get_past_as_anything_but_problems(folder, content, file):
    kept = (folder.root / file).read_bytes()
    try:
        (folder.root / file).write_bytes(content)
        _, problems = read_concept(folder.root, "bo")
        assert all(isinstance(problem, Problem) for problem in problems)
    finally:
        (folder.root / file).write_bytes(kept)
