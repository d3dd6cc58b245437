import os
from pathlib import Path

import torch
from transformers import PreTrainedModel
from trl import SFTTrainer

from ..host.resume import ResumableRun
from ..host.sharding import is_sharded
from ..hub.student import StudentHubMixin
from ..selection.mixin import SELECTION_WEIGHT, LLKDMixin
from ..selection.signals import mean_token_entropy
from .collator import SoftTargetCollator
from .config import SoftTargetConfig
from .head import (
    add_soft_target_forward,
    check_head,
    check_partitioned_head,
    language_model,
    last_hidden_states,
    lm_head,
    scored_positions,
    vocabulary_size,
)
from .loss import DenseTarget, SparseTarget, sparse_target


TARGET_COLUMNS = ("row_key", "sample_weight")


class SoftTargetTrainer(ResumableRun, StudentHubMixin, LLKDMixin, SFTTrainer):
    """
    What trainers on soft targets share: an [`~trl.SFTTrainer`] whose loss is

        hard_weight · NLL + Σ_j target_weights[j] · sample_weight · KL(target_j ‖ student)

    as a mean over the answer tokens of the whole optimizer step, whatever its micro-batches, accumulation and
    processes.

    Targets come from the stores of `data_collator`, in their order, and then from `live_proxy`, if there is one. With
    `reverse_kl` the KL to the live proxy is KL(student ‖ target).

    Args:
        model, args, train_dataset, kwargs:
            As in [`~trl.SFTTrainer`]; `args` is a [`~config.SoftTargetConfig`], and rows are those of
            [`~rows.soft_target_rows`], with `sample_weight` where rows differ in weight.

    Raises:
        ValueError: a model whose logits are not understood, or a mixture of experts with its auxiliary loss.
    """

    _state_name = "soft_target_state.json"

    args: SoftTargetConfig

    def __init__(self, model: str | PreTrainedModel, args: SoftTargetConfig, train_dataset, **kwargs) -> None:
        self._student_path = model if isinstance(model, str) else model.config._name_or_path
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        if self.aux_loss_enabled:
            raise ValueError(
                f"{type(self).__name__} does not add the auxiliary loss of a mixture of experts: set "
                "router_aux_loss_coef=0.0."
            )
        (check_partitioned_head if is_sharded(args) else check_head)(self.model)
        add_soft_target_forward(language_model(self.model))
        self.data_collator = SoftTargetCollator(
            pad_token_id=self._tokenizer.pad_token_id,
            pad_to_multiple_of=args.pad_to_multiple_of,
            truncation_mode=args.truncation_mode,
        )
        self.target_weights: list[float] = []
        self.live_proxy: PreTrainedModel | None = None
        self.reverse_kl = False

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [column for column in TARGET_COLUMNS if column not in self._signature_columns]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.model.training or return_outputs:
            plain = {key: inputs[key] for key in ("input_ids", "attention_mask", "labels")}
            return super().compute_loss(model, plain, return_outputs, num_items_in_batch)
        scored = scored_positions(inputs["labels"])
        rows = scored.nonzero()[:, 0]
        tokens = scored.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        # DDP averages gradients over processes, and `num_items_in_batch` counts the tokens of all of them
        over_processes = num_items_in_batch is not None and self.args.average_tokens_across_devices
        factor = torch.as_tensor((self.accelerator.num_processes if over_processes else 1) / tokens).to(rows.device)
        sample_weight = inputs.get("sample_weight")
        sample_weight = torch.ones(len(scored), device=rows.device) if sample_weight is None else sample_weight
        selection_weight = inputs.get(SELECTION_WEIGHT, torch.ones(len(scored), device=rows.device))[rows]
        hard_weight, target_weights = self._loss_weights(inputs)
        weights = torch.tensor(target_weights, dtype=factor.dtype, device=rows.device)
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            soft_target_inputs={
                "labels": inputs["labels"],
                "targets": self._targets(inputs, scored),
                "hard": hard_weight * factor * selection_weight,
                "soft": weights[:, None] * factor * sample_weight[rows] * selection_weight,
                "temperature": self.args.distillation_temperature,
                "reverse": self.reverse_kl,
            },
        )
        self._log_token_metrics(outputs, inputs["attention_mask"], sample_weight)
        return outputs.loss

    def _loss_weights(self, inputs: dict) -> tuple[float, list[float]]:
        """Of a batch's NLL, and of the KL to each of its targets."""
        return self.args.hard_weight, self.target_weights

    def _uncertainty(self, pool: dict) -> torch.Tensor:
        scored = scored_positions(pool["labels"])
        rows, none = scored.nonzero()[:, 0], torch.zeros(0, int(scored.sum()), device=scored.device)
        outputs = self.model(
            input_ids=pool["input_ids"],
            attention_mask=pool["attention_mask"],
            soft_target_inputs={
                "labels": pool["labels"],
                "targets": [],
                "hard": torch.zeros(len(rows), device=scored.device),
                "soft": none,
                "temperature": 1.0,
            },
        )
        return mean_token_entropy(outputs.entropy, rows, len(scored), vocabulary_size(self.model))

    def _targets(self, inputs: dict, scored: torch.Tensor) -> list[SparseTarget | DenseTarget]:
        targets: list[SparseTarget | DenseTarget] = [
            sparse_target(
                inputs[f"target_ids_{number}"],
                inputs[f"target_log_probs_{number}"],
                self.args.target_tail,
                self.args.distillation_temperature,
            )
            for number in range(len(self.data_collator.stores))
        ]
        if self.live_proxy is not None:
            with torch.no_grad(), self.accelerator.autocast():
                hidden = last_hidden_states(self.live_proxy, inputs["input_ids"], inputs["attention_mask"])
            targets.append(DenseTarget(hidden[:, :-1][scored], lm_head(self.live_proxy)))
        return targets

    def _log_token_metrics(self, outputs, attention_mask: torch.Tensor, sample_weight: torch.Tensor) -> None:
        """Token means over all processes, in one exchange."""
        local = [
            attention_mask.sum(),
            sample_weight.sum(),
            torch.tensor(len(sample_weight), device=attention_mask.device),
            torch.tensor(outputs.nll.numel(), device=attention_mask.device),
            outputs.nll.sum(),
            outputs.entropy.sum(),
            outputs.is_top1.sum(),
            *outputs.kl.sum(dim=1),
        ]
        sums = self.accelerator.reduce(torch.stack([value.double() for value in local])).tolist()
        all_tokens, weight, rows, tokens, nll, entropy, correct, *kl = sums
        tokens = max(tokens, 1.0)
        metrics = {
            "nll": nll / tokens,
            "entropy": entropy / tokens,
            "mean_token_accuracy": correct / tokens,
            **{name: value / tokens for name, value in zip(self._kl_names(len(kl)), kl, strict=True)},
        }
        if len(kl):
            metrics["sample_weight"] = weight / rows
        for name, value in self._of_interest(metrics).items():
            self._metrics["train"][name].append(value)
        self._total_train_tokens += int(all_tokens)
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def _of_interest(self, metrics: dict[str, float]) -> dict[str, float]:
        """What is logged of a batch's token means."""
        return metrics

    def _kl_names(self, count: int) -> list[str]:
        return ["kl"] if count == 1 else [f"kl_{number}" for number in range(count)]

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            self._write_state(output_dir, num_tokens=self._total_train_tokens)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._total_train_tokens = self._read_state(Path(checkpoint))["num_tokens"]
