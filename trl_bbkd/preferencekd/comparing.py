"""A language model as judge: it is shown the teacher's answer and two samples, in both orders, and says which is better."""

import itertools

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import JudgeError
from ..evaluation.student import pad_rows
from .judges import Judged
from .pairs import win_rates


QUESTIONS = {
    "quality": (
        "Below are a request and two answers to it, and an answer that an expert gave. Take the expert's answer as the measure of what "
        "a good answer says and how it says it. Length alone is no merit, and neither is the order in which the two are shown."
    ),
    "match": (
        "Below are a request and two answers to it, and an answer that an expert gave. Compare what the two say with what the expert "
        "says: the same facts and conclusions, with nothing left out, added or contradicted. Wording and style do not count."
    ),
}
ASKED = {
    "quality": "Which of the two is the better answer? Write A or B.",
    "match": "Which of the two says more nearly what the expert says? Write A or B.",
}
FIRST, SECOND = "A", "B"


def comparison(question: str, prompt: str | list[dict], reference: str, first: str, second: str) -> str:
    """
    The text of a comparison.

    Args:
        question (`str`):
            `"quality"` or `"match"`.
        prompt (`str` or `list[dict]`):
            The prompt; of messages, each with its role.
        reference (`str`):
            The teacher's answer.
        first, second (`str`):
            The answers to compare, in the order in which they are shown.
    """
    if not isinstance(prompt, str):
        prompt = "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    parts = {"Request": prompt, "Expert's answer": reference, f"Answer {FIRST}": first, f"Answer {SECOND}": second}
    shown = "\n\n".join(f"[{name}]\n{text.strip()}" for name, text in parts.items())
    return f"{QUESTIONS[question]}\n\n{shown}\n\n[Question]\n{ASKED[question]}"


class ComparingJudge:
    """
    Scores samples by how often a model prefers them, each compared with each other in both orders (equation of
    [`~pairs.win_rates`]). Of its answer only the two tokens count by which "A" and "B" differ.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model, which should follow instructions.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer. With a chat template a comparison is a user's message; without one it is plain text.
        question (`str`):
            What it is asked: `"quality"` or `"match"`.
        batch_size (`int`):
            Comparisons in one forward pass.
        chat_template_kwargs (`dict`, *optional*):
            Passed to `apply_chat_template`.

    Raises:
        JudgeError: a comparison is longer than the model's context.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        question: str,
        batch_size: int,
        chat_template_kwargs: dict | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.question, self.batch_size = question, batch_size
        self.chat_template_kwargs = chat_template_kwargs or {}

    def __call__(self, rows: list[Judged]) -> list[list[float]]:
        asked = [
            (row, first, second)
            for row in rows
            for first, second in itertools.permutations(range(len(row.candidates)), 2)
        ]
        texts = [
            comparison(self.question, row.prompt, row.references[0], row.candidates[first], row.candidates[second])
            for row, first, second in asked
        ]
        wins = iter(self.first_wins([self._question_ids(text) for text in texts]))
        scores = []
        for row in rows:
            count = len(row.candidates)
            table = [[0.0] * count for _ in range(count)]
            for first, second in itertools.permutations(range(count), 2):
                table[first][second] = next(wins)
            scores.append(win_rates(table))
        return scores

    def _question_ids(self, text: str) -> tuple[list[int], int, int]:
        """A comparison's tokens up to the answer, and the tokens that say "A" and "B" there."""
        if self.tokenizer.chat_template is None:
            start, special = f"{text}\n\n[Answer]\n", True
        else:
            start = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                tokenize=False,
                add_generation_prompt=True,
                **self.chat_template_kwargs,
            )
            special = False
        first, second = (
            self.tokenizer(start + answer, add_special_tokens=special)["input_ids"] for answer in (FIRST, SECOND)
        )
        differs = next(place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and differs > limit:
            raise JudgeError(
                f"A comparison has {differs} tokens, and the judge's context is {limit}: it has a prompt, the teacher's answer and "
                "two samples. Lower max_prompt_length or max_completion_length, or take a judge with a longer context."
            )
        return first[:differs], first[differs], second[differs]

    @torch.no_grad()
    def first_wins(self, questions: list[tuple[list[int], int, int]]) -> list[float]:
        """
        Probability with which the model says "A", of "A" and "B", after each question.

        Args:
            questions (`list[tuple[list[int], int, int]]`):
                Token ids of each, and the two answers' tokens.
        """
        model, device = self.model, self.model.device
        # Left padding is not seen
        pad_id = self.tokenizer.pad_token_id or 0
        order = sorted(range(len(questions)), key=lambda number: len(questions[number][0]))
        found = [0.0] * len(questions)
        was_training = model.training
        model.eval()
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            ids, mask = pad_rows([questions[number][0] for number in numbers], pad_id, device, side="left")
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1).logits[:, -1]
            answers = torch.tensor([questions[number][1:] for number in numbers], device=device)
            said_first, said_second = logits.float().gather(1, answers).unbind(dim=1)
            for number, value in zip(numbers, torch.sigmoid(said_first - said_second).tolist(), strict=True):
                found[number] = value
        model.train(was_training)
        return found
