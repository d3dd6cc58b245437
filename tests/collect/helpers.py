"""Recipes of collections, and what they leave."""

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from tests.collect.server import KEY, MODEL
from trl_bbkd.collect.command import collect
from trl_bbkd.collect.settings import CollectConfig


QUIET = {"temperature": 0.0, "max_tokens": 64}  # no look at the seed


def prompts_file(folder: Path, prompts: list) -> Path:
    """A file of prompts, or of whole rows."""
    rows = [prompt if isinstance(prompt, dict) else {"prompt": prompt} for prompt in prompts]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings_for(server, folder: Path, prompts: list | None = None, **changes) -> CollectConfig:
    """A recipe for prompts (or those that are there), with the key in the environment."""
    os.environ["OPENAI_API_KEY"] = KEY
    path = folder / "prompts.jsonl" if prompts is None else prompts_file(folder, prompts)
    said = {"base_url": server.url, "model": MODEL, "output_dir": str(folder / "out"), "dataset_name": str(path)}
    return CollectConfig(**said | QUIET | changes)


def run(server, folder: Path, prompts: list | None = None, **changes) -> list[dict]:
    """Collect, and return the set."""
    collect(settings_for(server, folder, prompts, **changes))
    return rows(folder)


def write_recipe(server, folder: Path, **changes) -> Path:
    """As [`settings_for`], as a file."""
    said = {"base_url": server.url, "model": MODEL, "output_dir": str(folder / "out"), "dataset_name": "prompts.jsonl"}
    path = folder / "collect.yaml"
    said = {name: value for name, value in (said | QUIET | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(said))
    return path


def rows(folder: Path) -> list[dict]:
    return pq.read_table(folder / "out/train.parquet").to_pylist()


def left_out(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out/left_out.jsonl").read_text().splitlines()]
