"""
Proxy-KD in a script in TRL's manner. Beside a script for `SFTTrainer` the names `ProxyKDConfig` and `ProxyKDTrainer` differ, and
`--proxy_model` is new: a larger open model with the student's tokenizer. One call to `train` warms the proxy up on some of the
rows, aligns it to the teacher's answers, keeps its soft targets on disk, and distils. A second call of the same command goes on at
the first stage that is not finished.

In the small world of this repository, on a CPU core, without a network, in about a minute:

```bash
python examples/proxykd.py \
    --model_name_or_path recipes/tinyworld/student --proxy_model recipes/tinyworld/proxy \
    --dataset_name recipes/tinyworld --output_dir output/proxykd_script --max_completion_length 32 \
    --proxy_warmup_epochs 6 --proxy_learning_rate 2e-3 --proxy_per_device_train_batch_size 32 \
    --alignment_rounds 4 --alignment_epochs 2 --alignment_learning_rate 1e-3 --preference_weight 0.2 --kl_weight 10 \
    --max_steps 250 --learning_rate 1.2e-2 --lr_scheduler_type linear --per_device_train_batch_size 64 \
    --use_cpu true --bf16 false --report_to none
```

A real student, with a proxy trained as an adapter, meant for one GPU with 48 GB and not run by us:

```bash
accelerate launch examples/proxykd.py \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --proxy_model Qwen/Qwen2.5-7B-Instruct \
    --proxy_lora_kwargs '{"r": 32, "target_modules": "all-linear"}' --proxy_learning_rate 1e-4 \
    --proxy_model_init_kwargs '{"dtype": "bfloat16"}' --dataset_name teacher.jsonl --output_dir output/student \
    --max_completion_length 512 --per_device_train_batch_size 8 --gradient_accumulation_steps 8
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

from trl_bbkd import ProxyKDConfig, ProxyKDTrainer, load_teacher_data


def main(
    script_args: ScriptArguments,
    training_args: ProxyKDConfig,
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
    trainer = ProxyKDTrainer(
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
    return TrlParser((ScriptArguments, ProxyKDConfig, ModelConfig, DatasetMixtureConfig))


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
