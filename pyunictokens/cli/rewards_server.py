"""`pyunictokens rewards serve`: reward models in a process of their own, for any number of trainers.

Reads the same settings as `train --rewards`; serving is done by `pyunictokens.rewards.served.server`.
"""

from __future__ import annotations

from typing import Annotated

import typer

from .shell import DeviceOption, guarded, say

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Reward models in a process of their own.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root() -> None:
    """Reward models in a process of their own, which trainers ask over the network."""


def serve(
    rewards: Annotated[
        str | None,
        typer.Option(
            "--rewards", metavar="FILE.yaml", help="Reward models as for train, or MODULE:FUNCTION. Default: the toy's."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Where to listen; 127.0.0.1 is this machine alone, 0.0.0.0 every network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 7000,
    device: DeviceOption = "auto",
) -> None:
    """Score for trainers until Ctrl-C or SIGTERM. Their side: `--rewards http://HOST:PORT`.

    Both sides need one key in PYUNICTOKENS_REWARDS_KEY, or in a file that PYUNICTOKENS_REWARDS_KEY_FILE names. The
    key itself never travels; images and scores are not encrypted: use a network you trust, or a tunnel.

    Examples:

        pyunictokens rewards serve --device cuda:1

        pyunictokens rewards serve --rewards rewards.yaml --host 0.0.0.0 --port 7000 --device cuda
    """
    from ..models.bundle import Sources
    from ..rewards.served.messages import read_key
    from ..rewards.served.server import RewardServer
    from ..runs.bundle import load_scorers, read_rewards
    from ..utils.devices import pick_device
    from ..utils.signals import stop_on_signals

    key, place = read_key(), pick_device(device)
    found = load_scorers(Sources(), place, read_rewards(rewards), trust=True)  # named on this command line
    assert found is not None
    server = RewardServer(found.ensemble, key, host=host, port=port, device=place)
    names = ", ".join(server.names) or "reward models"
    with stop_on_signals(lambda text: say("ending when all who have asked are answered")) as stop:
        say(f"{server.address}: {names} on {place}; Ctrl-C ends")
        server.serve(stop)


app.command("serve")(guarded(serve))
