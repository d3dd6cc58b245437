import copy
import json
import shutil
import time
from importlib.util import find_spec
from pathlib import Path

from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
)

from ..data.teacher_data import tokenize_as_configured
from ..errors import StageError, TeacherDataError
from ..host._compat import print_prompt_completions_sample
from ..host.model_files import save_model
from ..host.model_paths import refuse_adapter_path
from ..host.preflight import (
    refuse_broken_weights,
    refuse_frozen,
    refuse_frozen_adapter,
    refuse_no_steps,
    refuse_too_few_rows,
    require_tokenizer,
)
from ..host.resume import differences, last_finished_checkpoint
from ..soft_targets.caching import rows_fingerprint
from ..soft_targets.rows import soft_target_rows
from .config import PreferenceRoundsConfig
from .model import TrainedInRounds, check_model
from .pairs import teacher_over_sample
from .rounds import RoundsOnDisk
from .sampling import ModelSampler, VLLMSampler, sample_completions


SAMPLES_FOLDER, SAMPLER_FOLDER = "samples", "sampler"
SAME_WHEN_RESUMED = (
    "seed",
    "num_rounds",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "beta",
    "preference_weight",
    "sft_weight",
    "max_completion_length",
    "sample_temperature",
    "sample_top_p",
    "sample_batch_size",
    "lr_scheduler_type",
)


