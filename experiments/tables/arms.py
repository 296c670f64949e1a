"""What is compared: arms (how tokens are learned, how they are reinforced), tables, claims, sizes, the paper's numbers.

Settings are words over the toy preset, so a change of the preset changes every arm alike. It says nothing of how arms
are run (lab.py) or judged (stats.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from pyunictokens.runs.paper_numbers import number

KINDS = ("animal", "human", "object")


@dataclass(frozen=True)
class Arm:
    """One way to make a personalised model."""

    name: str
    title: str
    start: str
    """Where its tokens come from: "text" (no tokens, the looks in words), "staged", "unic" (three stages), "joint"."""
    words: tuple[str, ...] | None = None
    """Settings of the reinforcement; None: there is none."""
    as_dear_as: str | None = None
    """The arm whose row-steps of reinforcement it is given, in steps of its own; None: the scale's number of steps."""


@dataclass(frozen=True)
class Scale:
    """How much work one cell is. `words` go before the arms' own."""

    name: str
    concepts: tuple[tuple[str, int], ...]
    """(kind, seed of the drawn concept) of the tables."""
    seeds: tuple[int, ...]
    """Seeds of the training, each with every concept."""
    words: tuple[str, ...] = ()


_SIX = tuple((kind, number) for number in (31, 32) for kind in KINDS)

_WORDS = (
    "stages.max_steps=20",
    "stages.generated_images=4",
    "grpo.steps=20",
    "grpo.timestep_fraction=0.5",
    "grpo.groups=2",
    "grpo.ema_decay=0.9",
    "grpo.dsog.enabled=true",
    "grpo.dsog.initial=auto",
    "grpo.dsog.max_candidates=8",
    "evaluation.samples=2",
)
"""The toy preset, cut to what a cell may take, with DSOG as the paper preset has it: it selects from the first step."""

SCALES = {
    "quick": Scale("quick", _SIX, (0,), _WORDS),
    "full": Scale("full", _SIX, (0, 1, 2), _WORDS),
    "smoke": Scale(
        "smoke",
        (("animal", 11),),
        (0,),
        (
            *_WORDS,
            "stages.max_steps=3",
            "stages.generated_images=2",
            "stages.generated_timesteps=4",
            "grpo.steps=2",
            "grpo.groups=1",
            "grpo.group_size=3",
            "evaluation.samples=1",
        ),
    ),
}
"""full: six concepts, three seeds. quick: one of the seeds. smoke: it runs."""

OURS = Arm("ours", "UniCTokens-R1", "staged", ())

ARMS = {
    arm.name: arm
    for arm in (
        Arm("text", "base model, looks in words", "text"),
        Arm("joint", "joint stage", "joint"),
        Arm("staged", "two stages", "staged"),
        Arm("unic", "UniCTokens, three stages", "unic"),
        Arm("joint_grpo", "joint stage + GRPO", "joint", ()),
        OURS,
        Arm("no_reasoning", "without understanding reasoning", "staged", ("grpo.reasoning=false",)),
        Arm("no_visual", "without visual-instruct reasoning", "staged", ("grpo.visual_ratio=0",)),
        Arm("no_text_only", "without text-only reasoning", "staged", ("grpo.visual_ratio=1",)),
        Arm("no_dsog", "without DSOG", "staged", ("grpo.dsog.enabled=false",)),
        Arm("no_dsog_equal", "without DSOG, equal compute", "staged", ("grpo.dsog.enabled=false",), "ours"),
    )
}
"""All arms by name. Previews cost row-steps; the last arm has as many more steps as they pay for. Group size, weight of
the divergence, tokens that count, timesteps and what learns are the business of experiments/reinforce_study.py."""


@dataclass(frozen=True)
class Table:
    """One table of the paper: its rows, and the row that the others are held against."""

    name: str
    title: str
    arms: tuple[str, ...]
    reference: str


TABLES = (
    Table("table1", "Table 1: methods", ("text", "joint", "unic", "ours"), "ours"),
    Table(
        "table2",
        "Table 2: what reasoning and DSOG are good for",
        ("no_reasoning", "no_visual", "no_text_only", "no_dsog", "no_dsog_equal", "ours"),
        "ours",
    ),
    Table("table3", "Table 3: where reinforcement begins", ("joint", "joint_grpo", "staged", "ours"), "ours"),
)


