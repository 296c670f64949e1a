"""Training with served experts: the run is the one with experts at home, value for value, also when it loses them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest

from pyunictokens.rewards import Ensemble, EnsembleScore, RewardBatch
from pyunictokens.rewards.base import PreviewScorer
from pyunictokens.rewards.served.client import RemoteRewards
from pyunictokens.rewards.served.server import RewardServer
from pyunictokens.train import read_metrics, train_grpo
from pyunictokens.utils.errors import UserError
from tests.train.world import Brevity, Colour, grpo_config, red_preview, world

KEY = b"sixteen letters or more"


class Judging(Colour):
    """A reward model that judges previews as well."""

    def preview_scorer(self, prompts: Sequence[str]) -> PreviewScorer:
        return red_preview(prompts)


@pytest.fixture
def server() -> Iterator[RewardServer]:
    served = RewardServer(Ensemble({"tier": Brevity(), "ber": Judging(0), "der": Colour(2)}), KEY)
    thread = threading.Thread(target=served.serve, daemon=True)
    thread.start()
    yield served
    served.close()
    thread.join(10)


@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_the_run_is_the_one_at_home(tmp_path: Path, server: RewardServer) -> None:
    here = world(tmp_path / "data")
    remote = RemoteRewards([server.address], KEY)
    train_grpo(**here.fresh(), config=grpo_config(), out_dir=tmp_path / "home")
    asked = {**here.fresh(), "rewards": remote, "preview_scorer": remote.preview_scorer}
    train_grpo(**asked, config=grpo_config(), out_dir=tmp_path / "away")
    home, away = (
        [{key: value for key, value in line.items() if key != "seconds"} for line in read_metrics(tmp_path / name)]
        for name in ("home", "away")
    )
    assert away == home and len(home) == 4


@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_the_next_group_is_drawn_while_one_is_scored(tmp_path: Path, server: RewardServer) -> None:
    here = world(tmp_path / "data")
    remote = RemoteRewards([server.address], KEY)
    events: list[str] = []

    class Watched:
        """Scores only what is waited for, so that nothing but the order of calls can make the test pass."""

        def submit(self, batch: RewardBatch) -> Future[EnsembleScore]:
            events.append("handed over")
            future: Future[EnsembleScore] = Future()

            def result(timeout: float | None = None) -> EnsembleScore:
                events.append("waited for")
                return remote.score(batch)

            future.result = result  # type: ignore[method-assign]
            return future

    config = grpo_config(groups=2, steps=2)
    train_grpo(**here.fresh(), config=config, out_dir=tmp_path / "home")
    asked = {**here.fresh(), "rewards": Watched()}
    train_grpo(**asked, config=config, out_dir=tmp_path / "away")
    assert events == 2 * ["handed over", "handed over", "waited for", "waited for"]
    home, away = (
        [{key: value for key, value in line.items() if key != "seconds"} for line in read_metrics(tmp_path / name)]
        for name in ("home", "away")
    )
    assert away == home


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*rows are filled", "ignore:the DSOG scorer failed")
def test_a_run_that_loses_its_experts_goes_on_when_they_are_back(tmp_path: Path, server: RewardServer) -> None:
    here = world(tmp_path / "data")
    remote = RemoteRewards([server.address], KEY, backoff=0.05)
    asked = {**here.fresh(), "rewards": remote, "preview_scorer": remote.preview_scorer}

    def loses(phase: str, done: int, total: int, values: object) -> None:
        if done == 2:
            server.close()

    with pytest.raises(UserError, match=f"{server.address} .* are lost.*--resume"):
        train_grpo(**asked, config=grpo_config(checkpoint_every=1), out_dir=tmp_path / "run", progress=loses)
    again = RewardServer(server.rewards, KEY, port=server.port)
    threading.Thread(target=again.serve, daemon=True).start()
    asked = {**here.fresh(), "rewards": remote, "preview_scorer": remote.preview_scorer}
    train_grpo(**asked, config=grpo_config(checkpoint_every=1), out_dir=tmp_path / "run", resume=True)
    train_grpo(**here.fresh(), config=grpo_config(checkpoint_every=1), out_dir=tmp_path / "home")
    again.close()
    home, away = (
        [{key: value for key, value in line.items() if key != "seconds"} for line in read_metrics(tmp_path / name)]
        for name in ("home", "run")
    )
    assert away == home and len(home) == 4
