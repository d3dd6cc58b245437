"""Ways of sharding that cannot work are refused in one line, before anything is loaded."""

import sys
import types
from importlib.machinery import ModuleSpec
from importlib.util import find_spec

import pytest
import torch
from transformers import BitsAndBytesConfig, TrainingArguments

from tests.sharding.runs import FSDP2, HSDP
from trl_bbkd.host.sharding import check_sharding


# What the check itself calls
STAND_IN = types.ModuleType("deepspeed")
STAND_IN.__spec__ = ModuleSpec("deepspeed", None)
STAND_IN.init_distributed = lambda dist_backend: None
FOUR_BITS = BitsAndBytesConfig(load_in_4bit=True)


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")


@pytest.fixture
def launch(monkeypatch):
    """As `accelerate launch` does; accelerate itself is left as it is."""
    monkeypatch.setattr("trl_bbkd.host.sharding.shard_on_cpus", lambda: None)

    def launch(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"FSDP_VERSION": "1"}, "first version is not supported.*fsdp_version: 2"),
        ({"FSDP_STATE_DICT_TYPE": "LOCAL_STATE_DICT"}, "FSDP2 has no LOCAL_STATE_DICT.*FULL_STATE_DICT.*or SHARDED"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "there is none. Set `fsdp_offload_params: false`"),
    ],
)
def test_fsdp_that_cannot_work(args, launch, changed, message):
    launch(**{**FSDP2, **changed})
    with pytest.raises(ValueError, match=message) as error:
        check_sharding(args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {},
            r"2 copies \(.*\) of 2 parts \(.*\) are 4 processes, and there are 1. Give both sizes beside --num_processes",
        ),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "parallelism_config_tp_size: 2 is not supported.*hsdp.yaml"),
        ({"PARALLELISM_CONFIG_CP_SIZE": "4"}, "parallelism_config_cp_size: 4 is not supported"),
    ],
)
def test_processes_that_are_divided_otherwise(args, launch, changed, message):
    launch(**{**HSDP, **changed})
    with pytest.raises(ValueError, match=message) as error:
        check_sharding(args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"save_only_model": True}, "save_only_model=True asks for nothing else"),
        ({"push_to_hub": True, "hub_strategy": "every_save"}, "hub_strategy='every_save' would send it"),
    ],
)
def test_checkpoints_in_parts_where_a_whole_student_is_asked_for(tmp_path, launch, config, message):
    launch(**FSDP2 | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"})
    with pytest.raises(
        ValueError, match=f"has no student that can be loaded, and {message}.*FULL_STATE_DICT"
    ) as error:
        check_sharding(TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **config))
    assert "\n" not in str(error.value)


def test_checkpoints_in_parts_with_an_older_torch(args, launch, monkeypatch):
    launch(**FSDP2 | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"})
    check_sharding(args)
    monkeypatch.setattr("trl_bbkd.host.sharding.SAVES_IN_PARTS", "99")
    with pytest.raises(ValueError, match="SHARDED_STATE_DICT needs torch 99.*FULL_STATE_DICT"):
        check_sharding(args)


def test_four_bits_that_would_not_be_sharded(args, launch):
    launch(**FSDP2)
    with pytest.raises(ValueError, match="uint8 are not sharded by FSDP2.*bnb_4bit_quant_storage: bfloat16"):
        check_sharding(args, None, FOUR_BITS)
    check_sharding(args, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16))


@pytest.mark.parametrize("stage", ["2", "3"])
def test_four_bits_under_zero(args, launch, monkeypatch, stage):
    monkeypatch.setitem(sys.modules, "deepspeed", STAND_IN)
    monkeypatch.setattr("trl_bbkd.host.sharding._refuse_missing_compiler", lambda: None)
    launch(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE=stage)
    if stage == "2":
        check_sharding(args, FOUR_BITS)
        return
    with pytest.raises(ValueError, match="cannot be partitioned by ZeRO-3. Take ZeRO-2"):
        check_sharding(args, FOUR_BITS)


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is compiled")
def test_a_compiler_that_is_not_there(args, launch, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", STAND_IN)
    monkeypatch.setattr("torch.utils.cpp_extension.is_ninja_available", lambda: True)
    launch(ACCELERATE_USE_DEEPSPEED="true", CXX=sys.executable)
    check_sharding(args)
    launch(CXX="no-such-compiler")
    with pytest.raises(ValueError, match="no-such-compiler cannot be found. Install a C.. compiler .*FSDP2"):
        check_sharding(args)
    monkeypatch.setattr("torch.utils.cpp_extension.is_ninja_available", lambda: False)
    with pytest.raises(ValueError, match="no-such-compiler and ninja cannot be found"):
        check_sharding(args)


def test_every_micro_batchs_gradient_is_reduced_under_fsdp2(args, launch):
    before = args.accelerator_config
    check_sharding(args)
    assert args.accelerator_config is before
    launch(**FSDP2)
    check_sharding(args)
    assert args.accelerator_config.gradient_accumulation_kwargs == {"sync_each_batch": True}
    assert before.gradient_accumulation_kwargs is None


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_deepspeed_that_is_not_there(args, launch):
    launch(ACCELERATE_USE_DEEPSPEED="true")
    with pytest.raises(
        ValueError, match=r'not installed: pip install "trl-bbkd\[deepspeed\]". FSDP2 needs no package'
    ):
        check_sharding(args)
