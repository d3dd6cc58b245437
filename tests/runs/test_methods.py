"""What each method's `METHOD` says."""

import subprocess
import sys
from pathlib import Path

import pytest

import trl_bbkd
from tests.processes import ROOT
from trl_bbkd.runs.method import Method
from trl_bbkd.runs.methods import METHODS, load_class, load_method


TRAINERS = {
    "gad": "GADTrainer",
    "proxykd": "ProxyKDTrainer",
    "bayeskd": "BayesKDTrainer",
    "preferencekd": "PreferenceKDTrainer",
    "llkd": "LLKDTrainer",
}
LOOKED_AT = """
import sys
from trl_bbkd.runs.methods import METHODS, load_method
from trl_bbkd.runs.recipe_keys import recipe_keys
assert all(load_method(name).template.is_file() and recipe_keys(name) for name in METHODS)
assert not {"torch", "transformers", "trl", "datasets", "matplotlib"} & {*sys.modules}
"""


def test_they_are_looked_at_without_what_is_heavy():
    done = subprocess.run([sys.executable, "-c", LOOKED_AT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", METHODS)
def test_what_it_names_is_there(name):
    method = load_method(name)
    folder = Path(trl_bbkd.__file__).parent / name
    assert isinstance(method, Method) and method.template == folder / "template.yaml"
    assert method.name == getattr(trl_bbkd, TRAINERS[name])._name
    for path in (method.config, method.arguments, method.job, method.report):
        assert isinstance(load_class(path), type), path
    fields = load_class(method.config).__dataclass_fields__
    assert {*method.input_paths} <= {*fields}
