"""The small world of the recipes: its rows, its judge, and what is measured of a student there."""

import sys
from pathlib import Path

from datasets import Dataset

from trl_bbkd.data.teacher_data import tokenize_teacher_data
from trl_bbkd.evaluation.student import evaluate_student


RECIPES = Path(__file__).parents[2] / "recipes"
WORLD = RECIPES / "tinyworld"
sys.path.insert(0, str(WORLD))

import build  # noqa: E402, F401
import world  # noqa: E402


ANSWER_TOKENS = 32
# Key of a measurement, and its form
STUDENT_COLUMNS = {
    "valid, T=1.0": ("valid@t1.0", "{:.3f}"),
    "T=0.7": ("valid@t0.7", "{:.3f}"),
    "greedy": ("valid@greedy", "{:.3f}"),
    "distinct valid": ("distinct_valid@t1.0", "{:,.0f}"),
    "teacher NLL": ("teacher_nll", "{:.4f}"),
}


def tokenized(rows: Dataset, tokenizer) -> Dataset:
    return tokenize_teacher_data(rows, tokenizer, max_completion_length=ANSWER_TOKENS)[0]


def teacher_rows(split: str) -> Dataset:
    return Dataset.from_json(str(WORLD / f"teacher_{split}.jsonl"))


def measured(model, tokenizer, rows: list[dict], **settings) -> dict[str, float]:
    """By the exact judge, on samples for held-out prompts."""
    defaults = {"max_new_tokens": ANSWER_TOKENS, "num_samples": 8, "batch_size": 512}
    return evaluate_student(model, tokenizer, rows, world.judge, **defaults | settings)
