"""The key is nowhere but in the environment, also where an endpoint quotes it."""

import asyncio
import base64
import os
import subprocess
import sys

import aiohttp
import pytest

from tests.collect.helpers import prompts_file, write_recipe
from tests.collect.server import KEY, LASTING, NOTED, TRANSIENT, TeacherServer
from trl_bbkd.cli import main
from trl_bbkd.collect.client import Client
from trl_bbkd.collect.redaction import Redactor
from trl_bbkd.collect.replies import NoReply
from trl_bbkd.collect.settings import CollectConfig


OTHER = "wandb-secret-of-another-program"
CODE = "from trl_bbkd.cli import main; main()"


def collect(recipe, folder, *words):
    """As a user runs it, with all that can be said switched on."""
    environment = {**os.environ, "OPENAI_API_KEY": KEY, "WANDB_API_KEY": OTHER, "PYTHONASYNCIODEBUG": "1"}
    command = [sys.executable, "-X", "dev", "-W", "default", "-c", CODE, "collect", str(recipe), *words]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)


def found_in(folder, *texts):
    """Files and texts with a secret in them."""
    secrets = [KEY.encode(), OTHER.encode(), base64.b64encode(KEY.encode())]
    contents = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    contents |= {f"text {number}": text.encode() for number, text in enumerate(texts)}
    assert len(contents) > len(texts)
    return [name for name, content in contents.items() if any(secret in content for secret in secrets)]


def test_the_search_finds(tmp_path):
    (tmp_path / "a").write_text(f"Bearer {KEY}")
    assert found_in(tmp_path, "nothing") and found_in(tmp_path, OTHER)


def test_with_faults_that_quote_it(tmp_path):
    """In answers, in errors that pass and in those that stay; in output, log, journal, card, set and list."""
    kinds = ["ok", *(f"[{kind}]" for kind in (*TRANSIENT, *LASTING, *NOTED)), "[500!]", "[429 ms!]"]
    prompts_file(tmp_path, [f"{kind} Why {OTHER[:3]}?" for kind in kinds])
    with TeacherServer(echoes_key=True, remembers=False) as server:
        recipe = write_recipe(server, tmp_path, request_timeout=1, max_retries=1, logprobs=True, temperature=1.0)
        done = collect(recipe, tmp_path)
        assert done.returncode == 0, done.stderr
        assert server.requests > len(kinds)
    assert found_in(tmp_path, done.stdout, done.stderr) == []
    assert "***" in (tmp_path / "out/left_out.jsonl").read_text()  # it was there


@pytest.mark.parametrize("kind", ["401", "quota", "unreachable"])
def test_in_what_ends_a_run(tmp_path, monkeypatch, capfd, caplog, kind):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("WANDB_API_KEY", OTHER)
    caplog.set_level("DEBUG")
    prompts_file(tmp_path, [f"[{kind}] Why?"])
    with TeacherServer(echoes_key=True, remembers=False) as server:
        changes = {"base_url": "http://127.0.0.1:9/v1"} if kind == "unreachable" else {}
        with pytest.raises(SystemExit):
            main(["collect", str(write_recipe(server, tmp_path, **changes))])
    out, err = capfd.readouterr()
    assert err.splitlines()[-1].startswith("error: ") and kind in err
    assert found_in(tmp_path, out, err, caplog.text) == []


def test_of_an_error_of_the_connection_its_name_is_shown_alone(monkeypatch):
    """Its text may hold the headers that were sent."""

    def broken(*_, **__):
        raise aiohttp.ClientError(f"headers: Bearer {KEY}")

    async def send():
        async with Client(CollectConfig("http://h/v1", "m", "out", "x"), KEY) as client:
            return await client.send({})

    monkeypatch.setattr(aiohttp.ClientSession, "post", broken)
    assert asyncio.run(send()) == NoReply("connection lost", "ClientError")


def test_in_a_traceback(tmp_path):
    """Of an error that nobody foresaw, while a request is on its way."""
    prompts_file(tmp_path, ["Why?"])
    with TeacherServer(echoes_key=True, remembers=False) as server:
        recipe = write_recipe(server, tmp_path)
        code = (
            "import aiohttp\n"
            "def broken(*arguments, **keywords): raise RuntimeError('unforeseen')\n"
            "aiohttp.ClientResponse.read = broken\n"
        ) + CODE
        environment = {**os.environ, "OPENAI_API_KEY": KEY}
        command = [sys.executable, "-X", "dev", "-c", code, "collect", str(recipe)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert "RuntimeError: unforeseen" in done.stderr and done.returncode == 1
    assert found_in(tmp_path, done.stdout, done.stderr) == []


def test_secrets_of_the_environment(monkeypatch):
    """With ends of lines, as JSON has them, and where one begins as another does."""
    monkeypatch.setenv("SOME_TOKEN", 'schlüssel"geheim\n')
    monkeypatch.setenv("OTHER_TOKEN", "another-secret-and-more")
    redactor = Redactor("another-secret")
    spelled = ('schlüssel"geheim', 'schlüssel\\"geheim', 'schl\\u00fcssel\\"geheim', "another-secret-and-more")
    for text in (*spelled, "another-secret", "hf_" + "a" * 20):
        assert redactor.in_messages(f"<{text}>") == "<***>"


def test_spellings(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "another/secret+value")
    redactor = Redactor('key/with "signs"')
    for text in ('key/with "signs"', "key%2Fwith%20%22signs%22", 'key/with \\"signs\\"', "another/secret+value"):
        assert redactor.in_messages(f"<{text}>") == "<***>"
    assert redactor.in_messages("sk-proj-abcdefgh, Authorization: Bearer abc.def-ghi") == "***, Authorization: ***"
    # An answer keeps what is no key of this endpoint
    assert redactor.in_answers('sk-proj-abcdefgh another/secret+value key/with "signs"').endswith(
        "another/secret+value ***"
    )
    assert Redactor("none").in_answers("none of them") == "none of them"
    assert Redactor(None).in_answers("as it is") == "as it is"
