"""The weighted sum: the paper's weights, the parts kept, and what happens when an expert fails or returns no number."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from pyunictokens.rewards import PAPER_WEIGHTS, Ensemble, Fer, RewardBatch, plain_text
from pyunictokens.utils.errors import UserError

from .fakes import ColourFace, flat

COLOURS = [(0.5, 0.0, 0.0), (-0.5, 0.0, 0.0), (0.1, 0.3, 0.0)]


class Says:
    """An expert that says what it was told to."""

    def __init__(self, *values: float):
        self.values = values
        self.asked = 0

    def score(self, batch: RewardBatch) -> Tensor:
        self.asked += 1
        return torch.tensor(self.values)


def experts() -> dict[str, Says]:
    return {"tier": Says(1, 0, 0.5), "ber": Says(0.2, 0.4, 0), "der": Says(0, 1, 1), "fer": Says(0.3, 0.6, 0.9)}


def batch(kind: str = "object", prompts: tuple[str, ...] = ("p", "q", "r")) -> RewardBatch:
    return RewardBatch(flat(*COLOURS), list(prompts), kind=kind)


def test_weights_of_the_paper() -> None:
    assert PAPER_WEIGHTS["human"] == {"tier": 0.4, "ber": 0.2, "der": 0.2, "fer": 0.2}
    for kind in ("animal", "object"):
        assert PAPER_WEIGHTS[kind] == {"tier": 0.4, "ber": 0.3, "der": 0.3, "fer": 0.0}


@pytest.mark.parametrize(
    ("kind", "total"),
    [
        ("object", [0.4 + 0.06, 0.12 + 0.3, 0.2 + 0.3]),
        ("animal", [0.4 + 0.06, 0.12 + 0.3, 0.2 + 0.3]),
        ("human", [0.4 + 0.04 + 0.06, 0.08 + 0.2 + 0.12, 0.2 + 0.2 + 0.18]),
    ],
)
def test_total_by_hand(kind: str, total: list[float]) -> None:
    score = Ensemble(experts()).score(batch(kind))
    torch.testing.assert_close(score.total, torch.tensor(total))
    assert set(score.parts) == ({"tier", "ber", "der", "fer"} if kind == "human" else {"tier", "ber", "der"})
    torch.testing.assert_close(score.parts["tier"], torch.tensor([1.0, 0.0, 0.5]))


def test_an_expert_of_weight_zero_is_not_asked() -> None:
    judges = experts()
    Ensemble(judges).score(batch("animal"))
    assert judges["fer"].asked == 0 and judges["ber"].asked == 1


def test_weights_for_every_kind_or_for_one() -> None:
    everywhere = Ensemble(experts(), weights={"der": 2})
    torch.testing.assert_close(everywhere.score(batch("human")).total, torch.tensor([0.0, 2.0, 2.0]))
    one = Ensemble(experts(), weights={"animal": {"ber": 1}})
    torch.testing.assert_close(one.score(batch("animal")).total, torch.tensor([0.2, 0.4, 0.0]))
    torch.testing.assert_close(one.score(batch("object")).total, torch.tensor([0.46, 0.42, 0.5]))


def test_one_more_expert_is_one_line() -> None:
    ensemble = Ensemble({**experts(), "sharp": Says(1, 1, 0)}, weights={"object": {"ber": 0.5, "sharp": 0.5}})
    torch.testing.assert_close(ensemble.score(batch()).total, torch.tensor([0.6, 0.7, 0.0]))


def test_rows_without_a_face_are_counted() -> None:
    ensemble = Ensemble({"fer": Fer(ColourFace())}, weights={"human": {"fer": 1}})
    human = RewardBatch(flat(*COLOURS), ["p"] * 3, references=flat(COLOURS[0]), kind="human")
    score = ensemble.score(human)
    assert score.no_face == 1 and score.parts["fer"][1] == 0 and score.parts["fer"][0] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_names_expert_and_row(value: float) -> None:
    judges = {**experts(), "der": Says(0.1, 0.2, value)}
    score = Ensemble(judges).score(batch())
    (invalid,) = score.invalid
    assert (invalid.reward, invalid.rows, invalid.prompt) == ("der", (2,), "r") and str(invalid.value) == str(value)
    assert score.total.isfinite().tolist() == [True, True, False] and score.total[2].isnan(), "the step is left out"
    assert score.parts["tier"].isfinite().all()
    with pytest.raises(UserError, match=r"reward model 'der' scored image 2 .*must be finite; prompt 'r'"):
        score.require_finite()


def test_scores_of_another_group_size_are_refused() -> None:
    with pytest.raises(UserError, match=r"reward model 'ber' returned \(2,\) for 3 images"):
        Ensemble({**experts(), "ber": Says(1, 2)}).score(batch())

    class Float:
        def score(self, batch: RewardBatch) -> float:
            return 1.0

    with pytest.raises(UserError, match=r"reward model 'ber' returned float for 3 images"):
        Ensemble({**experts(), "ber": Float()}).score(batch())


def test_a_failing_expert_is_named_with_the_row_it_fails_on() -> None:
    class Picky:
        def score(self, batch: RewardBatch) -> Tensor:
            if "q" in batch.prompts:
                raise RuntimeError("cannot read q")
            return torch.zeros(len(batch))

    with pytest.raises(UserError, match=r"'tier' failed at image 1 \(prompt 'q'\): RuntimeError: cannot read q"):
        Ensemble({**experts(), "tier": Picky()}).score(batch())


def test_an_expert_that_fails_only_on_many_rows_is_told_apart() -> None:
    class Small:
        def score(self, batch: RewardBatch) -> Tensor:
            if len(batch) > 1:
                raise MemoryError("too many")
            return torch.zeros(1)

    with pytest.raises(UserError, match=r"on the 3 images together, though not on any image alone: MemoryError"):
        Ensemble({"ber": Small()}, weights={"ber": 1}).score(batch())


def test_an_experts_own_complaint_is_passed_on_with_its_name() -> None:
    ensemble = Ensemble({**experts(), "fer": Fer(ColourFace())})
    with pytest.raises(UserError, match=r"reward model 'fer': no reference images"):
        ensemble.score(batch("human"))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"ber": -0.1}, "weight of 'ber' for 'human' is -0.1"),
        ({"ber": float("nan")}, "weight of 'ber'"),
        ({"ber": "0.3"}, "is '0.3': must be a finite number"),
        ({"ber": True}, "is True: must be a finite number"),
        ({"ber": 0}, "are all 0"),
        ({"berr": 1}, "name berr, reward models are tier, ber, der, fer"),
        ({"plant": {"ber": 1}}, "weights of kind 'plant'"),
        ({"human": {"ber": 1}, "ber": 1}, "mixes numbers and tables"),
        ({}, "weights is empty"),
    ],
)
def test_bad_weights(weights: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Ensemble(experts(), weights)


def test_bad_experts() -> None:
    with pytest.raises(UserError, match="no reward models"):
        Ensemble({})
    with pytest.raises(UserError, match=r"ber\(batch\): a reward function takes prompts, images"):
        Ensemble({"ber": lambda batch: torch.zeros(3)})
    with pytest.raises(UserError, match=r"reward model 'ber' is a int: must have score"):
        Ensemble({"ber": 3})  # type: ignore[dict-item]


def test_a_reward_model_that_ends_the_process_is_an_error() -> None:
    class Leaves:
        def score(self, batch: RewardBatch) -> Tensor:
            sys.exit()

    with pytest.raises(UserError, match=r"reward model 'ber' failed at image 0 \(prompt 'p'\): SystemExit"):
        Ensemble({**experts(), "ber": Leaves()}).score(batch())

    class Interrupted:
        def score(self, batch: RewardBatch) -> Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Ensemble({**experts(), "ber": Interrupted()}).score(batch())


def test_a_kind_whose_expert_is_missing_fails_when_it_is_scored() -> None:
    judges = experts()
    del judges["fer"]
    ensemble = Ensemble(judges)  # fine for animals and objects
    assert ensemble.score(batch("animal")).total.shape == (3,)
    with pytest.raises(UserError, match="weights of 'human' name fer"):
        ensemble.score(batch("human"))


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("A photo of <bo>.", "A photo of dog."),
        ("A photo of <token_0><token_1><bo> in snow.", "A photo of dog in snow."),
        ("<token_0> <token_1> <bo> and <bo>'s toy", "dog and dog's toy"),
        ("a < b and c > d", "a < b and c > d"),
        ("no token", "no token"),
    ],
)
def test_plain_text(text: str, plain: str) -> None:
    assert plain_text(text, "dog") == plain


def test_plain_text_needs_a_class() -> None:
    with pytest.raises(UserError, match="class_word is empty"):
        plain_text("A photo of <bo>.", " ")
