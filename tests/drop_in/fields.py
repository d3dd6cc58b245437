"""
What each field of TRL's configurations, and each argument of its trainers, does in ours.

`"acts"`: as in TRL. `"differs: how"`: it acts, otherwise. `"refused: why"`: one error that names it.
"""

from accelerate import ParallelismConfig


ACTS = "acts"
SCRIPTS = "differs: for scripts; the trainer does not read it, as in TRL"
SHARDING = "refused: use plain data parallelism (docs/multi_gpu.md)"
SHARDED = "differs: FSDP2, ZeRO-2 and ZeRO-3 shard what is trained; others are refused"
EVALUATION = "refused: agreement with the teacher, measured before and after every round, takes its place"
BEST = "refused: `alignment_patience` keeps the best proxy"
REFERENCE = "refused: the reference is the proxy as it was when the round began"
PUSHED = "refused: an aligned proxy is a step on the way; upload its folder yourself"
OTHER_LOSS = "refused: no loss of equation 6 has it"
LENGTHS = "refused: lengths are those of the tokens, and no other column is kept"
OF_STUDENT = "differs: the student's; the proxy has fields of its own (`proxy_*`)"

# TrainingArguments, which all have: what each trainer's own table does not name acts
TRAINING = (
    "activation_checkpointing activation_checkpointing_kwargs accelerator_config adam_beta1 adam_beta2 adam_epsilon "
    "auto_find_batch_size average_tokens_across_devices batch_eval_metrics bf16 bf16_full_eval data_seed "
    "dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers "
    "dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers "
    "ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed disable_tqdm do_eval "
    "do_predict do_train enable_jit_checkpoint eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start "
    "eval_steps eval_strategy eval_use_gather_object fp16 fp16_full_eval fsdp fsdp_config full_determinism "
    "gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs greater_is_better hub_always_push "
    "hub_model_id hub_private_repo hub_revision hub_strategy hub_token ignore_data_skip include_for_metrics "
    "include_num_input_tokens_seen label_names label_smoothing_factor learning_rate length_column_name "
    "liger_kernel_config load_best_model_at_end local_rank log_level log_level_replica log_on_each_node "
    "logging_first_step logging_nan_inf_filter logging_steps logging_strategy lr_scheduler_kwargs lr_scheduler_type "
    "max_grad_norm max_steps metric_for_best_model neftune_noise_alpha num_train_epochs optim optim_args "
    "optim_target_modules output_dir parallelism_config per_device_eval_batch_size per_device_train_batch_size "
    "prediction_loss_only project push_to_hub remove_unused_columns report_to restore_callback_states_from_checkpoint "
    "resume_from_checkpoint run_name save_on_each_node save_only_model save_steps save_strategy save_total_limit seed "
    "skip_memory_metrics tf32 torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps "
    "trackio_bucket_id trackio_space_id trackio_static_space_id train_sampling_strategy use_cache use_cpu "
    "use_liger_kernel warmup_steps weight_decay"
).split()
SCRIPT_FLAGS = dict.fromkeys(("do_train", "do_eval", "do_predict"), SCRIPTS)
RESUME = "differs: for recipes; in Python, train(resume_from_checkpoint=...)"

