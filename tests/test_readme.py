"""Every code block of the README, and every first run of a method, is run as it stands, at a smaller size where it says so here."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import pipeline

from tests.code_blocks import code, code_blocks
from tests.pictures import is_drawn
from trl_bbkd.collect.reading import read_settings
from trl_bbkd.data.teacher_data import check_teacher_data
from trl_bbkd.runs.recipe import load_recipe


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = [(block.language, block.code) for block in code_blocks("README.md")]
RECIPES = ("gad", "proxykd-on-policy", "preferencekd", "proxykd", "bayeskd", "llkd")
RUNS = [f"accelerate launch recipes/{name}.yaml\n" for name in RECIPES]
MOST_LINES = 110
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
SMALL_REPORT = "--eval_prompts 16 --eval_samples 1"
SMALL_BATCH = "--per_device_train_batch_size 64 --discriminator_batch_size 64"
SMALL = "--use_cpu true --bf16 false --max_steps 2 --per_device_train_batch_size 8 --max_completion_length 12"


def blocks(language):
    return [text for name, text in BLOCKS if name == language]


def run(command, cwd, timeout=900):
    process = subprocess.run(
        command,
        shell=True,
        executable="/bin/bash",
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-3000:]
    return process


def test_every_block_has_a_test():
    assert [name for name, _ in BLOCKS] == ["bash", "bash", "python", "json", "yaml", "bash"]
    seeds = [f"trl-bbkd train recipes/{name}.yaml --seeds 0 1 2\n" for name in RECIPES]
    assert code("docs/results/recipes.md", "bash") == [one + three for one, three in zip(RUNS, seeds, strict=True)]
    assert blocks("bash")[0].endswith(f"&& {RUNS[0]}")


def test_readme_is_read_in_two_minutes():
    assert len(README.splitlines()) <= MOST_LINES


def test_install_commands():
    """Installing is `.ci/run`'s part: it runs the second block from its first word to its last."""
    install, test = blocks("bash")[:2]
    assert install == "pip install -c constraints.txt -e . && accelerate launch recipes/gad.yaml\n"
    assert test == 'pip install -c constraints.txt -e ".[test]" && pytest\n'
    assert test.strip() in (ROOT / ".ci/run").read_text()


def test_first_command_in_small(tmp_path):
    launch = blocks("bash")[0].split("&&")[1].strip()
    small = f"--max_steps 4 {SMALL_BATCH} {SMALL_REPORT} --output_dir {shlex.quote(str(tmp_path / 'gad'))}"
    process = run(f"{launch} {small}", ROOT)
    assert "undistilled" in process.stdout and "SeqKD" in process.stdout
    check_run(tmp_path / "gad")
    check_folders_are_told(tmp_path / "gad")


@pytest.mark.slow
def test_first_command_as_it_stands(tmp_path):
    launch = blocks("bash")[0].split("&&")[1].strip()
    run(f"{launch} --output_dir {shlex.quote(str(tmp_path / 'gad'))}", ROOT)
    check_run(tmp_path / "gad")
    gained = json.loads((tmp_path / "gad/metrics.json").read_text())["differences"]["SeqKD"]
    assert gained["valid@t1.0"]["difference"] > 0 and gained["valid@equal_diversity"]["low"] > 0


def check_a_tie(results, method):
    """As its page says; CPU and thread count change the figures of a run by a few hundredths."""
    valid = {name: results[name]["valid@t1.0"] for name in ("undistilled", "SeqKD", method)}
    assert abs(valid[method] - valid["SeqKD"]) < 0.05 and valid["undistilled"] + 0.6 < valid[method]


def check_run(folder):
    for name in ("model.safetensors", "README.md", "report.md", "curves.png", "metrics.json"):
        assert (folder / name).stat().st_size > 100, name
    assert is_drawn(folder / "curves.png")
    assert (folder / "discriminator/backbone/model.safetensors").is_file()
    assert {"undistilled", "SeqKD", "GAD"} <= set(json.loads((folder / "metrics.json").read_text())["results"])
    (answer,) = pipeline("text-generation", str(folder))("tom takes 4 pears to the market .", max_new_tokens=8)
    assert "generated_text" in answer


