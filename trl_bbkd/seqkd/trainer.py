"""SeqKD, the baseline of every run: supervised fine-tuning on the teacher's answers."""

from collections.abc import Callable
from dataclasses import dataclass, field

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..data.teacher_data import prompt_ids_of
from ..host._compat import keep_4bit_weights_differentiable
from ..host.sharding import check_sharding


CURVE_POINTS = 8
CURVE_PREFIX = "held_out/"

# Of the method's configuration, what SeqKD trains with as well.
SHARED_ARGUMENTS = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "data_seed",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "ddp_find_unused_parameters",
    "ddp_timeout",
    "deepspeed",
    "disable_tqdm",
    "fp16",
    "fsdp",
    "fsdp_config",
    "full_determinism",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "logging_steps",
    "model_init_kwargs",
    "optim",
    "optim_args",
    "seed",
    "tf32",
    "trust_remote_code",
    "use_cpu",
    "warmup_steps",
    "weight_decay",
)


class CurveCallback(TrainerCallback):
    """
    Measures the student a few times during training, into `state.log_history` of the main process.

    Kept there, the measurements are part of every checkpoint and survive a resume.

    Args:
        measure (`Callable[[PreTrainedModel], dict[str, float]]`):
            Measurement of a student, which every process takes part in and the main one gets.
        on_measured (`Callable[[PreTrainedModel, int, dict[str, float]], None]`, *optional*):
            Called with the student, the step and its metrics.
        points (`int`, *optional*, defaults to `8`):
            Number of measurements, evenly spaced; the last one is at the last step.
        at_end (`bool`, *optional*, defaults to `True`):
            Whether to make that last one.
    """

    def __init__(
        self, measure: Callable, on_measured: Callable | None = None, points: int = CURVE_POINTS, at_end: bool = True
    ):
        self.measure = measure
        self.on_measured = on_measured
        self.points = points
        self.at_end = at_end

    def on_step_end(self, args, state, control, model=None, **kwargs):
        steps = curve_steps(state.max_steps, self.points) - (set() if self.at_end else {state.max_steps})
        if state.global_step not in steps:
            return
        metrics = self.measure(model)
        if state.is_world_process_zero:
            state.log_history.append(
                {"step": state.global_step, **{CURVE_PREFIX + name: value for name, value in metrics.items()}}
            )
        if self.on_measured is not None:
            self.on_measured(model, state.global_step, metrics)
        PartialState().wait_for_everyone()


def curve_steps(max_steps: int, points: int = CURVE_POINTS) -> set[int]:
    """Steps at which the student is measured: at most `points` of them, `max_steps` included."""
    return {max(1, round(max_steps * point / points)) for point in range(1, points + 1)}


def curve(log_history: list[dict]) -> list[dict]:
    """The measurements in a log: `{"step": ..., metric: value}`."""
    return [
        {"step": entry["step"]}
        | {key.removeprefix(CURVE_PREFIX): value for key, value in entry.items() if key.startswith(CURVE_PREFIX)}
        for entry in log_history
        if any(key.startswith(CURVE_PREFIX) for key in entry)
    ]


@dataclass
class SeqKD:
    """What a baseline run was: the best checkpoint is on disk."""

    steps: int
    batch_size: int
    learning_rate: float
    best_step: int | None = None
    curve: list[dict] = field(default_factory=list)


def batch_shape(sequences_per_device_and_step: int, samples_per_prompt: int, largest_batch: int) -> tuple[int, int]:
    """
    Rows per device and accumulation steps with which SFT sees as many prompts a step as the method does.

    Args:
        sequences_per_device_and_step (`int`):
            The method's sequences per device and optimizer step.
        samples_per_prompt (`int`):
            Of them, samples of one prompt.
        largest_batch (`int`):
            Rows that fit on a device.
    """
    rows = max(1, round(sequences_per_device_and_step / samples_per_prompt))
    batch = max(size for size in range(1, min(rows, largest_batch) + 1) if rows % size == 0)
    return batch, rows // batch


