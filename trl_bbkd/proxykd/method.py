"""Proxy-KD, as recipes, runs and reports see it."""

from dataclasses import replace

from ..proxy.method import ProxyMethod
from ..runs.held_models import HeldModel, Phase, reference_of


class ProxyKD(ProxyMethod):
    """Distillation from a proxy that was aligned with the teacher."""

    name = "Proxy-KD"
    config = "trl_bbkd.proxykd.config:ProxyKDConfig"
    trainer_type = "trl_bbkd.proxykd.trainer:ProxyKDTrainer"
    report = "trl_bbkd.proxykd.report:ProxyKDReport"
    console_keys = ("loss", "nll", "kl", "mean_token_accuracy", "completions/mean_length", "learning_rate")

    def trains_proxy(self, args) -> bool:
        return bool({"warmup", "align"} & {*args.stages})

    def training_of_the_proxy(self, recipe, proxy: HeldModel, waiting: HeldModel) -> Phase:
        """The alignment, which holds a reference beside what the warm-up holds."""
        args = recipe.training_args
        warmup = super().training_of_the_proxy(recipe, proxy, waiting)
        if "align" not in args.stages or args.preference_weight == 0:
            return warmup
        # A preference is a pair of rows
        aligned = replace(proxy, rows=2 * proxy.rows, learns=2.0)
        return replace(
            warmup,
            name="the proxy's alignment",
            models=(aligned, reference_of(aligned), waiting),
            new_tokens=args.max_completion_length,
            sampled=args.per_device_eval_batch_size,
            sampler="proxy",
            uses_vllm=args.use_vllm,
        )

    def training_of_the_student(self, recipe, student: HeldModel) -> Phase:
        args = recipe.training_args
        phase = super().training_of_the_student(recipe, student)
        if not args.needs_targets or args.target_source == "cache":
            return phase
        if args.is_on_policy:
            # All samples of a step at once
            phase = replace(phase, new_tokens=args.max_completion_length, sampled=phase.step_rows)
        live = replace(self.frozen(self.proxy(recipe), args), rows=student.rows)
        kept = phase.targets_per_token if args.sample_weighting != "none" else 0
        return replace(phase, models=(student, live), loss="dense", targets_per_token=kept)

    def samples_of_a_row(self, args) -> float:
        return float(args.is_on_policy)


METHOD = ProxyKD()
