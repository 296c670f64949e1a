"""The studio's pages as several people use them at once, through Gradio's own client."""

import threading

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from pyunictokens.rollout.serving import ServingEngine
from pyunictokens.serve.catalog import Catalog
from pyunictokens.serve.studio.backend import Studio
from pyunictokens.serve.studio.concepts import Concepts
from pyunictokens.serve.studio.page import serve_studio
from pyunictokens.serve.studio.training import Training

from .test_bad_input import wait_until

PROMPT = "a photo of a red cat."


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """(the studio, its address)."""
    root = tmp_path_factory.mktemp("studio")
    (root / "runs").mkdir()
    serving = ServingEngine(batch_from=1)
    catalog = Catalog(folder=root / "runs", device="cpu", in_use=serving.concepts_in_use)
    studio, training = Studio(catalog, serving, root / "choices"), Training(root / "runs", root / "data")
    address, shown, stop = [], threading.Event(), threading.Event()

    def say(text):
        address.append(text)
        shown.set()

    options = (studio, Concepts(root / "data"), training, "127.0.0.1", 0, say, stop.is_set)
    thread = threading.Thread(target=serve_studio, args=options)
    thread.start()
    assert shown.wait(60)
    yield studio, address[0]
    stop.set()
    thread.join(60)
    assert not thread.is_alive()


def test_one_who_draws_long_does_not_keep_another_waiting(studio):
    backend, address = studio
    ann, ben = (Client(address, verbose=False) for _ in range(2))
    long = ann.submit("base", PROMPT, 1, False, "1", "1000", "0", api_name="/draw")
    wait_until(lambda: backend.workers.running)
    pictures, status = ben.submit("base", PROMPT, 1, False, "2", "1", "0", api_name="/draw").result(timeout=60)
    assert len(pictures) == 1 and status.startswith("1 of 1 drawn") and not long.done()
    long.cancel()
    wait_until(lambda: not backend.workers.running)


def test_of_two_pictures_one_is_chosen_once(studio):
    backend, address = studio
    client = Client(address, verbose=False)
    client.predict("base", PROMPT, api_name="/two")
    assert client.predict(api_name="/choose").startswith("1 choice in")
    with pytest.raises(AppError, match="Draw two pictures first"):
        client.predict(api_name="/choose_1")
    assert len((backend.choices / "preferences.jsonl").read_text().splitlines()) == 1


def test_no_page_of_another_site_may_train(studio):
    """One whose name was made to lead to this machine is of the same origin to a browser."""
    _, address = studio
    assert httpx.get(f"{address}config").status_code == 200
    for path in ("config", "gradio_api/info"):
        assert httpx.get(address + path, headers={"host": "example.com:7860"}).status_code == 400
