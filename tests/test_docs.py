"""The documentation holds together: its site builds strictly, its links lead somewhere, its keys exist."""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from trl_bbkd.collect.settings import CollectConfig
from trl_bbkd.judging.reading import option_names
from trl_bbkd.judging.settings import EVAL_JUDGE_KEYS, JUDGE_KEYS, OWN_KEYS
from trl_bbkd.tasks.reading import OPTION_NAMES
from trl_bbkd.tasks.settings import TASK_KEYS


ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
GUIDES = [ROOT / "docs" / name for name in ("choose.md", "runs.md", "multi_gpu.md", "troubleshooting.md")]
SITE = ("mkdocs", "material", "mkdocstrings")


def test_options_of_the_page_of_evaluations_exist():
    words = set(re.findall(r"--([a-z_]+)", (ROOT / "docs/evaluate.md").read_text()))
    assert len(words) > 12 and words <= {*option_names(), *OPTION_NAMES}


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in SITE),
    reason='the site needs mkdocs: pip install "trl-bbkd[docs]"',
)
def test_site_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    start, api = ((tmp_path / "site" / name).read_text() for name in ("index.html", "api.html"))
    assert 'href="choose.html"' in start and 'href="contributing.html"' in start
    assert "discriminator_learning_rate" in api and "alignment_rounds" in api
    check_tables_of_keys((tmp_path / "site/recipes.html").read_text())
    collect = (tmp_path / "site/collect.html").read_text()
    assert collect.count("<tr><td><code") == len(fields(CollectConfig)) and ">max_<wbr>cost</code>" in collect
    evaluate = (tmp_path / "site/evaluate.html").read_text()
    of_a_training = {*EVAL_JUDGE_KEYS} - {*JUDGE_KEYS}
    shown = len(JUDGE_KEYS) + len(OWN_KEYS) + len(TASK_KEYS) + len(of_a_training)
    assert evaluate.count("<tr><td><code") == shown
    assert all(f">{name.replace('_', '_<wbr>')}</code>" in evaluate for name in of_a_training)
    assert not (tmp_path / "site/site").exists()


def check_tables_of_keys(page):
    """Of each method: its own keys, the common ones, the rest, and what is refused, each key once."""
    from trl import GRPOConfig

    from trl_bbkd import GADConfig, LLKDConfig, PreferenceKDConfig

    _, *methods = re.split(r'<h3 id="[\w-]+">', page)
    assert len(methods) == 5 and "<!-- keys" not in page
    for config, part in ((GADConfig, methods[0]), (PreferenceKDConfig, methods[3]), (LLKDConfig, methods[4])):
        keys = re.findall(r"<tr><td><code[^>]*>(.*?)</code>", part)
        names = {key.replace("<wbr>", "").replace("<wbr />", "") for key in keys}
        assert len(names) == len(keys) and {field.name for field in fields(config) if field.init} <= names
    own, common, rest, refused = methods[0].split("<table>")[1:]
    inherited = {field.name for field in fields(GRPOConfig)}
    for name in {field.name for field in fields(GADConfig)} - inherited | {"seqkd_baseline"}:
        assert f">{name.replace('_', '_<wbr>')}</code>" in own, name
    assert ">learning_<wbr>rate</code>" in common and "TrainingArguments" in common and ">beta</code>" in common
    assert ">top_<wbr>p</code>" in rest and "GRPOConfig" in rest and ">parallelism_<wbr>config</code>" not in rest
    assert ">parallelism_<wbr>config</code>" in refused and "sharded by FSDP2 or ZeRO alone" in refused


def test_batches_of_several_gpus(monkeypatch, tmp_path):
    """The example's table, by the configuration's own arithmetic."""
    from trl_bbkd import GADConfig

    text = (ROOT / "docs/multi_gpu.md").read_text()
    table = text.split("| | 1 GPU | 4 GPUs | 8 GPUs |")[1].split("\n\n")[0]
    rows = {
        cells[0].strip("`"): cells[1:] for cells in re.findall(r"^\| (.+) \| (\d+) \| (\d+) \| (\d+) \|$", table, re.M)
    }
    for column, processes in enumerate((1, 4, 8)):
        monkeypatch.setattr(GADConfig, "world_size", processes)
        keys = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")
        args = GADConfig(str(tmp_path), use_cpu=True, bf16=False, **{key: int(rows[key][column]) for key in keys})
        samples, prompts = int(rows["samples a step"][column]), int(rows["prompts a step"][column])
        assert args.generation_batch_size == samples == prompts * args.num_generations
        assert 1000 // prompts == int(rows["steps an epoch, with 1,000 prompts"][column])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_keys_of_the_guides_exist(page):
    from trl import ModelConfig

    from trl_bbkd import BayesKDConfig, GADConfig, LLKDConfig, ProxyKDConfig
    from trl_bbkd.runs.recipe import ClassifierArguments, RecipeArguments

    known = {
        field.name
        for config in (
            BayesKDConfig,
            GADConfig,
            LLKDConfig,
            ProxyKDConfig,
            ModelConfig,
            ClassifierArguments,
            RecipeArguments,
        )
        for field in fields(config)
    }
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    keys = {key for code in re.findall(r"`([^`]+)`", text) for key in re.findall(r"\b([a-z_]+): ", code)}
    keys |= set(re.findall(r"--(\w+) ", " ".join(re.findall(r"trl-bbkd train my.yaml (.*)", page.read_text()))))
    keys -= {
        "accelerate_config",
        "fsdp_state_dict_type",
        "num_processes",
        "machine_rank",
        "main_process_ip",
        "main_process_port",
        "seeds",
    }  # the launcher's and the command's
    assert len(keys) > 4 and keys - known == set()


def test_keys_of_the_page_of_collections_exist():
    text = re.sub(r"```.*?```", "", (ROOT / "docs/collect.md").read_text(), flags=re.DOTALL)
    code = " ".join(re.findall(r"`([^`]+)`", text))
    keys = set(re.findall(r"\b[a-z]+_[a-z_]+\b", code))
    # Columns, parameters of endpoints, and programs' options
    keys -= {"finish_reason", "reasoning_content", "reasoning_effort", "allow_fallbacks", "do_sample", "https_proxy"}
    keys -= {"left_out", "max_completion_tokens"}
    assert len(keys) > 20 and keys - {field.name for field in fields(CollectConfig)} == set()
