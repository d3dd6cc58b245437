"""Recipes of tiny runs, and runs that are killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import yaml

from tests.processes import ROOT


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


def kill(recipe, module, name):
    command = [sys.executable, ROOT / "tests/runs/kill_after_training.py", recipe, module, name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]


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
