import copy
import json
import os
import shutil
import time
from pathlib import Path
from typing import NoReturn

from accelerate.utils import set_seed
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
from trl import DPOTrainer

from ..data.teacher_data import is_tokenized, tokenize_teacher_data
from ..errors import StageError, TeacherDataError
from ..host._compat import keep_4bit_weights_differentiable, keep_precision, print_prompt_completions_sample
from ..host.model_paths import refuse_adapter_path
from ..host.preflight import (
    refuse_frozen,
    refuse_frozen_adapter,
    refuse_no_steps,
    refuse_prompt_learning,
    refuse_too_few_rows,
    require_config,
    require_tokenizer,
)
from ..host.reference import add_reference_adapter, copy_adapter_to_reference
from ..host.resume import differences, last_finished_checkpoint
from ..host.sharding import refuse_sharding
from ..proxy.agreement import teacher_agreement
from ..proxy.checks import NO_VIRTUAL_TOKENS
from ..proxy.model import adapter_of, load_weights, save_proxy
from ..soft_targets.caching import model_fingerprint, rows_fingerprint
from ..soft_targets.head import check_head
from ..soft_targets.rows import soft_target_rows
from .alignment_config import ProxyAlignmentConfig
from .sampling import ModelSampler, VLLMSampler, sample_completions


RUN_FILE, ROUND_FILE = "alignment.json", "round.json"
SAMPLES_FOLDER, PROXY_FOLDER, SAMPLER_FOLDER = "samples", "proxy", "sampler"
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
    "alignment_patience",
)


