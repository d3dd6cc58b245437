"""Tasks of lm_eval as files, and an evaluation by them."""

import json

import yaml

from trl_bbkd.cli import main


CHOICES = [
    {"question": "Name a fruit that is red.", "choices": ["An apple", "A dog", "The sky"], "gold": 0},
    {"question": "How many legs does a dog have?", "choices": ["one", "four legs and one tail", "two"], "gold": 1},
    {"question": "What is the color of the sky?", "choices": ["red", "dark", "blue"], "gold": 2},
    {"question": "Say hello to the cat.", "choices": ["Hello, cat!", "How are you today?"], "gold": 0},
    {"question": "Name an animal.", "choices": ["apple", "cat"], "gold": 1},
    {"question": "Is it dark at night?", "choices": ["yes", "no"], "gold": 0},
    {"question": "Is an apple blue?", "choices": ["yes", "no"], "gold": 1},
]


def write_task(folder, name="red", rows=CHOICES, file=None, **changes):
    """A task of multiple choice and its rows; a change of `None` leaves a key out."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.5},
    }
    path = folder / (file or f"{name}.yaml")
    path.write_text(yaml.safe_dump({key: value for key, value in (keys | changes).items() if value is not None}))
    return path


def write_writing_task(folder, rows=CHOICES, **changes):
    """A task whose answers are written, and scored by a word in them."""
    keys = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[gold]}}",
        "doc_to_choice": None,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    return write_task(folder, "writing", rows, **(keys | changes))


def ask(folder, model, *tasks, options=()):
    """Run the command; return its JSON and its page."""
    main(
        ["evaluate", str(model), "--tasks", *map(str, tasks), "--output_dir", str(folder / "out"), *map(str, options)]
    )
    return json.loads((folder / "out/evaluation.json").read_text()), (folder / "out/evaluation.md").read_text()
