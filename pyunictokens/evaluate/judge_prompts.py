"""What a judge is asked (Dense Rea., the GPT columns of VQA and QA, Dense Gen., Dense Rea. Gen.), as one question each.

The paper has GPT-4o score answers, and for images "whether each segment of text is correctly represented in the
image, giving a score from 0 to 1", segments split at punctuation marks; its prompts are not published, so these are
this project's own. The judge brings its scale to 0…1 itself. `rewards.judge` asks.
"""

from __future__ import annotations

import re

QUESTION, REFERENCE, GIVEN, PART = "Question:", "Right answer:", "Answer given:", "Part of the description:"
"""Labels of lines in the questions below, for judges that read them by rule (experiments/local_judge.py)."""


def answer_question(question: str, reference: str, answer: str) -> str:
    """How good is `answer`, when `reference` is right?"""
    return (
        "Judge an answer by its meaning. Wording, length, case and punctuation do not count; what is wrong, missing or "
        "contradicts the right answer does.\n"
        f"{QUESTION} {_line(question)}\n{REFERENCE} {_line(reference)}\n{GIVEN} {_line(answer)}\n"
        "Best score: it says the same as the right answer. Worst score: it says something else, or nothing."
    )


def segment_question(segment: str, subject: str) -> str:
    """Is this part of a longer prompt shown?"""
    return (
        f"The picture was drawn from a longer description of {_one(subject)}. Judge one part of it "
        "alone: is it correctly shown in the picture? Style and beauty do not count.\n"
        f"{PART} {_line(segment)}\n"
        "Best score: everything this part says is there as it says. Worst score: nothing of it is."
    )


def field(text: str, label: str) -> str | None:
    """What stands behind `label` in a judge's question, None where there is no such line."""
    found = re.search(rf"^{re.escape(label)} ?(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else None


def _one(subject: str) -> str:
    """`one dog` of a class word; what begins with an article (`a striped pink cat`) is said as it is."""
    words = _line(subject)
    return words if re.match(r"(a|an|the)\s", words, re.IGNORECASE) else f"one {words}"


def _line(text: str) -> str:
    """One line, so that an answer cannot pretend to be part of the question."""
    return " ".join(text.split())
