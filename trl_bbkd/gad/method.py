"""GAD, as recipes, runs and reports see it."""

from dataclasses import replace

from ..runs.held_models import HeldModel, Phase, longest_row, reference_of, rows_of_a_step, student_of
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

    def phases(self, recipe) -> list[Phase]:
        args = recipe.training_args
        student = student_of(recipe)
        models = [student, *([reference_of(student)] if args.beta > 0 else []), self._discriminator(recipe, student)]
        if args.critic == "copy":
            models.append(self._critic(recipe, student))
        on_device = args.use_vllm and args.vllm_mode == "colocate"
        return [
            Phase(
                "the student's training",
                tuple(models),
                longest_row(args),
                rows_of_a_step(args),
                new_tokens=args.max_completion_length,
                # All samples of the steps that share them, at once
                sampled=args.per_device_train_batch_size * args.steps_per_generation,
                vllm_share=args.vllm_gpu_memory_utilization if on_device else 0.0,
                vllm_divides=args.vllm_tensor_parallel_size,
                vllm_sleeps=args.vllm_enable_sleep_mode,
                uses_vllm=args.use_vllm,
                gathers_to_sample=args.ds3_gather_for_generation,
            )
        ]

    def _discriminator(self, recipe, student: HeldModel) -> HeldModel:
        args = recipe.training_args
        is_shared = args.discriminator == "shared"
        adapter = args.discriminator_lora_kwargs
        if is_shared and adapter is None:
            adapter = student.adapter
        # A prompt's samples, and the teacher's answer
        rows = 1 + 1 / args.num_generations
        return replace(
            student,
            name="discriminator",
            source=student.source if is_shared else args.discriminator or student.source,
            key="model_name_or_path" if is_shared or args.discriminator is None else "discriminator",
            kind="text" if args.discriminator_head == "likelihood" else "trunk",
            adapter=adapter,
            is_4bit=student.is_4bit if is_shared else args.discriminator_load_in_4bit,
            storage_of_4bit=student.storage_of_4bit if is_shared else "uint8",
            stands_on="student" if is_shared else None,
            trains=args.discriminator_updates_per_batch > 0,
            has_own_engine=True,
            rows=args.discriminator_batch_size or args.per_device_train_batch_size,
            reads=rows,
            learns=rows * args.discriminator_updates_per_batch,
            as_adapter="""--discriminator_lora_kwargs '{"target_modules": "all-linear"}'""",
            in_4bit="--discriminator_load_in_4bit true",
            as_shared="--discriminator shared",
        )

    def _critic(self, recipe, student: HeldModel) -> HeldModel:
        return replace(
            student,
            name="critic",
            kind="trunk",
            adapter=recipe.training_args.critic_lora_kwargs,
            is_4bit=False,
            has_own_engine=True,
            reads=1.0,
            as_adapter="""--critic_lora_kwargs '{"target_modules": "all-linear"}'""",
            in_4bit="",
        )

    def why_not_sharded(self, recipe) -> str:
        from .discriminator_setup import why_models_are_not_sharded

        return why_models_are_not_sharded(recipe.training_args)

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

    def samples_of_a_row(self, args) -> float:
        return 1.0

    def sft_learning_rate(self, args) -> float:
        """That of the warm-up, which is supervised fine-tuning as well."""
        return args.warmup_learning_rate or args.learning_rate

    def warnings(self, trainer) -> list[dict]:
        return [vars(warning) for warning in trainer.monitor.warnings]


METHOD = GAD()
