import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..data.teacher_data import row_names
from ..errors import LLKDDataError
from ..host._compat import without_step
from ..host.resume import differences
from ..host.typed import MixinBase
from .collator import CARRIED_COLUMNS, LLKDDataCollator, blank_row, integers, take_rows
from .config import SELECTION_ARGUMENTS, SelectionConfig, check_batches
from .signals import check_confidence
from .tally import SelectionTally
from .thresholds import Selector


SELECTION_FILE = "selection.safetensors"
SELECTION_WEIGHT = "selection_weight"
PIECES = "selection_pieces"  # in which a batch is learned from


class LLKDMixin(MixinBase):
    """
    Lets a trainer learn, at every step, from the rows of a pool of which the teacher is sure and the student is not
    ([arXiv 2411.08028](https://huggingface.co/papers/2411.08028), our reading).

    It stands before a trainer of transformers or TRL among the bases of a class, and its `args` are a
    [`~selection.config.SelectionConfig`] as well:

    ```python
    class SelectiveSFTTrainer(LLKDMixin, SFTTrainer): ...
    ```

    A pool of `pool_factor` times the batch is scored without gradients, and what was not kept goes no further: it
    costs no backward pass. The signals of all processes are gathered before the thresholds move, so that each has the
    same.

    Raises:
        [`~errors.LLKDDataError`]: no rows, no confidence, or a pool larger than the data set.
        ValueError: packing or `padding_free`.
    """

    _group_column = "group"

    args: SelectionConfig
    train_dataset: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.selector: Selector | None = None
        if self.args.selection == "llkd":
            self._start_selection()

    def _start_selection(self) -> None:
        args, rows = self.args, self.train_dataset
        for name in ("packing", "padding_free"):
            if getattr(args, name, False):
                raise ValueError(
                    f"{name}=True merges rows, so that none can be left out. Set it to False for selection."
                )
        if type(self).compute_loss is LLKDMixin.compute_loss:
            self._refuse_other_losses()
        if args.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy='batch_rebalance' sizes batches itself, so that no pool can be drawn. Choose another."
            )
        if not isinstance(rows, Dataset):
            raise LLKDDataError(
                "selection='llkd' draws pools from shuffled rows and counts their groups: it needs a `Dataset`, not a stream. "
                "Turn streaming off."
            )
        check_confidences(rows)
        check_batches(len(rows), args)
        if "row_id" not in rows.column_names:
            self.train_dataset = rows.add_column("row_id", list(range(len(rows))))
        columns, num_groups = self.train_dataset, 1
        if self._group_column in columns.column_names:
            num_groups = 1 + int(integers(self._group_column, columns[self._group_column], row_names(rows)).max())
        ids = integers("row_id", columns["row_id"], row_names(rows))
        self.selector = Selector(args.selection_settings(num_groups))
        self.tally = SelectionTally(num_groups, int(ids.max()) + 1, self._true_groups(ids))
        self._selection_logs: dict[str, list[float]] = {}

    def _true_groups(self, row_ids: torch.Tensor) -> torch.Tensor | None:
        """The true group of each row id, where a trainer knows any; -1 where it does not."""
        return None

    def _refuse_other_losses(self) -> None:
        other = {
            "loss_type": getattr(self.args, "loss_type", "nll") != "nll",
            "label_smoothing_factor": self.args.label_smoothing_factor != 0,
            "compute_loss_func": self.compute_loss_func is not None,
            "router_aux_loss_coef": getattr(self, "aux_loss_enabled", False),
        }
        for name in (name for name, is_asked_for in other.items() if is_asked_for):
            raise ValueError(
                f"{name} is not possible with selection='llkd': its loss is the weighted NLL of the kept rows."
            )

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [column for column in CARRIED_COLUMNS if column not in self._signature_columns]

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        collator = self.data_collator
        if is_training and self.selector is not None:
            batch_size *= self.args.pool_factor
            self.data_collator = LLKDDataCollator(collator, group_column=self._group_column)
        try:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        finally:
            self.data_collator = collator

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        pools, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.selector is None or not pools:
            return pools, num_items
        pools = [self._prepare_inputs(pool) for pool in pools]
        kept = self._kept(pools)
        of_loss = kept if self.args.selection_denominator == "selected" else pools
        return kept, self._get_num_items_in_batch(of_loss, device)

    @torch.no_grad()
    def _kept(self, pools: list[dict]) -> list[dict]:
        """What is kept of each pool of an optimizer step; of one of which nothing is, a row without a label."""
        uncertainty = self._scored(pools)
        own = torch.cat(
            [self._signals(number, *pair) for number, pair in enumerate(zip(pools, uncertainty, strict=True))]
        )
        # Processes may have different numbers of rows in the last step
        everyone = self.accelerator.gather(self.accelerator.pad_across_processes(own, dim=0, pad_index=-1))
        everyone = everyone[everyone[:, 0] >= 0]
        confidence, uncertain, group, row_id, process, number = everyone.cpu().T
        group = group.long()
        found = self.selector.select(confidence, uncertain, group)
        self._log_selection(confidence, uncertain, group, row_id.long(), found)
        mine = process == self.accelerator.process_index
        sizes = [len(pool["row_id"]) for pool in pools]
        kept = [
            self._taken(pool, keep, weight)
            for pool, keep, weight in zip(
                pools, found.keep[mine].split(sizes), found.weight[mine].split(sizes), strict=True
            )
        ]
        for index, batch in enumerate(kept):
            rows = process[found.keep & (number == index)].long().bincount(minlength=1).max()
            # As many on every process, whatever it kept: they exchange metrics with each
            batch[PIECES] = max(1, -(-int(rows) // self.args.per_device_train_batch_size))
        return kept

    def _scored(self, pools: list[dict]) -> list[torch.Tensor]:
        """u of each pool's rows; 0 where nothing depends on it."""
        if not self.selector.settings.asks_student:
            return [torch.zeros_like(pool["teacher_confidence"]) for pool in pools]
        was_training = self.model.training
        self.model.eval()
        with self.compute_loss_context_manager():
            uncertainty = [self._uncertainty(pool) for pool in pools]
        self.model.train(was_training)
        return uncertainty

    def _signals(self, number: int, pool: dict, uncertainty: torch.Tensor) -> torch.Tensor:
        process = torch.full_like(uncertainty, self.accelerator.process_index, dtype=torch.float64)
        index = torch.full_like(process, number)
        columns = (pool["teacher_confidence"], uncertainty, pool["group"], pool["row_id"], process, index)
        return torch.stack([column.double().to(process.device) for column in columns], dim=1)

    def _taken(self, pool: dict, keep: torch.Tensor, weight: torch.Tensor) -> dict:
        if keep.any():
            taken = take_rows(pool, keep, getattr(self.args, "pad_to_multiple_of", None))
            taken[SELECTION_WEIGHT] = weight[keep].float().to(pool["row_id"].device)
        else:
            taken = blank_row(pool)
            taken[SELECTION_WEIGHT] = torch.zeros(1, device=pool["row_id"].device)
        return {name: value for name, value in taken.items() if name not in CARRIED_COLUMNS}

    def training_step(self, model, inputs, num_items_in_batch=None):
        """With no more rows with gradients at once than the user said: in the first steps a whole pool is kept."""
        pieces = inputs.pop(PIECES, 1)
        if pieces == 1:
            return super().training_step(model, inputs, num_items_in_batch)
        rows = len(inputs[SELECTION_WEIGHT])
        number = torch.arange(rows) * pieces // rows
        batches = [self._piece(inputs, number == piece) for piece in range(pieces)]
        with without_step(self.accelerator, model):
            losses = [super(LLKDMixin, self).training_step(model, batch, num_items_in_batch) for batch in batches[:-1]]
        return sum(losses) + super().training_step(model, batches[-1], num_items_in_batch)

    def _piece(self, batch: dict, rows: torch.Tensor) -> dict:
        if rows.any():
            return take_rows(batch, rows, getattr(self.args, "pad_to_multiple_of", None))
        return blank_row(batch) | {SELECTION_WEIGHT: torch.zeros_like(batch[SELECTION_WEIGHT][:1])}

    def _uncertainty(self, pool: dict) -> torch.Tensor:
        """u of each row, `(B,)`: the mean entropy of the student's distributions over the answer's tokens, over log V."""
        inputs = {name: pool[name] for name in ("input_ids", "attention_mask", "labels")}
        outputs = self.model(**inputs, fused_lm_head=True, use_cache=False)
        scored = outputs.label_mask.sum(dim=1).clamp(min=1)
        vocab_size = self.model.config.get_text_config().vocab_size
        return outputs.entropy.sum(dim=1) / scored / torch.tensor(float(vocab_size)).log()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weight = inputs.pop(SELECTION_WEIGHT, None)
        if weight is None or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs, fused_lm_head=True, use_cache=False)
        tokens = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = -(outputs.log_probs * weight[:, None]).sum() / torch.as_tensor(tokens).clamp(min=1)
        over_processes = num_items_in_batch is not None and self.args.average_tokens_across_devices
        return loss * (self.accelerator.num_processes if over_processes else 1)

    def _log_selection(self, confidence, uncertainty, group, row_id, found) -> None:
        self.tally.add(row_id, group, found.keep, is_warmup=self.selector.is_warming_up)
        for name, value in self._selection_metrics(confidence, uncertainty, group, row_id, found).items():
            values = self._selection_logs.setdefault(f"selection/{name}", [])
            if name == "distinct_rows":
                # Counted since the beginning: the last one stands for all steps
                values.clear()
            # Of nothing there is no mean
            if not torch.isnan(torch.as_tensor(value)):
                values.append(float(value))

    def _selection_metrics(self, confidence, uncertainty, group, row_id, found) -> dict[str, torch.Tensor]:
        """What is logged of a step, from the rows of all processes; NaN is left out."""
        metrics = {
            "kept_share": found.keep.double().mean(),
            "distinct_rows": self.tally.distinct_rows,
            "confidence_kept": confidence[found.keep].mean(),
            "confidence_dropped": confidence[~found.keep].mean(),
        }
        if self.selector.settings.asks_student:
            metrics["uncertainty_kept"] = uncertainty[found.keep].mean()
            metrics["uncertainty_dropped"] = uncertainty[~found.keep].mean()
        thresholds = self.selector.thresholds()
        metrics["threshold_score"] = thresholds.score
        for number in range(self.selector.settings.num_groups):
            metrics[f"kept_share_{number}"] = found.keep[group == number].double().mean()
            metrics[f"threshold_teacher_{number}"] = thresholds.teacher[number]
            if self.selector.settings.asks_student:
                metrics[f"threshold_student_{number}"] = thresholds.student[number]
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.selector is not None and "loss" in logs:
            logs = logs | {name: sum(values) / len(values) for name, values in self._selection_logs.items() if values}
            self._selection_logs.clear()
        super().log(logs, start_time)

    def _settings(self) -> dict[str, str]:
        """What decides which rows a step learns from, as text."""
        return {name: str(getattr(self.args, name)) for name in SELECTION_ARGUMENTS}

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.selector is not None and self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            state = self.selector.state_dict() | self.tally.state_dict()
            save_file(state, Path(output_dir) / SELECTION_FILE, metadata=self._settings())

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.selector is not None and checkpoint is not None:
            path = Path(checkpoint) / SELECTION_FILE
            if not path.is_file():
                raise ValueError(
                    f"{checkpoint} has no {SELECTION_FILE}: it is of a run without selection. Resume with selection='none', "
                    "or start a new run."
                )
            with safe_open(path, framework="pt") as file:
                differing = differences(file.metadata(), self._settings())
            if differing:
                raise ValueError(f"{checkpoint} belongs to another run ({differing}). Resume with its settings.")
            state = load_file(path)
            counts = {name: state.pop(name) for name in self.tally.state_dict()}
            rows, own_rows = (len(tensors["tally.used"]) for tensors in (counts, self.tally.state_dict()))
            if rows != own_rows:
                raise ValueError(f"{checkpoint} is of {rows} rows, and `train_dataset` has {own_rows}.")
            self.selector.load_state_dict(state)
            self.tally.load_state_dict(counts)


def check_confidences(rows: Dataset) -> None:
    """
    Refuse rows that no pool can be selected from. A trainer that has its rows before its student asks this first.

    Raises:
        [`~selection.signals.LLKDDataError`]: there is no `teacher_confidence`, or a row's is none.
    """
    if "teacher_confidence" not in rows.column_names:
        raise LLKDDataError(
            "selection='llkd' needs a column `teacher_confidence`, a number from 0 to 1 for each row. Make it with "
            "`trl_bbkd.pseudo_label`, or from the teacher's token log-probabilities or the agreement of several answers "
            "(trl_bbkd.selection.signals)."
        )
    check_confidence(rows["teacher_confidence"], row_names(rows))
