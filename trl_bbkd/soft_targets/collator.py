"""Batches of rows with their soft targets."""

from dataclasses import dataclass, field

import numpy as np
import torch

from ..host._compat import DataCollatorForLanguageModeling
from .caching import answer_length
from .store import TargetStore


@dataclass
class SoftTargetCollator(DataCollatorForLanguageModeling):
    """
    Adds to a batch of TRL's language-model collator what its rows' soft targets are.

    Rows have `input_ids`, `labels`, `row_key` and, optionally, `sample_weight`, the weight of the row's KL. Rows
    without `row_key`, those of an evaluation, have no soft targets. Beside the padded tensors a batch has, for each of
    the stores, the targets of all its answer tokens, row after row: `target_ids_0` and `target_log_probs_0` of shape
    `(N, k)`; and `sample_weight`, `(B,)`.

    Args:
        stores (`list[TargetStore]`, *optional*):
            Where targets are looked up.
        truncation_mode (`str`, *optional*, defaults to `"keep_start"`):
            Which end of a sequence was kept where it was longer than `max_length`: its targets are cut in the same
            way.
    """

    stores: list[TargetStore] = field(default_factory=list)
    truncation_mode: str = "keep_start"

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        if "sample_weight" in examples[0]:
            batch["sample_weight"] = torch.tensor([row["sample_weight"] for row in examples], dtype=torch.float32)
        for number, store in enumerate(self.stores if "row_key" in examples[0] else []):
            targets = [self._targets(store, row) for row in examples]
            batch[f"target_ids_{number}"] = torch.from_numpy(np.concatenate([ids for ids, _ in targets]))
            batch[f"target_log_probs_{number}"] = torch.from_numpy(np.concatenate([values for _, values in targets]))
        return batch

    def _targets(self, store: TargetStore, row: dict) -> tuple[np.ndarray, np.ndarray]:
        targets = store[row["row_key"]]
        count = answer_length(row["labels"])
        kept = slice(None, count) if self.truncation_mode == "keep_start" else slice(len(targets.ids) - count, None)
        return targets.ids[kept], targets.log_probs[kept]
