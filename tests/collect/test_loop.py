"""From an API to a student, by the commands of the documentation: against a server of this machine, and `transformers serve`."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from itertools import islice

import pytest
import yaml

from tests.code_blocks import ROOT, code, commands
from tests.collect.helpers import prompts_file
from tests.collect.server import KEY, MODEL, TeacherServer
from tests.processes import free_port
from trl_bbkd import cli
from trl_bbkd.commands import train


PAGE = "docs/collect.md"
STUDENT = "Qwen/Qwen2.5-0.5B-Instruct"
SMALL = (
    "--use_cpu true --bf16 false --disable_tqdm true --max_steps 2 --per_device_train_batch_size 8 --num_generations 4 "
    "--gradient_accumulation_steps 1 --max_completion_length 12 --discriminator_only_steps 0 --eval_prompts 4 --eval_samples 1"
).split()
WORLD = ROOT / "recipes/tinyworld"


def loop(folder, monkeypatch, student, prompts, **changes):
    """Each command as it stands, but for the address, the student and the size of the training; return the report."""
    monkeypatch.chdir(folder)
    prompts_file(folder, prompts)
    recipe = yaml.safe_load(code(PAGE, "yaml")[0]) | changes
    (folder / "teacher.yaml").write_text(yaml.safe_dump(recipe))
    lines = commands(code(PAGE, "bash")[0])
    assert [words[:2] for words in lines] == [
        *(["trl-bbkd", name] for name in ("collect", "init", "train")),
        ["cat", "output/gad/report.md"],
    ]
    for words in lines[:2]:
        cli.main([student if word == STUDENT else word for word in words[1:]])
    # Without the launcher
    train.run_recipe(lines[2][2], SMALL)
    return subprocess.run(lines[3], capture_output=True, text=True, check=True).stdout


def results(folder):
    return json.loads((folder / "output/gad/metrics.json").read_text())["results"]


def test_the_commands_of_the_docs(tmp_path, monkeypatch, tiny_model_dir):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with TeacherServer() as server:
        prompts = [f"Question {number}?" for number in range(24)]
        report = loop(tmp_path, monkeypatch, tiny_model_dir, prompts, base_url=server.url, model=MODEL)
        assert 24 <= server.requests <= 25  # with the look at the seed
    assert "gpt-4.1-mini" in report and {"undistilled", "SeqKD", "GAD"} <= set(results(tmp_path))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """`transformers serve` with a model of the small world, that samples: its address and its model."""
    for package in ("fastapi", "openai", "uvicorn"):
        pytest.importorskip(package, reason=f"transformers serve needs {package}: the `dev` extra")
    folder = tmp_path_factory.mktemp("served")
    model = shutil.copytree(WORLD / "proxy", folder / "teacher")
    (model / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    assert json.loads((model / "generation_config.json").read_text())["do_sample"]
    # Without this folder it answers 500
    (folder / "cache").mkdir()
    port = free_port()
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "HF_HUB_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, folder / "log")
        yield {"base_url": f"http://127.0.0.1:{port}/v1", "model": str(model), "api_key_env": None}
    finally:
        process.terminate()
        process.wait(30)


def wait_for(address, process, log):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.2)
    raise AssertionError(log.read_text()[-3000:])


@pytest.mark.slow
def test_the_commands_against_transformers_serve(tmp_path, monkeypatch, capsys, served, tiny_model_dir):
    with (WORLD / "teacher_train.jsonl").open() as file:
        prompts = [json.loads(line)["prompt"] for line in islice(file, 24)]
    changes = served | {"num_samples": 2, "temperature": 1.0, "max_tokens": 40}
    report = loop(tmp_path, monkeypatch, tiny_model_dir, prompts, **changes)
    told = capsys.readouterr().err
    assert "samples" not in told and "48 answers in output/collect/train.parquet." in told
    card = (tmp_path / "output/collect/README.md").read_text()
    assert "| `n` | ignored |" in card and "| `seed` | honoured |" in card and "| `usage` | honoured |" in card
    assert f"`{served['model']}@main` (48)" in card and "a server of its user's own" in card
    assert "gpt-4.1-mini" in report and {"undistilled", "SeqKD", "GAD"} <= set(results(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "another/model"}, "unknown model"),
        ({"logprobs": True}, "`logprobs` is ignored, by two answers. Either take it out of the recipe"),
    ],
)
def test_what_transformers_serve_does_not_do(tmp_path, monkeypatch, capsys, served, changes, message):
    prompts_file(tmp_path, ["ann takes 4 eggs to the river .", "max takes 6 cakes to the party ."])
    monkeypatch.chdir(tmp_path)
    said = served | {"dataset_name": "prompts.jsonl", "output_dir": "out", "max_tokens": 40} | changes
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(SystemExit):
        cli.main(["collect", "teacher.yaml"])
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in line
