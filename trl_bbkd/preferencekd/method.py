"""PreferenceKD, as recipes, runs and reports see it."""

from dataclasses import replace

from ..runs.held_models import Phase, longest_row, reference_of, rows_of_a_step, student_of
from ..runs.method import Method


class PreferenceKD(Method):
    """Preference distillation."""

    name = "PreferenceKD"
    config = "trl_bbkd.preferencekd.config:PreferenceKDConfig"
    report = "trl_bbkd.preferencekd.report:PreferenceKDReport"
    console_keys = ("loss", "nll", "rewards/accuracies", "rewards/margins", "learning_rate")
    input_paths = ("judge", "discriminator")
    goes_on_by_itself = True

    def phases(self, recipe) -> list[Phase]:
        args = recipe.training_args
        # A preference is a pair of rows, and the teacher's answer beside it
        rows = 2.0 if args.judge == "teacher" or args.sft_weight == 0 else 3.0
        student = student_of(recipe)
        aligned = replace(student, rows=2 * student.rows, learns=rows)
        return [
            Phase(
                "the student's training",
                (aligned, reference_of(aligned)),
                longest_row(args),
                rows_of_a_step(args),
                new_tokens=args.max_completion_length,
                sampled=args.sample_batch_size,
                uses_vllm=args.use_vllm,
            )
        ]

    def trainer(self, job):
        from datasets import Dataset

        from ..runs.recipe import import_callable
        from .trainer import PreferenceKDTrainer

        judge = import_callable(job.args.judge) if ":" in job.args.judge else None
        return PreferenceKDTrainer(judge=judge, eval_dataset=Dataset.from_list(job.test), **job.trainer_arguments())

    def sft_learning_rate(self, args) -> float:
        """That of the warm-up, which is supervised fine-tuning as well."""
        return args.warmup_learning_rate

    def findings(self, trainer) -> dict:
        return {"rounds": trainer.round_reports}


METHOD = PreferenceKD()