def check_folders_are_told(folder):
    """What a run leaves, and its proxy's folder, stands in `docs/runs.md`."""
    page = (ROOT / "docs/runs.md").read_text()
    paths = [*folder.iterdir(), *folder.glob("proxy/*")]
    names = {re.sub(r"-\d+$", "-N", path.name) + "/" * path.is_dir() for path in paths}
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_python_example(tmp_path):
    (example,) = blocks("python")
    small = example.replace("max_steps=20", "max_steps=2, use_cpu=True, bf16=False, per_device_train_batch_size=8")
    small = small.replace("output/student", str(tmp_path / "student"))
    assert small.count("max_steps=2,") == 1
    script = tmp_path / "example.py"
    script.write_text(small)
    run(f"{shlex.quote(sys.executable)} {shlex.quote(str(script))}", ROOT)
    assert (tmp_path / "student/model.safetensors").is_file()
    assert (tmp_path / "student/discriminator/heads.safetensors").is_file()


def test_teacher_file_and_recipe(tmp_path, tiny_model_dir):
    (example,), (recipe,), command = blocks("json"), blocks("yaml"), blocks("bash")[2].strip()
    rows = [json.loads(line) for line in example.splitlines()]
    for row in rows:
        assert check_teacher_data(Dataset.from_list([row])).rows == 1
    (tmp_path / "teacher.jsonl").write_text("".join(json.dumps(rows[0]) + "\n" for _ in range(24)))
    (tmp_path / "my.yaml").write_text(recipe.replace("Qwen/Qwen2.5-0.5B-Instruct", tiny_model_dir))
    run(f"{command} {SMALL}", tmp_path)
    assert (tmp_path / "output/student/report.md").is_file()


def test_proxykd_command_in_small(tmp_path):
    command = RUNS[RECIPES.index("proxykd")].strip()
    small = f"--max_steps 4 --proxy_warmup_epochs 1 --alignment_rounds 2 --alignment_epochs 1 {SMALL_REPORT}"
    process = run(f"{command} {small} --output_dir {shlex.quote(str(tmp_path / 'kd'))}", ROOT)
    assert "Proxy-KD: " in process.stdout and "SeqKD" in process.stdout
    for name in (
        "model.safetensors",
        "README.md",
        "report.md",
        "curves.png",
        "metrics.json",
        "proxy/targets/store.json",
    ):
        assert (tmp_path / "kd" / name).stat().st_size > 100, name
    assert is_drawn(tmp_path / "kd/curves.png")
    results = json.loads((tmp_path / "kd/metrics.json").read_text())["results"]
    assert set(results) == {"undistilled", "proxy", "SeqKD", "Proxy-KD", "teacher"}
    for text in ((tmp_path / "kd" / name).read_text() for name in ("report.md", "README.md")):
        for stage in ("proxy warm-up", "proxy alignment", "soft targets", "distillation"):
            assert f"| {stage} |" in text
    check_folders_are_told(tmp_path / "kd")


@pytest.mark.slow
def test_proxykd_command_as_it_stands(tmp_path):
    run(f"{RUNS[RECIPES.index('proxykd')].strip()} --output_dir {shlex.quote(str(tmp_path / 'kd'))}", ROOT)
    results = json.loads((tmp_path / "kd/metrics.json").read_text())["results"]
    assert results["Proxy-KD"]["valid@t1.0"] > results["SeqKD"]["valid@t1.0"] > results["undistilled"]["valid@t1.0"]


