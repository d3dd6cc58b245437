"""`trl-bbkd init`."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from trl_bbkd.cli import main
from trl_bbkd.commands.train import run_recipe
from trl_bbkd.runs.methods import METHODS
from trl_bbkd.runs.new_recipe import methods
from trl_bbkd.runs.recipe import load_recipe


NEEDED = {
    "proxykd": ["--proxy", "some/proxy"],
    "bayeskd": ["--proxy", "some/proxy"],
    "llkd": ["--labels", "yes", "no"],
}
ON_CPU = ["--use_cpu", "true", "--bf16", "false"]


@pytest.fixture
def folder(tmp_path, monkeypatch, standard_rows):
    """The current directory, with twelve rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in standard_rows[:12]))
    return tmp_path


def init(method, *options, student="some/student", data="answers.jsonl"):
    main(["init", method, "--student", student, "--data", data, *options])


def test_there_is_one_for_each_method():
    assert methods() == sorted(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_it_is_a_recipe_with_comments(folder, capsys, method):
    init(method, *NEEDED.get(method, []), "--teacher", "GPT-5: the 'chat' model")
    assert capsys.readouterr().out == f"Wrote {method}.yaml. Train it with: trl-bbkd train {method}.yaml\n"
    recipe = load_recipe(f"{method}.yaml", ON_CPU)
    assert recipe.method == method and recipe.script_args.teacher_name == "GPT-5: the 'chat' model"
    assert recipe.model_args.model_name_or_path == "some/student"
    assert recipe.script_args.dataset_name == str(folder / "answers.jsonl")
    assert recipe.training_args.output_dir == f"output/{method}"
    assert getattr(recipe.training_args, "proxy_model", "some/proxy") == "some/proxy"
    assert getattr(recipe.training_args, "labels", ["yes", "no"]) == ["yes", "no"]
    text = Path(f"{method}.yaml").read_text()
    assert f"# Train:    trl-bbkd train {method}.yaml\n" in text and "$" not in text
    assert max(map(len, text.splitlines())) <= 140
    # The second command of its header is one that can be given
    try_it = next(line for line in text.splitlines() if line.startswith("# Try it:")).split()
    load_recipe(f"{method}.yaml", [*try_it[try_it.index(f"{method}.yaml") + 1 :], *ON_CPU])


def test_it_trains(folder, tiny_model_dir):
    init("gad", student=tiny_model_dir)
    small = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1"]
    small += ["--max_completion_length", "8", "--num_generations", "4", "--discriminator_only_steps", "0"]
    run_recipe("gad.yaml", [*small, "--seqkd_baseline", "false", *ON_CPU])
    assert (folder / "output/gad/adapter_model.safetensors").is_file()


def test_paths_are_found_from_the_recipe(folder):
    (folder / "sub").mkdir()
    init("gad", "--output", "sub/mine.yaml", student=str(folder))
    values = yaml.safe_load(Path("sub/mine.yaml").read_text())
    assert values["dataset_name"] == "../answers.jsonl" and values["model_name_or_path"] == str(folder)
    assert values["output_dir"] == "output/mine"
    recipe = load_recipe("sub/mine.yaml", ON_CPU)
    assert recipe.script_args.dataset_name == str(folder / "answers.jsonl")


@pytest.mark.parametrize("value", ["12", "true", "null", "a: b # c", "it's", "$x {y}"])
def test_text_stays_text(folder, value):
    (folder / value).touch()
    init("gad", "--teacher", value, data=value)
    values = yaml.safe_load(Path("gad.yaml").read_text())
    assert values["teacher_name"] == value and values["dataset_name"] == value


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "gda --student a/b --data c/d",
            "there is no method 'gda'; did you mean 'gad'? Methods: bayeskd, gad, llkd, preferencekd, proxykd.",
        ),
        (
            "ppo --student a/b --data c/d",
            "there is no method 'ppo'. Methods: bayeskd, gad, llkd, preferencekd, proxykd.",
        ),
        ("gad --data c/d", "the following arguments are required: --student"),
        (
            "gad --student a/b --data none.jsonl",
            "--data none.jsonl: there is no such file or folder, and it is no Hub id.",
        ),
        ("gad --student ./none --data c/d", "--student ./none: there is no such file or folder, and it is no Hub id."),
        ("gad --student a/b/c --data c/d", "--student a/b/c: there is no such file or folder, and it is no Hub id."),
        ("gad --student a/b --data c/d --proxy e/f", "method 'gad' has no use for --proxy. Take it out."),
        (
            "proxykd --student a/b --data c/d",
            "method 'proxykd' needs --proxy: a larger model with the student's tokenizer.",
        ),
        ("llkd --student a/b --data c/d", "method 'llkd' needs --labels: the names of the classes, two at least."),
        ("llkd --student a/b --data c/d --labels x x", "--labels names the classes, two at least; got x x."),
        ("gad --student a/b --data c/d --output none/x.yaml", "--output none/x.yaml: there is no folder "),
        (
            "gad --student a/b --data c/d --output there.yaml",
            "there.yaml exists. Name another file with --output, or take ",
        ),
        ("gad --student a/b --data c/d --force", "unrecognized arguments: --force"),
    ],
)
def test_errors_are_one_line(folder, capsys, command, message):
    (folder / "there.yaml").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        main(["init", *command.split()])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(("error: " + message, "trl-bbkd: error: " + message))
    assert (folder / "there.yaml").read_text() == "mine" and not (folder / "gad.yaml").exists()


def test_the_command_of_the_docs(folder, capsys):
    docs = (Path(__file__).parents[1] / "docs/recipes.md").read_text()
    *_, command = re.findall(r"```bash\n(.*?)\n```", docs, flags=re.DOTALL)
    (folder / "teacher.jsonl").write_text((folder / "answers.jsonl").read_text())
    program, *arguments = shlex.split(command)
    main(arguments)
    assert program == "trl-bbkd" and Path("gad.yaml").is_file()
    with pytest.raises(SystemExit):
        main(["init", "--help"])
    known = re.findall(r"^  (--\w+)", capsys.readouterr().out, flags=re.MULTILINE)
    assert {*re.findall(r"`(--\w+)`", docs)} == {*known}
