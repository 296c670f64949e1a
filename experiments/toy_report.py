"""Stage `report` of the toy's build: what the shipped toy can do before any personalisation, as numbers and pictures.

Loads the exported assets through the ordinary loaders, measures on scenes that were never trained on, and writes
docs/toyworld.json, the table in docs/toyworld.md and the pictures docs/images/toyworld_*.png.

    python experiments/toy_report.py         # only the last number about facts, which needs no training data
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from toy_cache import load_cache
from toy_experts import measure_experts
from toy_export import ROOT
from toy_vq import to_pixels

from pyunictokens import MagvitV2, RolloutEngine, Showo, TextTokenizer
from pyunictokens.data import wording
from pyunictokens.data.images import make_grid
from pyunictokens.toy import grammar as grammar
from pyunictokens.toy.facts import FACTS
from pyunictokens.toy.networks import ToyNetworks
from pyunictokens.toy.scene import SLOTS, Attributes, from_labels, random_scene
from pyunictokens.utils.files import read_json, write_json, write_text_atomic

_ASSETS = ROOT / "pyunictokens" / "assets" / "toy"
_DOCS = ROOT / "docs"
_MAX_TEXT = 64
STEPS, GUIDANCE = 12, 3.0


def stated(scene: Attributes, *, subject: bool = True) -> list[str]:
    """The slots that a full caption of the scene speaks of."""
    slots = (["shape", "colour", "pattern"] + (["hair"] if scene.kind == "human" else [])) if subject else []
    slots += ["wear", "wear_colour"] if scene.wear else []
    slots += ["item", "item_colour"] if scene.item else []
    return [*slots, "place"]


def agreement(read: torch.Tensor, scenes: list[Attributes], slots: list[list[str]]) -> dict[str, float]:
    """Share of right readings per slot, over the slots that each picture was asked for; and their mean."""
    names = list(SLOTS)
    hits: dict[str, list[bool]] = {name: [] for name in names}
    for row, scene, asked in zip(read.tolist(), scenes, slots, strict=True):
        for slot in asked:
            hits[slot].append(row[names.index(slot)] == getattr(scene, slot))
    out = {slot: round(float(np.mean(found)), 4) for slot, found in hits.items() if found}
    out["mean"] = round(float(np.mean(list(out.values()))), 4)
    return out


class _Toy:
    def __init__(self) -> None:
        self.model = Showo.from_pretrained(_ASSETS / "showo")
        self.model.max_text = _MAX_TEXT
        self.vq = MagvitV2.from_pretrained(_ASSETS / "vq")
        self.tokenizer = TextTokenizer.from_pretrained(_ASSETS / "tokenizer")
        self.experts = ToyNetworks.from_pretrained(_ASSETS)
        self.engine = RolloutEngine(self.model, self.vq, self.tokenizer)

    def read(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.experts.reader.read(part.clamp(-1, 1)) for part in pixels.split(250)])

    def draw(self, prompts: list[str], guidance: float = GUIDANCE, seed: int = 0) -> torch.Tensor:
        rollout = self.engine.generate_images(
            prompts, steps=STEPS, guidance_scale=guidance, temperature=1.0, seed=seed, record=False
        )
        assert rollout.pixels is not None
        return rollout.pixels

    def answers(self, images: torch.Tensor, questions: list[str]) -> list[str]:
        """The likeliest answers, 50 questions at a time."""
        out: list[str] = []
        for k in range(0, len(questions), 50):
            seen = images if len(images) == 1 else images[k : k + 50]
            found = self.engine.generate_text(seen, questions[k : k + 50], max_new_tokens=32, temperature=0)
            out += found.texts
        return out


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()


def _reconstruction(toy: _Toy, work: Path) -> tuple[dict[str, object], torch.Tensor, torch.Tensor]:
    images, labels = load_cache(work)
    x = to_pixels(images[-1000:])
    scenes = [from_labels(row) for row in labels[-1000:]]
    codes = torch.cat([toy.vq.encode(part) for part in x.split(100)])
    y = torch.cat([toy.vq.decode(part) for part in codes.split(100)]).clamp(-1, 1)
    every = [list(SLOTS)] * len(scenes)
    numbers = {
        "l1": round((y - x).abs().mean().item() / 2, 4),
        "codes_in_use": codes.unique().numel(),
        "reader_on_drawings": agreement(toy.read(x), scenes, every),
        "reader_on_reconstructions": agreement(toy.read(y), scenes, every),
    }
    return numbers, x, y


def _following(toy: _Toy, work: Path, count: int) -> dict[str, object]:
    """Attribute accuracy of pictures drawn for captions of unseen scenes: plain, word rows, hints with their fact."""
    out: dict[str, object] = {}
    rng = np.random.default_rng(5)
    for name, prefix in (("captions", ""), ("captions_of_held_out_subjects", "held_out_")):
        _, labels = load_cache(work, prefix)
        scenes = [from_labels(row) for row in labels[-count:]]
        prompts = [grammar.caption(scene, rng, full=True) for scene in scenes]
        out[name] = agreement(toy.read(toy.draw(prompts)), scenes, [stated(scene) for scene in scenes])
    _, labels = load_cache(work, "held_out_")
    scenes = [from_labels(row) for row in labels[:count]]
    rows = [f"a photo of {grammar.bag(scene, rng, 24, full=True)} {scene.noun}." for scene in scenes]
    own = [[slot for slot in stated(scene) if slot in ("shape", "colour", "pattern", "hair")] for scene in scenes]
    out["word_rows"] = agreement(toy.read(toy.draw(rows)), scenes, own)
    prompts, truths, asked = [], [], []
    for scene in scenes:
        values = grammar.draw_facts(rng)
        k = int(rng.integers(len(values)))
        prompt = grammar.FACTS[k].prompts[0].format(x=f"{grammar.bag(scene, rng, full=True)} {scene.noun}")
        prompts.append(wording.compound_prompt(prompt, grammar.FACTS[k].sentence(values[k])))
        truths.append(scene.with_words(**_clean(scene, values[k])))
        asked.append([*own[len(asked)], *values[k]])
    out["hints_with_their_fact"] = agreement(toy.read(toy.draw(prompts)), truths, asked)
    return out


def _clean(scene: Attributes, value: dict[str, str]) -> dict[str, str]:
    """The fact's slots; the other slots stay whatever they were, nobody asks for them."""
    return {**{slot: scene.word(slot) for slot in ("wear", "wear_colour", "item", "item_colour")}, **value}


