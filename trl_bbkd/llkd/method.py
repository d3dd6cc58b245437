"""LLKD, as recipes, runs and reports see it."""

from dataclasses import replace

from ..runs.held_models import Phase, rows_of_a_step, student_of
from ..runs.method import Method


class LLKD(Method):
    """Distillation of a classifier, from the rows that are worth it. Its job makes the trainers, and the report."""

    name = "LLKD"
    config = "trl_bbkd.llkd.config:LLKDConfig"
    arguments = "trl_bbkd.runs.recipe:ClassifierArguments"
    job = "trl_bbkd.llkd.job:LLKDJob"
    report = "trl_bbkd.llkd.report:LLKDReport"
    console_keys = ("loss", "selection/kept_share", "grad_norm", "learning_rate")
    init_options = ("labels",)

    def phases(self, recipe) -> list[Phase]:
        args = recipe.training_args
        pool = args.pool_factor if args.selection != "none" else 0
        student = replace(
            student_of(recipe), kind="classes", num_labels=len(args.labels or ()) or 2, reads=float(pool)
        )
        return [
            Phase("the student's training", (student,), args.max_length or 512, rows_of_a_step(args), loss="classes")
        ]


METHOD = LLKD()
