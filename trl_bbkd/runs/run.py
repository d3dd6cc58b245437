"""One run of a recipe, from what the teacher wrote to a distilled student and its report."""

from ..reports.report import print_table
from .failures import tells_failures
from .in_use import alone_in_its_folder
from .methods import load_class, load_method
from .recipe import Recipe


@tells_failures
@alone_in_its_folder
def run(recipe: Recipe) -> None:
    """
    Distil a student as `recipe` says and report what it gained over plain training on the same rows.

    In `output_dir` it leaves the student, its tokenizer and card, what the method and the comparison leave beside it
    (`discriminator/`, `proxy/`, `seqkd/`, `all_rows/`, ...), `report.md` and its pictures, `metrics.json` and
    `recipe.yaml`. With `push_to_hub` the student goes to the Hub at the end, once all of it is written.

    Args:
        recipe ([`~runs.recipe.Recipe`]):
            The recipe.

    Raises:
        [`~errors.RecipeError`]: no student is named, or `output_dir` holds a run of another recipe or is in use by one.
        [`~errors.TeacherDataError`]: the teacher's text or labels cannot be used.
        [`~errors.DiskFullError`]: there is no space left; what is finished is safe.
        [`~errors.HubError`]: the student cannot be pushed; before training, or when it is finished and on disk.
    """
    job = load_class(load_method(recipe.method).job)(recipe)
    report = job.distil()
    if report is None:
        return
    job.write(report)
    job.add_baselines(report)
    job.write(report)
    if job.is_main_process:
        print_table(report)
        print(f"Student, report.md, curves.png and metrics.json: {recipe.training_args.output_dir}")
        job.track(report)
        job.push()
