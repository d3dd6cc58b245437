"""What shared code asks of a method. Imports nothing heavy: a method is looked at before anything is trained."""

import inspect
from pathlib import Path

from .held_models import Phase, longest_row, rows_of_a_step, student_of


class Method:
    """
    A method of distillation, as recipes, runs and reports see it. A method's folder has a `method.py` with one object of a
    subclass, `METHOD`, and [`~runs.methods.METHODS`] its name.

    Classes are named as `"package.module:Class"`: keys of recipes are read from the source of the first two before
    anything is imported, and all are imported on use. So is what the methods below need.

    Attributes:
        name (`str`):
            Its name, as in `"Proxy-KD"`.
        config (`str`):
            The configuration: a dataclass on [`~transformers.TrainingArguments`]. That of a student that writes text has
            `max_prompt_length`, `max_completion_length`, `answers_per_prompt`, `chat_template_kwargs` and `reasoning`, as
            [`~soft_targets.config.SoftTargetConfig`] has.
        arguments (`str`):
            What a recipe has beside it, model and data: [`~runs.recipe.RecipeArguments`], or
            [`~runs.recipe.ClassifierArguments`] where the student classifies.
        job (`str`):
            The [`~runs.job.Job`] that runs a recipe.
        report (`str`):
            The [`~reports.report.Report`]; of a student that writes text a [`~reports.text_report.TextReport`], with the method's
            own sections and small pictures.
        console_keys (`tuple[str, ...]`):
            What of a line of the log a terminal shows.
        input_paths (`tuple[str, ...]`):
            Keys of the configuration that name folders or files, and may be relative to the recipe.
        init_options (`tuple[str, ...]`):
            Options of `trl-bbkd init` that the method needs, of [`~runs.new_recipe.OPTIONS`].
        goes_on_by_itself (`bool`):
            Whether it goes on with a stopped run without being asked.
        takes_reward_funcs (`bool`):
            Whether `reward_funcs` of a recipe mean something.
        errors (`tuple[type[Exception], ...]`):
            What its training may find on disk that does not fit, and is told as an error of the recipe.
    """

    name: str
    config: str
    arguments = "trl_bbkd.runs.recipe:RecipeArguments"
    job = "trl_bbkd.runs.text_job:TextJob"
    report = "trl_bbkd.reports.text_report:TextReport"
    console_keys: tuple[str, ...] = ("loss", "grad_norm", "learning_rate")
    input_paths: tuple[str, ...] = ()
    init_options: tuple[str, ...] = ()
    goes_on_by_itself = False
    takes_reward_funcs = False
    errors: tuple[type[Exception], ...] = ()

    @property
    def template(self) -> Path:
        """The recipe that `trl-bbkd init` starts from, if there is one: `template.yaml` in the method's folder."""
        return Path(inspect.getfile(type(self))).with_name("template.yaml")

    def check(self, recipe) -> None:
        """Refuse what the method can do nothing with, with a [`~errors.RecipeError`], before data or models are loaded."""

    def phases(self, recipe) -> list[Phase]:
        """What is on a device in each phase of a run that is larger than what the others hold: by itself, the student alone."""
        args = recipe.training_args
        return [Phase("the student's training", (student_of(recipe),), longest_row(args), rows_of_a_step(args))]

    def why_not_sharded(self, recipe) -> str:
        """Why its trainer refuses FSDP and DeepSpeed with this recipe, in one line; empty if it does not."""
        return ""

    # Of a student that writes text

    def trainer(self, job):
        """The trainer of a run: `job.trainer_arguments()` is what a trainer of TRL takes."""
        raise NotImplementedError

    def samples_per_prompt(self, args) -> int:
        """The method's sequences for each prompt of a step."""
        return 1

    def samples_of_a_row(self, args) -> float:
        """Answers that it samples itself, in training, for each sequence that it learns from."""
        return 0.0

    def sft_learning_rate(self, args) -> float:
        """That of its supervised fine-tuning, which the baseline takes."""
        return args.learning_rate

    def more_results(self, job, trainer) -> dict[str, dict[str, float]]:
        """Columns of the report's table beside the students', measured by `job.measure`."""
        return {}

    def findings(self, trainer) -> dict:
        """What the report has of this method, by its entries' names, such as `stages`. It has to be fit for JSON."""
        return {}

    def warnings(self, trainer) -> list[dict]:
        """What went wrong during training: `step` and `text`."""
        return []
