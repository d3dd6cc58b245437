"""Checkpoints from which a run of GAD goes on exactly where it was."""

import json
import os
from pathlib import Path

from datasets import IterableDataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .._compat import keep_precision
from .checkpoint import (
    STATE_NAME,
    TRAINER_STATE_NAME,
    last_finished_checkpoint,
    load_generation_batch,
    read_state,
    refuse_another_run,
    save_generation_batch,
)
from .reference import REFERENCE_ADAPTER, copy_adapter_to_reference


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
)


class ResumableGAD:
    """
    The part of [`GADTrainer`] that writes and reads checkpoints: discriminator, critic, replayed pairs, phase, KL
    reference, warnings and the generation batch under way. Student, optimizer and random states are TRL's.
    """

    def _describe_run(self) -> dict:
        """What decides which samples a step sees and what is trained: the same in a run and its resumption."""
        run = {
            # Its name alone: folders may be moved, and paths given from elsewhere
            "student": Path(self._student_path).name,
            "rows": None if isinstance(self.train_dataset, IterableDataset) else len(self.train_dataset),
            "num_processes": self.accelerator.num_processes,
            **{name: getattr(self.args, name) for name in SAME_WHEN_RESUMED},
        }
        # As it is read back from a checkpoint
        return json.loads(json.dumps(run, default=str))

    def check_output_dir(self, resume_from_checkpoint: str | bool | None = None) -> str | None:
        """
        Find the checkpoint to resume from, and refuse to mix two runs in `output_dir`. `train` does this first.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                As in `train`; `True` takes the last checkpoint that was written to its end.

        Returns:
            `str`: The checkpoint; `None` for a new run.

        Raises:
            ValueError: A new run in a folder with checkpoints, a checkpoint of another run, or none to resume from.
        """
        if resume_from_checkpoint is True:
            # Trainer would take the latest one, which a killed run may have left half-written
            checkpoint = last_finished_checkpoint(self.args.output_dir)
            if checkpoint is None:
                raise ValueError(f"There is no finished checkpoint in {self.args.output_dir} to resume from.")
            resume_from_checkpoint = str(checkpoint)
        if resume_from_checkpoint:
            refuse_another_run(Path(resume_from_checkpoint), self._describe_run())
            return resume_from_checkpoint
        found = last_finished_checkpoint(self.args.output_dir)
        if found is not None:
            raise ValueError(
                f"output_dir holds checkpoints of another run, such as {found}; they would be mixed up with this one's. "
                "Choose another output_dir, delete them, or go on with that run: resume_from_checkpoint=True."
            )
        return None

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        return super().train(self.check_output_dir(resume_from_checkpoint), *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        if self.args.should_save:
            # A run that is resumed writes over later checkpoints: not finished, from now until the end
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _own_file(self, checkpoint: str | Path, name: str) -> Path:
        """The file that this process alone writes to a checkpoint."""
        return Path(checkpoint) / f"{name}-{self.accelerator.process_index}.safetensors"

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        os.makedirs(output_dir, exist_ok=True)
        save_generation_batch(self._own_file(output_dir, "generation_batch"), self._step, self._buffered_inputs)
        if self.discriminator_trainer.replay is not None:
            self.discriminator_trainer.replay.save(self._own_file(output_dir, "replay"))
        if not self.args.should_save:
            return
        self.discriminator_trainer.save(Path(output_dir) / DISCRIMINATOR_FOLDER)
        if self.critic_trainer is not None:
            self.critic_trainer.save(Path(output_dir) / CRITIC_FOLDER)
        state = {
            "run": self._describe_run(),
            "phase": "warmup" if self._in_warmup else "adversarial",
            "warmup_steps": self._warmup_steps,
            "monitor": self.monitor.state(),
        }
        (Path(output_dir) / STATE_NAME).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # The file that marks a checkpoint as finished comes next: every process must have written its own by then
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with keep_precision(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = read_state(Path(checkpoint))
        self.discriminator_trainer.load(Path(checkpoint) / DISCRIMINATOR_FOLDER)
        if self.critic_trainer is not None:
            self.critic_trainer.load(Path(checkpoint) / CRITIC_FOLDER)
        if self.discriminator_trainer.replay is not None:
            self.discriminator_trainer.replay.load(self._own_file(checkpoint, "replay"))
        self._step, self._buffered_inputs = load_generation_batch(
            self._own_file(checkpoint, "generation_batch"), self.accelerator.device
        )
        self.monitor.load_state(state["monitor"])
        self._warmup_steps = state["warmup_steps"]
        self._in_warmup = state["phase"] == "warmup"
        self.beta = 0.0 if self._in_warmup else self.args.beta
        if not self._in_warmup:
            self._restore_reference(Path(checkpoint).parent / WARMED_UP_STUDENT_FOLDER)

    def _set_reference(self) -> None:
        """Make the student, as it is now, the KL reference, and keep it on disk for a resumed run."""
        if self._warmup_steps > 0:
            self._save(os.path.join(self.args.output_dir, WARMED_UP_STUDENT_FOLDER))
        model = self.accelerator.unwrap_model(self.model)
        if self.ref_model is not None:
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(model.state_dict())
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
            reference = self.accelerator.unwrap_model(self.ref_model)
            warmed_up = type(self._unwrapped_policy()).from_pretrained(folder, dtype=reference.dtype)
            reference.load_state_dict(warmed_up.state_dict())
        self._reference_is_set = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        output_dir = output_dir or self.args.output_dir
        if not _internal_call and self.args.should_save:
            self.discriminator.save_pretrained(Path(output_dir) / DISCRIMINATOR_FOLDER)
        super().save_model(output_dir, _internal_call)
