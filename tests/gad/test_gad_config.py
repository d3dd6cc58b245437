import pytest
import torch
from peft import LoraConfig

from tests.sharding.runs import FSDP2
from trl_bbkd.errors import TeacherDataError

from .helpers import make_config, make_trainer, no_model_is_loaded


GAE = {"advantage_estimator": "gae", "critic": "copy"}
TOKEN = {"discriminator_credit": "token", "discriminator_head": "likelihood"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fp16": True}, "does not support fp16"),
        ({"max_completion_length": None}, "max_completion_length must be a number"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1, got 0"),
        ({"generation_kwargs": {"max_new_tokens": 4}}, "generation_kwargs has 'max_new_tokens'"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0, got -1.0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
        ({"max_steps": -5}, "max_steps must be at least -1, got -5"),
        ({"loss_type": "dapoo"}, "loss_type must be one of 'grpo'.*got 'dapoo'"),
        ({"scale_rewards": "groups"}, "scale_rewards must be one of 'group'.*got 'groups'"),
        (
            {"discriminator_head": "likelyhood"},
            "discriminator_head must be one of 'scalar', 'likelihood', got 'likelyh",
        ),
        ({**GAE, "critic": "cpoy"}, "critic must be one of 'copy', 'trunk', got 'cpoy'"),
        ({**GAE, "scale_rewards": "none"}, "scale_rewards='none' has no effect with advantage_estimator='gae'"),
        ({"gamma": 0.9}, "gamma=0.9 has no effect without advantage_estimator='gae'"),
        (
            {"discriminator_likelihood_reduction": "mean"},
            "discriminator_likelihood_reduction='mean' has no effect without discriminator_head='likelihood'",
        ),
        ({"discriminator_replay_ratio": 0.2}, "discriminator_replay_ratio=0.2 has no effect without .*_size"),
        (
            {"warmup_learning_rate": 1e-3, "warmup_epochs": 0.0},
            "warmup_learning_rate=0.001 has no effect without warmup_epochs",
        ),
        (
            {"warmup_learning_rate": 1e-3, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
            "warmup_learning_rate multiplies.*lr_scheduler_type='reduce_lr_on_plateau'",
        ),
        ({"warmup_epochs": 3.0}, "warmup_epochs counts towards num_train_epochs .2.*got 3.0"),
        ({"warmup_epochs": -1.0}, "got -1.0"),
        ({"discriminator_updates_per_batch": -1}, "discriminator_updates_per_batch must be at least 0, got -1"),
        ({"discriminator_max_grad_norm": 0.0}, "discriminator_max_grad_norm must be positive, got 0.0"),
        ({"discriminator_sft_weight": 1.0}, "needs discriminator_head='likelihood'"),
        (
            {"discriminator_sft_weight": 1.0, "discriminator_head": "likelihood", "warmup_epochs": 0.0},
            "acts during warm-up, but warmup_epochs is 0",
        ),
        ({"num_generations": 1}, "num_generations must be at least 2, got 1"),
        ({"max_prompt_length": 0}, "max_prompt_length must be at least 1, got 0"),
        ({"warmup_learning_rate": 1e-3, "learning_rate": 0.0}, "warmup_learning_rate needs a positive learning_rate"),
        (
            {"advantage_estimator": "gae"},
            "advantage_estimator='gae' needs a critic: set critic='copy'.*critic='trunk'",
        ),
        ({"critic": "copy"}, "critic='copy' is only used by advantage_estimator='gae'"),
        (
            {**GAE, "critic": "trunk", "critic_lora_kwargs": {"r": 4}},
            "critic_lora_kwargs needs critic='copy', got.*trunk",
        ),
        ({"critic_lora_kwargs": {"r": 4}}, "critic_lora_kwargs needs critic='copy', got critic=None"),
        ({**GAE, "gamma": 1.1}, "gamma must be at most 1, got 1.1"),
        ({**GAE, "gamma": -0.1}, "gamma must be at least 0, got -0.1"),
        ({**GAE, "lam": 1.1}, "lam must be at most 1, got 1.1"),
        ({**GAE, "lam": -0.1}, "lam must be at least 0, got -0.1"),
        ({**GAE, "cliprange_value": 0.0}, "cliprange_value must be positive, got 0.0"),
        ({**GAE, "critic_learning_rate": -1.0}, "critic_learning_rate must be at least 0, got -1.0"),
        ({**GAE, "critic_max_grad_norm": 0.0}, "critic_max_grad_norm must be positive, got 0.0"),
        ({**GAE, "importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' has one ratio"),
        ({"discriminator_credit": "token"}, "discriminator_credit='token' needs discriminator_head='likelihood'"),
        ({**TOKEN, "importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' has one ratio"),
        (
            {**TOKEN, "multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation='normalize_then",
        ),
        ({"group_std_floor": -1.0}, "group_std_floor must be at least 0, got -1.0"),
        ({**GAE, "group_std_floor": 0.1}, "group_std_floor=0.1 bounds.*advantage_estimator='gae'.*Set it to 0"),
        ({"group_std_floor": 0.1, "scale_rewards": "none"}, "group_std_floor=0.1 bounds.*scale_rewards='none'"),
        (
            {"group_std_floor": 0.1, "multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation='normalize_then_sum' divides.*group_std_floor",
        ),
        ({"policy_min_accuracy": 1.5}, "policy_min_accuracy is an accuracy.*between 0 and 1, got 1.5"),
        ({"discriminator_max_accuracy": -0.5}, "discriminator_max_accuracy is an accuracy.*got -0.5"),
        (
            {"policy_min_accuracy": 0.9, "discriminator_max_accuracy": 0.6},
            "policy_min_accuracy=0.9 must not be over discriminator_max_accuracy=0.6",
        ),
        ({"discriminator_replay_size": -1}, "discriminator_replay_size must be at least 0, got -1"),
        ({"discriminator_replay_size": 7}, "discriminator_replay_size=7 has no room: each batch of 8 .*draws 8 past"),
        (
            {"discriminator_replay_size": 31, "steps_per_generation": 4},
            "discriminator_replay_size=31 has no room: each batch of 32 .*draws 32 past",
        ),
        ({"discriminator_replay_size": 90, "discriminator_replay_ratio": 1.0}, "discriminator_replay_ratio.*got 1.0"),
        ({"discriminator_replay_size": 90, "discriminator_replay_ratio": 0.0}, "discriminator_replay_ratio.*got 0.0"),
        ({"sync_ref_model": True, "beta": 0.1}, "sync_ref_model=True would replace it"),
        (
            {
                "discriminator_credit": "token",
                "discriminator_head": "likelihood",
                "mask_truncated_completions": True,
            },
            "discriminator_credit='token'.*mask_truncated_completions=True",
        ),
        ({**GAE, "off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold and loss_type='vespo'"),
        (
            {"policy_min_accuracy": 0.5, "discriminator_updates_per_batch": 0},
            "wait for a discriminator that learns.*discriminator_updates_per_batch is 0",
        ),
        (
            {"discriminator_replay_size": 90, "discriminator_updates_per_batch": 0},
            "discriminator_replay_size needs a discriminator that learns.*discriminator_updates_per_batch is 0",
        ),
    ],
)
def test_bad_values_are_named(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **config)


def test_values_at_the_edge_are_taken(tmp_path):
    config = make_config(
        tmp_path, **GAE, gamma=1.0, lam=0.0, discriminator_replay_size=8, critic_lora_kwargs='{"r": 4}'
    )
    assert config.critic_lora_kwargs == {"r": 4}
    make_config(tmp_path, policy_min_accuracy=0.0, discriminator_max_accuracy=1.0, group_std_floor=0.1)
    make_config(tmp_path, discriminator_replay_size=3, discriminator_replay_ratio=0.25)


def test_the_best_checkpoint_needs_a_metric_and_knows_its_direction(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    with pytest.raises(ValueError, match="load_best_model_at_end needs metric_for_best_model.*teacher_nll"):
        make_config(tmp_path, **best)
    config = make_config(tmp_path, **best, metric_for_best_model="teacher_nll")
    assert (config.metric_for_best_model, config.greater_is_better) == ("teacher_nll", False)
    config = make_config(tmp_path, **best, metric_for_best_model="eval_valid")
    assert (config.metric_for_best_model, config.greater_is_better) == ("eval_valid", True)


@pytest.mark.parametrize(
    ("launched", "settings", "message"),
    [
        ({"FSDP_VERSION": "1"}, {}, "FSDP's first version is not supported"),
        (FSDP2, {"critic": "trunk", "advantage_estimator": "gae"}, "critic='trunk' reads .* under FSDP and DeepSpeed"),
        (FSDP2, {"discriminator_load_in_4bit": True}, "uint8 are not sharded by FSDP2"),
    ],
)
def test_sharding_that_cannot_work_is_refused_before_loading(
    tiny_model_dir, tmp_path, monkeypatch, launched, settings, message
):
    config = make_config(tmp_path, **settings)
    no_model_is_loaded(monkeypatch)
    monkeypatch.setattr("trl_bbkd.host.sharding.shard_on_cpus", lambda: None)
    for name, value in {"ACCELERATE_USE_FSDP": "true", **launched}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        from trl_bbkd.gad.trainer import GADTrainer

        GADTrainer(tiny_model_dir, args=config)


def test_bad_teacher_text_is_refused_before_loading(tiny_model_dir, tmp_path, standard_rows, monkeypatch):
    no_model_is_loaded(monkeypatch)
    with pytest.raises(TeacherDataError, match="Row 1: `completion` is empty"):
        make_trainer(tmp_path, tiny_model_dir, [standard_rows[0], {**standard_rows[1], "completion": " "}])
    with pytest.raises(TeacherDataError, match="No room for an answer"):
        make_trainer(tmp_path, tiny_model_dir, standard_rows, max_completion_length=510)


def test_a_setting_given_twice_is_refused(tiny_model_dir, tmp_path, standard_rows):
    with pytest.raises(ValueError, match="`discriminator` to the trainer or set it in `args`, not both"):
        make_trainer(
            tmp_path,
            tiny_model_dir,
            standard_rows,
            trainer_kwargs={"discriminator": tiny_model_dir},
            discriminator=tiny_model_dir,
        )
    with pytest.raises(ValueError, match="`discriminator_peft_config` or set"):
        make_trainer(
            tmp_path,
            tiny_model_dir,
            standard_rows,
            trainer_kwargs={"discriminator_peft_config": LoraConfig()},
            discriminator_lora_kwargs={"r": 4},
        )


def test_discriminator_as_a_lora_adapter_from_the_config(tiny_model_dir, other_model_dir, tmp_path, standard_rows):
    trainer = make_trainer(
        tmp_path,
        tiny_model_dir,
        standard_rows,
        discriminator=other_model_dir,
        discriminator_lora_kwargs={"r": 4, "target_modules": "all-linear"},
    )
    trainable = {name for name, parameter in trainer.discriminator.named_parameters() if parameter.requires_grad}
    assert trainable >= {"score_head.weight", "score_head.bias"}
    assert all("lora_" in name or "score_head" in name for name in trainable)
    assert trainer.discriminator.score_head.in_features == 48
    assert trainer.discriminator.score_head.weight.dtype == torch.float32
