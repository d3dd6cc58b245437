"""The documentation holds together: its site builds strictly, its links lead somewhere, its keys exist."""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
GUIDES = [ROOT / "docs" / name for name in ("choose.md", "runs.md", "troubleshooting.md")]
SITE = ("mkdocs", "material", "mkdocstrings")


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
    assert not (tmp_path / "site/site").exists()


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
    assert len(keys) > 4 and keys - known == set()
