"""The skill for coding agents: what it is made of, and its commands one after another in one folder."""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import yaml

from tests.code_blocks import ROOT, code_blocks, commands
from tests.hub_server import HubServer
from trl_bbkd import cli
from trl_bbkd.commands import train
from trl_bbkd.runs.recipe_keys import recipe_keys


SKILL = ROOT / "skills/black-box-distillation/SKILL.md"
TEXT = SKILL.read_text()
# Models of the small world stand for those of the skill, and runs are shorter
MODELS = {"Qwen/Qwen2.5-0.5B-Instruct": "student", "Qwen/Qwen2.5-7B-Instruct": "proxy"}
ROWS = 64
SMALL = (
    "--use_cpu true --bf16 false --disable_tqdm true --max_steps 2 --per_device_train_batch_size 16 --eval_prompts 4"
)
SMALL += " --gradient_accumulation_steps 1 --max_completion_length 16 --discriminator_only_steps 0 --save_steps 1"


def test_front_matter():
    head = yaml.safe_load(TEXT.split("---\n")[1])
    assert head["name"] == SKILL.parent.name and re.fullmatch(r"[a-z0-9-]{1,64}", head["name"])
    assert 100 < len(head["description"]) <= 1024 and "Use when" in head["description"]
    assert len(TEXT.splitlines()) <= 200


def test_links_lead_somewhere():
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^## (.*)", TEXT, re.M)
    }
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", TEXT):
        assert (SKILL.parent / target).exists(), target
        assert target or anchor in anchors, anchor


def test_keys_exist():
    known = set().union(*(recipe_keys(method) for method in ("gad", "proxykd", "bayeskd", "llkd")))
    keys = set(re.findall(r"`(\w+): [^`]+`", TEXT))
    keys |= {name for name in re.findall(r"`([a-z]+(?:_[a-z]+)+)`", TEXT) if not name.startswith("top_log")}
    assert len(keys) > 15 and keys - known == set()


def test_commands_in_order(monkeypatch, tmp_path, capsys):
    """In this process, so that TRL is imported once; pushing goes to a Hub on this machine."""
    monkeypatch.chdir(tmp_path)
    world = ROOT / "recipes/tinyworld"
    with (world / "teacher_train.jsonl").open() as file:
        (tmp_path / "teacher.jsonl").write_text("".join(islice(file, ROWS)))
    shutil.copy(ROOT / "recipes/tinytopics/teacher_train.jsonl", tmp_path / "labelled.jsonl")
    blocks = code_blocks(SKILL)
    for block in blocks:
        if block.language == "python":
            exec(compile(block.code, str(block), "exec"), {})
        elif block.language == "bash":
            for words in commands(block.code):
                run([str(world / MODELS[word]) if word in MODELS else word for word in words])
    said = capsys.readouterr().out
    assert "rows: 64" in said and "tinyworld" in said and "undistilled" in said
    for method in ("gad", "proxykd", "bayeskd", "llkd"):
        assert (tmp_path / f"{method}.yaml").is_file()
    assert (tmp_path / "output/try/report.md").is_file()
    results = json.loads((tmp_path / "output/gad/metrics.json").read_text())["results"]
    assert {"undistilled", "SeqKD", "GAD"} <= set(results)


def run(words):
    if words[:2] == ["trl-bbkd", "train"]:
        # As `trl-bbkd train` does it, but for the launcher; what the skill says wins
        train.run_recipe(words[2], [*SMALL.split(), *words[3:]])
    elif words[:2] == ["trl-bbkd", "push"]:
        push(words)
    elif words[0] == "trl-bbkd":
        cli.main(words[1:])
    else:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert done.stdout


def push(words):
    with HubServer() as hub:
        environment = {**os.environ, **hub.environment(), "PYTHONPATH": str(ROOT)}
        program = Path(sys.executable).parent / words[0]
        done = subprocess.run([program, *words[1:]], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "adapter_model.safetensors" in hub.commits[-1].files
    assert hub.repositories["me/student"]["visibility"] == "private"
