"""`pyunictokens serve` as a process: what it prints, answers, logs, and how it ends."""

import json
import os
import signal
import subprocess
import sys

import httpx
import openai

from .world import concept_run


def test_it_serves_a_run_and_ends_in_good_order(tmp_path):
    concept_run(tmp_path / "runs" / "bo", "bo", 1)
    words = [sys.executable, "-m", "pyunictokens", "serve", "--runs", str(tmp_path / "runs"), "--port", "0"]
    key = "a-key-of-many-characters"
    environment = {**os.environ, "PYUNICTOKENS_SERVE_KEY": key, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            line = process.stdout.readline()
            assert line.endswith(": bo, base; Ctrl-C ends\n"), line
            address = line.partition(": ")[0]
            with openai.OpenAI(base_url=address, api_key=key, max_retries=0) as client:
                answer = client.images.generate(model="bo", prompt="a photo of <bo>.", extra_body={"steps": 2})
                assert answer.data[0].b64_json
            assert httpx.get(address + "/models").status_code == 401
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0 and "ending when what runs is done" in out
    lines = [json.loads(line) for line in err.splitlines()]
    assert [line["status"] for line in lines] == [200, 401] and key not in err and "photo" not in err


def test_it_refuses_another_address_without_a_key(tmp_path):
    words = [sys.executable, "-m", "pyunictokens", "serve", "--host", "0.0.0.0"]
    environment = {name: value for name, value in os.environ.items() if "SERVE_KEY" not in name}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "set PYUNICTOKENS_SERVE_KEY" in done.stderr and "Traceback" not in done.stderr
