"""Recipes of tiny runs, and what the runs leave."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import yaml

from trl_bbkd.__main__ import main
from trl_bbkd.runs.recipe import load_recipe
from trl_bbkd.runs.run import run


RESUME = ["--resume_from_checkpoint", "true"]


def write_recipe(folder, student, output_dir, **changes):
    values = {
        "method": "gad",
        "model_name_or_path": student,
        "dataset_name": str(folder),
        "teacher_name": "a test",
        "sample_metrics": f"{folder / 'judge.py'}:has_blue",
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 64,
        "num_generations": 4,
        "max_completion_length": 12,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "discriminator_learning_rate": 1e-3,
        "gradient_checkpointing": False,
        **changes,
    }
    path = Path(output_dir).parent / f"{Path(output_dir).name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path


def run_recipe(path):
    run(load_recipe(path))


def command_line(folder, *arguments) -> str:
    """What `python -m trl_bbkd` prints in a folder; in a process of its own, which stays there."""
    os.chdir(folder)
    sys.argv = ["trl_bbkd/__main__.py", *map(str, arguments)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(sys.argv[1:])
    return printed.getvalue()


def saved(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    return {name: metrics[name] for name in ("results", "curves", "differences", "log_history")}


def without_times(metrics):
    for found in metrics["results"].values():
        found.pop("seconds", None)
    metrics["log_history"] = [
        {name: value for name, value in line.items() if "time" not in name and "per_second" not in name}
        for line in metrics["log_history"]
    ]
    return metrics


def never(*args, **kwargs):
    raise AssertionError("this was done before")