def sft_rows(dataset, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict | None = None):
    """
    Teacher rows as SFT reads them: `input_ids` and `labels`, from the very tokens of `teacher_ids`.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `prompt` and `teacher_ids`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's tokenizer.
        chat_template_kwargs (`dict`, *optional*):
            Passed to `apply_chat_template`, for prompts that are not tokenised yet.
    """

    def build(batch):
        prompts = prompt_ids_of(tokenizer, batch, chat_template_kwargs)
        pairs = list(zip(prompts, batch["teacher_ids"], strict=True))
        return {
            "input_ids": [prompt + list(answer) for prompt, answer in pairs],
            "labels": [[-100] * len(prompt) + list(answer) for prompt, answer in pairs],
        }

    columns = dataset.column_names or list(next(iter(dataset)))
    description = {} if isinstance(dataset, IterableDataset) else {"desc": "Preparing rows"}
    return dataset.map(build, batched=True, remove_columns=columns, **description)


def train_seqkd(
    model: str | PreTrainedModel,
    args,
    dataset,
    tokenizer: PreTrainedTokenizerBase,
    measure: Callable[[PreTrainedModel], dict[str, float]],
    is_better: Callable[[dict, dict], bool],
    *,
    output_dir: str,
    max_steps: int,
    learning_rate: float,
    samples_per_prompt: int = 1,
    peft_config=None,
    quantization_config=None,
) -> SeqKD:
    """
    Fine-tune the student on the teacher's answers and leave its best checkpoint in `output_dir`.

    Args:
        model (`str` or [`~peft.PeftModel`]):
            The student's checkpoint, or an adapter on its base model.
        args ([`~trl.trainer.base_config._BaseConfig`]):
            The method's configuration. Optimizer and precision are taken from it, and there are as many prompts per
            optimizer step. Its schedule (linear to 0, after `warmup_steps`) and gradient clipping are the defaults of
            [`~trl.SFTConfig`].
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `prompt` and `teacher_ids`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's tokenizer.
        measure (`Callable`):
            Measurement of a student, made several times; it decides which checkpoint is the best.
        is_better (`Callable[[dict, dict], bool]`):
            Whether the first metrics are better than the second.
        output_dir (`str`):
            Folder of the best checkpoint.
        max_steps (`int`):
            Optimizer steps.
        learning_rate (`float`):
            Learning rate.
        samples_per_prompt (`int`, *optional*, defaults to `1`):
            How many of the method's sequences share a prompt.
        peft_config, quantization_config:
            As in [`~trl.SFTTrainer`].
    """
    shared = {name: getattr(args, name) for name in SHARED_ARGUMENTS}
    shared["learning_rate"] = learning_rate
    batch, accumulation = batch_shape(
        args.per_device_train_batch_size * args.gradient_accumulation_steps,
        samples_per_prompt,
        args.per_device_train_batch_size,
    )
    result = SeqKD(max_steps, batch * accumulation * args.world_size, shared["learning_rate"])
    best: dict[str, float] = {}

    def keep_the_best(student, step, metrics):
        # The main process has the metrics, and the weights may be in parts on all of them
        improves = [PartialState().is_main_process and (not best or is_better(metrics, best))]
        if not broadcast_object_list(improves)[0]:
            return
        best.clear()
        best.update(metrics)
        result.best_step = step
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if PartialState().is_main_process:
            student.save_pretrained(output_dir, state_dict=weights)
            tokenizer.save_pretrained(output_dir)

    sft_args = SFTConfig(
        output_dir=output_dir,
        max_steps=max_steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_length=None,
        report_to="none",
        save_strategy="no",
        **shared,
    )
    check_sharding(sft_args, quantization_config)
    trainer = SFTTrainer(
        model=model,
        args=sft_args,
        train_dataset=sft_rows(dataset, tokenizer, args.chat_template_kwargs),
        processing_class=tokenizer,
        callbacks=[CurveCallback(measure, keep_the_best)],
        peft_config=peft_config,
        quantization_config=quantization_config,
    )
    if trainer.accelerator.device.type == "cpu":
        keep_4bit_weights_differentiable(trainer.model)
    trainer.train()
    result.curve = curve(trainer.state.log_history)
    return result
