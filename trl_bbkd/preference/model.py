"""A model that goes from round to round: in memory or, where it is sharded, by way of the disk."""

import contextlib
import copy
import dataclasses
import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import DPOTrainer

from ..host._compat import keep_4bit_weights_differentiable, references_sharded_like_students, whole_models
from ..host.engines import gathered
from ..host.model_files import load_model, load_weights, save_model
from ..host.model_paths import base_of_adapter
from ..host.reference import add_reference_adapter, copy_adapter_to_reference
from ..host.resume import FinishedCheckpoints
from ..host.sharding import check_sharding, is_sharded
from ..soft_targets.caching import model_fingerprint
from .config import PreferenceRoundsConfig
from .rounds import RoundsOnDisk


class TrainedInRounds(FinishedCheckpoints, DPOTrainer):
    """
    DPO in rounds, the reference of each being the model as it was when the round began.

    FSDP2 and DeepSpeed wrap a model for one training. Under them TRL's trainer is made anew for each round, in this same
    object, from the model that the round before has left on disk, whole; and what looks at the model between two rounds loads
    it from there, whole on every process. Otherwise the model stays in memory, and its weights are copied to the reference.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, as [`check_model`] lets it pass.
        args ([`~config.PreferenceRoundsConfig`]):
            Configuration, a copy that may be changed.
        rows ([`~datasets.Dataset`]):
            Rows to train on, for as long as no round has begun.
        disk ([`~rounds.RoundsOnDisk`]):
            Where the model of a round is kept.
        processing_class, callbacks, quantization_config, peft_config:
            As in [`~trl.DPOTrainer`].
    """

    args: PreferenceRoundsConfig
    eval_dataset: Dataset | None

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: PreferenceRoundsConfig,
        rows: Dataset,
        disk: RoundsOnDisk,
        processing_class: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback] | None,
        quantization_config: BitsAndBytesConfig | None,
        peft_config: PeftConfig | None,
    ):
        self._is_sharded = is_sharded(args)
        self._disk = disk
        self._round: int | None = None  # of which this is the model, where it is on disk
        given = args.model_init_kwargs or {}
        if self._is_sharded and not isinstance(model, str):
            # TRL warns that it ignores them; here they are for the rounds to come
            args.model_init_kwargs = None
        in_memory = not isinstance(model, str) and not isinstance(model, PeftModel) and peft_config is None
        self._make(
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
        quantized = {} if quantization_config is None else {"quantization_config": quantization_config}
        self._dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        self._init_kwargs = {
            "dtype": self.model.dtype,
            "trust_remote_code": args.trust_remote_code,
            **quantized,
            **given,
        }

    def _make(self, **arguments) -> None:
        with references_sharded_like_students(DPOTrainer):
            super().__init__(**arguments)
        if isinstance(self.model, PeftModel):
            add_reference_adapter(self.model)
        if self.accelerator.device.type == "cpu":
            keep_4bit_weights_differentiable(self.model)

    def _make_anew(self, number: int, rows: Dataset) -> None:
        """Make TRL's trainer of the model that round `number` has left, for training on `rows`."""
        path = str(self._disk.model(number))
        is_adapter = base_of_adapter(path) is not None
        # Callbacks have states of their own, and a configuration that of its DeepSpeed engine
        callbacks, held_out, output_dir = self.callback_handler.callbacks, self.eval_dataset, self.args.output_dir
        changes: dict[str, Any] = {
            "model_init_kwargs": None if is_adapter else self._init_kwargs,
            "output_dir": str(self._disk.output_dir),  # after which a repository is named
        }
        args = dataclasses.replace(self.args, **changes)
        self._make(
            model=self._load(number, trainable=True) if is_adapter else path,
            args=args,
            train_dataset=rows,
            processing_class=self.processing_class,
        )
        self.callback_handler.callbacks, self.eval_dataset, self.args.output_dir = callbacks, held_out, output_dir
        self._round = number

    def _load(self, number: int, trainable: bool = False) -> PreTrainedModel | PeftModel:
        model = load_model(str(self._disk.model(number)), trainable, **self._init_kwargs)
        for name, parameter in model.named_parameters():
            # PEFT loads an adapter in float32
            if parameter.dtype != self._dtypes[name]:
                parameter.data = parameter.data.to(self._dtypes[name])
        return model

    def _release(self) -> None:
        """Give back what the model and its training take: it is on disk."""
        self.accelerator.free_memory()
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self, name, None)
            setattr(self.callback_handler, name, None)
        self.model_wrapped = self.ref_model = self.deepspeed = None
        gc.collect()
        torch.cuda.empty_cache()

    def _unwrapped(self) -> PreTrainedModel | PeftModel:
        return self.accelerator.unwrap_model(self.model)

    @contextlib.contextmanager
    def _whole(self) -> Iterator[PreTrainedModel | PeftModel]:
        """The model as it is between two rounds, whole on every process: none waits for another in its forward pass."""
        if not self._is_sharded:
            yield self._unwrapped()
            return
        if self._round is None:
            raise ValueError(
                "Under FSDP and DeepSpeed a model is measured as it lies on disk, after `train` has begun. Call `train` first."
            )
        with whole_models():
            model = self._load(self._round)
            yield model.to(self.accelerator.device)
        del model
        gc.collect()
        torch.cuda.empty_cache()

    def _fingerprint(self) -> str:
        """Of the model that was handed in, as the main process has it: the others may have no weights yet."""
        with self._gathered():
            found = [model_fingerprint(self._unwrapped()) if self.accelerator.is_main_process else None]
        return broadcast_object_list(found)[0]

    def _gathered(self):
        """Within the block a model that no training has wrapped yet is whole."""
        return gathered(list(self.model.parameters()), is_written=False)

    def _begin(self, number: int, pairs: Callable[[], Dataset]) -> None:
        """
        Begin round `number` with the model as it is, and make that the reference.

        Args:
            number (`int`):
                The round.
            pairs (`Callable[[], Dataset]`):
                Makes what the round trains on.
        """
        seed = self.args.seed + number
        set_seed(seed)
        if self._is_sharded:
            self._release()
            self._make_anew(number - 1, pairs())
            set_seed(seed)
            return
        if self.ref_model is None:
            copy_adapter_to_reference(self._unwrapped())
        else:
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(self._unwrapped().state_dict())
        # Adam's moments are those of the round
        self.optimizer = self.lr_scheduler = None
        self.train_dataset = pairs()

    def _keep(self, number: int) -> None:
        """Write the model as round `number` has left it, whole."""
        weights, has_trained = None, self.optimizer is not None
        if self._is_sharded and has_trained:
            weights = self.accelerator.get_state_dict(self.model_wrapped)
        with contextlib.nullcontext() if has_trained else self._gathered():
            if self.args.should_save:
                save_model(self._unwrapped(), self.processing_class, self._disk.model(number), weights)
        self.accelerator.wait_for_everyone()
        self._round = number

    def _go_back(self, number: int, rows: Dataset) -> None:
        """Take the model that round `number` has left on disk."""
        if self._is_sharded:
            self._release()
            self._make_anew(number, rows)
        else:
            load_weights(self._unwrapped(), self._disk.model(number))

    def _write(self, folder: str | Path) -> None:
        """Write the model as it is after a round."""
        if self.args.should_save:
            if self._is_sharded:
                shutil.copytree(self._disk.model(self._round), folder, dirs_exist_ok=True)
            else:
                save_model(self._unwrapped(), self.processing_class, folder)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in [`~transformers.Trainer`]; under FSDP and DeepSpeed, between rounds, from the disk."""
        if not self._is_sharded or self.is_in_train or self._round is None:
            super().save_model(output_dir, _internal_call)
            return
        self._write(output_dir or self.args.output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)


def check_model(
    model: str | PreTrainedModel | PeftModel,
    args: PreferenceRoundsConfig,
    quantization_config: BitsAndBytesConfig | None,
    role: str,
) -> None:
    """
    Raises:
        ValueError: If the run is to be sharded in a way that cannot work (see [`~host.sharding.check_sharding`]), or with a
            model that is no path and no adapter on one.
    """
    check_sharding(args, quantization_config)
    if is_sharded(args) and isinstance(model, PreTrainedModel):
        raise ValueError(
            f"Under FSDP and DeepSpeed a model in memory may be in parts, and its reference is read whole. Hand in the {role}'s "
            "path."
        )
