"""Stage `corpus` of the toy's build: everything the toy model will read, as padded ids.

WORK/corpus.npz: captions of the cached scenes, questions with answers, and lists of facts with the one that fits. Ids
are those of the toy tokenizer; CODE (the unknown word) marks where training puts codes of the picture into the text,
because concept tokens start as means of code embeddings.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from toy_cache import load_cache

from pyunictokens.data import wording
from pyunictokens.models.showo import prompting
from pyunictokens.toy import grammar as grammar
from pyunictokens.toy.scene import from_labels, random_scene
from pyunictokens.toy.words import build_tokenizer
from pyunictokens.utils.signals import end_with_parent_process

CAPTIONS, QUESTIONS = 3, 6
END, CODE = 0, 1
MAX_TEXT = 64
_WIDTH = {"captions": 60, "questions": 48, "facts": 150}


def _rows(texts: list[list[int]], width: int) -> np.ndarray:
    out = np.full((len(texts), width), -1, dtype=np.int16)
    for row, ids in enumerate(texts):
        out[row, : min(len(ids), width)] = ids[:width]
    return out


def _caption_ids(tokenizer, scene, rng: np.random.Generator) -> list[int]:
    text = grammar.any_caption(scene, rng)
    ids = tokenizer.encode(text).ids
    if text.startswith("a photo of ") and rng.random() < 0.1:
        ids[3:3] = [CODE] * int(rng.integers(4, 20))
    return ids


def _pairs(tokenizer, pairs: list[tuple[str, str]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows `question answer end`, and where each answer begins."""
    rows, starts = [], []
    for question, answer in pairs:
        asked = tokenizer.encode(prompting.chat_question(question)).ids
        rows.append([END, *asked, *tokenizer.encode(answer).ids, END])
        starts.append(1 + len(asked))
    return _rows(rows, width), np.array(starts, dtype=np.int16)


def _known_without_picture(rng: np.random.Generator) -> tuple[str, str]:
    scene = random_scene(rng)
    pairs = grammar.subject_questions(scene, f"{grammar.bag(scene, rng)} {scene.noun}")
    if rng.random() < 0.3:
        pairs = [(f"is {pairs[1][0].split(' does ')[1].removesuffix(' have?')} {scene.word('pattern')}?", "yes")]
        if rng.random() < 0.5:
            pairs = [
                (pairs[0][0].replace(f" {scene.word('pattern')}?", f" {grammar.another('pattern', scene, rng)}?"), "no")
            ]
    return pairs[rng.integers(len(pairs))]


def _fact_pair(rng: np.random.Generator) -> tuple[str, str]:
    """A request over a list of facts, or a plain question over it, or a question that the words alone answer."""
    dice = rng.random()
    if dice < 0.2:
        return _known_without_picture(rng)
    scene = random_scene(rng)
    if dice < 0.85:
        facts, prompt, answer = grammar.text_only(rng, grammar.mention(scene, rng))
        return wording.text_only_question(facts, prompt), answer
    values = grammar.draw_facts(rng)
    facts = [fact.sentence(value) for fact, value in zip(grammar.FACTS, values, strict=True)]
    k = int(rng.integers(len(facts)))
    question = grammar.FACTS[k].question.format(x=grammar.mention(scene, rng))
    listed = ". ".join(facts[i] for i in rng.permutation(len(facts)))
    return f"Information: {listed}. {question}?", grammar.FACTS[k].short(values[k])


def _part(job: tuple[int, np.ndarray, int]) -> dict[str, np.ndarray]:
    seed, labels, num_facts = job
    rng, tokenizer = np.random.default_rng(seed), build_tokenizer()
    captions: list[list[int]] = []
    asked: list[tuple[str, str]] = []
    for row in labels:
        scene = from_labels(row)
        captions += [_caption_ids(tokenizer, scene, rng) for _ in range(CAPTIONS)]
        pool = [*grammar.questions(scene, rng), grammar.recognition(scene, rng), grammar.recognition(scene, rng)]
        asked += [pool[k] for k in rng.choice(len(pool), QUESTIONS, replace=False)]
    questions, question_starts = _pairs(tokenizer, asked, _WIDTH["questions"])
    facts, fact_starts = _pairs(tokenizer, [_fact_pair(rng) for _ in range(num_facts)], _WIDTH["facts"])
    return {
        "captions": _rows(captions, _WIDTH["captions"]),
        "questions": questions,
        "question_starts": question_starts,
        "facts": facts,
        "fact_starts": fact_starts,
    }


def build_corpus(work: Path, *, seed: int, facts: int = 45_000) -> None:
    """Write all sentences of pre-training; about a minute on two cores."""
    _, labels = load_cache(work)
    chunks = np.array_split(labels, 38)
    jobs = [(seed + 1000 + k, chunk, facts // len(chunks)) for k, chunk in enumerate(chunks)]
    with ProcessPoolExecutor(os.cpu_count(), initializer=end_with_parent_process) as pool:
        parts = list(pool.map(_part, jobs))
    np.savez(work / "corpus.npz", **{key: np.concatenate([part[key] for part in parts]) for key in parts[0]})
