from collections.abc import Callable
from typing import Any

import torch


ANSWER = "teacher_"  # what the names of a batch's tensors begin with that are of the teacher's answers


class PairsAndAnswers:
    """
    Collates pairs as TRL does, with the teacher's answers beside them where rows have `teacher_ids`; rows that have nothing
    else make a batch of these answers alone.

    Args:
        collate_pairs (`Callable`):
            [`~trl.trainer.dpo_trainer.DataCollatorForPreference`].
    """

    def __init__(self, collate_pairs: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]):
        self.collate_pairs = collate_pairs

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "teacher_ids" not in examples[0]:
            return self.collate_pairs(examples)
        # The preferred halves of pairs, so that an answer is cut and padded as they are
        pairs = self.collate_pairs(
            [
                {"prompt_ids": row["prompt_ids"], "chosen_ids": row["teacher_ids"], "rejected_ids": []}
                for row in examples
            ]
        )
        answers = {name: values[: len(examples)] for name, values in pairs.items()}
        if "chosen_ids" not in examples[0]:
            return answers
        return self.collate_pairs(examples) | {ANSWER + name: values for name, values in answers.items()}