SOFT_TARGETS = {
    **dict.fromkeys(TRAINING, ACTS),
    **SCRIPT_FLAGS,
    # TrainingArguments
    "auto_find_batch_size": "differs: refused with selection='llkd', whose pools are a multiple of the batch",
    "learning_rate": OF_STUDENT,
    "lr_scheduler_type": OF_STUDENT,
    "num_train_epochs": OF_STUDENT,
    "max_steps": OF_STUDENT,
    "eval_strategy": "differs: the student's; the proxy is measured before and after its stages",
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), SHARDED),
    "parallelism_config": SHARDING,
    "fp16": "refused: gradients are made with the loss, before they could be scaled; use bf16",
    "label_smoothing_factor": "refused: the soft targets take its place",
    "length_column_name": LENGTHS,
    "liger_kernel_config": "refused: belongs to use_liger_kernel",
    "resume_from_checkpoint": "differs: a run that was stopped goes on by itself from its last finished checkpoint",
    "save_only_model": "refused: such checkpoints cannot be gone on from",
    "train_sampling_strategy": "differs: 'batch_rebalance' is refused with selection='llkd'",
    "use_liger_kernel": "refused: replaces the forward that the loss is computed in",
    # SFTConfig
    "model_init_kwargs": "differs: the student's; the proxy's are `proxy_model_init_kwargs`",
    "trust_remote_code": ACTS,
    "router_aux_loss_coef": "refused: a mixture of experts' auxiliary loss is not added; 0.0 says so",
    "chat_template_path": "differs: another tokenizer's template must not need tokens that the student lacks",
    "dataset_text_field": "refused: rows are `prompt` and `completion`",
    "dataset_kwargs": "refused: rows are always prepared here",
    "dataset_num_proc": "differs: where `max_length` cuts; answers are tokenised in one process",
    "eos_token": ACTS,
    "max_length": "differs: `None` by default (`max_completion_length` bounds answers); soft targets are cut with it",
    "truncation_mode": ACTS,
    "shuffle_dataset": ACTS,
    "packing": "refused: targets and weight of a row belong to one answer",
    "packing_strategy": "refused: belongs to packing",
    "padding_free": "refused: targets are looked up row by row",
    "pad_to_multiple_of": ACTS,
    "eval_packing": "refused: belongs to packing",
    "completion_only_loss": "refused: `False`; only an answer's tokens have targets",
    "assistant_only_loss": "refused: the loss is the one answer's already",
    "loss_type": "refused: the hard loss is the NLL",
    "activation_offloading": ACTS,
    "pad_token": ACTS,
}

ALIGNMENT = {
    **dict.fromkeys(TRAINING, ACTS),
    **SCRIPT_FLAGS,
    # TrainingArguments
    **dict.fromkeys(("num_train_epochs", "max_steps", "warmup_steps"), "differs: of one round"),
    **dict.fromkeys(("learning_rate", "lr_scheduler_type"), "differs: of one round; another default"),
    **dict.fromkeys(("save_steps", "save_total_limit"), "differs: within a round, whose checkpoints go when it ends"),
    **dict.fromkeys(
        (
            "batch_eval_metrics",
            "bf16_full_eval",
            "eval_accumulation_steps",
            "eval_delay",
            "eval_do_concat_batches",
            "eval_on_start",
            "eval_steps",
            "eval_strategy",
            "eval_use_gather_object",
            "fp16_full_eval",
            "include_for_metrics",
            "prediction_loss_only",
        ),
        EVALUATION,
    ),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), BEST),
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_model_id",
            "hub_private_repo",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
        ),
        PUSHED,
    ),
    "hub_token": "differs: nothing is pushed",
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), SHARDED),
    "parallelism_config": SHARDING,
    "label_smoothing_factor": OTHER_LOSS,
    "length_column_name": LENGTHS,
    "output_dir": "differs: holds the aligned proxy, and a folder for each round",
    "resume_from_checkpoint": "differs: an alignment that was stopped goes on by itself",
    "save_only_model": "refused: such checkpoints cannot be gone on from",
    "save_strategy": "differs: 'best' is refused; `alignment_patience` keeps the best proxy",
    # DPOConfig
    "model_init_kwargs": ACTS,
    "trust_remote_code": ACTS,
    "router_aux_loss_coef": ACTS,
    "disable_dropout": ACTS,
    "dataset_num_proc": "refused: rows are tokenised in one process",
    "max_length": "differs: `None` by default; rows whose prompt fills it are dropped, as in TRL",
    "truncation_mode": ACTS,
    "padding_free": ACTS,
    "pad_to_multiple_of": ACTS,
    "precompute_ref_log_probs": "refused: each round has samples and a reference of its own",
    "precompute_ref_batch_size": "refused: belongs to precompute_ref_log_probs",
    "loss_type": "refused: it is `['sigmoid', 'sft']`, equation 6",
    "loss_weights": "refused: they are `preference_weight` and `sft_weight`",
    "ld_alpha": ACTS,
    "f_divergence_type": ACTS,
    "f_alpha_divergence_coef": ACTS,
    "label_smoothing": OTHER_LOSS,
    "beta": ACTS,
    "train_sampling_strategy": "differs: 'random' or 'sequential'; others are refused, because a pair has no one length",
    "use_weighting": "refused: TRL cannot weigh the NLL of equation 3",
    "discopop_tau": OTHER_LOSS,
    "activation_offloading": ACTS,
    "sync_ref_model": REFERENCE,
    "ref_model_mixup_alpha": REFERENCE,
    "ref_model_sync_steps": REFERENCE,
    "pad_token": ACTS,
}