def _understanding(toy: _Toy, work: Path, count: int) -> dict[str, object]:
    images, labels = load_cache(work)
    rng = np.random.default_rng(6)
    asked, right, kinds = [], [], []
    for row in labels[-count:]:
        pairs = grammar.questions(from_labels(row), rng)
        pairs = [pair for pair in pairs if not pair[0].startswith("describe")]
        question, answer = pairs[int(rng.integers(len(pairs)))]
        asked.append(question)
        right.append(answer)
        kinds.append("yes_or_no" if answer in ("yes", "no") else "open")
    given = toy.answers(to_pixels(images[-count:]), asked)
    hits = np.array([_plain(a) == _plain(b) for a, b in zip(given, right, strict=True)])
    out: dict[str, object] = {"questions": round(float(hits.mean()), 4)}
    for kind in ("open", "yes_or_no"):
        out[f"questions_{kind}"] = round(float(hits[np.array(kinds) == kind].mean()), 4)
    lists = []
    for _ in range(count):
        found, prompt, answer = grammar.text_only(rng, str(rng.choice(grammar.NAMES)))
        lists.append((wording.text_only_question(found, prompt), answer))
    out["facts"] = _right_facts(toy, lists)
    out["facts_of_a_concept"] = _facts_of_a_concept(toy, count)
    return out


def _facts_of_a_concept(toy: _Toy, count: int) -> float:
    """How often the right fact is found where a concept's folder asks."""
    rng = np.random.default_rng(8)
    return _right_facts(toy, [_as_a_folder_asks(rng) for _ in range(count)])


def _right_facts(toy: _Toy, asked: list[tuple[str, str]]) -> float:
    """The share of (question, right fact) that the model answers with the right fact."""
    given = toy.answers(torch.full((1, 3, 64, 64), -1.0), [question for question, _ in asked])
    return round(float(np.mean([_plain(a) == _plain(fact) for a, (_, fact) in zip(given, asked, strict=True)])), 4)


def _as_a_folder_asks(rng: np.random.Generator) -> tuple[str, str]:
    """A question of a concept's folder, over all eight facts and with a prompt that pre-training never read."""
    facts = [fact.sentence(value) for fact, value in zip(FACTS, grammar.draw_facts(rng), strict=True)]
    wanted = int(rng.integers(len(FACTS)))
    subject = grammar.mention(random_scene(rng, held_out=True), rng)
    return wording.text_only_question(facts, FACTS[wanted].unseen_prompt.format(x=subject)), facts[wanted]


