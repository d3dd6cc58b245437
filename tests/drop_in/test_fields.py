"""Every field and argument that our trainers inherit acts, differs or is refused by name; a new one has to be decided."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import trl_bbkd
from tests.drop_in import fields
from tests.drop_in.table import PAGE, render, sections
from trl_bbkd import (
    BayesKDConfig,
    BayesKDTrainer,
    LLKDConfig,
    LLKDTrainer,
    PreferenceKDConfig,
    PreferenceKDTrainer,
    ProxyAlignmentConfig,
    ProxyAlignmentTrainer,
    ProxyKDConfig,
    ProxyKDTrainer,
)


CONFIGS = {
    ProxyKDConfig: (SFTConfig, fields.SOFT_TARGETS),
    BayesKDConfig: (SFTConfig, fields.SOFT_TARGETS),
    ProxyAlignmentConfig: (DPOConfig, fields.ALIGNMENT),
    PreferenceKDConfig: (DPOConfig, fields.PREFERENCE),
    LLKDConfig: (TrainingArguments, fields.CLASSIFIER),
}
TRAINERS = {
    ProxyKDTrainer: (SFTTrainer, fields.PROXY_ARGUMENTS, ProxyKDConfig),
    BayesKDTrainer: (SFTTrainer, fields.PROXY_ARGUMENTS, BayesKDConfig),
    ProxyAlignmentTrainer: (DPOTrainer, fields.ALIGNMENT_ARGUMENTS, ProxyAlignmentConfig),
    PreferenceKDTrainer: (DPOTrainer, fields.PREFERENCE_ARGUMENTS, PreferenceKDConfig),
    LLKDTrainer: (Trainer, fields.CLASSIFIER_ARGUMENTS, LLKDConfig),
}
ON_CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


def names_of(config):
    return {field.name for field in dataclasses.fields(config)}


def arguments_of(trainer):
    return set(inspect.signature(trainer.__init__).parameters) - {"self"}


def refused(table):
    return [name for name, verdict in table.items() if verdict.startswith("refused")]


REFUSED_FIELDS = [(config, name) for config, (_, table) in CONFIGS.items() for name in refused(table)]
REFUSED_ARGUMENTS = [(trainer, name) for trainer, (_, table, _) in TRAINERS.items() for name in refused(table)]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_inherited_field_is_decided(config):
    base, table = CONFIGS[config]
    assert set(table) == names_of(base), f"{base.__name__} has other fields now: decide what {config.__name__} does."
    assert set(table) <= names_of(config)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_argument_is_decided(trainer):
    base, table, _ = TRAINERS[trainer]
    assert set(table) == arguments_of(base), f"{base.__name__} has other arguments now: decide what ours does."
    taken = {name for name in table if name not in refused(table)}
    assert taken == arguments_of(base) & arguments_of(trainer)


def test_every_verdict_says_something():
    tables = [table for section in sections() for table in (section.arguments, section.fields)]
    assert len(tables) >= 6
    for name, verdict in (item for table in tables for item in table.items()):
        assert verdict == "acts" or re.fullmatch(r"(differs|refused): .{5,}", verdict), name


@pytest.mark.parametrize(("config", "name"), REFUSED_FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_a_refused_field_is_refused_by_name(config, name):
    value = (
        "hinge"
        if config in (ProxyAlignmentConfig, PreferenceKDConfig) and name == "loss_type"
        else fields.REFUSED_VALUES[name]
    )
    beside = {"eval_strategy": "no"} if name != "eval_strategy" else {}
    with pytest.raises(ValueError, match=rf"^{name}=.* is not possible") as error:
        config("out", **{**ON_CPU, **beside, name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", CONFIGS)
def test_what_a_configuration_fills_in_is_taken_again(config):
    """A refusal must not hit what another configuration of the class was given by default."""
    made = config("out", **ON_CPU)
    config(**{field.name: getattr(made, field.name) for field in dataclasses.fields(made) if field.init})


@pytest.mark.parametrize("config", [ProxyKDConfig, BayesKDConfig])
def test_what_is_done_anyway_may_be_said(config):
    config("out", completion_only_loss=True, router_aux_loss_coef=0.0, eval_packing=False, **ON_CPU)


@pytest.mark.parametrize("config", [ProxyAlignmentConfig, PreferenceKDConfig])
@pytest.mark.parametrize(
    ("name", "value"), [("train_sampling_strategy", "group_by_length"), ("save_strategy", "best")]
)
def test_a_value_that_rounds_have_no_use_for(config, name, value):
    with pytest.raises(ValueError, match=f"{name}='{value}' is not possible here"):
        config("out", **{**ON_CPU, name: value})


@pytest.mark.parametrize("trainer", TRAINERS)
def test_sharding_that_cannot_work_is_refused_by_the_trainer(monkeypatch, trainer):
    args = TRAINERS[trainer][2]("out", **ON_CPU)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="FSDP's first version is not supported"):
        trainer("student", args=args)


@pytest.mark.parametrize(("trainer", "name"), REFUSED_ARGUMENTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_refused_argument_is_refused_by_name(trainer, name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        trainer("student", **{name: None})


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_of_ours_is_read_somewhere(config):
    """A field of a method that nothing reads would have no effect."""
    folder = Path(trl_bbkd.__file__).parent
    sources = [file for file in folder.rglob("*.py") if "gad" not in file.parts]
    text = "\n".join(file.read_text(encoding="utf-8") for file in sources)
    for name in names_of(config) - names_of(CONFIGS[config][0]):
        assert re.search(rf"\b(args|self)\.{name}\b|\"{name}\"", text), name


def test_the_page_says_what_the_tables_say():
    assert PAGE.read_text(encoding="utf-8") == render(), "Write docs/drop_in.md: python -m tests.drop_in.table"
