"""What a report samples by itself, and what a user says of it."""

import pytest

from tests.recipes import write_recipe
from trl_bbkd.errors import RecipeError
from trl_bbkd.runs.methods import load_method
from trl_bbkd.runs.recipe import RecipeArguments, load_recipe
from trl_bbkd.runs.sampling_plan import FEWEST_PROMPTS, answers_in_training, sampling_plan


@pytest.mark.parametrize("samples_per_prompt", [1, 8])
@pytest.mark.parametrize("steps", [200, 600, 5000])
@pytest.mark.parametrize("has_baseline", [True, False])
def test_by_default_it_takes_a_tenth_of_the_training(samples_per_prompt, steps, has_baseline):
    answers = answers_in_training(samples_per_prompt, steps * 64)
    plan = sampling_plan(RecipeArguments(), steps, 1000, has_baseline, answers)
    assert (
        0.05 * answers < plan.all <= 0.1 * answers
        or plan.all == sampling_plan(RecipeArguments(), steps, 1000, has_baseline).all
    )
    assert plan.all <= 0.1 * answers
    assert f"about {plan.all / answers:.0%} of the training's cost" in str(plan)


def test_samples_go_before_prompts_and_some_stay():
    full = sampling_plan(RecipeArguments(), 600, 1000, True)
    assert (full.prompts, full.samples, full.all // full.prompts) == (256, 8, 111)
    fewer = sampling_plan(RecipeArguments(), 600, 1000, True, 200_000)
    assert fewer.prompts == 256 and 1 <= fewer.samples < 8
    few = sampling_plan(RecipeArguments(), 600, 1000, True, 50_000)
    assert FEWEST_PROMPTS < few.prompts < 256 and few.samples == 1
    fewest = sampling_plan(RecipeArguments(), 600, 1000, True, 10)
    assert (fewest.prompts, fewest.samples) == (FEWEST_PROMPTS, 1)
    # A small model on 200 rows, of which 10 are held out
    small = sampling_plan(RecipeArguments(), 300, 10, True, answers_in_training(1, 300 * 8))
    assert (small.prompts, small.all // small.prompts) == (10, 24)


def test_what_is_named_stays_named():
    named = RecipeArguments(eval_prompts=256, eval_samples=8)
    for answers in (None, 10, 1e9):
        plan = sampling_plan(named, 250, 256, True, answers)
        assert (plan.prompts, plan.samples, plan.curve_samples, plan.all) == (256, 8, 4, 256 * 111)
    plan = sampling_plan(RecipeArguments(eval_samples=8), 250, 256, True, 10)
    assert (plan.prompts, plan.samples) == (FEWEST_PROMPTS, 8)
    plan = sampling_plan(RecipeArguments(eval_prompts=100), 250, 256, True, 10)
    assert (plan.prompts, plan.samples) == (100, 1)


def test_temperatures_are_counted():
    plan = sampling_plan(RecipeArguments(eval_prompts=10, eval_samples=4, eval_temperatures=[0.5]), 8, 10, False)
    assert plan.once == 40 and plan.all == 2 * 40 + 7 * 10 * 2 and "temperatures 0.5 (eval_temperatures)" in str(plan)
    greedy = RecipeArguments(eval_prompts=10, eval_samples=4, eval_temperatures=[0.0])
    assert sampling_plan(greedy, 8, 10, False).once == 10


@pytest.mark.parametrize("value", [[], [1.0, 1.0], [-0.1], ["inf"]], ids=str)
def test_temperatures_that_are_none(tmp_path, recipe_folder, tiny_model_dir, value):
    recipe = write_recipe(recipe_folder, tiny_model_dir, tmp_path / "out", eval_temperatures=value)
    with pytest.raises(RecipeError, match="eval_temperatures"):
        load_recipe(recipe)
    with pytest.raises(
        RecipeError, match="eval_temperatures must be different numbers of at least 0, such as 1.0 0.7 0"
    ):
        load_recipe(write_recipe(recipe_folder, tiny_model_dir, tmp_path / "a"), ["--eval_temperatures", "1", "1"])
    recipe = load_recipe(write_recipe(recipe_folder, tiny_model_dir, tmp_path / "b", eval_temperatures=[0.7, 0]))
    assert recipe.script_args.eval_temperatures == [0.7, 0]


@pytest.mark.parametrize(
    ("name", "overrides", "samples", "says"),
    [
        ("gad", [], 1, "1.7 for each answer that the training samples and learns from"),
        ("proxykd-on-policy", [], 1, "1.7 for each answer that the training samples and learns from"),
        ("preferencekd", [], 3.2, "0.53 for each answer that the training samples and learns from"),
        (
            "preferencekd",
            ["--num_train_epochs", "1"],
            8,
            "0.21 for each answer that the training samples and learns from",
        ),
        ("proxykd", [], 0, "about 340% of the training's cost"),
        ("bayeskd", [], 0, "about 340% of the training's cost"),
    ],
)
def test_a_method_that_samples_itself_is_told_no_share_of_its_cost(name, overrides, samples, says):
    """How long it learns from a sample is not known; how many there are is."""
    recipe, rows = load_recipe(f"recipes/{name}.yaml", overrides), 120 * 256
    method = load_method(recipe.method)
    of_a_row = method.samples_of_a_row(recipe.training_args)
    assert of_a_row == samples
    answers = answers_in_training(method.samples_per_prompt(recipe.training_args), rows)
    recipe.script_args.eval_temperatures = [1.0, 1.2, 0.8, 0.6, 0.4, 0.2]
    plan = sampling_plan(recipe.script_args, 120, 256, True, answers, of_a_row * rows)
    # The recipes name their counts
    assert (plan.prompts, plan.samples, plan.all) == (256, 8, 52_224)
    assert str(plan).endswith(f"52,224 in the whole run, {says}")
    assert ("training's cost" in str(plan)) == (samples == 0)


def test_one_sample_is_one():
    assert "16 held-out prompts (eval_prompts), 1 sample of each" in str(sampling_plan(RecipeArguments(), 2, 99, True))
