"""What is said of a key that is called otherwise here."""

import pytest

from trl_bbkd.errors import RecipeError
from trl_bbkd.runs.key_names import NAMES_HERE, nearest
from trl_bbkd.runs.recipe_file import METHODS, RecipeFile
from trl_bbkd.runs.recipe_keys import recipe_keys


EVERYWHERE = {
    "model": "model_name_or_path",
    "data": "dataset_name",
    "dataset": "dataset_name",
    "output": "output_dir",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "teacher": "teacher_name",
    "student": "model_name_or_path",
    "Batch-Size": "per_device_train_batch_size",
}


def refusal(tmp_path, text, method="gad"):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"method: {method}\n{text}\n")
    recipe_file = RecipeFile(path)
    with pytest.raises(RecipeError) as error:
        recipe_file.check_keys(recipe_keys(recipe_file.method))
    return str(error.value).removeprefix(f"{path}, ")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "here"), EVERYWHERE.items())
def test_names_of_other_programs(tmp_path, method, name, here):
    assert refusal(tmp_path, f"{name}: x", method) == f"line 2: unknown key {name!r}; did you mean {here!r}?"


def test_a_name_means_what_the_method_has(tmp_path):
    assert "'max_completion_length'?" in refusal(tmp_path, "max_tokens: 1")
    assert "'max_length'?" in refusal(tmp_path, "max_tokens: 1", "llkd")
    assert "'labels'?" in refusal(tmp_path, "classes: [a, b]", "llkd")


def test_options_too():
    assert nearest("--lr", ["--learning_rate"]) == "; did you mean '--learning_rate'?"
    assert (
        nearest("--batch-size", ["--per_device_train_batch_size"]) == "; did you mean '--per_device_train_batch_size'?"
    )


def test_typos_as_before():
    assert nearest("learning_rat", ["learning_rate", "seed"]) == "; did you mean 'learning_rate'?"
    assert nearest("zzzz", ["learning_rate"]) == "."


def test_every_name_is_of_a_key_that_there_is():
    keys = set().union(*(recipe_keys(method) for method in METHODS))
    assert {here for found in NAMES_HERE.values() for here in found} <= keys
    assert all(name == name.lower() and "-" not in name for name in NAMES_HERE)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        (
            "training:\n  learning_rate: 1",
            "Take that line out, and write what is below it, such as `learning_rate`, without",
        ),
        ("training:\n  lr: 1", "Take that line out, and write what is below it, such as `lr`, without indentation."),
        ("training:", "a recipe is flat. Take that line out."),
    ],
)
def test_sections(tmp_path, text, advice):
    assert refusal(tmp_path, text).startswith("line 2: unknown key 'training': a recipe is flat.")
    assert advice in refusal(tmp_path, text)


@pytest.mark.parametrize("name", ["chat_template_path", "eos_token"])
def test_a_tokenizer_that_is_taken_as_it_is(tmp_path, name):
    """Keys that methods with a proxy have."""
    assert name in recipe_keys("proxykd")
    found = refusal(tmp_path, f"{name}: x")
    assert found.startswith(f"line 2: unknown key {name!r}: the student's tokenizer is taken as it is.")
    assert "save it beside the student" in found and "did you mean" not in found
