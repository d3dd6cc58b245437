"""Contracts with TRL and transformers: each seam that is overridden or called keeps its signature."""

import contextlib
import inspect
import re
import types

import pytest
import torch
import transformers
from transformers import Trainer
from transformers.trainer_callback import CallbackHandler
from trl import DPOTrainer, GRPOTrainer, SFTTrainer
from trl.generation import vllm_client, vllm_generation
from trl.generation.vllm_generation import VLLMGeneration

from trl_bbkd.host import _compat


OVERRIDDEN = {
    (GRPOTrainer, "_calculate_rewards"): ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    (GRPOTrainer, "_compute_loss"): ["self", "model", "inputs"],
    (GRPOTrainer, "_generate"): ["self", "prompts"],
    (GRPOTrainer, "_generate_and_score_completions"): ["self", "inputs"],
    (GRPOTrainer, "_generate_single_turn"): [
        "self",
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
        "has_tool_images",
    ],
    (VLLMGeneration, "_iter_named_params"): ["self"],
    (VLLMGeneration, "sync_weights"): ["self"],
    (GRPOTrainer, "_get_eval_sampler"): ["self", "eval_dataset"],
    (GRPOTrainer, "_get_train_sampler"): ["self", "dataset"],
    (GRPOTrainer, "_load_optimizer_and_scheduler"): ["self", "checkpoint"],
    (GRPOTrainer, "_set_signature_columns_if_needed"): ["self"],
    (GRPOTrainer, "get_eval_dataloader"): ["self", "eval_dataset"],
    (Trainer, "get_test_dataloader"): ["self", "test_dataset"],
    (Trainer, "set_initial_training_values"): ["self", "args", "dataloader"],
    (Trainer, "create_optimizer_and_scheduler"): ["self", "num_training_steps"],
    (GRPOTrainer, "_tokenize_prompts"): ["self", "prompts"],
    (Trainer, "get_batch_samples"): ["self", "epoch_iterator", "num_batches", "device"],
    (Trainer, "_get_num_items_in_batch"): ["self", "batch_samples", "device"],
    (Trainer, "training_step"): ["self", "model", "inputs", "num_items_in_batch"],
    (Trainer, "_load_from_checkpoint"): ["self", "resume_from_checkpoint", "model"],
    (Trainer, "_load_best_model"): ["self"],
    (Trainer, "_load_rng_state"): ["self", "checkpoint"],
    (Trainer, "_prepare_for_training"): ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
    (Trainer, "_push_from_checkpoint"): ["self", "checkpoint_folder"],
    (Trainer, "_save"): ["self", "output_dir", "state_dict"],
    (Trainer, "_save_rng_state"): ["self", "output_dir"],
    (Trainer, "evaluation_loop"): [
        "self",
        "dataloader",
        "description",
        "prediction_loss_only",
        "ignore_keys",
        "metric_key_prefix",
    ],
    (Trainer, "train"): ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    (Trainer, "_save_optimizer_and_scheduler"): ["self", "output_dir"],
    (Trainer, "init_hf_repo"): ["self", "token", "private"],
    (Trainer, "push_to_hub"): ["self", "commit_message", "blocking", "token", "revision", "private", "kwargs"],
    (Trainer, "save_model"): ["self", "output_dir", "_internal_call"],
    (GRPOTrainer, "create_model_card"): ["self", "model_name", "dataset_name", "tags"],
    (SFTTrainer, "compute_loss"): ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    (SFTTrainer, "_set_signature_columns_if_needed"): ["self"],
    (Trainer, "_save_checkpoint"): ["self", "model", "trial"],
    (Trainer, "_get_output_dir"): ["self", "trial"],
    (SFTTrainer, "_save_checkpoint"): ["self", "model", "trial"],
    (GRPOTrainer, "_save_checkpoint"): ["self", "model", "trial"],
    (DPOTrainer, "_save_checkpoint"): ["self", "model", "trial"],
    (SFTTrainer, "_prepare_dataset"): [
        "self",
        "dataset",
        "processing_class",
        "args",
        "packing",
        "formatting_func",
        "dataset_name",
    ],
    (Trainer, "_get_dataloader"): [
        "self",
        "dataset",
        "description",
        "batch_size",
        "sampler_fn",
        "is_training",
        "dataloader_key",
    ],
    (DPOTrainer, "evaluate"): ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
    (DPOTrainer, "predict"): ["self", "test_dataset", "ignore_keys", "metric_key_prefix"],
    (DPOTrainer, "_prepare_dataset"): ["self", "dataset", "processing_class", "args", "dataset_name"],
    (DPOTrainer, "_compute_loss"): ["self", "model", "inputs", "return_outputs"],
    (DPOTrainer, "_set_signature_columns_if_needed"): ["self"],
    (DPOTrainer, "train"): ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    (_compat.DataCollatorForLanguageModeling, "torch_call"): ["self", "examples"],
}


