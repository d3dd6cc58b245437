"""Checkpoints from which a run of GAD goes on exactly where it was."""

import os
from pathlib import Path

from peft import PeftModel

from ..host._compat import whole_models
from ..host.engines import begin_optimizer, copy_model
from ..host.reference import REFERENCE_ADAPTER, copy_adapter_to_reference, read_reference
from ..host.resume import ResumableRun, division, state_of
from ..host.sharding import is_sharded
from .generation_batch import load_generation_batch, save_generation_batch


DISCRIMINATOR_FOLDER = "discriminator"
CRITIC_FOLDER = "critic"
WARMED_UP_STUDENT_FOLDER = "warmed_up_student"
SAME_WHEN_RESUMED = (
    "seed",
    "num_generations",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "advantage_estimator",
    "critic",
    "critic_lora_kwargs",
    "discriminator",
    "discriminator_credit",
    "discriminator_head",
    "discriminator_likelihood_reduction",
    "discriminator_lora_kwargs",
    "discriminator_loss",
    "discriminator_replay_size",
    "discriminator_rows",
)


class ResumableGAD(ResumableRun):
    """
    The part of [`GADTrainer`] that writes and reads checkpoints: discriminator, critic, replayed pairs, phase, KL
    reference, warnings and the generation batch under way. Student, optimizer and random states are TRL's.
    """

    _state_name = "gad_state.json"
    _same_when_resumed = SAME_WHEN_RESUMED

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        # It draws an order an epoch from one generator, which no checkpoint keeps
        for _ in range(self._epochs_before):
            next(iter(sampler))
        return sampler

    def _own_file(self, checkpoint: str | Path, name: str, process: int | None = None) -> Path:
        """The file that this process alone, or another one, writes to a checkpoint."""
        process = self.accelerator.process_index if process is None else process
        return Path(checkpoint) / f"{name}-{process}.safetensors"

    def _check_division(self, checkpoint, found):
        super()._check_division(checkpoint, found)
        micro_batches = state_of(checkpoint).global_step * found["gradient_accumulation_steps"]
        if micro_batches % (found["steps_per_generation"] * found["num_iterations"]):
            raise ValueError(
                f"{checkpoint} lies amid a generation batch, of which each process has a part. Resume with its settings "
                f"({division(found)}), or from a checkpoint at whose step a generation batch ends."
            )

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.accelerator.is_fsdp2:
            # While the discriminator learns alone, the student's optimizer has taken no step
            begin_optimizer(self.optimizer, self.model)
        super()._save_optimizer_and_scheduler(output_dir)
        os.makedirs(output_dir, exist_ok=True)
        save_generation_batch(self._own_file(output_dir, "generation_batch"), self._step, self._buffered_inputs)
        if self.discriminator_trainer.replay is not None:
            self.discriminator_trainer.replay.save(self._own_file(output_dir, "replay"))
        self.discriminator_trainer.save(Path(output_dir) / DISCRIMINATOR_FOLDER)
        if self.critic_trainer is not None:
            self.critic_trainer.save(Path(output_dir) / CRITIC_FOLDER)
        if self.args.should_save:
            self._write_state(
                output_dir,
                phase="warmup" if self._in_warmup else "adversarial",
                warmup_steps=self._warmup_steps,
                warmup_share=self._warmup_share,
                monitor=self.monitor.state(),
            )

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = self._read_state(Path(checkpoint))
        self.discriminator_trainer.load(Path(checkpoint) / DISCRIMINATOR_FOLDER)
        if self.critic_trainer is not None:
            self.critic_trainer.load(Path(checkpoint) / CRITIC_FOLDER)
        if self.discriminator_trainer.replay is not None:
            self._load_replay(checkpoint, processes=state["run"]["num_processes"])
        if self._is_divided_alike(Path(checkpoint)):
            self._step, self._buffered_inputs = load_generation_batch(
                self._own_file(checkpoint, "generation_batch"), self.accelerator.device
            )
        else:
            # The next micro-batch begins a generation batch
            self._step, self._buffered_inputs = self.state.global_step * self.args.gradient_accumulation_steps, None
        self.monitor.load_state(state["monitor"])
        self._warmup_steps, self._warmup_share = state["warmup_steps"], state["warmup_share"]
        self._in_warmup = state["phase"] == "warmup"
        self.beta = 0.0 if self._in_warmup else self.args.beta
        if not self._in_warmup:
            self._restore_reference(Path(checkpoint).parent / WARMED_UP_STUDENT_FOLDER)

    def _load_replay(self, checkpoint: str, processes: int) -> None:
        replay, accelerator = self.discriminator_trainer.replay, self.accelerator
        if processes == accelerator.num_processes:
            replay.load(self._own_file(checkpoint, "replay"))
            return
        files = [self._own_file(checkpoint, "replay", process) for process in range(processes)]
        replay.load_share(files, accelerator.process_index, accelerator.num_processes)

    def _set_reference(self) -> None:
        """Make the student, as it is now, the KL reference, and keep it on disk for a resumed run."""
        if self._warmup_steps > 0:
            weights = self.accelerator.get_state_dict(self.model_wrapped)
            if self.args.should_save:
                self._save(os.path.join(self.args.output_dir, WARMED_UP_STUDENT_FOLDER), state_dict=weights)
        model = self.accelerator.unwrap_model(self.model)
        if self.ref_model is not None:
            copy_model(model, self._unwrapped_reference())
        elif self.args.beta != 0 and REFERENCE_ADAPTER in model.peft_config:
            copy_adapter_to_reference(model)
        self._reference_is_set = True

    def _restore_reference(self, folder: Path) -> None:
        if self.ref_model is not None and self._warmup_steps > 0:
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"The KL reference of this run, {folder}, is missing. Put the folder back beside the checkpoints, "
                    "or start again from a checkpoint of the warm-up."
                )
            reference = self._unwrapped_reference()
            with whole_models():
                warmed_up = type(self._unwrapped_policy()).from_pretrained(folder, dtype=reference.dtype)
            copy_model(warmed_up, reference)
        model = self.accelerator.unwrap_model(self.model)
        has_adapter = isinstance(model, PeftModel) and REFERENCE_ADAPTER in model.peft_config
        if has_adapter and self._warmup_steps > 0 and is_sharded(self.args):
            # Of a sharded model a checkpoint has the trained adapter alone
            read_reference(model, folder)
        self._reference_is_set = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        output_dir = output_dir or self.args.output_dir
        if not _internal_call:
            self.discriminator_trainer.save_discriminator(Path(output_dir) / DISCRIMINATOR_FOLDER)
        super().save_model(output_dir, _internal_call)
