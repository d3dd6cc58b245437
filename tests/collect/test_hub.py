"""A set on the Hub, with the real client in processes of its own, against a server of the Hub's protocol."""

import io
import os
import subprocess
import sys

import pyarrow.parquet as pq
from huggingface_hub import DatasetCard

from tests.collect.helpers import prompts_file, rows, write_recipe
from tests.collect.server import KEY, TeacherServer
from tests.hub_server import TOKEN, HubServer


CODE = "from trl_bbkd.cli import main; main()"


def collect(hub, recipe, *words):
    environment = {**os.environ, **hub.environment(), "OPENAI_API_KEY": KEY}
    command = [sys.executable, "-c", CODE, "collect", str(recipe), "--push_to_hub", *words]
    return subprocess.run(command, env=environment, cwd=recipe.parent, capture_output=True, text=True, timeout=120)


def test_a_set_and_its_card_are_sent(tmp_path):
    """The first commit fails: the same command sends the set, and asks for nothing again."""
    prompts_file(tmp_path, ["A?", "B?", "[length] C?"])
    with TeacherServer() as server, HubServer({"/commit/": 403}) as hub:
        changes = {"hub_dataset_id": "me/answers", "extra_body": {"user": "/home/me/secret.txt"}}
        recipe = write_recipe(server, tmp_path, **changes)
        failed = collect(hub, recipe)
        assert failed.returncode == 2 and len(rows(tmp_path)) == 2
        assert failed.stderr.splitlines()[-1].startswith(
            "error: The set could not be pushed to me/answers: the Hub answered 403"
        )
        assert failed.stderr.rstrip().endswith("The same command pushes it again, and asks for nothing twice.")
        hub.refusals.clear()
        asked = server.requests
        done = collect(hub, recipe)
        assert done.returncode == 0 and server.requests == asked
    assert f"On the Hub: {hub.url}/datasets/me/answers" in done.stderr
    repository = hub.repositories["me/answers"]
    assert repository["type"] == "dataset" and repository["visibility"] == "private"
    (commit,) = hub.commits
    assert commit.message == "Upload answers" and set(commit.files) == {"README.md", "train.parquet"}
    assert pq.read_table(io.BytesIO(commit.files["train.parquet"])).to_pylist() == rows(tmp_path)
    card = DatasetCard(commit.files["README.md"].decode())
    assert card.data.configs[0]["data_files"] == [{"split": "train", "path": "train.parquet"}]
    assert "# Answers of teacher-1" in card.text and "/home/me" not in card.text and "secret.txt" in card.text
    texts = [*commit.files.values(), *(run.stdout.encode() + run.stderr.encode() for run in (failed, done))]
    assert not any(secret.encode() in text for secret in (TOKEN, KEY) for text in texts)


def test_a_hub_that_refuses_is_known_before_anything_is_paid(tmp_path):
    prompts_file(tmp_path, ["A?"])
    with TeacherServer() as server, HubServer({"/api/repos/create": 403}) as hub:
        recipe = write_recipe(server, tmp_path, hub_dataset_id="me/answers", hub_private_repo=False)
        done = collect(hub, recipe)
        assert done.returncode == 2 and server.requests == 0
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith("error: The data set me/answers cannot be created on the Hub: the Hub answered 403")
    assert "Refused" in line and TOKEN not in done.stderr and "Log in with `hf auth login`" in line
    assert line.endswith("Nothing was asked yet: `push_to_hub: false` collects without the Hub.")
