import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_bbkd.errors import JudgeError
from trl_bbkd.preferencekd.comparing import ComparingJudge, comparison
from trl_bbkd.preferencekd.pairs import preferred_pairs

from .test_judges import row


ROWS = [row("p", ["one", "two words", "three"], "reference"), row("q", ["x", "y"], "other")]


class Scripted(ComparingJudge):
    """Says "A" with a probability that the text decides."""

    def __init__(self, answer):
        self.answer, self.question, self.texts = answer, "quality", []

    def _question_ids(self, text):
        self.texts.append(text)
        return text

    def first_wins(self, questions):
        return [self.answer(text) for text in questions]


def test_one_that_always_says_first_prefers_nothing():
    scores = Scripted(lambda text: 1.0)(ROWS)
    assert scores == [[0.5] * 3, [0.5] * 2]
    assert [preferred_pairs(each, [1] * len(each)) for each in scores] == [[], []]


def test_one_that_looks_at_the_answers_prefers_the_same_in_both_orders():
    def longer_first(text):
        first, second = (text.partition(f"[Answer {name}]\n")[2].partition("\n")[0] for name in "AB")
        return 0.9 if len(first) > len(second) else 0.1

    judge = Scripted(longer_first)
    # "two words" beats both, "three" beats "one"; of "x" and "y" the later one wins in either order
    assert judge(ROWS) == [pytest.approx([0.1, 0.9, 0.5]), pytest.approx([0.5, 0.5])]
    assert len(judge.texts) == 3 * 2 + 2


@pytest.mark.parametrize("question", ["quality", "match"])
def test_a_comparison_shows_the_teachers_answer_and_both_samples(question):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    text = comparison(question, messages, " Because.\n", "So.", "Perhaps.")
    for part in (
        "system: Be brief.\n\nuser: Why?",
        "[Expert's answer]\nBecause.\n",
        "[Answer A]\nSo.\n",
        "[Answer B]\nPerhaps.\n",
    ):
        assert part in text
    assert text.index("So.") < text.index("Perhaps.") and "A or B" in text


@pytest.fixture(scope="module")
def judging(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64), tokenizer


@pytest.mark.parametrize("has_template", [True, False])
def test_the_probability_is_that_of_the_two_answers_tokens_however_batches_are_made(judging, has_template):
    model, tokenizer = judging
    if not has_template:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
        tokenizer.chat_template = None
    judge = ComparingJudge(model, tokenizer, "quality", batch_size=3)
    texts = [comparison("quality", "the sky " * n, "blue", "red", "green") for n in (1, 9, 3, 5)]
    questions = [judge._question_ids(text) for text in texts]
    found = judge.first_wins(questions)
    judge.batch_size = 1
    assert judge.first_wins(questions) == pytest.approx(found, rel=1e-9)
    for text, (ids, first, second), probability in zip(texts, questions, found, strict=True):
        assert tokenizer.decode([first]).strip() == "A" and tokenizer.decode([second]).strip() == "B"
        shown = tokenizer.decode(ids)
        assert text in shown and shown.endswith("assistant\n" if has_template else "[Answer]\n")
        logits = model(torch.tensor([ids])).logits[0, -1]
        assert probability == pytest.approx(torch.softmax(logits[[first, second]], dim=0)[0].item(), rel=1e-6)


def test_a_comparison_beyond_the_judges_context(judging):
    model, tokenizer = judging
    judge = ComparingJudge(model, tokenizer, "quality", batch_size=3)
    with pytest.raises(JudgeError, match=r"A comparison has \d+ tokens, and the judge's context is \d+"):
        judge([row("the sky " * 2000, ["one", "two"], "blue")])
