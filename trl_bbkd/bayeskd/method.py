"""Bayes-KD, as recipes, runs and reports see it."""

from ..errors import NGramError
from ..proxy.method import ProxyMethod


class BayesKD(ProxyMethod):
    """Distillation from an estimate of the teacher's distributions."""

    name = "Bayes-KD"
    config = "trl_bbkd.bayeskd.config:BayesKDConfig"
    trainer_type = "trl_bbkd.bayeskd.trainer:BayesKDTrainer"
    report = "trl_bbkd.bayeskd.report:BayesKDReport"
    errors = (*ProxyMethod.errors, NGramError)

    def findings(self, trainer) -> dict:
        return super().findings(trainer) | {"calibration": trainer.calibration or {}}


METHOD = BayesKD()
