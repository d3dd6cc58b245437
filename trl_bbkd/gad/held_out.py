"""What GAD's evaluations measure on held-out rows, and what follows from it for the discriminator."""

import itertools
import logging

import torch
from datasets import Dataset
from transformers.trainer_utils import EvalLoopOutput

from ..data.answers import AnswersByPrompt
from ..evaluation.means import EvaluationMeans
from ..evaluation.student import SampleMetrics, judge
from ..host.typed import MixinBase
from .config import GADConfig
from .monitor import TrainingMonitor
from .samplers import RowSampler


logger = logging.getLogger(__name__)
ACCURACY = "discriminator/accuracy"


class MeasuredHeldOut(MixinBase):
    """
    The part of [`GADTrainer`] that measures the student on held-out rows, and watches whether the discriminator knows more
    there than the answers it has learned.
    """

    args: GADConfig
    monitor: TrainingMonitor
    sample_metrics: SampleMetrics | None
    num_generations_eval: int
    _held_out: EvaluationMeans
    _held_out_answers: AnswersByPrompt
    _are_new: list[bool]  # of the rows of an evaluation batch, those that no process has measured yet

    def _judge_samples(self, prompts: list, completions: list) -> None:
        if self.sample_metrics is None:
            return
        texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
        for name, values in judge(self.sample_metrics, prompts, texts).items():
            values = list(itertools.compress(values, self._are_new))
            self._held_out.add(name, sum(values), len(values))

    def _measure_answers(self, batch: dict[str, torch.Tensor], rows: list[dict]) -> None:
        """The NLL of all answers to the prompts of an evaluation batch, one answer to each at a time."""
        answers = [self._answers_to(row["prompt_ids"], row["teacher_ids"]) for row in rows]
        # As often on every process, since each must run the model
        for number in range(self._held_out_answers.most):
            teacher = self._teacher_tensors([{"teacher_ids": own[min(number, len(own) - 1)]} for own in answers])
            counts = [new and number < len(own) for new, own in zip(self._are_new, answers, strict=True)]
            mask = teacher["teacher_mask"] & torch.tensor(counts, device=teacher["teacher_mask"].device)[:, None]
            self._measure_teacher_nll(batch | teacher | {"teacher_mask": mask})

    def _measure_teacher_nll(self, inputs: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            log_probs, mask, _ = self._teacher_log_probs(self.model, inputs)
        self._held_out.add("teacher_nll", -(log_probs * mask).sum().item(), mask.sum().item())

    def _get_eval_sampler(self, eval_dataset):
        """Each prompt once, however many of the rows share it."""
        answers = AnswersByPrompt(eval_dataset)
        if answers.most == 1:
            return super()._get_eval_sampler(eval_dataset)
        return RowSampler(super()._get_eval_sampler(answers.first_rows), answers.first_rows)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        rows = dataloader.dataset
        self._held_out_answers = AnswersByPrompt(rows)
        prompts = self._held_out_answers.first_rows
        self._held_out.begin(len(prompts) * self.num_generations_eval if isinstance(rows, Dataset) else None)
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update(self._held_out.pop_means(metric_key_prefix))
        # One of several data sets has a prefix of its own, and what is evaluated by hand may be any
        if self.is_in_train and metric_key_prefix == "eval" and not self._discriminator_has_stopped():
            self._watch_discriminator(self._metrics["eval"][ACCURACY])
        return output

    def _watch_discriminator(self, accuracies: list[float]) -> None:
        accuracy = sum(accuracies) / len(accuracies)
        for warning in self.monitor.observe_held_out(self.state.global_step, accuracy):
            if self.accelerator.is_main_process:
                logger.warning(f"Step {warning.step}: {warning.text}")

    def _discriminator_has_stopped(self) -> bool:
        patience = self.args.discriminator_patience
        return patience is not None and self.monitor.evaluations_since_best >= patience
