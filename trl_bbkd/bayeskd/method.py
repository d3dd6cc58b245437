"""Bayes-KD, as recipes, runs and reports see it."""

from dataclasses import replace

from ..errors import NGramError
from ..proxy.method import ProxyMethod
from ..runs.held_models import HeldModel, Phase


class BayesKD(ProxyMethod):
    """Distillation from an estimate of the teacher's distributions."""

    name = "Bayes-KD"
    config = "trl_bbkd.bayeskd.config:BayesKDConfig"
    trainer_type = "trl_bbkd.bayeskd.trainer:BayesKDTrainer"
    report = "trl_bbkd.bayeskd.report:BayesKDReport"
    errors = (*ProxyMethod.errors, NGramError)
    store_stage = "estimate"

    def training_of_the_student(self, recipe, student: HeldModel) -> Phase:
        args = recipe.training_args
        phase = super().training_of_the_student(recipe, student)
        return replace(phase, targets_per_token=args.target_top_k * len(args.target_weights))

    def findings(self, trainer) -> dict:
        return super().findings(trainer) | {"calibration": trainer.calibration or {}}


METHOD = BayesKD()