MEASURED = "refused: NLL and agreement with the teacher, measured before and after every round, take its place"
LAST = "refused: the student of the last round is kept"
AT_THE_END = "refused: the student goes to the Hub when all rounds are done"
OF_A_ROUND = "differs: of one round; the warm-up has `warmup_epochs` and `warmup_learning_rate`"

PREFERENCE = ALIGNMENT | {
    # TrainingArguments
    **dict.fromkeys([name for name, verdict in ALIGNMENT.items() if verdict == EVALUATION], MEASURED),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), LAST),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_token"), ACTS),
    **dict.fromkeys(("hub_strategy", "hub_always_push"), AT_THE_END),
    **dict.fromkeys(("num_train_epochs", "max_steps"), OF_A_ROUND),
    "learning_rate": "differs: of one round, 5e-7 by default; the warm-up has `warmup_learning_rate`",
    "lr_scheduler_type": "differs: of the warm-up and of each round; `cosine` by default",
    "warmup_steps": "differs: of the warm-up and of each round; a tenth of their steps by default",
    "output_dir": "differs: holds the student, and a folder for each round",
    "resume_from_checkpoint": "differs: a run that was stopped goes on by itself",
    "save_strategy": "differs: 'best' is refused; the student of the last round is kept",
    # DPOConfig
    "loss_type": "refused: it is `sigmoid`, and the NLL of the teacher's answers",
    "ref_model_mixup_alpha": "refused: the reference is the student as it was when the round began",
    "ref_model_sync_steps": "refused: the reference is the student as it was when the round began",
    "sync_ref_model": "refused: the reference is the student as it was when the round began",
    "label_smoothing": "refused: neither the preference loss nor the NLL has it",
    "label_smoothing_factor": "refused: neither the preference loss nor the NLL has it",
    "discopop_tau": "refused: belongs to another loss",
    "use_weighting": "refused: TRL cannot weigh the NLL of the teacher's answers",
}

CLASSIFIER = {
    **dict.fromkeys(TRAINING, ACTS),
    **SCRIPT_FLAGS,
    "auto_find_batch_size": "differs: refused with selection='llkd', whose pools are a multiple of the batch",
    "batch_eval_metrics": "differs: needs `compute_metrics` of your own",
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config"), "differs: FSDP2, ZeRO-2 and ZeRO-3 shard; others are refused"
    ),
    "learning_rate": "differs: 2e-5 by default",
    "logging_steps": "differs: 10 by default",
    "parallelism_config": "refused: pools are scored by the student as a whole",
    "per_device_train_batch_size": "differs: 32 by default; a pool is `pool_factor` times as many rows",
    "remove_unused_columns": "differs: `False` is refused where a column is no input of the student",
    "resume_from_checkpoint": RESUME,
    "train_sampling_strategy": "differs: 'batch_rebalance' is refused with selection='llkd'",
    "warmup_steps": "differs: a tenth of all steps by default",
}

