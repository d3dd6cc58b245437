"""
Batches that carry what LLKD selects by, and the rows of them that are kept.

A collator cannot select: it may run in another process, and never sees the student.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from ..errors import LLKDDataError, kind_of
from .signals import check_confidence


CARRIED_COLUMNS = ("teacher_confidence", "group", "row_id")
# Of a batch with soft targets: one row for each answer token
PER_TOKEN = ("target_ids_", "target_log_probs_")
# What has one entry for each position, so that padding can be cut off
PER_POSITION = {"input_ids", "attention_mask", "labels", "completion_mask", "position_ids", "token_type_ids"}


@dataclass
class LLKDDataCollator:
    """
    Lets any collator make the batch, and adds `teacher_confidence` (float32), `group` and `row_id` (int64) to it, each
    `(B,)` and in the order of the rows. The collator does not see these columns, so that it need not know them.

    Args:
        collator (`Callable`):
            Makes a batch of a list of rows: TRL's, transformers' or your own. It has to give one row for each, or, for
            rows with `chosen_ids`, the chosen answers and then the rejected ones.
        group_column (`str`, *optional*, defaults to `"group"`):
            Column of integers from 0 that has the rows' groups. `"group"` may be missing: then there is one group, 0.
            Another one, such as `"label"`, stays in the rows.
        required (`bool`, *optional*, defaults to `True`):
            Whether rows must have `teacher_confidence`. Those of an evaluation need none; then it is not in the batch.

    Raises:
        [`~errors.LLKDDataError`]: from a call; a row without a column, with a confidence that is none, or merged with
        others. From the constructor: a collator that merges rows.
    """

    collator: Callable[[list[dict]], Mapping]
    group_column: str = "group"
    required: bool = True

    def __post_init__(self) -> None:
        if getattr(self.collator, "padding_free", False):
            raise LLKDDataError(
                "padding_free merges rows, so that none can be left out. Set padding_free: false for LLKD."
            )

    def __call__(self, rows: list[dict]) -> dict:
        names = [row.get("row_id", f"{position} of the batch") for position, row in enumerate(rows)]
        if "seq_lengths" in rows[0]:
            raise LLKDDataError(
                f"Row {names[0]} is packed from several, so that none can be left out. Set packing: false for LLKD."
            )
        carried = {}
        confidences = self._column("teacher_confidence", rows, names, self.required)
        if confidences is not None:
            check_confidence(confidences, names)
            carried["teacher_confidence"] = torch.tensor([float(value) for value in confidences], dtype=torch.float32)
        groups = self._column(self.group_column, rows, names, self.required and self.group_column != "group")
        groups = [0] * len(rows) if groups is None else groups
        carried["group"] = integers(self.group_column, groups, names)
        ids = self._column("row_id", rows, names, False)
        if ids is not None:
            carried["row_id"] = integers("row_id", ids, names)

        batch = self.collator([{k: v for k, v in row.items() if k not in CARRIED_COLUMNS} for row in rows])
        if not isinstance(batch, Mapping):
            raise LLKDDataError(f"The collator made {kind_of(batch)}; LLKD needs a dictionary of tensors.")
        expected = 2 * len(rows) if "chosen_ids" in rows[0] else len(rows)
        found = _length(batch)
        if found != expected:
            raise LLKDDataError(
                f"The collator made {found} rows of {len(rows)}, so that none can be left out: expected {expected}. "
                "Turn off packing and padding_free, or use a collator that makes one row for each."
            )
        return {**batch, **carried}

    def _column(self, name: str, rows: list[dict], names: list, required: bool) -> list | None:
        missing = [position for position, row in enumerate(rows) if name not in row]
        if not missing:
            return [row[name] for row in rows]
        if not required and len(missing) == len(rows):
            return None
        advice = (
            "Make it with `trl_bbkd.pseudo_label`, or add a column with a number from 0 to 1 that says how sure the "
            "teacher is of each row"
            if name == "teacher_confidence"
            else "Add it as a column of integers"
        )
        raise LLKDDataError(
            f"Row {names[missing[0]]} has no `{name}`. {advice}; if the dataset has it, packing or "
            "remove_unused_columns: true took it away."
        )


def take_rows(batch: Mapping, keep: torch.Tensor, pad_to_multiple_of: int | None = None) -> dict:
    """
    Leave rows out of a batch, and then the columns in which only padding is left: the rows are as if they had been
    collated alone.

    Left padding, too, is cut off. A model that counts absolute positions from the left, padding included, then gives
    other results, as it does whenever a row has other neighbours.

    Args:
        batch (`Mapping`):
            Of B rows. Tensors and lists with B entries are cut; with chosen answers and then rejected ones in
            `input_ids`, those with 2 B as well. Of `target_ids_*` and `target_log_probs_*`, `(N_tokens, k)`, the rows
            of the tokens scored in `labels` are cut with them. Everything else stays.
        keep (`torch.Tensor` of shape `(B,)`):
            Which rows to keep, boolean.
        pad_to_multiple_of (`int`, *optional*):
            Of which the width is to stay a multiple.

    Returns:
        `dict`: of the kept rows, in their order. Without any, tensors of 0 rows.
    """
    if keep.dtype != torch.bool:
        raise ValueError(f"`keep` is {keep.dtype}; it must be boolean, with one entry for each row.")
    keep = keep.cpu()
    size, copies = len(keep), 1
    if "input_ids" in batch:
        found = len(batch["input_ids"])
        copies = 2 if found == 2 * size else 1
        if found != copies * size:
            raise ValueError(f"`keep` is for {size} rows, but the batch has {found}.")
    indices = {times * size: keep.repeat(times).nonzero().flatten() for times in range(1, copies + 1)}
    taken: dict = {}
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and value.dim():
            index = _token_index(batch, keep, name) if name.startswith(PER_TOKEN) else indices.get(len(value))
            taken[name] = value if index is None else value[index.to(value.device)]
        elif isinstance(value, list) and len(value) in indices:
            taken[name] = [value[i] for i in indices[len(value)].tolist()]
        else:
            taken[name] = value
    return _without_padding(taken, pad_to_multiple_of)


def _token_index(batch: Mapping, keep: torch.Tensor, name: str) -> torch.Tensor:
    rows = (batch["labels"][:, 1:] != -100).nonzero()[:, 0].cpu()
    if len(rows) != len(batch[name]):
        raise ValueError(f"`{name}` has {len(batch[name])} rows, but {len(rows)} tokens are scored.")
    return keep[rows].nonzero().flatten()


def _without_padding(batch: dict, pad_to_multiple_of: int | None) -> dict:
    mask = batch.get("attention_mask")
    if not (isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.any() and "input_ids" in batch):
        return batch
    width = mask.size(1)
    tensors = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and not k.startswith(PER_TOKEN)}
    wide = [name for name, value in tensors.items() if width in value.shape[1:]]
    # One that may or may not be per position: better some padding than a wrong cut
    if any(name not in PER_POSITION or batch[name].shape != mask.shape for name in wide):
        return batch
    columns = mask.any(dim=0).nonzero().flatten()
    start, stop = int(columns[0]), int(columns[-1]) + 1
    if "labels" in wide:
        scored = (batch["labels"] != -100).any(dim=0)
        if scored[:start].any() or scored[stop:].any():
            return batch
        # A token is scored from the position before it, even if that is padding
        start -= int(start > 0 and scored[start])
    length = stop - start
    length += -length % (pad_to_multiple_of or 1)
    stop = min(width, start + length)
    start = max(0, stop - length)
    return batch | {name: batch[name][:, start:stop].contiguous() for name in wide}


def _length(batch: Mapping) -> int:
    if "input_ids" in batch:
        return len(batch["input_ids"])
    return next((len(v) for v in batch.values() if isinstance(v, torch.Tensor) and v.dim()), 0)


def integers(name: str, values: Iterable, names: Iterable) -> torch.Tensor:
    integers = []
    for value, row in zip(values, names, strict=True):
        try:
            integers.append(operator.index(value))
        except TypeError:
            raise LLKDDataError(f"Row {row}: `{name}` is {value!r}; it must be an integer.") from None
        if integers[-1] < 0:
            raise LLKDDataError(f"Row {row}: `{name}` is {value}; it must be 0 or more.")
    return torch.tensor(integers, dtype=torch.int64)


def blank_row(batch: Mapping) -> dict:
    """
    The first row of a batch without anything to learn from: its `labels` are -100 and it has no soft targets. A
    process of whose pool nothing is kept still takes part in the backward pass, for which the others wait.
    """
    keep = torch.zeros(_length(batch), dtype=torch.bool)
    keep[0] = True
    row = take_rows(batch, keep)
    row["labels"] = torch.full_like(row["labels"], -100)
    return {name: value[:0] if name.startswith(PER_TOKEN) else value for name, value in row.items()}
