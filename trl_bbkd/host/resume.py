"""A run that can be killed at any moment and goes on: which checkpoint, whose, and whether it was finished."""

import contextlib
import json
import logging
import re
from pathlib import Path

from accelerate.utils import set_seed
from datasets import IterableDataset
from transformers import Trainer, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ._compat import be_wrapped_again, keep_precision, whole_students
from .preflight import refuse_broken_weights, refuse_no_steps
from .sharding import is_sharded
from .typed import MixinBase


logger = logging.getLogger(__name__)
TRAINER_STATE_NAME = "trainer_state.json"  # the last file of a checkpoint, but for TRL's adaptive entropy
# Settings that divide the rows of a step among processes and micro-batches, and leave which rows they are
DIVISION = ("num_processes", "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")


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


def rows_together(run: dict) -> dict:
    """A description of a run with the rows of all processes in a step, in place of how they are divided."""
    at_once = run["num_processes"] * run["per_device_train_batch_size"]
    together = {f"rows in all {name}": at_once * run[name] for name in DIVISION[2:] if name in run}
    return {name: value for name, value in run.items() if name not in DIVISION} | together


def refuse_other_engine(checkpoint: str | Path, trainer: Trainer) -> None:
    """
    Refuse a checkpoint whose optimizer this run could not load: Trainer leaves out a file it does not know, without a word.

    Raises:
        ValueError: Names the engine that can go on.
    """
    checkpoint = Path(checkpoint)
    found, own = _engine_of(checkpoint), "DDP"
    if trainer.is_deepspeed_enabled:
        own = "DeepSpeed"
    elif trainer.is_fsdp_enabled:
        own = f"FSDP ({trainer.accelerator.state.fsdp_plugin.state_dict_type.name})"
    if found != own:
        raise ValueError(
            f"{checkpoint} was written under {found}, and {own} cannot read its optimizer's state. Resume under {found}, or begin "
            f"a new run from its student: model_name_or_path={checkpoint}."
        )
    processes = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    if found == "DeepSpeed" and processes != trainer.accelerator.num_processes:
        raise ValueError(
            f"{checkpoint} was written by {processes} processes, and DeepSpeed keeps an optimizer's state in a file for each of "
            f"them. Resume with --num_processes {processes}, or begin a new run from its student: "
            f"model_name_or_path={checkpoint}. FSDP2 resumes with any number."
        )


def _engine_of(checkpoint: Path) -> str:
    """By the files of the student's optimizer; plain data parallelism writes what one process does."""
    if any(checkpoint.glob("global_step*")):
        return "DeepSpeed"
    if (checkpoint / "optimizer_0").is_dir():
        return "FSDP (SHARDED_STATE_DICT)"
    return "FSDP (FULL_STATE_DICT)" if (checkpoint / "optimizer.bin").is_file() else "DDP"


def division(run: dict) -> str:
    return ", ".join(f"{name}={run[name]}" for name in DIVISION if name in run)


def state_of(checkpoint: str | Path) -> TrainerState:
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
            self._check_run(Path(resume_from_checkpoint))
            return resume_from_checkpoint
        found = last_finished_checkpoint(self.args.output_dir)
        if found is not None and not self._has_begun:
            raise ValueError(
                f"output_dir holds checkpoints of another run, such as {found}; they would be mixed up with this one's. "
                "Choose another output_dir, delete them, or go on with that run: resume_from_checkpoint=True."
            )
        return None

    def _check_run(self, checkpoint: Path) -> None:
        """Refuse a checkpoint of another run, or of this one where it cannot be divided anew."""
        found, own = self._read_state(checkpoint)["run"], self._describe_run()
        refuse_other_engine(checkpoint, self)
        differing = differences(found, own)
        if not differing:
            return
        if differences(rows_together(found), rows_together(own)):
            advice = "Resume with its settings."
            if found["num_processes"] != own["num_processes"]:
                advice += (
                    " With another number of processes, keep per_device_train_batch_size × processes × "
                    "gradient_accumulation_steps."
                )
            raise ValueError(f"{checkpoint} belongs to another run ({differing}). {advice}")
        self._check_division(checkpoint, found)

    def _check_division(self, checkpoint: Path, found: dict) -> None:
        """Refuse to divide a run anew where its rows would be others, or what a process keeps for itself cannot be dealt out."""
        reason = None
        if found["rows"] is None:
            reason = "a stream is divided among processes as it is read"
        elif self.args.train_sampling_strategy not in ("random", "sequential"):
            reason = f"train_sampling_strategy={self.args.train_sampling_strategy!r} orders rows by the batch of one process"
        if reason is not None:
            raise ValueError(
                f"{checkpoint} was written with {division(found)}, and cannot go on with {division(self._describe_run())}: {reason}. "
                "Resume with its settings."
            )

    def _is_divided_alike(self, checkpoint: Path) -> bool:
        return division(self._read_state(checkpoint)["run"]) == division(self._describe_run())

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
        self._epochs_before = 0 if checkpoint is None else int(state_of(checkpoint).epoch)
        be_wrapped_again(self)
        output = super().train(checkpoint, *args, **kwargs)
        refuse_no_steps(self.state.global_step, type(self).__name__)
        return output

    def _has_taken_all_steps(self, checkpoint: str) -> bool:
        """Whether nothing is left to train. `Trainer` would take a step more, unless it is at the end of an epoch."""
        steps = self.args.max_steps
        if steps <= 0:
            *_, steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return state_of(checkpoint).global_step >= steps

    def _finished_before(self, checkpoint: str) -> TrainOutput:
        """Bring back what `train` left."""
        self.state = state_of(checkpoint)
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # A push saves by an internal call too
        is_checkpoint = _internal_call and Path(output_dir or "").name.startswith(PREFIX_CHECKPOINT_DIR)
        with contextlib.nullcontext() if is_checkpoint else whole_students(self.accelerator):
            super().save_model(output_dir, _internal_call)

    def _load_rng_state(self, checkpoint):
        processes = None if checkpoint is None else self._read_state(Path(checkpoint))["run"]["num_processes"]
        if processes in (None, self.accelerator.num_processes):
            super()._load_rng_state(checkpoint)
            return
        if self.accelerator.is_main_process:
            logger.warning(
                f"{self._training_name}: {checkpoint} was written by {processes} processes, and goes on with "
                f"{self.accelerator.num_processes}. What is random is drawn anew."
            )
        # Not as at the beginning, which would draw the same again
        set_seed(self.args.seed + self.state.global_step, device_specific=True)