@pytest.mark.parametrize(("owner", "name"), OVERRIDDEN, ids=lambda value: getattr(value, "__name__", value))
def test_seam_keeps_its_signature(owner, name):
    method = getattr(owner, name, None)
    assert method is not None, (
        f"{owner.__name__}.{name} is gone. Find its successor and move the override in the trainers."
    )
    parameters = list(inspect.signature(method).parameters)
    assert parameters == OVERRIDDEN[owner, name], (
        f"{owner.__name__}.{name} now takes {parameters}. Read its new body, adapt the overrides in the trainers, then "
        "update this list and the range of trl in pyproject.toml."
    )


def test_log_probs_seam():
    parameters = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
    assert {"model", "input_ids", "attention_mask", "logits_to_keep"} <= set(parameters), (
        "GADTrainer._sft_loss calls _get_per_token_logps_and_entropies with these arguments. Adapt it."
    )


def test_what_a_callback_adds_to_an_evaluation_chooses_the_best_model(tmp_path):
    """`JudgeCallback` writes into the very dictionary that `on_evaluate` is handed."""
    source = inspect.getsource(Trainer.evaluate)
    handed = "self.callback_handler.on_evaluate(self.args, self.state, self.control, output.metrics)"
    assert handed in source and source.rstrip().endswith("return output.metrics"), (
        "Trainer.evaluate no longer returns the metrics that callbacks are handed. Read it, and adapt judging/callback.py."
    )
    source = inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert "metrics = self._evaluate(" in source and "_determine_best_metric(metrics=metrics" in source
    assert inspect.getsource(Trainer._evaluate).rstrip().endswith("return metrics")
    state, args = types.SimpleNamespace(best_metric=None), types.SimpleNamespace(metric_for_best_model="win_rate")
    args.greater_is_better, args.save_strategy, state.global_step = True, "no", 1
    trainer = types.SimpleNamespace(args=args, state=state)
    for value, is_best in ((float("nan"), False), (0.3, True), (float("nan"), False), (0.2, False)):
        assert Trainer._determine_best_metric(trainer, {"eval_win_rate": value}, None) == is_best, (
            "a missing score is none"
        )
    assert list(inspect.signature(Trainer.log).parameters) == ["self", "logs", "start_time"]


def test_what_a_finished_run_is_known_by():
    source = inspect.getsource(Trainer._inner_training_loop)
    values = source[: source.index(") = self.set_initial_training_values")].split()
    assert values[-1] == "max_steps,", (
        "ResumableRun._has_taken_all_steps takes the last of set_initial_training_values for the number of steps. Adapt it."
    )


def test_the_folder_of_a_checkpoint_and_the_file_that_is_written_last():
    source = inspect.getsource(Trainer._save_checkpoint)
    for line in (
        'checkpoint_folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"',
        "self._get_output_dir(trial=trial)",
        "TRAINER_STATE_NAME",
    ):
        assert line in source, (
            f"Trainer._save_checkpoint no longer has {line!r}. Adapt FinishedCheckpoints._save_checkpoint."
        )


def test_grpo_keeps_of_its_batch_what_gad_begins_anew_with():
    source = inspect.getsource(GRPOTrainer.__init__)
    for line in ("self._step = 0", "self._buffered_inputs = None", "self.beta = args.beta"):
        assert line in source, f"GRPOTrainer no longer sets {line!r}: read its new body, and adapt TwoStageGAD._begin."
    source = inspect.getsource(GRPOTrainer._generate)
    assert "return prompt_ids, completion_ids, tool_mask," in source, (
        "GADTrainer._generate takes the prompts from place 0 of this tuple and env_mask from place 2. Adapt it."
    )


def test_soft_target_seams():
    message = "SoftTargetTrainer counts on this. Read SFTTrainer.compute_loss and adapt soft_targets/trainer.py: "
    source = inspect.getsource(SFTTrainer.compute_loss)
    for part in ("num_items_in_batch", "average_tokens_across_devices", 'self._metrics[mode]["entropy"]'):
        assert part in source, message + part
    assert SFTTrainer.loss_is_scaled_for_ga is None, message + "loss_is_scaled_for_ga"
    assert {"input_ids", "labels"} <= set(inspect.getsource(SFTTrainer._set_signature_columns_if_needed).split('"'))


def test_rows_handed_in_are_prepared_by_the_seam_that_prepares_those_of_the_constructor():
    for trainer in (SFTTrainer, DPOTrainer):
        assert "self._prepare_dataset(" in inspect.getsource(trainer.evaluate), "Adapt proxy/trainer.py."
    for name in ("get_train_dataloader", "get_eval_dataloader", "get_test_dataloader"):
        assert "self._get_dataloader(" in inspect.getsource(getattr(Trainer, name)), "Adapt proxy/ and llkd/ trainers."