class ProxyAlignmentTrainer(DPOTrainer):
    r"""
    Trainer that aligns an open proxy to a teacher of which only the text is known: the alignment stage of Proxy-KD
    ([arXiv 2401.07013](https://huggingface.co/papers/2401.07013), equations 3 to 6).

    The rows are cut into `num_rounds` shards. In each round the proxy answers the prompts of its shard, and DPO
    prefers the teacher's answers over these samples, together with the NLL of the teacher's answers. The reference of
    a round is the proxy as it was when the round began.

    `train` goes through all rounds. In `output_dir` it leaves the aligned proxy, `alignment.json` with what was
    measured before and after every round, and a folder a round with its samples. A run that was stopped goes on by
    itself, from the last checkpoint of its round, with the samples it had.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The proxy, as in [`~trl.DPOTrainer`].
        args ([`ProxyAlignmentConfig`], *optional*):
            Configuration. If `None`, the defaults are used.
        train_dataset ([`~datasets.Dataset`]):
            Teacher text in TRL's prompt-completion format: `completion` is the teacher's answer to `prompt`.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Held-out teacher text in the same format, on which agreement with the teacher is measured.
        processing_class, callbacks, quantization_config, peft_config:
            As in [`~trl.DPOTrainer`].

    Raises:
        TeacherDataError: If the teacher text breaks the contract, or there are fewer rows than rounds.
        ValueError: Under DeepSpeed or FSDP; if `alignment_patience` has nothing to measure on; if `output_dir` holds
            another run.
    """

    _tag_names = ["trl", "trl-bbkd", "proxykd"]
    _name = "Proxy alignment"

    args: ProxyAlignmentConfig
    control: TrainerControl

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: ProxyAlignmentConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        self._proxy_path = model if isinstance(model, str) else model.config._name_or_path
        if args is None:
            args = ProxyAlignmentConfig(f"{self._proxy_path.split('/')[-1]}-aligned")
        require_config(args, ProxyAlignmentConfig, type(self).__name__)
        args = copy.copy(args)
        refuse_sharding(
            args, type(self).__name__, "its reference is a second model whose weights are replaced every round"
        )
        refuse_other_than_dataset("train_dataset", train_dataset)
        if eval_dataset is not None:
            refuse_other_than_dataset("eval_dataset", eval_dataset)
        if eval_dataset is None and args.alignment_patience is not None:
            raise ValueError("alignment_patience needs eval_dataset: agreement is measured on held-out rows.")
        if args.use_vllm and args.world_size > 1:
            raise ValueError("use_vllm=True samples in one process. Start one, or set it to False.")
        refuse_adapter_path(model, "proxy")
        refuse_prompt_learning(adapter_of(model) or peft_config, "proxy", NO_VIRTUAL_TOKENS)
        refuse_frozen_adapter(peft_config, "proxy")
        if not isinstance(model, str) and peft_config is None:
            refuse_frozen(model, "proxy")
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(
                self._proxy_path, padding_side="left", trust_remote_code=args.trust_remote_code
            )
        require_tokenizer(processing_class, type(self).__name__)
        rows = self._with_room(self._tokenize(train_dataset, processing_class, args), args)
        if len(rows) < args.num_rounds:
            raise TeacherDataError(
                f"Round {len(rows) + 1} of {args.num_rounds} has an empty shard: there are only {len(rows)} rows to align "
                f"on. Set the number of rounds to {len(rows)} at most, or give alignment more rows."
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
        in_memory = not isinstance(model, str) and not isinstance(model, PeftModel) and peft_config is None
        super().__init__(
            model=model,
            # TRL would read the reference from disk, whatever the weights in memory
            ref_model=copy.deepcopy(model) if in_memory else None,
            args=args,
            train_dataset=rows,
            processing_class=processing_class,
            callbacks=callbacks,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        # For callbacks that generate from its prompts
        self.eval_dataset = eval_dataset
        if isinstance(self.model, PeftModel):
            add_reference_adapter(self.model)
        if self.accelerator.device.type == "cpu":
            keep_4bit_weights_differentiable(self.model)
        check_head(self.model)
        self._output_dir = Path(args.output_dir)
        self.rounds: list[dict] = []
        self._run: dict | None = None

    @staticmethod
    def _tokenize(dataset: Dataset, tokenizer, args: ProxyAlignmentConfig) -> Dataset:
        if is_tokenized(dataset):
            return dataset
        return tokenize_teacher_data(
            dataset,
            tokenizer,
            max_completion_length=args.max_completion_length,
            max_prompt_length=args.max_prompt_length,
            chat_template_kwargs=args.chat_template_kwargs,
            reasoning=args.reasoning,
        )[0]

    @staticmethod
    def _with_room(rows: Dataset, args: ProxyAlignmentConfig) -> Dataset:
        """Without rows whose prompt alone fills `max_length`, which TRL drops when it prepares rows."""
        if args.max_length is None or args.truncation_mode != "keep_start":
            return rows
        kept = [index for index, ids in enumerate(rows["prompt_ids"]) if len(ids) < args.max_length]
        if not kept:
            raise TeacherDataError(f"max_length={args.max_length} cuts off every answer. Raise it, or leave it out.")
        return rows.select(kept) if len(kept) < len(rows) else rows

    def _rows_to_measure(self, dataset: Dataset | None, tokenizer, args: ProxyAlignmentConfig) -> list[dict] | None:
        if dataset is None:
            return None
        held_out = self._tokenize(dataset, tokenizer, args)
        return soft_target_rows(held_out, tokenizer, args.chat_template_kwargs).to_list()

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        # Rows get their token ids when their round begins: a sample's own, not those of its text
        return dataset

    # Rounds

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> None:
        """
        Train all rounds that are not finished yet.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Ignored: a run in `output_dir` goes on by itself.

        Raises:
            ValueError: `output_dir` holds the alignment of another proxy, or with other rows or settings.
        """
        self.rounds = self._finished_rounds()
        # The proxy in memory has learned since, and goes on from a round on disk
        if self._run is None or not self.rounds or self.rounds[-1]["round"] == 0:
            self._check_run()
        if self.rounds and self.rounds[-1]["round"] > 0:
            load_weights(self._unwrapped(), self._round_folder(self.rounds[-1]["round"]) / PROXY_FOLDER)
        if not self.rounds:
            self._finish_round(0, self._measure(), [], 0.0)
        for number in range(len(self.rounds), self.args.num_rounds + 1):
            if self._has_converged():
                break
            started = time.perf_counter()
            self._begin_round(number)
            checkpoint = last_finished_checkpoint(self.args.output_dir)
            super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
            refuse_no_steps(self.state.global_step, f"Round {number}")
            log = self.state.log_history
            self._finish_round(number, self._measure(), log, time.perf_counter() - started)
        self.args.output_dir = str(self._output_dir)
        if self.best_round != self.rounds[-1]["round"]:
            self._load_round(self.best_round)
        if self.args.should_save:
            save_proxy(self._unwrapped(), self.processing_class, self._output_dir)
        self.accelerator.wait_for_everyone()

    @property
    def best_round(self) -> int:
        """The round whose proxy is kept: the last one, or with `alignment_patience` the one that agrees most."""
        if self.args.alignment_patience is None:
            return self.rounds[-1]["round"]
        return max(self.rounds, key=lambda entry: entry["top1_agreement"])["round"]

    def _has_converged(self) -> bool:
        patience = self.args.alignment_patience
        return patience is not None and self.rounds[-1]["round"] - self.best_round >= patience

    def _begin_round(self, number: int) -> None:
        set_seed(self.args.seed + number)
        folder = self._round_folder(number)
        self.args.output_dir = str(folder)
        self._set_reference()
        # Adam's moments are those of the round
        self.optimizer = self.lr_scheduler = None
        shard = self._teacher_rows.shard(self.args.num_rounds, number - 1, contiguous=True)
        if self.args.preference_weight > 0:
            samples = self._sample(shard, folder, number)
        else:
            samples = list(shard["teacher_ids"])  # without a preference there is nothing to sample
        self.train_dataset = Dataset.from_dict(
            {
                "prompt_ids": list(shard["prompt_ids"]),
                "chosen_ids": list(shard["teacher_ids"]),
                "rejected_ids": samples,
            }
        )

    def _set_reference(self) -> None:
        """Make the proxy as it is now the reference."""
        if self.ref_model is None:
            copy_adapter_to_reference(self._unwrapped())
        else:
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(self._unwrapped().state_dict())

    def _sample(self, shard: Dataset, folder: Path, number: int) -> list[list[int]]:
        rows = shard.select_columns(["prompt", "completion", "prompt_ids"]).to_list()
        settings = {
            "max_new_tokens": self.args.max_completion_length,
            "temperature": self.args.sample_temperature,
            "top_p": self.args.sample_top_p,
        }
        sampler: VLLMSampler | ModelSampler
        if self.args.use_vllm:
            sampler = self._vllm_sampler(folder / SAMPLER_FOLDER, settings)
        else:
            settings["batch_size"] = self.args.sample_batch_size
            sampler = ModelSampler(self._unwrapped(), self.processing_class, **settings)
        # Far apart, so that no two files of a run have the same seed
        seed = (self.args.seed * 1000 + number) * 1_000_000
        # The model's own mixed precision comes with its first training: every round is to sample alike
        with self.accelerator.autocast():
            ids = sample_completions(folder / SAMPLES_FOLDER, rows, sampler, self.args.sample_batch_size, seed)
        del sampler  # and with it the memory of vLLM
        shutil.rmtree(folder / SAMPLER_FOLDER, ignore_errors=True)
        if self.args.log_completions and self.accelerator.is_main_process:
            self._print_samples(rows, ids, number)
        return ids

    def _vllm_sampler(self, folder: Path, settings: dict) -> VLLMSampler:
        """A sampler of the proxy as it is now, which vLLM reads from disk."""
        save_proxy(self._unwrapped(), self.processing_class, folder)
        base, adapter = str(folder), None
        if isinstance(self.model, PeftModel):
            base, adapter = self.model.peft_config["default"].base_model_name_or_path, str(folder)
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
        Measure the proxy's agreement with the teacher, as before and after every round.

        Args:
            eval_dataset ([`~datasets.Dataset`], *optional*):
                Held-out teacher text; by default that of the constructor.
            ignore_keys:
                Ignored: there are no predictions.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`):
                What the names of the metrics begin with.

        Returns:
            `dict[str, float]`: as [`~proxy.agreement.teacher_agreement`].
        """
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        refuse_other_than_dataset("eval_dataset", eval_dataset)
        rows = self._rows_to_measure(eval_dataset, self.processing_class, self.args)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._measure(rows).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test") -> NoReturn:
        raise ValueError(
            "predict is not possible here: teacher text has no rejected answers to score. `evaluate` measures the proxy's "
            "agreement with the teacher."
        )

    def _measure(self, rows: list[dict] | None = None) -> dict[str, float]:
        rows = self._held_out if rows is None else rows
        if rows is None:
            return {}
        return teacher_agreement(
            self._unwrapped(),
            rows,
            self.accelerator,
            self.args.per_device_eval_batch_size,
            self._tokenizer.pad_token_id,
        )

    def _finish_round(self, number: int, metrics: dict[str, float], log: list[dict], seconds: float) -> None:
        entry = {"round": number, **metrics, "seconds": seconds}
        self.rounds.append(entry)
        folder = self._round_folder(number)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            # The first one is gone back to where no round is better
            if number > 0 or self.args.alignment_patience is not None:
                save_proxy(self._unwrapped(), self.processing_class, folder / PROXY_FOLDER)
            _write_json(self._output_dir / RUN_FILE, {"run": self._run, "rounds": self.rounds})
            _write_json(folder / ROUND_FILE, {**entry, "log_history": log})
            # The proxies before the last one and the best one, and the round's checkpoints, are of no further use
            for earlier in range(number):
                if earlier != self.best_round:
                    shutil.rmtree(self._round_folder(earlier) / PROXY_FOLDER, ignore_errors=True)
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if metrics:
            self.log({f"alignment/{name}": value for name, value in metrics.items()} | {"alignment/round": number})

    def _finished_rounds(self) -> list[dict]:
        rounds: list[dict] = []
        while (path := self._round_folder(len(rounds)) / ROUND_FILE).is_file():
            entry = json.loads(path.read_text(encoding="utf-8"))
            del entry["log_history"]
            rounds.append(entry)
        return rounds

    @property
    def log_history(self) -> list[dict]:
        """The logs of all finished rounds, as one: steps are counted through."""
        history, first_step = [], 0
        for entry in self.rounds:
            path = self._round_folder(entry["round"]) / ROUND_FILE
            log = json.loads(path.read_text(encoding="utf-8"))["log_history"]
            history += [{**line, "step": line["step"] + first_step, "round": entry["round"]} for line in log]
            first_step += max((line["step"] for line in log), default=0)
        return history

    def _load_round(self, number: int) -> None:
        load_weights(self._unwrapped(), self._round_folder(number) / PROXY_FOLDER)

    def _check_run(self) -> None:
        keys = soft_target_rows(self._teacher_rows, self.processing_class, self.args.chat_template_kwargs)["row_key"]
        self._run = {
            "proxy": model_fingerprint(self._unwrapped()),
            "rows": rows_fingerprint(keys),
            "num_processes": self.accelerator.num_processes,
            "adapter": self._adapter(),
            **{name: getattr(self.args, name) for name in SAME_WHEN_RESUMED},
        }
        path = self._output_dir / RUN_FILE
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))["run"]
            differing = differences(found, self._run)
            if differing:
                raise StageError(
                    f"{self._output_dir} holds another alignment ({differing}). Choose another output_dir or delete it."
                )

    def _adapter(self) -> str | None:
        if not isinstance(self.model, PeftModel):
            return None
        config = self.model.peft_config["default"].to_dict()
        return json.dumps({key: config.get(key) for key in ("peft_type", "r", "lora_alpha", "use_dora")}, default=str)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with keep_precision(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _round_folder(self, number: int) -> Path:
        return self._output_dir / f"round-{number}"

    def _unwrapped(self) -> PreTrainedModel | PeftModel:
        return self.accelerator.unwrap_model(self.model)


def refuse_other_than_dataset(name: str, dataset) -> None:
    """
    Raises:
        [`~errors.TeacherDataError`]: `dataset` is missing, a stream, several, or something else.
    """
    if not isinstance(dataset, Dataset):
        kind = "a stream: turn streaming off" if isinstance(dataset, IterableDataset) else type(dataset).__name__
        raise TeacherDataError(
            f"{name} is {'missing' if dataset is None else kind}; an alignment needs one `Dataset` of prompts and the teacher's "
            "completions."
        )


def _write_json(path: Path, content: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