class PreferenceRoundsTrainer(TrainedInRounds):
    r"""
    What trainers share that prefer the teacher's answers over a model's own, round by round.

    The rows are cut into `num_rounds` shards. In each round the model answers the prompts of its shard, and DPO prefers
    the teacher's answers over these samples, together with the NLL of the teacher's answers. The reference of a round is
    the model as it was when the round began.

    `train` goes through all rounds. In `output_dir` it leaves the model, a file with what was measured before and after
    every round, and a folder a round with its samples. A run that was stopped goes on by itself, from the last
    checkpoint of its round, with the samples it had.

    A method names the model's role and the training, and says what is measured and, where rows differ, by what a round
    is better than another.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, as in [`~trl.DPOTrainer`].
        args ([`~config.PreferenceRoundsConfig`]):
            Configuration.
        train_dataset ([`~datasets.Dataset`]):
            Teacher text in TRL's prompt-completion format: `completion` is the teacher's answer to `prompt`.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Held-out teacher text in the same format, on which the model is measured.
        processing_class, callbacks, quantization_config, peft_config:
            As in [`~trl.DPOTrainer`].

    Raises:
        TeacherDataError: If the teacher text breaks the contract, or there are fewer rows than rounds.
        ValueError: If the run is to be sharded in a way that cannot work (see [`~host.sharding.check_sharding`]), or with a
            model in memory; if `output_dir` holds another run.
    """

    _role: str  # what the model is, also the name of its folders: "proxy"
    _training_name: str  # what the training is, also the name of its file and its metrics: "alignment"
    _same_when_resumed: tuple[str, ...] = SAME_WHEN_RESUMED
    _best_by: str  # the measurement by which a round is better than another, where `_patience` is set

    args: PreferenceRoundsConfig
    control: TrainerControl

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: PreferenceRoundsConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        args = copy.copy(args)
        check_model(model, args, quantization_config, self._role)
        self._refuse_other_than_dataset("train_dataset", train_dataset)
        if eval_dataset is not None:
            self._refuse_other_than_dataset("eval_dataset", eval_dataset)
        if args.use_vllm and find_spec("vllm") is None:
            raise ValueError("use_vllm=True needs vLLM: pip install 'trl-bbkd[vllm]'.")
        refuse_adapter_path(model, self._role)
        refuse_broken_weights(model, self._role)
        refuse_frozen_adapter(peft_config, self._role)
        if not isinstance(model, str) and peft_config is None:
            refuse_frozen(model, self._role)
        if processing_class is None:
            path = model if isinstance(model, str) else model.config._name_or_path
            processing_class = AutoTokenizer.from_pretrained(
                path, padding_side="left", trust_remote_code=args.trust_remote_code
            )
        require_tokenizer(processing_class, type(self).__name__)
        rows = _with_room(tokenize_as_configured(train_dataset, processing_class, args)[0], args)
        if len(rows) < args.num_rounds:
            raise TeacherDataError(
                f"Round {len(rows) + 1} of {args.num_rounds} has an empty shard: there are only {len(rows)} rows to train "
                f"on. Set the number of rounds to {len(rows)} at most, or give more rows."
            )
        if args.dataloader_drop_last:
            refuse_too_few_rows(
                len(rows) // args.num_rounds,
                args.per_device_train_batch_size * args.world_size,
                "rows of a round",
                "lower num_rounds or per_device_train_batch_size, or set dataloader_drop_last to False",
            )
        self._teacher_rows = rows
        self._held_out = self._rows_to_measure(eval_dataset, processing_class, args)
        super().__init__(
            model,
            args,
            rows,
            RoundsOnDisk(args.output_dir, self._training_name, self._role),
            processing_class,
            callbacks,
            quantization_config,
            peft_config,
        )
        # For callbacks that generate from its prompts
        self.eval_dataset = eval_dataset
        self.rounds: list[dict] = []
        self._run: dict | None = None

    def _refuse_other_than_dataset(self, name: str, dataset) -> None:
        if not isinstance(dataset, Dataset):
            kind = "a stream: turn streaming off" if isinstance(dataset, IterableDataset) else type(dataset).__name__
            raise TeacherDataError(
                f"{name} is {'missing' if dataset is None else kind}; {type(self).__name__} needs one `Dataset` of prompts and "
                "the teacher's completions."
            )

    def _rows_to_measure(self, dataset: Dataset | None, tokenizer, args) -> list[dict] | None:
        if dataset is None:
            return None
        held_out, _ = tokenize_as_configured(dataset, tokenizer, args, held_out=True)
        return soft_target_rows(held_out, tokenizer, args.chat_template_kwargs).to_list()

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        # Rows get their token ids when their round begins: a sample's own, not those of its text
        return dataset

    # What a method says

    def _measured(self, rows: list[dict]) -> dict[str, float]:
        """What is measured before and after every round, on held-out rows with `input_ids` and `labels`."""
        raise NotImplementedError

    @property
    def _patience(self) -> int | None:
        """Rounds without a better one after which no other is begun; `None` goes through all, and keeps the last."""
        return None

    def _pairs(self, shard: Dataset, folder: Path, number: int) -> Dataset:
        """The pairs of round `number`: `prompt_ids`, `chosen_ids` and `rejected_ids`."""
        if self.args.preference_weight > 0:
            samples = self._sample(shard, folder, number)
        else:
            samples = list(shard["teacher_ids"])  # without a preference there is nothing to sample
        return teacher_over_sample(shard, samples)

    @property
    def _learns_first(self) -> bool:
        """Whether `_before_first_round` trains the model."""
        return False

    def _before_first_round(self) -> list[dict]:
        """What a method does before the first round; the log of what it trains comes back."""
        return []

    # Rounds

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Train all rounds that are not finished yet.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Ignored: a run in `output_dir` goes on by itself.

        Raises:
            ValueError: `output_dir` holds such a training of another model, or with other rows or settings.
        """
        self.rounds = self._disk.finished()
        # The model in memory has learned since, and goes on from a round on disk
        of_the_handed_in = 0 if self._learns_first else 1
        has_learned = len(self.rounds) > of_the_handed_in or self._is_sharded
        if self._run is None or not has_learned:
            self._check_run()
        if self.rounds:
            self._round = self.rounds[-1]["round"]
        if len(self.rounds) > of_the_handed_in:
            self._go_back(len(self.rounds) - 1, self._teacher_rows)
        if not self.rounds:
            started = time.perf_counter() if self._learns_first else None
            self._end_round(0, self._before_first_round(), started)
        for number in range(len(self.rounds), self.args.num_rounds + 1):
            if self._has_converged():
                break
            started = time.perf_counter()
            self._begin_round(number)
            self._end_round(number, self._train_on_rows(f"Round {number}", *args, **kwargs), started)
        self.args.output_dir = str(self._disk.output_dir)
        if self.best_round != self.rounds[-1]["round"]:
            self._go_back(self.best_round, self._teacher_rows)
        self._write(self._disk.output_dir)

    def _train_on_rows(self, name: str, *args, **kwargs) -> list[dict]:
        """Train on `train_dataset` in `args.output_dir`, from its last checkpoint if there is one. The log comes back."""
        checkpoint = last_finished_checkpoint(self.args.output_dir)
        super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
        refuse_no_steps(self.state.global_step, name)
        return self.state.log_history

    @property
    def best_round(self) -> int:
        """The round whose model is kept: the last one, or with patience the one that measured best."""
        if self._patience is None:
            return self.rounds[-1]["round"]
        return max(self.rounds, key=lambda entry: entry[self._best_by])["round"]

    def _has_converged(self) -> bool:
        return self._patience is not None and self.rounds[-1]["round"] - self.best_round >= self._patience

    def _begin_round(self, number: int) -> None:
        folder = self._disk.folder(number)
        self.args.output_dir = str(folder)
        shard = self._teacher_rows.shard(self.args.num_rounds, number - 1, contiguous=True)
        self._begin(number, lambda: self._pairs(shard, folder, number))

    def _sample(self, shard: Dataset, folder: Path, number: int) -> list[list[int]]:
        rows = shard.select_columns(["prompt", "completion", "prompt_ids"]).to_list()
        settings = {
            "max_new_tokens": self.args.max_completion_length,
            "temperature": self.args.sample_temperature,
            "top_p": self.args.sample_top_p,
        }
        sampler: ModelSampler | VLLMSampler
        # Far apart, so that no two files of a run have the same seed
        seed = (self.args.seed * 1000 + number) * 1_000_000
        with self._whole() as model:
            if self.args.use_vllm:
                sampler = self._vllm_sampler(model, folder / SAMPLER_FOLDER, settings)
            else:
                settings["batch_size"] = self.args.sample_batch_size
                sampler = ModelSampler(model, self.processing_class, **settings)
            # The model's own mixed precision comes with its first training: every round is to sample alike
            with self.accelerator.autocast():
                ids = sample_completions(
                    folder / SAMPLES_FOLDER, rows, sampler, self.args.sample_batch_size, seed, self._role
                )
            del sampler, model  # and with them the memory of vLLM
        shutil.rmtree(folder / SAMPLER_FOLDER, ignore_errors=True)
        if self.args.log_completions and self.accelerator.is_main_process:
            self._print_samples(rows, ids, number)
        return ids

    def _vllm_sampler(self, model: PreTrainedModel | PeftModel, folder: Path, settings: dict) -> VLLMSampler:
        """A sampler of the model, which vLLM reads from disk."""
        if self.accelerator.is_main_process:
            save_model(model, self.processing_class, folder)
        self.accelerator.wait_for_everyone()
        base, adapter = str(folder), None
        if isinstance(model, PeftModel):
            base, adapter = model.peft_config["default"].base_model_name_or_path, str(folder)
        return VLLMSampler(base, self.processing_class, adapter=adapter, vllm_kwargs=self.args.vllm_kwargs, **settings)

    def _print_samples(self, rows: list[dict], ids: list[list[int]], number: int) -> None:
        shown = slice(None, self.args.num_completions_to_print)
        print_prompt_completions_sample(
            [row["prompt"] for row in rows[shown]],
            self.processing_class.batch_decode(ids[shown]),
            {},
            None,
            number,
            extra={"teacher": [row["completion"] for row in rows[shown]]},
        )

    # What is kept on disk

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Measure the model, as before and after every round.

        Args:
            eval_dataset ([`~datasets.Dataset`], *optional*):
                Held-out teacher text; by default that of the constructor.
            ignore_keys:
                Ignored: there are no predictions.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`):
                What the names of the metrics begin with.

        Returns:
            `dict[str, float]`: what was measured.
        """
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        self._refuse_other_than_dataset("eval_dataset", eval_dataset)
        rows = self._rows_to_measure(eval_dataset, self.processing_class, self.args)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._measure(rows).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        raise ValueError(
            "predict is not possible here: teacher text has no rejected answers to score. `evaluate` measures what "
            "is measured before and after every round."
        )

    def _measure(self, rows: list[dict] | None = None) -> dict[str, float]:
        rows = self._held_out if rows is None else rows
        return {} if rows is None else self._measured(rows)

    def _end_round(self, number: int, log: list[dict], started: float | None = None) -> None:
        # The first one is gone back to where no round is better
        if number > 0 or self._patience is not None or self._learns_first or self._is_sharded:
            self._keep(number)
        metrics = self._measure()
        self._finish_round(number, metrics, log, 0.0 if started is None else time.perf_counter() - started)

    def _finish_round(self, number: int, metrics: dict[str, float], log: list[dict], seconds: float) -> None:
        entry = {"round": number, **metrics, "seconds": seconds}
        self.rounds.append(entry)
        if self.args.should_save:
            self._disk.finish(self._run, self.rounds, log)
            self._disk.clear(number, self.best_round)
        self.accelerator.wait_for_everyone()
        if metrics:
            values = {**metrics, "round": number}
            self.log({f"{self._training_name}/{name}": value for name, value in values.items()})

    @property
    def log_history(self) -> list[dict]:
        """The logs of all finished rounds, as one: steps are counted through."""
        return self._disk.log_history(self.rounds)

    def _check_run(self) -> None:
        keys = soft_target_rows(self._teacher_rows, self.processing_class, self.args.chat_template_kwargs)["row_key"]
        self._run = {
            self._role: self._fingerprint(),
            "rows": rows_fingerprint(keys),
            "num_processes": self.accelerator.num_processes,
            "adapter": self._adapter(),
            "sharded by": self.accelerator.distributed_type.value if self._is_sharded else None,
            **{name: getattr(self.args, name) for name in self._same_when_resumed},
        }
        found = self._disk.run()
        differing = differences(found, self._run) if found is not None else ""
        if differing:
            raise StageError(
                f"{self._disk.output_dir} holds another {self._training_name} ({differing}). Choose another output_dir or delete "
                "it."
            )

    def _adapter(self) -> str | None:
        if not isinstance(self.model, PeftModel):
            return None
        config = self.model.peft_config["default"].to_dict()
        return json.dumps({key: config.get(key) for key in ("peft_type", "r", "lora_alpha", "use_dora")}, default=str)


def _with_room(rows: Dataset, args: PreferenceRoundsConfig) -> Dataset:
    """Without rows whose prompt alone fills `max_length`, which TRL drops when it prepares rows."""
    if args.max_length is None or args.truncation_mode != "keep_start":
        return rows
    kept = [index for index, ids in enumerate(rows["prompt_ids"]) if len(ids) < args.max_length]
    if not kept:
        raise TeacherDataError(f"max_length={args.max_length} cuts off every answer. Raise it, or leave it out.")
    return rows.select(kept) if len(kept) < len(rows) else rows
