"""PreferenceKD, as recipes, runs and reports see it."""

from dataclasses import replace

from ..runs.held_models import HeldModel, Phase, longest_row, reference_of, rows_of_a_step, student_of
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
        args, student = recipe.training_args, student_of(recipe)
        # A preference is a pair of rows, and the teacher's answer beside it
        has_answers = args.judge != "teacher" and args.sft_weight > 0
        preferring = replace(student, rows=2 * student.rows, learns=2.0 + has_answers)
        training = Phase(
            "the student's training",
            (preferring, replace(reference_of(preferring), reads=2.0)),
            longest_row(args),
            rows_of_a_step(args),
            new_tokens=args.max_completion_length,
            sampled=args.sample_batch_size,
            uses_vllm=args.use_vllm,
        )
        return [*self._judging(recipe, student), training]

    def _judging(self, recipe, student: HeldModel) -> list[Phase]:
        """A model of its own that judges, beside the student and its reference."""
        args = recipe.training_args
        if args.judge in ("teacher", "overlap", "self") or ":" in args.judge:
            return []
        waiting = replace(student, trains=False, waits=True, learns=0.0)
        judge = replace(student, name="judge", as_adapter="", in_4bit="", is_4bit=False, adapter=None)
        if args.judge == "discriminator":
            judge = replace(
                judge,
                source=args.discriminator or student.source,
                key="discriminator" if args.discriminator else student.key,
                kind="text" if args.discriminator_head == "likelihood" else "trunk",
                adapter=args.discriminator_lora_kwargs,
                dtype="float32",
                has_own_engine=True,
                rows=args.discriminator_batch_size or args.per_device_train_batch_size,
                learns=1.0 + args.num_generations,
                as_adapter="""--discriminator_lora_kwargs '{"target_modules": "all-linear"}'""",
            )
        else:
            judge = replace(
                judge,
                source=args.judge,
                key="judge",
                trains=False,
                is_whole=True,
                dtype="bfloat16" if args.bf16 else "float32",
                rows=args.per_device_eval_batch_size,
                reads=float(args.num_generations * (args.num_generations - 1)),
                learns=0.0,
            )
        return [
            Phase(
                "the judging",
                (judge, waiting, replace(reference_of(waiting), reads=0.0)),
                longest_row(args),
                rows_of_a_step(args),
            )
        ]

    def trainer(self, job):
        from datasets import Dataset

        from ..runs.recipe import import_callable
        from ..seqkd.trainer import CURVE_POINTS, CurveCallback
        from .trainer import PreferenceKDTrainer

        args = job.args
        judge = import_callable(args.judge) if ":" in args.judge else None
        # Warm-up and rounds share the points that a training has
        points = max(2, CURVE_POINTS // (args.num_rounds + (args.warmup_epochs > 0)))
        curve = CurveCallback(job.measure_briefly, points=points, at_end=False)
        return PreferenceKDTrainer(
            judge=judge,
            eval_dataset=Dataset.from_list(job.test),
            **job.trainer_arguments() | {"callbacks": [curve]},
        )

    def samples_of_a_row(self, args) -> float:
        """A round samples each of its prompts once, whatever its epochs."""
        return args.num_generations / args.num_train_epochs

    def sft_learning_rate(self, args) -> float:
        """That of the warm-up, which is supervised fine-tuning as well."""
        return args.warmup_learning_rate

    def findings(self, trainer) -> dict:
        return {"rounds": trainer.round_reports}


METHOD = PreferenceKD()
