"""The scripts and the notebook of `examples/`: each script by the command of its docstring, at a smaller size where it says so here."""

import ast
import importlib.util
import json
import math
import os
import re
import runpy
import sys
import tomllib
from itertools import islice
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from transformers import AutoConfig, AutoModelForCausalLM

import trl_bbkd
from tests.code_blocks import ROOT, code, commands
from tests.hub_server import HubServer
from tests.pictures import is_drawn


SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOK = ROOT / "examples/gad_on_a_t4.ipynb"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run_script(name, monkeypatch, output_dir, *changes):
    """Run a script in this process, by the first command of its docstring and what changes it."""
    (program, script, *arguments), *_ = commands(code(f"examples/{name}", "bash")[0])
    assert (program, script) == ("python", f"examples/{name}")
    small = ["--disable_tqdm", "true", "--save_strategy", "no", "--output_dir", str(output_dir), *map(str, changes)]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *arguments, *small])
    runpy.run_path(script, run_name="__main__")


def test_gad_in_the_small_world(monkeypatch, tmp_path):
    run_script("gad.py", monkeypatch, tmp_path, "--max_steps", 2, "--per_device_train_batch_size", 16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == 14_208
    assert (tmp_path / "discriminator/heads.safetensors").is_file()


def test_proxykd_in_the_small_world(monkeypatch, tmp_path):
    with (ROOT / "recipes/tinyworld/teacher_train.jsonl").open() as file:
        (tmp_path / "rows.jsonl").write_text("".join(islice(file, 200)))
    small = ["--dataset_name", tmp_path / "rows.jsonl", "--max_steps", 2, "--per_device_train_batch_size", 16]
    small += ["--alignment_rounds", 1, "--alignment_epochs", 1, "--proxy_warmup_epochs", 1]
    run_script("proxykd.py", monkeypatch, tmp_path, *small)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == 14_208
    assert (tmp_path / "proxy/align/stage.json").is_file() and (tmp_path / "proxy/targets/store.json").is_file()


def test_llkd_on_notes(monkeypatch, tmp_path):
    run_script("llkd.py", monkeypatch, tmp_path, "--max_steps", 4, "--selection_warmup_steps", 2)
    assert AutoConfig.from_pretrained(tmp_path).label2id["garden"] == 2
    assert 0 < json.loads((tmp_path / "eval_results.json").read_text())["eval_macro_f1"] < 1


def test_llkd_labels_what_an_api_said(monkeypatch, tmp_path):
    """Rows of both forms of the docstring teach the same: labels and confidences are those of the log-probabilities."""
    stated, probable = (json.loads(line) for line in code("examples/llkd.py", "json")[0].splitlines())
    assert set(stated) == {"text", "label", "teacher_confidence"} and set(probable) == {"text", "logprobs"}
    notes = [json.loads(line) for line in (ROOT / "recipes/tinytopics/teacher_train.jsonl").open()][:400]
    names = sorted({note["label"] for note in notes})
    rows = []
    for note in notes:
        others = (1 - note["teacher_confidence"] + 1e-6) / (len(names) - 1)
        of = {name: note["teacher_confidence"] if name == note["label"] else others for name in names}
        rows.append({"text": note["text"], "logprobs": {name: math.log(of[name]) for name in names}})
    (tmp_path / "api.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    train = trl_bbkd.LLKDTrainer.train
    monkeypatch.setattr(
        trl_bbkd.LLKDTrainer, "train", lambda self, **kwargs: (found.append(self.train_dataset), train(self, **kwargs))
    )
    changes = ["--dataset_name", tmp_path / "api.jsonl", "--test_split_size", 0.1, "--max_steps", 2]
    run_script("llkd.py", monkeypatch, tmp_path / "out", *changes, "--selection_warmup_steps", 1)
    labels = ["travel", "food", "garden", "weather", "sea"]
    for row in found[0].select(range(20)):
        note = notes[row["row_in_file"]]
        assert labels[row["label"]] == note["label"]
        assert row["teacher_confidence"] == pytest.approx(note["teacher_confidence"], abs=1e-3)
    assert len(found[0]) == 360 and (tmp_path / "out/eval_results.json").is_file()


def test_the_header_for_uv_agrees_with_the_package():
    """PEP 723: the header's ranges are those of `pyproject.toml`, and it names whatever the script imports."""
    text = (ROOT / "examples/gad.py").read_text()
    header = re.match(r"# /// script\n((?:#(?: .*)?\n)+?)# ///\n", text)[1]
    script = tomllib.loads("".join(line.removeprefix("# ").removeprefix("#") for line in header.splitlines(True)))
    assert script["requires-python"] == PROJECT["requires-python"]
    needed = {Requirement(line).name: Requirement(line).specifier for line in script["dependencies"]}
    assert needed.pop("trl-bbkd").contains(trl_bbkd.__version__)
    ours = {Requirement(line).name: Requirement(line).specifier for line in PROJECT["dependencies"]}
    assert needed and needed == {name: ours[name] for name in needed}
    assert imported(ast.parse(text)) == {"trl_bbkd", *needed}


def imported(tree):
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return {module.partition(".")[0] for module in modules} - sys.stdlib_module_names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_scripts_are_short_and_take_public_names_only(script):
    text = script.read_text()
    assert len(text.splitlines()) <= 120
    names = {
        alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("trl_bbkd")
        for alias in node.names
    }
    assert names and names <= set(trl_bbkd.__all__)


def cells(notebook):
    return {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"}


def test_the_notebook_holds_no_output_and_installs_this_package():
    notebook = json.loads(NOTEBOOK.read_text())
    code_cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_cells)
    # What the next test leaves out: it would need an index, and a person
    assert cells(notebook)["install"] == f"%pip install -q {PROJECT['name']}"
    assert cells(notebook)["login"].split() == "from huggingface_hub import notebook_login notebook_login()".split()
    from huggingface_hub import notebook_login  # noqa: F401


@pytest.mark.skipif(
    importlib.util.find_spec("nbclient") is None or importlib.util.find_spec("ipykernel") is None,
    reason='the notebook needs a kernel: pip install "trl-bbkd[test]"',
)
def test_the_notebook_runs(monkeypatch, tmp_path, tiny_model_dir):
    """In a kernel of its own, with a tiny student, two steps and a Hub on this machine; installing and logging in are left out."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    by_id = {cell["id"]: cell for cell in notebook.cells}
    changes = {"STUDENT": tiny_model_dir, "MAX_STEPS": 2, "REPOSITORY": "me/student"}
    lines = by_id["parameters"]["source"].splitlines()
    assert [line.partition(" = ")[0] for line in lines] == list(changes)
    by_id["parameters"]["source"] = "\n".join(f"{name} = {value!r}" for name, value in changes.items())
    for name in ("install", "login"):
        by_id[name]["source"] = ""
    with HubServer() as hub:
        own = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        }
        for name, value in {**hub.environment(), **own, "IPYTHONDIR": str(tmp_path / "ipython")}.items():
            monkeypatch.setenv(name, value)
        NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
        ).execute()
    output = {name: json.dumps(cell.get("outputs", [])) for name, cell in by_id.items()}
    student = tmp_path / "output/student"
    assert (student / "adapter_model.safetensors").is_file() and is_drawn(student / "curves.png"), output["train"]
    results = json.loads((student / "metrics.json").read_text())["results"]
    assert {"undistilled", "SeqKD", "GAD"} <= set(results)
    assert "SeqKD" in output["report"] and "image/png" in output["report"]
    assert by_id["generate"]["outputs"]
    (commit,) = hub.commits
    assert commit.repo_id == "me/student" and "adapter_model.safetensors" in commit.files, output["push"]
