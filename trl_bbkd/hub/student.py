"""What a trainer needs for its student to reach the Hub with a card of ours."""

import contextlib
import functools
import logging
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers.trainer_utils import HubStrategy

from ..errors import HubError
from ..host._compat import get_config_model_id, uploads_through
from ..host.typed import MixinBase
from ..reports.redaction import without_tokens
from .example import example_input
from .model_card import RECIPE_NAME, StudentCard, student_name, write_card
from .push import creation_error, upload_student
from .settings import changed_settings, hardware, hyperparameters


logger = logging.getLogger(__name__)
TRAINING_ARGUMENTS = "training_args.bin"


class StudentHubMixin(MixinBase):
    """
    Makes `push_to_hub`, and the pushes of `hub_strategy`, send the student and a card of our own.

    It stands before a TRL trainer among the bases of a class that names `_name`, `_paper` and `_tag_names`. See
    [`~hub.push.stage_student`] for what is sent.
    """

    _name: str
    _paper: dict[str, str]
    _tag_names: list[str]
    _card_note: str | None = None  # what a reader has to know of this method's students
    _card_settings: tuple[str, ...] = ()  # fields of the configuration that a card tells first
    _is_checkpointing = False

    @functools.cached_property
    def card(self) -> StudentCard:
        """What is known about the student. A run fills in what the trainer does not know, such as `teacher`."""
        base_model, example = get_config_model_id(self.model.config) or None, self._example_input()
        return StudentCard(
            method=self._name,
            paper=self._paper,
            tags=list(self._tag_names),
            base_model=base_model,
            name=student_name(self.args, base_model, self._name),
            repo_id=self.args.output_dir,
            is_adapter=isinstance(self.accelerator.unwrap_model(self.model), PeftModel),
            example=example,
            conversational=_is_conversational(self.train_dataset),
            chat_template_kwargs=getattr(self.args, "chat_template_kwargs", None) or {},
            note=self._card_note,
            max_new_tokens=getattr(self.args, "max_completion_length", 256),
            labels=self._class_labels(),
            folders=self._hub_folders(),
        )

    def _example_input(self) -> str | list[dict] | None:
        """An input of the teacher's rows that the card shows; of a held-out row, if there are any."""
        rows = next(iter(self.eval_dataset.values())) if isinstance(self.eval_dataset, dict) else self.eval_dataset
        return example_input(rows) or example_input(self.train_dataset)

    def _class_labels(self) -> list[str]:
        """Names of the student's classes, if it is a classifier."""
        return []

    def _hub_folders(self) -> list[str]:
        """Folders of `output_dir` that are sent beside the student."""
        return []

    def _save_hub_folders(self) -> None:
        """Write those folders."""

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        teacher_name: str | None = None,
    ) -> None:
        """
        Write the card, `README.md`, to `output_dir`. Arguments that are `None` keep what is known.

        Args:
            model_name (`str`, *optional*):
                Name of the student.
            dataset_name (`str` or `list[str]`, *optional*):
                Where the teacher's text came from.
            tags (`str` or `list[str]`, *optional*):
                More tags.
            teacher_name (`str`, *optional*):
                Name of the black-box teacher.
        """
        if not self.is_world_process_zero():
            return
        card = self.card
        card.teacher = teacher_name or card.teacher
        card.datasets = _listed(dataset_name) or card.datasets
        card.tags = list(dict.fromkeys([*card.tags, *_listed(tags)]))
        card.repo_id = self.hub_model_id or self.args.hub_model_id or self.args.output_dir
        # With a checkpoint TRL writes a card of its own accord, and would name the student after its folder
        card.name = card.name if self._is_checkpointing else model_name or card.name
        student = self.accelerator.unwrap_model(self.model)
        adapter = student.peft_config[student.active_adapter] if card.is_adapter else None
        card.hyperparameters = hyperparameters(self.args, self.state.global_step, self._card_settings, adapter)
        card.changed_settings = changed_settings(self.args)
        card.hardware = hardware(self.args)
        write_card(card, self.args.output_dir)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        try:
            super().init_hf_repo(token=token, private=private)
        except Exception as error:
            output_dir = self.args.output_dir
            repo_id = self.args.hub_model_id or Path(output_dir).absolute().name
            raise creation_error(error, repo_id, output_dir, token or self.args.hub_token) from None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> Any:
        """
        Send the student to the Hub, as [`~transformers.Trainer.push_to_hub`] does. `kwargs` are those of
        [`~StudentHubMixin.create_model_card`].

        Raises:
            [`~errors.HubError`]: the Hub refuses it or cannot be reached. The student is on disk.
        """
        if self.hub_model_id is None:
            # transformers creates the repository first, and saves the student only if that succeeds
            self.save_model(_internal_call=True)
            self.create_model_card()
        with self._our_uploads():
            return super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)

    def _save_checkpoint(self, model, trial):
        self._is_checkpointing = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_checkpointing = False

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.hub_strategy == HubStrategy.END:
            return
        with self._our_uploads():
            super()._push_from_checkpoint(checkpoint_folder)

    @contextlib.contextmanager
    def _our_uploads(self):
        # Of a sharded model every process has a part
        self._save_hub_folders()
        with uploads_through(self._upload):
            yield

    def _upload(self, api, *, folder_path, path_in_repo=None, run_as_future=False, ignore_patterns=None, **kwargs):
        if path_in_repo is None:
            # While it trains, what lies there may report on an earlier run
            upload = functools.partial(
                upload_student,
                api,
                folder_path,
                folders=self._hub_folders(),
                report_files=[RECIPE_NAME] if self.card.settings else [],
                **kwargs,
            )
        else:
            # A checkpoint, which `hub_strategy` asked for. Its arguments are a pickle that holds the token
            upload = functools.partial(
                api.upload_folder,
                folder_path=folder_path,
                path_in_repo=path_in_repo,
                ignore_patterns=[TRAINING_ARGUMENTS],
                **kwargs,
            )
        return api.run_as_future(_in_background, upload) if run_as_future else upload()


def _in_background(upload):
    """Upload, and say when it failed: nobody waits for the result."""
    try:
        return upload()
    except Exception as error:
        reason = error if isinstance(error, HubError) else without_tokens(f"{type(error).__name__}: {error}")
        logger.warning(f"Training goes on. {reason}")
        raise


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _is_conversational(dataset) -> bool:
    row: dict = next(iter(dataset), {}) if dataset is not None else {}
    return isinstance(row.get("prompt"), list)
