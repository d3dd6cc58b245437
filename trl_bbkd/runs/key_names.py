"""What a key is called here that other programs call otherwise. Imports nothing."""

import difflib
from collections.abc import Collection, Mapping, Sequence


MODEL, DATA, OUTPUT = ("model_name_or_path",), ("dataset_name",), ("output_dir",)
LENGTH = ("max_completion_length", "max_length")
BATCH, EVAL_BATCH = ("per_device_train_batch_size",), ("per_device_eval_batch_size",)
# By the name elsewhere, in plain small letters; the first that a method has is meant
NAMES_HERE = {
    **dict.fromkeys(
        ("model", "model_name", "model_path", "model_id", "base_model", "student", "student_model"), MODEL
    ),
    **dict.fromkeys(("pretrained_model_name_or_path", "student_model_name_or_path", "checkpoint"), MODEL),
    **dict.fromkeys(("data", "dataset", "dataset_path", "data_path", "datafile", "data_file", "train_data"), DATA),
    **dict.fromkeys(("rows", "train_file", "train_files", "training_data", "train_dataset", "corpus"), DATA),
    **dict.fromkeys(("data_files", "data_dir"), DATA),
    **dict.fromkeys(("output", "out", "out_dir", "output_path", "outdir", "save_dir", "save_path"), OUTPUT),
    **dict.fromkeys(("teacher", "teacher_model", "teacher_model_name_or_path"), ("teacher_name",)),
    **dict.fromkeys(("proxy", "proxy_model_name_or_path"), ("proxy_model",)),
    **dict.fromkeys(("judge", "metric", "metrics"), ("sample_metrics",)),
    **dict.fromkeys(("reward_model", "discriminator_model"), ("discriminator",)),
    **dict.fromkeys(("lr", "student_lr", "student_learning_rate"), ("learning_rate",)),
    **dict.fromkeys(("d_lr", "discriminator_lr", "reward_lr"), ("discriminator_learning_rate",)),
    **dict.fromkeys(("lr_scheduler", "scheduler", "lr_schedule"), ("lr_scheduler_type",)),
    **dict.fromkeys(
        ("epochs", "epoch", "num_epochs", "n_epochs", "max_epochs", "train_epochs"), ("num_train_epochs",)
    ),
    **dict.fromkeys(
        ("steps", "num_steps", "total_steps", "train_steps", "training_steps", "iterations"), ("max_steps",)
    ),
    **dict.fromkeys(("batch_size", "batch", "train_batch_size", "micro_batch_size", "mini_batch_size"), BATCH),
    **dict.fromkeys(("eval_batch_size", "test_batch_size"), EVAL_BATCH),
    **dict.fromkeys(("grad_accum", "gradient_accumulation", "accumulation_steps"), ("gradient_accumulation_steps",)),
    **dict.fromkeys(("grad_accum_steps", "accumulate_grad_batches"), ("gradient_accumulation_steps",)),
    **dict.fromkeys(("max_tokens", "max_new_tokens", "max_output_length", "completion_length"), LENGTH),
    **dict.fromkeys(("max_seq_length", "max_seq_len", "seq_length", "sequence_length", "cutoff_len"), LENGTH[::-1]),
    **dict.fromkeys(("max_input_length", "prompt_length"), ("max_prompt_length", "max_length")),
    **dict.fromkeys(("num_samples", "n_samples", "group_size", "rollouts", "n"), ("num_generations",)),
    **dict.fromkeys(("kl_coef", "kl_coeff", "kl_penalty", "init_kl_coef"), ("beta", "kl_weight")),
    **dict.fromkeys(("temp", "sampling_temperature"), ("temperature", "sample_temperature")),
    **dict.fromkeys(("lora", "use_lora", "peft", "adapter"), ("use_peft",)),
    **dict.fromkeys(("lora_rank", "rank"), ("lora_r",)),
    **dict.fromkeys(("load_4bit", "use_4bit", "qlora"), ("load_in_4bit",)),
    **dict.fromkeys(("precision", "torch_dtype"), ("dtype",)),
    **dict.fromkeys(("optimizer",), ("optim",)),
    **dict.fromkeys(("grad_clip", "clip_grad", "gradient_clipping", "max_norm"), ("max_grad_norm",)),
    **dict.fromkeys(("warmup",), ("warmup_steps",)),
    **dict.fromkeys(("label_names", "classes", "class_names"), ("labels",)),
    **dict.fromkeys(("logger", "tracker", "wandb", "log_with"), ("report_to",)),
    **dict.fromkeys(("resume", "resume_from"), ("resume_from_checkpoint",)),
    **dict.fromkeys(("vllm",), ("use_vllm",)),
    **dict.fromkeys(("random_seed",), ("seed",)),
    **dict.fromkeys(("split", "train_split"), ("dataset_train_split",)),
    **dict.fromkeys(("test_split", "eval_split"), ("dataset_test_split",)),
}
# Heads of sections in recipes of other programs; a recipe of ours has no sections
SECTIONS = {
    "args",
    "config",
    "distillation",
    "evaluation",
    "generation",
    "train",
    "trainer",
    "training",
    "training_args",
}
# Keys of other methods, by what to do in one that has no such key
REMEDIES = {
    "chat_template_path": "the student's tokenizer is taken as it is. Give it another template (tokenizer.chat_template = ...), "
    "save it beside the student with save_pretrained, and name that folder in model_name_or_path.",
    "eos_token": "the student's tokenizer is taken as it is. Set tokenizer.eos_token, save it beside the student with "
    "save_pretrained, and name that folder in model_name_or_path.",
}


def nearest(name: str, known: Collection[str], elsewhere: Mapping[str, Sequence[str]] = NAMES_HERE) -> str:
    """The end of an error message about `name`: what the known names have in its place, or the nearest one, if one is near."""
    plain = name.lstrip("-").replace("-", "_").lower()
    dashes = "--" if name.startswith("--") else ""
    if plain in REMEDIES:
        return f": {REMEDIES[plain]}"
    if plain in SECTIONS:
        return "."
    here = next((dashes + key for key in elsewhere.get(plain, ()) if dashes + key in known), None)
    match = [here] if here else difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else "."
