"""GAD, as recipes, runs and reports see it."""

from ..runs.method import Method


class GAD(Method):
    """Generative adversarial distillation."""

    name = "GAD"
    config = "trl_bbkd.gad.config:GADConfig"
    report = "trl_bbkd.gad.report:GADReport"
    console_keys = (
        "loss",
        "adversarial_phase",
        "discriminator/accuracy",
        "completions/length_ratio",
        "entropy",
        "learning_rate",
    )
    input_paths = ("discriminator",)
    takes_reward_funcs = True

    def trainer(self, job):
        from datasets import Dataset

        from .trainer import GADTrainer

        return GADTrainer(
            reward_funcs=job.reward_funcs,
            eval_dataset=None if job.args.eval_strategy == "no" else Dataset.from_list(job.test),
            sample_metrics=job.sample_metrics,
            **job.trainer_arguments(),
        )

    def samples_per_prompt(self, args) -> int:
        return args.num_generations

    def sft_learning_rate(self, args) -> float:
        """That of the warm-up, which is supervised fine-tuning as well."""
        return args.warmup_learning_rate or args.learning_rate

    def warnings(self, trainer) -> list[dict]:
        return [vars(warning) for warning in trainer.monitor.warnings]


METHOD = GAD()