def _pictures(toy: _Toy, work: Path, x: torch.Tensor, y: torch.Tensor) -> None:
    folder = _DOCS / "images"
    folder.mkdir(parents=True, exist_ok=True)
    make_grid(x[:48], 12, tile=96).save(folder / "toyworld_scenes.png", optimize=True)
    both = torch.cat([torch.cat([x[k : k + 8], y[k : k + 8]]) for k in (48, 56, 64)])
    make_grid(both, 8, tile=112).save(folder / "toyworld_reconstructions.png", optimize=True)
    _, labels = load_cache(work, "held_out_")
    rng = np.random.default_rng(9)
    prompts = [grammar.caption(from_labels(row), rng, full=True) for row in labels[100:110]]
    for row in labels[110:115]:
        scene, values = from_labels(row), grammar.draw_facts(rng)
        k = int(rng.integers(len(values)))
        hint = grammar.FACTS[k].prompts[0].format(x=grammar.subject_phrase(scene, rng, full=True))
        prompts.append(wording.compound_prompt(hint, grammar.FACTS[k].sentence(values[k])))
    make_grid(toy.draw(prompts, seed=3), 5, prompts, tile=176).save(folder / "toyworld_generations.png", optimize=True)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _table(numbers: dict[str, dict]) -> str:
    """The markdown tables of docs/toyworld.md."""
    rows = [
        ("drawings themselves", numbers["reconstruction"]["reader_on_drawings"]),
        ("reconstructed by the tokenizer", numbers["reconstruction"]["reader_on_reconstructions"]),
        ("generated from full captions", numbers["following"]["captions"]),
        ("the same, subjects never seen in training", numbers["following"]["captions_of_held_out_subjects"]),
        ("generated from a row of words (`a photo of striped nice red … cat.`)", numbers["following"]["word_rows"]),
        ("generated from a hint and its fact", numbers["following"]["hints_with_their_fact"]),
    ]
    head = "| pictures | " + " | ".join(name.replace("_", " ") for name in [*SLOTS, "mean"]) + " |"
    lines = [head, "|---" * (len(SLOTS) + 2) + "|"]
    for title, found in rows:
        cells = [f"{100 * found[slot]:.1f}" if slot in found else "" for slot in [*SLOTS, "mean"]]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    u, r = numbers["understanding"], numbers["reconstruction"]
    lines += [
        "",
        "| | |",
        "|---|---|",
        f"| reconstruction error, L1 of pixels in [0, 1] | {r['l1']:.4f} |",
        f"| codes in use on 1000 scenes | {r['codes_in_use']} of 1024 |",
        f"| questions about pictures, exact answer | {_percent(u['questions'])} "
        f"(open {_percent(u['questions_open'])}, yes or no {_percent(u['questions_yes_or_no'])}) |",
        f"| the right fact out of 3 to 8 | {_percent(u['facts'])} |",
        f"| the right fact out of 8, asked with a prompt that it never read | {_percent(u['facts_of_a_concept'])} |",
    ]
    seen = numbers["experts"]["held_out_scenes"]
    s, it = seen["subject"], seen["image_text"]
    lines += [
        f"| BER's network: right caption above the same with one thing wrong | {_percent(it['right_over_wrong'])} |",
        f"| its cosine: right, one thing wrong, another picture's | {it['right']:.2f}, {it['one_thing_wrong']:.2f}, "
        f"{it['other_picture']:.2f} |",
        f"| DER's cosine: same subject, one attribute wrong, unrelated | {s['same_subject']:.2f}, "
        f"{s['one_attribute_wrong']:.2f}, {s['unrelated']:.2f} |",
        f"| FER's network: face or no face | {_percent(seen['face']['presence_accuracy'])} |",
        "| TIER's network: a short answer finds its fact among 8 | "
        f"{_percent(numbers['experts']['sentence']['short_answer_finds_its_fact'])} |",
    ]
    return "\n".join(lines)


def report(work: Path, count: int = 500) -> None:
    """Measure, draw and write."""
    torch.manual_seed(0)
    toy = _Toy()
    reconstruction, x, y = _reconstruction(toy, work)
    numbers: dict[str, dict] = {"reconstruction": reconstruction, "following": _following(toy, work, count)}
    numbers["understanding"] = _understanding(toy, work, count)
    numbers["experts"] = measure_experts(work, toy.experts)
    provenance = read_json(_ASSETS / "provenance.json")
    numbers["made"] = {key: provenance[key] for key in ("commit", "seed", "seconds", "bytes")}
    numbers["drawn_with"] = {"timesteps": STEPS, "guidance_scale": GUIDANCE, "pictures": count}
    _write(numbers)
    _pictures(toy, work, x, y)


def report_requests(count: int = 500) -> None:
    """Only how well the requests of a folder are understood, which needs nothing that the weights were made from."""
    numbers = read_json(_DOCS / "toyworld.json")
    numbers["understanding"]["facts_of_a_concept"] = _facts_of_a_concept(_Toy(), count)
    _write(numbers)


def _write(numbers: dict[str, dict]) -> None:
    """docs/toyworld.json and the tables of docs/toyworld.md."""
    write_json(_DOCS / "toyworld.json", numbers)
    page = _DOCS / "toyworld.md"
    text = page.read_text(encoding="utf-8")
    start, end = "<!-- numbers: made by experiments/build_toy.py --stage report -->", "<!-- end of numbers -->"
    before, _, rest = text.partition(start)
    after = rest.partition(end)[2]
    write_text_atomic(page, f"{before}{start}\n{_table(numbers)}\n{end}{after}")
    print(_table(numbers))


if __name__ == "__main__":
    report_requests()
