"""
SDFT as a baseline: TRL's own trainer (`trl.experimental.sdft`, arXiv 2601.19897), on a teacher's rows.

The student answers the prompts, and learns on its answers what a model that is shown the teacher's answer would have said, token by
token. That model is the student as it began (`teacher_model_kind="base"`, TRL's default), or `"ema"` or `"live"`.

Whether a model makes something of the answer that it is shown can be asked of it: its nats a token for that very answer, without it,
with it in `SOLVED`, and with it in TRL's template. stories260K, 24 rows: 1.22, 1.17, 1.39. The small world's student of the recipes, 64
rows: 0.51, 2.61, 3.15. It has read one text at a time, and is at a loss in a context of two.
"""

from pathlib import Path

from datasets import Dataset
from trl.experimental.sdft import SDFTConfig, SDFTTrainer


# A prompt that is answered, and the prompt again. TRL's own template puts the answer behind the prompt, from where a model without
# a chat template goes on: behind the end of a text
SOLVED = "{prompt}{privileged_context}\n\n{prompt}"


def privileged_rows(rows: Dataset, tokenizer) -> Dataset:
    """
    `prompt` and `privileged_context`, the teacher's answer as other methods learn it: cut where they cut it, and without
    the token that ends it.

    Raises:
        ValueError: TRL would read other tokens of a prompt than other methods do, or the prompt is not a text.
    """

    def shown(row: dict) -> dict:
        prompt, ids = row["prompt"], list(row["prompt_ids"])
        if not isinstance(prompt, str):
            raise ValueError("SDFT's template is for prompts that are texts; these are lists of messages.")
        if tokenizer(text=prompt)["input_ids"] != ids:
            raise ValueError(
                f"SDFTTrainer would read other tokens of this prompt than stand in `prompt_ids`: {prompt!r}"
            )
        before, whole = (
            tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (ids, ids + list(row["teacher_ids"]))
        )
        return {"prompt": prompt, "privileged_context": whole[len(before) :]}

    return Dataset.from_list([shown(row) for row in rows])


def train_sdft(start: Path, folder: Path, rows: Dataset, tokenizer, **config) -> list[dict]:
    """
    Train a student by SDFT and save it.

    Shown answer, prompt and sample together may be longer than what the model was trained on, which nothing refuses.

    Args:
        start (`Path`):
            Folder of the student that it begins from, which is also the model that is shown the answer.
        folder (`Path`):
            Where the student is saved.
        rows ([`~datasets.Dataset`]):
            Tokenised teacher rows: `prompt`, a text, `prompt_ids` and `teacher_ids`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's.
        config:
            Fields of TRL's `SDFTConfig`, such as `max_steps`, `num_generations`, `distillation_alpha`. Here
            `teacher_prompt_template` is [`SOLVED`] and `max_prompt_length` `None`, if they are not given.

    Returns:
        `list[dict]`: what was logged.
    """
    defaults = {
        "teacher_prompt_template": SOLVED,
        "max_prompt_length": None,
        "model_init_kwargs": {"dtype": "float32"},
    }
    trainer = SDFTTrainer(
        model=str(start),
        args=SDFTConfig(str(folder), **defaults | config),
        train_dataset=privileged_rows(rows, tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder))
    return trainer.state.log_history
