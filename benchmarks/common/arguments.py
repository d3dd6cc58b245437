"""Arguments that command lines have in common, and trainers."""

import argparse
from collections.abc import Iterable

from .device import HAS_GPU


# Nothing but the measurements leaves a run
QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}


def parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def evidence_parser(description: str, output_dir: str, arms: Iterable[str]) -> argparse.ArgumentParser:
    """Of a benchmark that trains several arms from several seeds."""
    found = parser(description)
    found.add_argument("--output_dir", default=output_dir)
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    found.add_argument("--arms", nargs="*", choices=list(arms), default=list(arms))
    return found


def evidence_arguments(seed: int) -> dict:
    """Of a trainer whose student is measured, in float32."""
    return {
        "use_cpu": not HAS_GPU,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 10,
        "seed": seed,
        **QUIET,
    }


def timing_arguments() -> dict:
    """Of a trainer whose steps are timed."""
    return {"use_cpu": not HAS_GPU, "bf16": HAS_GPU, "gradient_checkpointing": False, **QUIET}
