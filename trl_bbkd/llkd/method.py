"""LLKD, as recipes, runs and reports see it."""

from ..runs.method import Method


class LLKD(Method):
    """Distillation of a classifier, from the rows that are worth it. Its job makes the trainers, and the report."""

    name = "LLKD"
    config = "trl_bbkd.llkd.config:LLKDConfig"
    arguments = "trl_bbkd.runs.recipe:ClassifierArguments"
    job = "trl_bbkd.llkd.job:LLKDJob"
    console_keys = ("loss", "selection/kept_share", "grad_norm", "learning_rate")
    init_options = ("labels",)


METHOD = LLKD()