def test_bayeskd_command_in_small(tmp_path):
    command = RUNS[RECIPES.index("bayeskd")].strip()
    folder = tmp_path / "bayeskd"
    small = f"--max_steps 4 --proxy_warmup_epochs 1 --prior_weight 1 {SMALL_REPORT}"
    process = run(f"{command} {small} --output_dir {shlex.quote(str(folder))}", ROOT)
    assert "Bayes-KD: " in process.stdout and "SeqKD" in process.stdout
    targets = [
        f"proxy/targets/{name}/{file}" for name in ("prior", "posterior") for file in ("store.json", "stage.json")
    ]
    for name in ("model.safetensors", "README.md", "report.md", "curves.png", "metrics.json", *targets):
        assert (folder / name).stat().st_size > 100, name
    assert is_drawn(folder / "curves.png")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["results"]) == {"undistilled", "proxy", "SeqKD", "Bayes-KD", "teacher"}
    assert metrics["calibration"]["proxy"] < metrics["calibration"]["prior"]
    report, card = ((folder / name).read_text() for name in ("report.md", "README.md"))
    for stage in ("proxy warm-up", "estimate of the teacher", "distillation"):
        assert f"| {stage} |" in report and f"| {stage} |" in card
    assert "## Calibration of the estimate" in report and "context that was seen once" in report
    check_folders_are_told(folder)


@pytest.mark.slow
def test_bayeskd_command_as_it_stands(tmp_path):
    run(f"{RUNS[RECIPES.index('bayeskd')].strip()} --output_dir {shlex.quote(str(tmp_path / 'bayeskd'))}", ROOT)
    results = json.loads((tmp_path / "bayeskd/metrics.json").read_text())["results"]
    check_a_tie(results, "Bayes-KD")


def test_llkd_command_in_small(tmp_path):
    command = RUNS[RECIPES.index("llkd")].strip()
    folder = tmp_path / "llkd"
    small = f"--max_steps 12 --selection_warmup_steps 4 --output_dir {shlex.quote(str(folder))}"
    process = run(f"{command} {small}", ROOT)
    assert "LLKD: " in process.stdout and "random rows" in process.stdout
    for name in ("model.safetensors", "README.md", "report.md", "curves.png", "reliability.png", "metrics.json"):
        assert (folder / name).stat().st_size > 100, name
    assert is_drawn(folder / "curves.png")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics["results"]) == ["undistilled", "all rows", "random rows", "LLKD"]
    assert 0 < metrics["results"]["LLKD"]["learned_share"] < 1 and metrics["warmup_steps"] == 4
    for text in ((folder / name).read_text() for name in ("report.md", "README.md")):
        assert "| travel |" in text and "The teacher's labels" in text
    (answer,) = pipeline("text-classification", str(folder))("the train station and a ticket")
    assert answer["label"] == "travel"
    check_folders_are_told(folder)


@pytest.mark.slow
def test_llkd_command_as_it_stands(tmp_path):
    run(f"{RUNS[RECIPES.index('llkd')].strip()} --output_dir {shlex.quote(str(tmp_path / 'llkd'))}", ROOT)
    results = json.loads((tmp_path / "llkd/metrics.json").read_text())["results"]
    f1 = {name: found["macro_f1"] for name, found in results.items()}
    assert f1["LLKD"] > f1["all rows"] > f1["random rows"] > f1["undistilled"]


def test_code_of_the_bayeskd_docs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = code("docs/bayeskd.md", "python")
    found = {}
    exec(example, found)
    assert found["ids"].tolist() == [[7, 8]] and found["ratios"][0] == pytest.approx([2 / 3, 1 / 3])


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_code_of_the_llkd_docs_runs(tmp_path):
    labelling, mixing = code("docs/llkd.md", "python")
    found = {"__name__": "docs"}
    exec(labelling, found)
    assert found["rows"]["label"][:] == [0, 1] and found["rows"]["teacher_confidence"][0] == pytest.approx(
        0.924, abs=1e-3
    )
    exec(mixing, found)
    assert found["SelectiveSFTConfig"]("x", use_cpu=True, bf16=False, selection="llkd").pool_factor == 4
    collecting, recipe, _ = code("docs/llkd.md", "yaml")
    (tmp_path / "collect.yaml").write_text(collecting)
    settings = read_settings(tmp_path / "collect.yaml", {})
    assert settings.labels == ["methods", "results"] and settings.top_logprobs == 20
    (tmp_path / "llkd.yaml").write_text(recipe)
    recipe = load_recipe(tmp_path / "llkd.yaml", ["--use_cpu", "true"])
    assert recipe.training_args.labels == ["methods", "results"] and recipe.script_args.baselines
