"""A method from outside: one folder, one line. CONTRIBUTING.md has its shape."""

import json
import sys

import pytest

from tests.pictures import is_drawn, lines
from tests.recipes import write_recipe
from trl_bbkd.errors import RecipeError
from trl_bbkd.runs.methods import METHODS
from trl_bbkd.runs.recipe import load_recipe
from trl_bbkd.runs.recipe_keys import own_keys, recipe_keys
from trl_bbkd.runs.run import run


METHOD = """\
from trl_bbkd.runs.method import Method


class Smoothed(Method):
    name = "smoothed SFT"
    config = "toy.trainer:SmoothedConfig"

    def trainer(self, job):
        from trl_bbkd.soft_targets.rows import soft_target_rows
        from .trainer import SmoothedTrainer

        rows = soft_target_rows(job.train, job.tokenizer, job.args.chat_template_kwargs)
        return SmoothedTrainer(**job.trainer_arguments() | {"train_dataset": rows})


METHOD = Smoothed()
"""
TRAINER = """\
from dataclasses import dataclass, field
from torch.nn.functional import cross_entropy
from trl_bbkd.soft_targets.config import SoftTargetConfig
from trl_bbkd.soft_targets.trainer import SoftTargetTrainer

@dataclass
class SmoothedConfig(SoftTargetConfig):
    smoothing: float = field(default=0.1, metadata={"help": "Share of a target that all tokens have alike."})

class SmoothedTrainer(SoftTargetTrainer):
    _name, _tag_names = "smoothed SFT", ["trl", "trl-bbkd", "toy"]
    _paper = {"title": "Rethinking the Inception Architecture", "id": "1512.00567", "citation": "@article{inception}"}
    _same_when_resumed = ("seed", "learning_rate", "smoothing")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        loss = cross_entropy(logits, labels, label_smoothing=self.args.smoothing if self.model.training else 0.0)
        return (loss, outputs) if return_outputs else loss
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The method, where Python finds it."""
    folder = tmp_path / "outside/toy"
    folder.mkdir(parents=True)
    for name, text in (("__init__", ""), ("method", METHOD), ("trainer", TRAINER)):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder.parent)
    # The one line
    monkeypatch.setitem(METHODS, "toy", "toy.method")
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy"]:
        del sys.modules[name]


@pytest.fixture
def write(toy, tmp_path, recipe_folder, tiny_model_dir):
    gads = dict.fromkeys(["num_generations", "discriminator_learning_rate"])
    return lambda **changes: write_recipe(
        recipe_folder, tiny_model_dir, tmp_path / "out", **{"method": "toy", **gads, **changes}
    )


def test_it_is_small(toy):
    assert sum(len(file.read_text().splitlines()) for file in toy.glob("*.py")) <= 40


def test_its_keys_are_known_before_it_is_imported(write):
    assert {"smoothing", "max_completion_length", "learning_rate", "eval_prompts"} <= recipe_keys("toy")
    assert {"smoothing", "hard_weight"} <= own_keys("toy") and "adam_beta1" not in own_keys("toy")
    with pytest.raises(RecipeError, match=r"line \d+: unknown key 'smothing'; did you mean 'smoothing'"):
        load_recipe(write(smothing=0.2))
    with pytest.raises(RecipeError, match="unknown option --smothing; did you mean '--smoothing'"):
        load_recipe(write(), ["--smothing", "0.2"])
    assert "toy.trainer" not in sys.modules
    with pytest.raises(RecipeError, match="smoothing: expected a number, got 'much'"):
        load_recipe(write(smoothing="much"))
    with pytest.raises(RecipeError, match="added to GAD's discriminator; method 'toy' has no rewards"):
        load_recipe(write(reward_funcs=["os.path.join"]))


def test_a_base_that_cannot_be_read_is_left_to_the_parser(write, toy, capsys):
    (toy / "trainer.py").write_text(
        TRAINER.replace("(SoftTargetConfig)", "(config.SoftTargetConfig)").replace(
            "soft_targets.config import SoftTargetConfig", "soft_targets import config"
        )
    )
    assert recipe_keys("toy") is None and own_keys("toy") == set()
    with pytest.raises(RecipeError, match="unknown key 'smothing'; did you mean 'smoothing'"):
        load_recipe(write(smothing=0.2))
    with pytest.raises(SystemExit):
        load_recipe(write(), ["--help"])
    assert "--help-all shows them" in capsys.readouterr().out


def test_its_recipe_runs(write, tmp_path, figures):
    recipe = load_recipe(write(smoothing=0.2, seqkd_baseline=False))
    assert recipe.training_args.smoothing == 0.2
    run(recipe)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert set(metrics["results"]) == {"undistilled", "smoothed SFT", "teacher"}
    nll = {name: found.get("teacher_nll") for name, found in metrics["results"].items()}
    assert nll["smoothed SFT"] < nll["undistilled"]
    assert (tmp_path / "out/report.md").read_text().startswith("# smoothed SFT: ")
    card = (tmp_path / "out/README.md").read_text()
    assert "https://huggingface.co/papers/1512.00567" in card and "| smoothing | `0.2` |" in card
    losses = [entry["loss"] for entry in metrics["log_history"] if "loss" in entry]
    assert is_drawn(tmp_path / "out/curves.png") and len(losses) == metrics["log_history"][-1]["step"]
    titles = ["The student's loss", "Norm of its gradient", "Learning rate", "NLL of held-out teacher answers"]
    assert set(lines(figures[0])) == {*titles, "blue at temperature 1.0"}
