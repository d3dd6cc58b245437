"""
LLKD from the labels of an API, in a script in TRL's manner: a small classifier learns, at every step, from the rows of which the
teacher is sure and the classifier is not.

A row is a text and what the API said of it, in one of two forms:

```json
{"text": "Pain fell by half.", "label": "results", "teacher_confidence": 0.92}
{"text": "Pain fell by half.", "logprobs": {"results": -0.08, "methods": -2.5}}
```

Rows of the second form, without `label`, are labelled here, by `pseudo_label`. Test rows have the true label in `label`. Where there are
none, `--test_split_size 0.1` holds some of the training rows out, and the student is measured against the teacher's labels.

On the notes of this repository, on a CPU core, without a network, in half a minute:

```bash
python examples/llkd.py \
    --model_name_or_path recipes/tinytopics/student --dataset_name recipes/tinytopics --output_dir output/llkd_script \
    --labels travel food garden weather sea --max_length 16 --selection_warmup_steps 100 --num_train_epochs 16 \
    --learning_rate 2e-3 --use_cpu true --bf16 false --report_to none
```

A real student, meant for one GPU with 8 GB and not run by us:

```bash
accelerate launch examples/llkd.py \
    --model_name_or_path FacebookAI/roberta-base --dataset_name labelled.jsonl --test_split_size 0.1 \
    --labels background methods results --num_train_epochs 3 --output_dir output/student
```
"""

from dataclasses import dataclass, field

from datasets import ClassLabel, Dataset
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from trl_bbkd import LLKDConfig, LLKDTrainer, load_teacher_data, pseudo_label


@dataclass
class LLKDScriptArguments(ScriptArguments):
    """
    Script arguments for LLKD.

    Args:
        label_probs_column (`str`, *optional*, defaults to `"logprobs"`):
            Column with the API's probabilities or log-probabilities of the labels, for rows without `label`.
    """

    label_probs_column: str = field(
        default="logprobs",
        metadata={"help": "Column with the API's log-probabilities of the labels, for rows without `label`."},
    )


def with_labels(rows: Dataset, names: list[str], label_probs_column: str) -> Dataset:
    """Rows whose `label` is a number that knows its name."""
    if "label" not in rows.column_names:
        return pseudo_label(rows, labels=names, label_probs_column=label_probs_column)
    for column in ("label", "gold"):  # `gold`: the true label of a training row, where it is known
        if column in rows.column_names:
            rows = rows.cast_column(column, ClassLabel(names=names))
    return rows


def main(
    script_args: LLKDScriptArguments,
    training_args: LLKDConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    train_rows, test_rows = load_teacher_data(script_args, dataset_args, input_column=training_args.text_column)
    train_rows = with_labels(train_rows, training_args.labels, script_args.label_probs_column)
    if test_rows is not None:
        test_rows = with_labels(test_rows, training_args.labels, script_args.label_probs_column)
    trainer = LLKDTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_rows,
        eval_dataset=test_rows,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    if test_rows is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def make_parser() -> TrlParser:
    return TrlParser((LLKDScriptArguments, LLKDConfig, ModelConfig, DatasetMixtureConfig))


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
