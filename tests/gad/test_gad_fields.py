"""Every field and argument of TRL that GAD inherits acts, differs or is refused by name; a new one has to be decided."""

import dataclasses
import inspect

import pytest
from trl import GRPOConfig, GRPOTrainer

from trl_bbkd.gad.config import GADConfig
from trl_bbkd.gad.trainer import GADTrainer

from .gad_fields import ARGUMENTS, INHERITED, REFUSED_ARGUMENTS, REFUSED_VALUES
from .helpers import make_config


VERDICTS = ("acts", "differs: ", "refused: ")


def names_of(config):
    return {field.name for field in dataclasses.fields(config)}


def refused(table):
    return {name for name, verdict in table.items() if verdict.startswith("refused")}


def test_every_inherited_field_is_decided():
    assert set(INHERITED) == names_of(GRPOConfig), "TRL has other fields now: decide what GAD does with each."
    assert set(INHERITED) <= names_of(GADConfig)
    assert set(REFUSED_VALUES) == refused(INHERITED)


def test_every_argument_is_decided():
    parameters = [name for name in inspect.signature(GRPOTrainer.__init__).parameters if name != "self"]
    own = [name for name in inspect.signature(GADTrainer.__init__).parameters if name != "self"]
    assert set(ARGUMENTS) == set(parameters), "TRL has other arguments now: decide what GAD does with each."
    assert own[: len(parameters)] == parameters, "GAD's arguments must stand where GRPO's do."
    assert set(REFUSED_ARGUMENTS) == refused(ARGUMENTS)


@pytest.mark.parametrize("table", [INHERITED, ARGUMENTS], ids=["fields", "arguments"])
def test_every_verdict_says_something(table):
    for name, verdict in table.items():
        assert verdict == "acts" or (verdict.startswith(VERDICTS[1:]) and len(verdict) > 15), name


@pytest.mark.parametrize("name", REFUSED_VALUES)
def test_a_refused_field_is_refused_by_name(tmp_path, name):
    beta = {"beta": 0.1} if name == "sync_ref_model" else {}
    with pytest.raises(ValueError, match=name) as error:
        make_config(tmp_path, **{name: REFUSED_VALUES[name]}, **beta)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", REFUSED_ARGUMENTS)
def test_a_refused_argument_is_refused_by_name(tmp_path, name):
    with pytest.raises(ValueError, match=f"does not support {name}"):
        GADTrainer("student", args=make_config(tmp_path), **{name: REFUSED_ARGUMENTS[name]})


def test_defaults_are_taken_as_they_are_given_back(tmp_path):
    """A refusal must not hit what another configuration has filled in."""
    config = make_config(tmp_path)
    values = {name: getattr(config, name) for name in REFUSED_VALUES}
    make_config(tmp_path, **values)