def test_the_adapter_that_dpo_takes_for_its_reference_is_ours():
    from trl_bbkd.host.reference import REFERENCE_ADAPTER

    assert f'"{REFERENCE_ADAPTER}" in ref_model_unwrapped.peft_config' in inspect.getsource(
        DPOTrainer._compute_loss
    ), "DPOTrainer finds its reference adapter under another name. Adapt trl_bbkd/host/reference.py."


def test_references_are_sharded_by_the_name_that_is_replaced():
    for trainer in (GRPOTrainer, DPOTrainer):
        assert "prepare_fsdp(self.ref_model, self.accelerator)" in inspect.getsource(trainer.__init__), (
            f"{trainer.__name__} shards its reference by another name. Adapt references_sharded_like_students."
        )


def test_what_a_trainer_that_is_made_anew_takes_over():
    source = inspect.getsource(Trainer.__init__)
    assert "self.callback_handler = CallbackHandler(" in source, "Adapt TrainedInRounds._make_anew."
    parameters = inspect.signature(CallbackHandler.__init__).parameters
    assert {"callbacks", "model", "optimizer", "lr_scheduler"} <= parameters.keys(), "Adapt TrainedInRounds._release."


@pytest.mark.parametrize("name", _compat.__all__)
def test_private_names_exist(name):
    assert callable(getattr(_compat, name))


def test_fused_head_scores_at_the_temperature_asked_for(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    _compat.add_fused_lm_head(model, temperature=0.5, outputs=("log_probs", "entropy"))
    installed = model.forward
    at_one = _compat.fused_forward(model, temperature=1.0)
    assert model.forward == installed, "fused_forward must leave the model as it was."

    ids = torch.tensor([[5, 6, 7, 8]])
    logits = model(ids).logits[:, :-1]
    for forward, temperature in ((installed, 0.5), (at_one, 1.0)):
        log_probs = forward(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        expected = (logits / temperature).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        torch.testing.assert_close(log_probs, expected)


def test_a_student_is_saved_whole_where_the_plugin_says_so():
    source = inspect.getsource(Trainer.save_model)
    assert '"FULL_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type)' in source, (
        "Trainer.save_model asks something else whether it writes a student. Adapt `whole_students`, or none is written."
    )


def test_trainers_upload_through_the_client_of_their_module():
    for method in (Trainer.push_to_hub, Trainer._push_from_checkpoint):
        uploads = inspect.getsource(method).count("hf_api().upload_folder(")
        assert uploads, f"{method.__name__} uploads in another way. Adapt `uploads_through`, or pickles reach the Hub."
    calls = []
    with _compat.uploads_through(lambda client, **kwargs: calls.append(kwargs)):
        transformers.trainer.hf_api().upload_folder(folder_path="x")
    assert calls == [{"folder_path": "x"}]
    assert "upload_folder" not in vars(transformers.trainer.hf_api())


def test_vllm_seams():
    source = inspect.getsource(GRPOTrainer)
    for line in (
        "self.vllm_generation = VLLMGeneration(",
        "if self.state.global_step != self._last_loaded_step:",
        'output["importance_sampling_ratio"] = vllm_importance_sampling_ratio',
    ):
        assert line in source, f"GRPOTrainer no longer has {line!r}: read its new body, and adapt gad/vllm.py."
    source = inspect.getsource(vllm_generation)
    for name in ("_dist", "_weight_metadata", "_llm_weights_sleeping", "model", "llm", "vllm_client"):
        assert f"self.{name} = " in source, f"VLLMGeneration has no {name} now. Adapt `vllm_with_weights_of`."
    asked = set(re.findall(r"self\._dist\.(\w+)", source))
    assert asked <= set(vars(_compat.WHOLE)), "VLLMGeneration asks its backend for more. Adapt `_compat.WHOLE`."
    assert {"prompts", "n", "temperature", "top_p", "max_tokens", "logprobs", "generation_kwargs"} <= set(
        inspect.signature(vllm_client.VLLMClient.generate).parameters
    ), "TRL's client takes other settings. Adapt evaluation/vllm.py."


def test_vllm_is_told_anew_what_the_weights_of_another_student_are():
    """A server reads as many bytes as it was told; afterwards the trainer's student is known again."""
    told = []
    generation = types.SimpleNamespace(model="student", _dist="sharded", _weight_metadata="told", mode="server")
    generation.sync_weights = lambda: told.append((generation.model, generation._dist, generation._weight_metadata))
    other = torch.nn.Linear(1, 1)
    with contextlib.suppress(KeyError), _compat.vllm_with_weights_of(other, generation):
        raise KeyError
    assert told == [(other, _compat.WHOLE, None)]
    assert (generation.model, generation._dist, generation._weight_metadata) == ("student", "sharded", "told")