# A value of each refused field
REFUSED_VALUES = {
    "assistant_only_loss": True,
    "batch_eval_metrics": True,
    "bf16_full_eval": True,
    "completion_only_loss": False,
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "dataset_num_proc": 2,
    "dataset_text_field": "content",
    "discopop_tau": 0.1,
    "eval_accumulation_steps": 2,
    "eval_delay": 2,
    "eval_do_concat_batches": False,
    "eval_on_start": True,
    "eval_packing": True,
    "eval_steps": 2,
    "eval_strategy": "epoch",
    "eval_use_gather_object": True,
    "fp16": True,
    "fp16_full_eval": True,
    "greater_is_better": True,
    "hub_always_push": True,
    "hub_model_id": "someone/proxy",
    "hub_private_repo": True,
    "hub_revision": "other",
    "hub_strategy": "end",
    "include_for_metrics": ["loss"],
    "label_smoothing": 0.1,
    "label_smoothing_factor": 0.1,
    "length_column_name": "size",
    "liger_kernel_config": {"rope": True},
    "load_best_model_at_end": True,
    "loss_type": "dft",
    "loss_weights": [0.5],
    "metric_for_best_model": "loss",
    "packing": True,
    "packing_strategy": "wrapped",
    "padding_free": True,
    "parallelism_config": ParallelismConfig(),
    "precompute_ref_batch_size": 2,
    "precompute_ref_log_probs": True,
    "prediction_loss_only": True,
    "push_to_hub": True,
    "ref_model_mixup_alpha": 0.5,
    "ref_model_sync_steps": 1,
    "router_aux_loss_coef": 0.1,
    "save_only_model": True,
    "sync_ref_model": True,
    "use_liger_kernel": True,
    "use_weighting": True,
}

PROXY_ARGUMENTS = {
    "model": "differs: a student that is frozen, has virtual tokens or is an adapter's path is refused",
    "args": "differs: second or third, beside `proxy_model`; TRL's configuration is refused",
    "data_collator": "refused: soft targets are looked up by our own",
    "train_dataset": "differs: a `Dataset` of prompts and the teacher's completions",
    "eval_dataset": "differs: one `Dataset` of prompts and the teacher's completions; `evaluate` takes several",
    "processing_class": "differs: a tokenizer; a processor is refused",
    "compute_loss_func": "refused: the loss is the method's",
    "compute_metrics": ACTS,
    "callbacks": ACTS,
    "optimizers": ACTS,
    "optimizer_cls_and_kwargs": ACTS,
    "preprocess_logits_for_metrics": ACTS,
    "quantization_config": ACTS,
    "peft_config": "differs: prompt learning is refused",
    "formatting_func": "refused: rows are `prompt` and `completion`",
}

ALIGNMENT_ARGUMENTS = {
    "model": "differs: a proxy that is frozen, has virtual tokens or is an adapter's path is refused",
    "ref_model": "refused: the reference is the proxy as it was when the round began",
    "args": "differs: second; TRL's configuration is refused",
    "data_collator": "refused: a round's pairs are collated as TRL does",
    "train_dataset": "differs: a `Dataset` of prompts and the teacher's completions; the proxy makes the rejected answers",
    "eval_dataset": "differs: a `Dataset` of prompts and the teacher's completions, to measure agreement on",
    "processing_class": "differs: a tokenizer; a processor is refused",
    "compute_metrics": "refused: agreement with the teacher takes its place",
    "callbacks": ACTS,
    "optimizers": "refused: each round has an optimizer of its own",
    "quantization_config": ACTS,
    "peft_config": "differs: prompt learning is refused",
}

PREFERENCE_ARGUMENTS = ALIGNMENT_ARGUMENTS | {
    "model": "differs: a student that is frozen, has virtual tokens or is an adapter's path is refused",
    "ref_model": "refused: the reference is the student as it was when the round began",
    "train_dataset": "differs: a `Dataset` of prompts and the teacher's completions; the student makes the answers to compare",
    "eval_dataset": "differs: a `Dataset` of prompts and the teacher's completions, of which the NLL is measured",
    "compute_metrics": "refused: NLL and agreement with the teacher take its place",
}

CLASSIFIER_ARGUMENTS = {
    "model": "differs: a classifier, or a path that gets a head; a frozen one and an adapter's path are refused",
    "args": "differs: an LLKDConfig; another one is refused",
    "data_collator": ACTS,
    "train_dataset": "differs: a `Dataset` with `label` and `teacher_confidence`",
    "eval_dataset": ACTS,
    "processing_class": "differs: a tokenizer; a processor is refused",
    "model_init": "refused: hand in `model`",
    "compute_loss_func": "refused: the loss is the weighted cross-entropy of the kept rows",
    "compute_metrics": "differs: accuracy and macro F1 by default",
    "callbacks": ACTS,
    "optimizers": ACTS,
    "optimizer_cls_and_kwargs": ACTS,
    "preprocess_logits_for_metrics": ACTS,
}
