from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .messages import REASONING_HELP, ReasoningPolicy, check_reasoning


if TYPE_CHECKING:
    # Once a configuration is made, text from the command line has been read
    KeywordArguments = dict[str, Any]
else:
    KeywordArguments = dict[str, Any] | str


@dataclass
class TeacherTextConfig:
    r"""
    Parameters of the teacher's rows as a student's tokenizer reads them. It stands among the bases of a trainer's
    configuration.

    Parameters:
        max_prompt_length (`int`, *optional*):
            Longest prompt, in tokens. Rows with a longer one are dropped, and counted. `None` keeps every row.
        max_completion_length (`int`, *optional*, defaults to `512`):
            Longest answer, in tokens. Longer ones are cut, and counted.
        answers_per_prompt (`int`, *optional*):
            Most training rows that share a prompt. The first ones are kept, the others left out and counted. `None` keeps
            every row.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Passed to `apply_chat_template`.
        reasoning (`str`, *optional*, defaults to `"keep"`):
            What becomes of the reasoning of the teacher's messages: `"keep"` it, as the chat template spells it, or
            `"drop"` it.
    """

    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt in tokens. Rows with a longer one are dropped and counted."}
    )
    max_completion_length: int = field(
        default=512, metadata={"help": "Longest answer in tokens. Longer ones are cut and counted."}
    )
    answers_per_prompt: int | None = field(
        default=None,
        metadata={"help": "Most training rows that share a prompt: the first ones. If `None`, every row."},
    )
    chat_template_kwargs: KeywordArguments | None = field(
        default=None, metadata={"help": "Keyword arguments of `apply_chat_template`."}
    )
    reasoning: ReasoningPolicy = field(default="keep", metadata={"help": REASONING_HELP})

    def check_teacher_text(self) -> None:
        """
        Raises:
            ValueError: a length or a count is under 1, or the policy for reasoning is none.
        """
        check_reasoning(self.reasoning)
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be at least 1, got {self.max_prompt_length}.")
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length must be at least 1, got {self.max_completion_length}.")
        if self.answers_per_prompt is not None and self.answers_per_prompt < 1:
            raise ValueError(f"answers_per_prompt must be at least 1, got {self.answers_per_prompt}.")