@dataclass(frozen=True)
class Claim:
    """What the paper says of two arms: that `arm` is above `other`."""

    says: str
    arm: str
    other: str


CLAIMS = (
    Claim("UniCTokens-R1 is above looks told in words", "ours", "text"),
    Claim("UniCTokens-R1 is above the joint stage", "ours", "joint"),
    Claim("UniCTokens-R1 is above UniCTokens", "ours", "unic"),
    Claim("Reinforcement improves tokens of the two stages", "ours", "staged"),
    Claim("Reinforcement improves tokens of the joint stage", "joint_grpo", "joint"),
    Claim("Reinforcement ends higher after two stages than after the joint stage", "ours", "joint_grpo"),
    Claim("Reasoning before drawing helps", "ours", "no_reasoning"),
    Claim("Steps that ask about an image help", "ours", "no_visual"),
    Claim("Steps that ask in text alone help", "ours", "no_text_only"),
    Claim("DSOG helps", "ours", "no_dsog"),
    Claim("DSOG helps at equal compute", "ours", "no_dsog_equal"),
)
"""The last goes further than the paper, which gives the arm without DSOG as many steps, not as much compute."""

KEY_MEASURES = {
    "samples.attributes": "attributes",
    "reasoning_generation.reward": "reward",
    "reasoning.accuracy": "right fact",
    "recognition.weight": "recognition",
}
"""What claims are judged by, with short names: attributes of everything drawn, the reward of prompts that never
trained, which fact is meant, and whether the concept is in an image."""

COLUMNS = {
    "recognition.weight": "Rec. weight",
    "reasoning.bleu": "Rea. BLEU",
    "reasoning.accuracy": "Rea. right fact",
    "vqa.bleu": "VQA BLEU",
    "vqa.accuracy": "VQA right",
    "qa.bleu": "QA BLEU",
    "qa.accuracy": "QA right",
    "pure.clip_t": "Pure CLIP-T",
    "pure.clip_i": "Pure CLIP-I",
    "pure.attributes": "Pure attributes",
    "dense.clip_t": "Dense CLIP-T",
    "dense.clip_i": "Dense CLIP-I",
    "dense.attributes": "Dense attributes",
    "reasoning_generation.clip_t": "Rea. Gen. CLIP-T",
    "reasoning_generation.clip_i": "Rea. Gen. CLIP-I",
    "reasoning_generation.attributes": "Rea. Gen. attributes",
    "reasoning_generation.reward": "Rea. Gen. reward",
    "dense_reasoning_generation.clip_t": "Dense Rea. Gen. CLIP-T",
    "dense_reasoning_generation.clip_i": "Dense Rea. Gen. CLIP-I",
    "dense_reasoning_generation.attributes": "Dense Rea. Gen. attributes",
    "samples.attributes": "All drawings: attributes",
}
"""Measures by key, in the paper's order; "attributes" are read exactly from the drawing, which the paper cannot."""

_PAPER_COLUMNS = (
    "recognition.weight",
    "reasoning.bleu",
    "vqa.bleu",
    "qa.bleu",
    "pure.clip_t",
    "pure.clip_i",
    "dense.clip_i",
    "reasoning_generation.clip_t",
    "reasoning_generation.clip_i",
    "dense_reasoning_generation.clip_i",
)
_PAPER_ROWS = {
    "text": ("table1", "Show-o+TP"),
    "joint": ("table3", "joint"),
    "unic": ("table1", "UniCTokens"),
    "staged": ("table1", "UniCTokens"),
    "joint_grpo": ("table3", "joint + UniCTask-GRPO"),
    "ours": ("table1", "UniCTokens-R1"),
    "no_reasoning": ("table2", "w/o Und. Rea."),
    "no_visual": ("table2", "w/o VIA"),
    "no_text_only": ("table2", "w/o TIA"),
    "no_dsog": ("table2", "w/o DSOG"),
}


def _printed(table: str, row: str) -> dict[str, float]:
    found = {key: number(table, row, key) for key in _PAPER_COLUMNS}
    return {key: value for key, value in found.items() if value is not None}


PAPER = {arm: _printed(*place) for arm, place in _PAPER_ROWS.items()}
"""The paper's values by arm and column; what it measured with GPT-4o has no counterpart here."""
