"""Pairs of answers to one prompt, of which one is preferred."""

from datasets import Dataset


def teacher_over_sample(rows: Dataset, samples: list[list[int]]) -> Dataset:
    """
    Prefer the teacher's answers over a model's own.

    Args:
        rows ([`~datasets.Dataset`]):
            Rows with `prompt_ids` and `teacher_ids`.
        samples (`list[list[int]]`):
            Token ids of the model's own answer to each prompt.

    Returns:
        [`~datasets.Dataset`]: `prompt_ids`, `chosen_ids` and `rejected_ids`.
    """
    return Dataset.from_dict(
        {
            "prompt_ids": list(rows["prompt_ids"]),
            "chosen_ids": list(rows["teacher_ids"]),
            "rejected_ids": samples,
        }
    )
