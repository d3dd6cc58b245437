"""The command as a user meets it: help, the live line, Ctrl-C."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields

import pytest

from tests.collect.helpers import prompts_file, rows, write_recipe
from tests.collect.server import KEY, TeacherServer
from trl_bbkd.cli import main
from trl_bbkd.collect.reading import NAMES_ELSEWHERE, read_settings
from trl_bbkd.collect.settings import CollectConfig
from trl_bbkd.collect.tally import Tally
from trl_bbkd.runs.shipped import COLLECT, recipe_list, recipes_folder, shipped_recipes


CODE = "from trl_bbkd.cli import main; main()"
HEAVY = ("torch", "transformers", "trl", "accelerate", "datasets", "pyarrow", "aiohttp", "huggingface_hub", "rich")


def test_help_has_every_key_and_imports_nothing_heavy():
    code = (
        "import sys, time\nbegin = time.process_time()\nfrom trl_bbkd.cli import main\n"
        "try: main(['collect', '--help'])\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        f"print(time.process_time() - begin, [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, _, loaded = done.stderr.strip().partition(" ")
    # 0.1 s on a quiet machine; processor time does not wait for others
    assert loaded == "[]" and float(seconds) < 0.3
    assert all(f"--{field.name} " in done.stdout for field in fields(CollectConfig))


def test_a_recipe_is_refused_before_anything_heavy_is_imported(tmp_path):
    (tmp_path / "bad.yaml").write_text(
        "base_url: http://h/v1\nmodel: m\ndataset_name: p\noutput_dir: o\nmax_requests: 0\n"
    )
    (tmp_path / "keyless.yaml").write_text("base_url: http://h/v1\nmodel: m\ndataset_name: p\noutput_dir: o\n")
    code = (
        "import sys\nfrom trl_bbkd.cli import main\nfor name in ('bad', 'keyless'):\n"
        "    try: main(['collect', name + '.yaml'])\n    except SystemExit as stopped: assert stopped.code == 2\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n" and [line.startswith("error: ") for line in done.stderr.splitlines()] == [True] * 2


def test_a_run_imports_nothing_of_torch(tmp_path):
    prompts_file(tmp_path, ["A?"])
    with TeacherServer() as server:
        recipe = write_recipe(server, tmp_path)
        code = f"import sys\n{CODE.replace('main()', '')}\nmain(['collect', {str(recipe)!r}])\n"
        code += f"print([name for name in {HEAVY[:4]} if name in sys.modules])"
        environment = {**os.environ, "OPENAI_API_KEY": KEY}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
    assert done.stdout.strip() == "[]"


def test_every_name_elsewhere_is_of_a_key_that_there_is():
    keys = {field.name for field in fields(CollectConfig)}
    assert {name for names in NAMES_ELSEWHERE.values() for name in names} <= keys and not keys & set(NAMES_ELSEWHERE)


def test_the_recipe_of_the_package():
    path = recipes_folder() / COLLECT
    settings = read_settings(path, {})
    assert settings.concurrency == 16 and settings.num_samples == 1
    # What is commented out may be said too
    text = re.sub(r"^# (?=\w+: )(?!Hardware|Command)", "", path.read_text(), flags=re.MULTILINE)
    assert "\nmax_cost: 5.00" in text and "\nlogprobs: true" in text
    assert str(path) in recipe_list() and path not in shipped_recipes().values()


def test_all_is_said_by_options(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OTHER_KEY", KEY)
    prompts_file(tmp_path, ["A?", "B?"])
    with TeacherServer() as server:
        recipe = write_recipe(server, tmp_path, model="another", max_tokens=3)
        main(
            [
                "collect",
                str(recipe),
                "--model",
                "teacher-1",
                "--max_tokens=64",
                "--api_key_env",
                "OTHER_KEY",
                "--seed",
                "null",
            ]
        )
    assert server.requests == 2 and server.asked[0]["max_tokens"] == 64 and "seed" not in server.asked[0]
    told = capsys.readouterr().err
    assert "2 answers to ask for." in told and f"2 answers in {tmp_path}/out/train.parquet." in told


def test_the_line():
    tally = Tally(expected=2000, started=0.0)
    tally.answered, tally.failed = 490, 10
    tally.spent.prompt, tally.spent.completion, tally.spent.cost = 10_000, 20_000, 0.5
    tally.faults.update({"rate limit": 3, "status 500": 1})
    tally.failures.update({"status 400": 10})
    tally.left_out.update({"length": 7})
    assert tally.line("USD", now=50.0) == (
        "500 of 2,000 answers · 10.0/s · 30,000 tokens · 0.5000 of about 2.0000 USD · 7 length left out · "
        "3 rate limit, 1 status 500 retried · 10 status 400 failed"
    )
    assert "USD" not in tally.line(None, now=50.0)


def start(recipe, **others):
    environment = {**os.environ, "OPENAI_API_KEY": KEY}
    return subprocess.Popen([sys.executable, "-c", CODE, "collect", str(recipe)], env=environment, text=True, **others)


def until(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)


def test_ctrl_c_keeps_everything(tmp_path):
    """What is in flight is waited for, and a second run goes on."""
    prompts_file(tmp_path, [f"Question {n}?" for n in range(60)])
    with TeacherServer(latency=0.3) as server:
        recipe = write_recipe(server, tmp_path, concurrency=8)
        process = start(recipe, stderr=subprocess.PIPE)
        until(lambda: server.requests > 20, process)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in told
        assert told.splitlines()[-1] == "Stopped. The same command goes on."
        assert server.paid == server.requests == len(rows(tmp_path)) < 60
        server.latency = 0.0
        os.environ["OPENAI_API_KEY"] = KEY
        main(["collect", str(recipe)])
        assert server.requests == 60 == len(rows(tmp_path))


@contextlib.contextmanager
def pressing_ctrl_c(*moments):
    """In this process, whenever the next moment has come."""

    def press():
        for moment in moments:
            while not moment():
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    with pytest.raises(SystemExit) as stopped:
        yield
    thread.join(30)
    assert stopped.value.code == 130


def test_a_second_ctrl_c_does_not_wait(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    prompts_file(tmp_path, ["Quick?", *(f"[slow trickle] Question {n}?" for n in range(20))])
    begin = time.monotonic()
    with TeacherServer() as server:
        recipe = write_recipe(server, tmp_path, concurrency=4, request_timeout=60)
        with pressing_ctrl_c(*[lambda: server.in_flight == 4] * 2):
            main(["collect", str(recipe)])
    assert time.monotonic() - begin < 20 and server.requests == 5 and len(rows(tmp_path)) == 1


def test_a_terminal_sees_a_live_line(tmp_path):
    prompts_file(tmp_path, [f"Question {n}?" for n in range(40)])
    with TeacherServer(latency=0.2) as server:
        recipe = write_recipe(server, tmp_path, concurrency=8, prompt_price=1, completion_price=1)
        ours, theirs = pty.openpty()
        process = start(recipe, stderr=theirs, stdin=theirs)
        os.close(theirs)
        seen = b""
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:  # its other end is closed
                break
            if not chunk:
                break
            seen += chunk
        assert process.wait(30) == 0
        os.close(ours)
    text = seen.decode()
    assert re.search(r"\d+ of 40 answers · [\d.]+/s · \d+ tokens · 0\.\d{4} of about", text)
    assert "\r" in text and "40 of 40 answers" in text


def test_a_run_that_waits_for_a_pause_ends_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    prompts_file(tmp_path, ["Quick?", *(f"[429 long] Question {n}?" for n in range(8))])

    class Waiting(TeacherServer):
        async def _answer(self, writer, path, raw, key):
            if "429 long" in json.loads(raw)["messages"][-1]["content"]:
                self.requests += 1
                return await self._error(writer, 429, "slow down", "rate_limit", {"Retry-After": "300"})
            return await super()._answer(writer, path, raw, key)

    begin = time.monotonic()
    with Waiting() as server:
        recipe = write_recipe(server, tmp_path, concurrency=4)
        with pressing_ctrl_c(lambda: server.requests >= 5):
            main(["collect", str(recipe)])
    assert time.monotonic() - begin < 20 and server.requests == 5


def test_a_wait_of_hours_ends_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    prompts_file(tmp_path, ["Why?"])

    class Waiting(TeacherServer):
        async def _answer(self, writer, path, raw, key):
            return await self._error(writer, 429, "daily limit", "rate_limit", {"Retry-After": "7200"})

    with Waiting() as server, pytest.raises(SystemExit):
        main(["collect", str(write_recipe(server, tmp_path))])
    assert "rate limit: asks to wait 7,200 s. daily limit. 1 answer is not asked for yet" in capsys.readouterr().err


def test_a_proxy_of_the_environment_is_used(tmp_path, monkeypatch, capsys):
    """It is asked for the whole address; `NO_PROXY` and a ~/.netrc with another key are as elsewhere."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    (tmp_path / "netrc").write_text("machine teacher.example login me password other-key\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    prompts_file(tmp_path, ["Why?"])
    paths = []

    class Proxy(TeacherServer):
        async def _answer(self, writer, path, raw, key):
            paths.append(path)
            return await super()._answer(writer, path.removeprefix("http://teacher.example"), raw, key)

    with Proxy() as server:
        monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
        main(["collect", str(write_recipe(server, tmp_path, base_url="http://teacher.example/v1"))])
        assert paths == ["http://teacher.example/v1/chat/completions"] and len(rows(tmp_path)) == 1
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        main(["collect", str(write_recipe(server, tmp_path))])
        assert paths[1:] == ["/v1/chat/completions"]
