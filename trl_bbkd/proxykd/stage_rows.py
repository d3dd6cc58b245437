"""Which rows belong to which stage (section 3 of arXiv 2401.07013v2): disjoint, and no prompt in two of them."""

import json
import random
from typing import NamedTuple

from datasets import Dataset

from ..data.teacher_data import row_names
from ..errors import TeacherDataError


STAGE_COLUMN = "stage"
STAGES = ("warmup", "align", "distil")


class StageRows(NamedTuple):
    """Rows of the proxy's warm-up, of its alignment, and of distillation."""

    warmup: Dataset
    align: Dataset
    distil: Dataset


def split_rows(dataset: Dataset, warmup_share: float, alignment_share: float, seed: int) -> StageRows:
    """
    Divide teacher rows between the stages.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt`. With a column `stage` (`"warmup"`, `"align"` or `"distil"`) the rows go where it says.
        warmup_share, alignment_share (`float`):
            Shares of the rows; distillation gets the rest. Rows of one prompt stay together, so that sizes are off by
            a few rows where prompts repeat.
        seed (`int`):
            Seed of the division.

    Returns:
        [`StageRows`]: in the order of `dataset`.

    Raises:
        [`~errors.TeacherDataError`]: the column holds something else.
    """
    if STAGE_COLUMN in dataset.column_names:
        stages = dataset[STAGE_COLUMN]
        unknown = next((row for row, stage in enumerate(stages) if stage not in STAGES), None)
        if unknown is not None:
            raise TeacherDataError(
                f"Row {row_names(dataset)[unknown]}: `{STAGE_COLUMN}` is {stages[unknown]!r}; it must be one of {', '.join(STAGES)}."
            )
        return StageRows(*(dataset.select(_indices(stages, stage)) for stage in STAGES))
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(dataset["prompt"]):
        groups.setdefault(json.dumps(prompt, sort_keys=True), []).append(index)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    bounds = [round(warmup_share * len(dataset)), round((warmup_share + alignment_share) * len(dataset))]
    parts: list[list[int]] = [[], [], []]
    placed = 0
    for group in order:
        parts[sum(placed >= bound for bound in bounds)] += group
        placed += len(group)
    return StageRows(*(dataset.select(sorted(part)) for part in parts))


def _indices(stages: list[str], stage: str) -> list[int]:
    return [row for row, value in enumerate(stages) if value == stage]
