# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-bbkd>=0.2,<0.3",
#     "trl>=1.16,<1.17",
# ]
# ///
"""
GAD in a script in TRL's manner. Beside a script for `GRPOTrainer` three things differ: the names `GADConfig` and `GADTrainer`, the
data, whose column `completion` holds the teacher's answers as for `SFTTrainer`, and `reward_funcs`, which are optional: the
discriminator is the reward.

In the small world of this repository, on a CPU core, without a network, in about a minute:

```bash
python examples/gad.py \
    --model_name_or_path recipes/tinyworld/student --dataset_name recipes/tinyworld --output_dir output/gad_script \
    --discriminator recipes/tinyworld/discriminator --discriminator_head likelihood --discriminator_only_steps 0 \
    --warmup_learning_rate 1e-2 --learning_rate 2e-3 --num_train_epochs 2 --max_steps 60 --max_completion_length 32 \
    --per_device_train_batch_size 64 --num_generations 8 --use_cpu true --bf16 false --report_to none
```

A real student as a LoRA adapter, meant for one GPU with 24 GB and not run by us:

```bash
accelerate launch examples/gad.py \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name teacher.jsonl --output_dir output/student \
    --use_peft true --lora_r 32 --lora_target_modules all-linear --discriminator shared --discriminator_head likelihood \
    --discriminator_learning_rate 1e-4 --learning_rate 1e-4 --num_train_epochs 2 --max_completion_length 512 \
    --per_device_train_batch_size 32 --gradient_accumulation_steps 4 --num_generations 8
```

The header above is for `uv run`, which makes an environment of its own, and for the Hub's jobs. There `--dataset_name` is a Hub id:

```bash
hf jobs uv run --flavor a10g-large --secrets HF_TOKEN examples/gad.py \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name me/teacher-answers --output_dir student \
    --use_peft true --lora_target_modules all-linear --discriminator shared --push_to_hub true --hub_model_id me/student
```

Before a release is on the package index, `uv run` finds the package in a wheel of this repository:

```bash
pip wheel --no-deps --wheel-dir dist . && uv run --find-links dist examples/gad.py --help
```
"""

from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from trl_bbkd import GADConfig, GADTrainer, load_teacher_data


def main(
    script_args: ScriptArguments,
    training_args: GADConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    train_rows, test_rows = load_teacher_data(script_args, dataset_args)
    trainer = GADTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_rows,
        eval_dataset=test_rows if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def make_parser() -> TrlParser:
    return TrlParser((ScriptArguments, GADConfig, ModelConfig, DatasetMixtureConfig))


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
