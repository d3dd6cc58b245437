"""What a run asks of a method: its trainer, and what that trainer has to report beside the student."""

import contextlib
from collections.abc import Iterator

from datasets import Dataset

from ..bayeskd.trainer import BayesKDTrainer
from ..errors import NGramError, RecipeError, StageError, TargetStoreError
from ..gad.trainer import GADTrainer
from ..proxy.trainer import ProxyTargetTrainer
from ..proxykd.trainer import ProxyKDTrainer
from ..reports.text_report import PROXY
from ..seqkd.trainer import CurveCallback


class GADRun:
    """A run of GAD. `job` is the [`~runs.text_job.TextJob`] it belongs to: data, tokenizer and measurements."""

    goes_on_by_itself = False
    console_keys = (
        "loss",
        "adversarial_phase",
        "discriminator/accuracy",
        "completions/length_ratio",
        "entropy",
        "learning_rate",
    )

    def __init__(self, job):
        self.job = job

    @property
    def samples_per_prompt(self) -> int:
        return self.job.args.num_generations

    @property
    def sft_learning_rate(self) -> float:
        """That of the warm-up, which is supervised fine-tuning as well."""
        return self.job.args.warmup_learning_rate or self.job.args.learning_rate

    def trainer(self) -> GADTrainer:
        job = self.job
        return GADTrainer(
            reward_funcs=job.reward_funcs,
            eval_dataset=None if job.args.eval_strategy == "no" else Dataset.from_list(job.test),
            sample_metrics=job.sample_metrics,
            **_shared_arguments(job),
        )

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        yield

    def more_results(self, trainer: GADTrainer) -> dict[str, dict[str, float]]:
        return {}

    def stages(self, trainer: GADTrainer) -> list[dict]:
        return []

    def calibration(self, trainer: GADTrainer) -> dict:
        return {}

    def warnings(self, trainer: GADTrainer) -> list[dict]:
        return [vars(warning) for warning in trainer.monitor.warnings]


class ProxyTargetRun:
    """A run of a method whose soft targets come from a proxy; it names its trainer."""

    samples_per_prompt = 1
    goes_on_by_itself = True
    console_keys = ("loss", "nll", "kl", "kl_prior", "kl_posterior", "mean_token_accuracy", "learning_rate")
    trainer_type: type[ProxyTargetTrainer]

    def __init__(self, job):
        self.job = job
        if job.script_args.dataset_streaming or job.recipe.dataset_args.streaming:
            trainer = self.trainer_type
            raise RecipeError(f"dataset_streaming must be false: {trainer._name} {trainer._why_no_stream}.")

    @property
    def sft_learning_rate(self) -> float:
        return self.job.args.learning_rate

    def trainer(self) -> ProxyTargetTrainer:
        held_out = Dataset.from_list(self.job.test)
        return self.trainer_type(eval_dataset=held_out, **_shared_arguments(self.job))

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """What is on disk from an earlier run is looked at when its stage comes."""
        try:
            yield
        except (StageError, TargetStoreError, NGramError) as error:
            raise RecipeError(str(error)) from error

    def more_results(self, trainer: ProxyTargetTrainer) -> dict[str, dict[str, float]]:
        """The proxy that the student learned from, under the same judge."""
        if not trainer.has_own_proxy:
            return {}
        proxy = trainer.live_proxy or trainer.proxy_stages.loaded_proxy()
        return {PROXY: self.job.measure(proxy, temperatures=(1.0,))}

    def stages(self, trainer: ProxyTargetTrainer) -> list[dict]:
        return trainer.stage_reports

    def calibration(self, trainer: ProxyTargetTrainer) -> dict:
        return {}

    def warnings(self, trainer: ProxyTargetTrainer) -> list[dict]:
        return trainer.warnings


class ProxyKDRun(ProxyTargetRun):
    """A run of Proxy-KD."""

    trainer_type = ProxyKDTrainer


class BayesKDRun(ProxyTargetRun):
    """A run of Bayes-KD."""

    trainer_type = BayesKDTrainer

    def calibration(self, trainer: BayesKDTrainer) -> dict:
        return trainer.calibration or {}


METHOD_RUNS = {"gad": GADRun, "proxykd": ProxyKDRun, "bayeskd": BayesKDRun}


def _shared_arguments(job) -> dict:
    return {
        "model": job.student(),
        "args": job.args,
        "train_dataset": job.train,
        "processing_class": job.tokenizer,
        "callbacks": [CurveCallback(job.measure_briefly, at_end=False)],
        "peft_config": job.peft_config,
        "quantization_config": job.quantization_config,
    }
