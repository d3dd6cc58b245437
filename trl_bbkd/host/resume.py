"""A run that can be killed at any moment and goes on: which checkpoint, whose, and whether it was finished."""

import json
import logging
import re
from pathlib import Path

from datasets import IterableDataset
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ._compat import be_wrapped_again, keep_precision
from .preflight import refuse_broken_weights, refuse_no_steps
from .sharding import is_sharded
from .typed import MixinBase


logger = logging.getLogger(__name__)
TRAINER_STATE_NAME = "trainer_state.json"  # the last file of a checkpoint, but for TRL's adaptive entropy


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders in `output_dir`, latest first."""
    found = [
        (int(match.group(1)), path)
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def is_finished(checkpoint: Path) -> bool:
    """Whether the checkpoint was written to its end. A run killed while saving leaves one that was not."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True


def last_finished_checkpoint(output_dir: str | Path) -> Path | None:
    """The latest checkpoint in `output_dir` that was written to its end, if there is one."""
    return next((path for path in checkpoints(output_dir) if is_finished(path)), None)


def differences(found: dict, wanted: dict) -> str:
    """Where two descriptions of a run differ, for an error message; empty if they do not."""
    return "; ".join(
        f"{key}: {found.get(key)!r} there, {value!r} here" for key, value in wanted.items() if found.get(key) != value
    )


def _state_of(checkpoint: str) -> TrainerState:
    return TrainerState.load_from_json(Path(checkpoint) / TRAINER_STATE_NAME)


class FinishedCheckpoints(MixinBase):
    """
    Makes a trainer write checkpoints of which every process can tell whether they were written to their end, and read them
    in the precision that it trains in. It stands before a TRL trainer among the bases of a class.
    """

    def _save_checkpoint(self, model, trial):
        if self.args.should_save:
            # A run that is resumed writes over later checkpoints: not finished, from now until the end
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # The file that marks a checkpoint as finished comes next: every process must have written its own by then
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with keep_precision(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)


class ResumableRun(FinishedCheckpoints):
    """
    Makes a trainer refuse to mix two runs in one `output_dir`, and resume from checkpoints that were written to their
    end.

    It stands before a TRL trainer among the bases of a class that names `_state_name` and `_same_when_resumed`.
    """

    _student_path: str
    _state_name: str  # file of a checkpoint that says, among other things, whose it is
    _same_when_resumed: tuple[str, ...]  # settings that decide which samples a step sees and what is trained
    _training_name = "training"  # what a run calls its training
    _has_begun = False  # whether the checkpoints in `output_dir` are this trainer's own
    _epochs_before = 0  # that an interrupted run has been through

    def _describe_run(self) -> dict:
        """What decides which samples a step sees and what is trained: the same in a run and its resumption."""
        run = {
            # Its name alone: folders may be moved, and paths given from elsewhere
            "student": Path(self._student_path).name,
            "rows": None if isinstance(self.train_dataset, IterableDataset) else len(self.train_dataset),
            "num_processes": self.accelerator.num_processes,
            **{name: getattr(self.args, name) for name in self._same_when_resumed},
        }
        # As it is read back from a checkpoint
        return json.loads(json.dumps(run, default=str))

    def _read_state(self, checkpoint: Path) -> dict:
        path = checkpoint / self._state_name
        if not path.is_file():
            raise ValueError(
                f"{checkpoint} is no complete checkpoint ({self._state_name} is missing): it was not written by "
                f"{type(self).__name__}, or with save_only_model=True. It can be a new run's model, but not be resumed."
            )
        return json.loads(path.read_text(encoding="utf-8"))

    def _write_state(self, checkpoint: str | Path, **state) -> None:
        text = json.dumps({"run": self._describe_run(), **state}, indent=2)
        (Path(checkpoint) / self._state_name).write_text(text + "\n", encoding="utf-8")

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
            refuse_broken_weights(resume_from_checkpoint, "checkpoint")
            found = self._read_state(Path(resume_from_checkpoint)).get("run", {})
            differing = differences(found, self._describe_run())
            if differing:
                raise ValueError(
                    f"{resume_from_checkpoint} belongs to another run ({differing}). Resume with its settings."
                )
            return resume_from_checkpoint
        found = last_finished_checkpoint(self.args.output_dir)
        if found is not None and not self._has_begun:
            raise ValueError(
                f"output_dir holds checkpoints of another run, such as {found}; they would be mixed up with this one's. "
                "Choose another output_dir, delete them, or go on with that run: resume_from_checkpoint=True."
            )
        return None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """
        As in [`~transformers.Trainer`], but a run that has taken all its steps is loaded, and takes none more.

        Raises:
            ValueError: As in [`~ResumableRun.check_output_dir`]; if not a single optimizer step was taken.
        """
        checkpoint = self.check_output_dir(resume_from_checkpoint)
        if checkpoint is not None and self._has_taken_all_steps(checkpoint):
            return self._finished_before(checkpoint)
        self._has_begun = True
        self._epochs_before = 0 if checkpoint is None else int(_state_of(checkpoint).epoch)
        be_wrapped_again(self)
        output = super().train(checkpoint, *args, **kwargs)
        refuse_no_steps(self.state.global_step, type(self).__name__)
        return output

    def _has_taken_all_steps(self, checkpoint: str) -> bool:
        """Whether nothing is left to train. `Trainer` would take a step more, unless it is at the end of an epoch."""
        steps = self.args.max_steps
        if steps <= 0:
            *_, steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return _state_of(checkpoint).global_step >= steps

    def _finished_before(self, checkpoint: str) -> TrainOutput:
        """Bring back what `train` left."""
        self.state = _state_of(checkpoint)
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        # By its name, because the run may have been moved
        best = str(Path(checkpoint).with_name(Path(best).name)) if best else None
        if is_sharded(self.args):
            # What is loaded finds its place in what training wraps
            self._prepare_for_training(self.state.max_steps, self.get_train_dataloader(), checkpoint)
            if best:
                self.state.best_model_checkpoint = best
                self._load_best_model()
        else:
            self._load_from_checkpoint(best or checkpoint)
            # All that is trained beside the student is in a checkpoint with the optimizer
            self.create_optimizer_and_scheduler(num_training_steps=self.state.max_steps)
            self._load_optimizer_and_scheduler(checkpoint)
        if self.accelerator.is_main_process:
            logger.warning(f"{self._training_name}: finished before, in {checkpoint}; not run again.")
        return TrainOutput(self.state.global_step, 0.0, {})
