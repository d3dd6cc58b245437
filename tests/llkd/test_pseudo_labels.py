import contextlib
import copy
import logging
import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from trl_bbkd.errors import PseudoLabelError
from trl_bbkd.llkd.pseudo_labels import label_distribution, label_scores, pseudo_label


LABELS = ["red", "the sky", "a red cherry"]
TEMPLATE = "{labels}\n\n{text}\nIt is"
TEXTS = [
    "The sky is blue.",
    "An apple",
    "How many legs does a dog have?",
    "Hello, cat! How are you today? A dog.",
    "A",
]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


@pytest.fixture
def rows():
    return Dataset.from_dict({"text": TEXTS, "id": range(len(TEXTS))})


@torch.no_grad()
def slow_scores(model, prompt_ids, label_ids):
    """Sum of log-probabilities of a label after a prompt: one token at a time, all logits, float64, no padding."""
    model, total = copy.deepcopy(model).double(), 0.0
    for t, token in enumerate(label_ids):
        logits = model(input_ids=torch.tensor([[*prompt_ids, *label_ids[:t]]])).logits[0, -1]
        total += float(torch.log_softmax(logits, dim=0)[token])
    return total


def slow_probs(model, tokenizer, prompts, texts, mean):
    """Distributions over labels that a prompt is continued with."""
    probs = []
    for prompt in prompts:
        scores = []
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            total = slow_scores(model, tokenizer(prompt)["input_ids"], ids)
            scores.append(total / len(ids) if mean else total)
        mass = sum(math.exp(score) for score in scores)
        probs.append([math.exp(score) / mass for score in scores])
    return torch.tensor(probs, dtype=torch.float64)


@contextlib.contextmanager
def forwards_of(model):
    """The shape of each batch that the model reads, and whether a gradient is recorded."""
    calls = []
    handle = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((tuple(kwargs["input_ids"].shape), torch.is_grad_enabled())),
        with_kwargs=True,
    )
    yield calls
    handle.remove()


def probs_of(dataset):
    return torch.tensor(dataset["teacher_probs"][:], dtype=torch.float64)


def check_columns(labelled, labels):
    probs = probs_of(labelled)
    assert torch.allclose(probs.sum(1), torch.ones(len(labelled), dtype=torch.float64), atol=1e-12)
    assert labelled["label"][:] == probs.argmax(1).tolist()
    assert labelled["teacher_confidence"][:] == probs.amax(1).tolist()
    assert labelled.features["label"].names == labels


def test_single_token_is_the_softmax_of_the_letters_logits(model, tokenizer, rows):
    labels = ["good", "bad", "neither"]
    labelled = pseudo_label(rows, labels, model, tokenizer, prompt="{labels}\n{text}\n->\n")
    prompts = [f"A. good\nB. bad\nC. neither\n{text}\n->\n" for text in TEXTS]
    expected = []
    for prompt in prompts:
        with torch.no_grad():
            logits = copy.deepcopy(model).double()(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
        expected.append(torch.softmax(logits[tokenizer.convert_tokens_to_ids(["A", "B", "C"])], 0))
    assert torch.allclose(probs_of(labelled), torch.stack(expected), atol=1e-6)
    assert labelled.column_names == ["text", "id", "label", "teacher_confidence", "teacher_probs"]
    assert labelled["text"][:] == TEXTS and labelled["id"][:] == list(range(5))
    check_columns(labelled, labels)


def test_labels_that_are_one_token_and_tokens_of_the_users_own(model, tokenizer, rows):
    labels = ["red", "dog", "cat"]
    own = pseudo_label(rows, labels, model, tokenizer, prompt="{text} is", label_tokens="labels")
    expected = slow_probs(model, tokenizer, [f"{text} is" for text in TEXTS], [" red", " dog", " cat"], mean=True)
    assert torch.allclose(probs_of(own), expected, atol=1e-6)
    named = pseudo_label(rows, ["x", "y", "z"], model, tokenizer, prompt="{text} is", label_tokens=labels)
    assert named["teacher_probs"][:] == own["teacher_probs"][:]


@pytest.mark.parametrize("mean", [True, False])
def test_full_label_is_forced_decoding(model, tokenizer, rows, mean):
    labelled = pseudo_label(
        rows, LABELS, model, tokenizer, prompt=TEMPLATE, scoring="full_label", length_normalize=mean, batch_size=4
    )
    prompts = [f"red, the sky, a red cherry\n\n{text}\nIt is" for text in TEXTS]
    expected = slow_probs(model, tokenizer, prompts, [" " + label for label in LABELS], mean)
    assert torch.allclose(probs_of(labelled), expected, atol=1e-6)
    check_columns(labelled, LABELS)


def test_labels_that_begin_alike_share_a_sequence(model):
    prompts, labels = [[40, 41, 42], [50]], [[5, 6], [5], [5, 6, 7], [5, 8], [9], [10, 11]]
    with forwards_of(model) as calls:
        scores = label_scores(model, prompts, labels, batch_size=64, length_normalize=False)
    # After the two calls of the head's check: the beginnings (5, 6) and (10,) of two prompts
    assert [shape for shape, _ in calls[2:]] == [(4, 5)]
    expected = [[slow_scores(model, prompt, label) for label in labels] for prompt in prompts]
    assert torch.allclose(scores, torch.tensor(expected, dtype=torch.float64), atol=1e-5)


def test_there_is_no_gradient_and_little_padding(model):
    prompts = [[40] * length for length in (9, 2, 7, 2, 9, 7)]
    with forwards_of(model) as calls:
        label_scores(model, prompts, [[5], [6]], batch_size=2)
    assert calls[2:] == [((2, 9), False), ((2, 7), False), ((2, 2), False)]


def test_batches_padding_order_and_mode_change_nothing(model, tokenizer, rows):
    arguments = dict(prompt=TEMPLATE, scoring="full_label", content_free="N/A")
    reference = probs_of(pseudo_label(rows, LABELS, model, tokenizer, batch_size=1, **arguments))
    for batch_size in (2, 3, 64):
        found = pseudo_label(rows, LABELS, model, tokenizer, batch_size=batch_size, **arguments)
        assert torch.allclose(probs_of(found), reference, atol=1e-6)
    padded = copy.deepcopy(tokenizer)
    padded.padding_side, padded.pad_token = "left", None
    model.train()
    found = pseudo_label(rows.select([3, 1, 0, 4, 2]), LABELS, model, padded, batch_size=2, **arguments)
    assert model.training
    model.eval()
    assert torch.allclose(probs_of(found), reference[[3, 1, 0, 4, 2]], atol=1e-6)
    first, second = (pseudo_label(rows, LABELS, model, tokenizer, batch_size=2, **arguments) for _ in range(2))
    assert first["teacher_probs"][:] == second["teacher_probs"][:]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_positions_are_right_for_a_model_with_learned_ones(tokenizer, rows):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = dict(n_positions=128, n_embd=32, n_layer=1, n_head=2, initializer_range=0.3)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size)).eval()
    labelled = pseudo_label(rows, LABELS, gpt2, tokenizer, prompt="{text} is", scoring="full_label", batch_size=8)
    expected = slow_probs(gpt2, tokenizer, [f"{text} is" for text in TEXTS], [" " + label for label in LABELS], True)
    assert torch.allclose(probs_of(labelled), expected, atol=1e-6)


def test_a_path_is_loaded_and_a_function_makes_prompts(model, tokenizer, tiny_model_dir, rows):
    arguments = dict(label_tokens=["A", "B", "C"])
    by_template = pseudo_label(rows, LABELS, model, tokenizer, prompt="{text}\n", **arguments)
    by_function = pseudo_label(rows, LABELS, tiny_model_dir, prompt=lambda row: row["text"] + "\n", **arguments)
    assert torch.allclose(probs_of(by_function), probs_of(by_template), atol=1e-6)


def test_braces_in_a_text_are_text(model, tokenizer):
    rows = Dataset.from_dict({"body": ["{labels} {0} {text}"]})
    arguments = dict(scoring="full_label", text_column="body")
    found = pseudo_label(rows, LABELS, model, tokenizer, prompt='{"x": "{text}"} {labels} ->', **arguments)
    prompt = '{"x": "{labels} {0} {text}"} red, the sky, a red cherry ->'
    expected = slow_probs(model, tokenizer, [prompt], [" " + label for label in LABELS], True)
    assert torch.allclose(probs_of(found), expected, atol=1e-6)


def test_chat_prompts_are_answered_without_a_space(model, tokenizer, rows):
    labelled = pseudo_label(rows, LABELS, model, tokenizer, prompt="{text}", scoring="full_label", as_chat=True)
    messages = [[{"role": "user", "content": text}] for text in TEXTS]
    prompts = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert torch.allclose(probs_of(labelled), slow_probs(model, tokenizer, prompts, LABELS, True), atol=1e-6)
    function = {"prompt": lambda row: [{"role": "user", "content": row["text"]}], "scoring": "full_label"}
    by_function = pseudo_label(rows, LABELS, model, tokenizer, **function)
    assert by_function["teacher_probs"][:] == labelled["teacher_probs"][:]


def test_division_by_the_prior_by_hand():
    # p(x) = (0.6, 0.4), prior = mean of (0.9, 0.1) and (0.5, 0.5) = (0.7, 0.3)
    scores = torch.tensor([[0.6, 0.4]]).log() + 3.0
    prior = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log() - 1.0
    a, b = 0.6 / 0.7, 0.4 / 0.3
    expected = torch.tensor([[a / (a + b), b / (a + b)]], dtype=torch.float64)
    assert torch.allclose(label_distribution(scores, prior), expected, atol=1e-6)
    assert torch.allclose(label_distribution(prior[:1], prior[:1]), torch.full((1, 2), 0.5).double(), atol=1e-6)


def test_a_content_free_row_is_undecided_and_others_are_divided_by_it(model, tokenizer):
    rows = Dataset.from_dict({"text": ["N/A", *TEXTS]})
    arguments = dict(prompt=TEMPLATE, scoring="full_label")
    plain = probs_of(pseudo_label(rows, LABELS, model, tokenizer, **arguments))
    divided = probs_of(pseudo_label(rows, LABELS, model, tokenizer, content_free="N/A", **arguments))
    assert torch.allclose(divided[0], torch.full((3,), 1 / 3, dtype=torch.float64), atol=1e-6)
    expected = plain / plain[0]
    assert torch.allclose(divided, expected / expected.sum(1, keepdim=True), atol=1e-6)
    two = probs_of(pseudo_label(rows, LABELS, model, tokenizer, content_free=["N/A", "An apple"], **arguments))
    expected = plain / (plain[0] + plain[2])
    assert torch.allclose(two, expected / expected.sum(1, keepdim=True), atol=1e-6)


def test_temperature_flattens(model, tokenizer, rows):
    arguments = dict(prompt=TEMPLATE, scoring="full_label")
    plain = probs_of(pseudo_label(rows, LABELS, model, tokenizer, **arguments))
    flat = pseudo_label(rows, LABELS, model, tokenizer, temperature=2.0, **arguments)
    expected = plain.sqrt() / plain.sqrt().sum(1, keepdim=True)
    assert torch.allclose(probs_of(flat), expected, atol=1e-9)
    check_columns(flat, LABELS)


def test_a_score_that_is_not_finite_names_its_row(tokenizer, tiny_model_dir, rows):
    broken = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    broken.lm_head.weight = torch.nn.Parameter(broken.lm_head.weight.detach().clone())
    # A token of row 1 alone
    with torch.no_grad():
        broken.get_input_embeddings().weight[tokenizer(" apple")["input_ids"][-1]] = float("nan")
    with pytest.raises(PseudoLabelError, match="Row 1: the teacher's score of label 0 is nan; .* bfloat16"):
        pseudo_label(rows, LABELS, broken, tokenizer, prompt="{text}", scoring="full_label")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(labels=[]), "`labels` holds 0 names"),
        (dict(labels=["a"]), "`labels` holds 1 names"),
        (dict(labels="ab"), "must be a list of names"),
        (dict(labels=["a", " "]), "none of them empty"),
        (dict(labels=["a", "b", "a"]), "'a' and 'a' are the same"),
        (dict(labels=["Big dog", "b", "big  Dog"]), "'Big dog' and 'big  Dog' are the same"),
        (dict(prompt=None), "`prompt` is missing"),
        (dict(prompt="Label it: {labels}"), "has no {text}"),
        (dict(prompt="{text}"), "has no {labels}: the teacher cannot know which letter"),
        (dict(text_column="body"), "no column `body`; columns found: text, id"),
        (dict(prompt=lambda row: row["text"], text_column="body", content_free="N/A"), "no column `body`"),
        (dict(prompt=lambda row: None), "Row 0: `prompt` made None"),
        (dict(prompt=lambda row: row["text"] if row["id"] else [{}]), "Row 1: `prompt` made 'An apple'"),
        (dict(scoring="generate"), "`scoring` is 'generate'; it must be one of 'single_token', 'full_label'"),
        (dict(label_tokens="digits"), "`label_tokens` is 'digits'"),
        (dict(label_tokens=["A", "B"]), "3 labels but 2 label tokens"),
        (dict(labels=[f"class {i}" for i in range(27)]), "27 labels but 26 label tokens"),
        (dict(label_tokens="labels", labels=["red", "a dog", "a cat"]), "'a cat' shares its first token .* 'a dog'"),
        (dict(label_tokens="labels", labels=["red", "blue"]), "The label 'blue' is 2 tokens"),
        (dict(label_tokens=["A", "dog", "B"], answer_prefix=""), "'dog' for the label 'the sky' is 3 tokens"),
        (dict(label_tokens=["A", "A", "B"]), "' A' for the label 'the sky' shares its first token"),
        (dict(label_tokens=["A", "", "B"], answer_prefix=""), "has no token"),
        (dict(tokenizer=None), "`tokenizer` is missing"),
        (dict(temperature=0.0), "`temperature` is 0.0"),
        (dict(dataset=Dataset.from_dict({"text": []})), "no rows"),
        (dict(dataset=[{"text": "a"}]), "a list; labelling needs a `datasets.Dataset`"),
        (dict(dataset=Dataset.from_dict({"text": ["a", None]})), "Row 1: `text` is None"),
        (dict(dataset=Dataset.from_dict({"text": ["a"], "label": [0]})), "already has a column `label`.*'gold'"),
        (
            dict(scoring="full_label", dataset=Dataset.from_dict({"text": ["a", "b " * 400]})),
            "Row 1: a prompt of .* context of 512",
        ),
        (dict(unmatched="ignore"), "`unmatched` is 'ignore'"),
    ],
)
def test_bad_input_of_a_model_is_one_error(model, tokenizer, rows, arguments, message):
    defaults = dict(dataset=rows, labels=LABELS, teacher=model, tokenizer=tokenizer, prompt="{labels} {text} is")
    with pytest.raises(PseudoLabelError, match=message):
        pseudo_label(**{**defaults, **arguments})


def test_a_tokenizer_without_chat_template_cannot_chat(model, tokenizer, rows):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    with pytest.raises(PseudoLabelError, match="no chat template"):
        pseudo_label(rows, LABELS, model, plain, prompt="{labels}{text}", as_chat=True)


# Collected answers

AB = ["Big dog", "cat", "C++"]


def test_answers_match_labels_and_their_stated_confidence():
    answers = ["cat", " Big  Dog. ", "**CAT**", "big-dog", "c++", [{"role": "assistant", "content": "Cat!"}]]
    for rows in (answers[:5], answers[5:]):
        data = Dataset.from_dict({"completion": rows, "sure": [0.9, 0.5, 1.0, 0.4, 0.2][: len(rows)]})
        labelled = pseudo_label(data, AB, confidence_column="sure")
        assert labelled["label"][:] == ([1, 0, 1, 0, 2] if len(rows) == 5 else [1])
        assert labelled["teacher_confidence"][:] == pytest.approx(data["sure"][:])
        assert labelled.column_names == ["completion", "sure", "label", "teacher_confidence", "teacher_probs"]
    assert labelled["teacher_probs"][0] == pytest.approx([0.05, 0.9, 0.05])


def test_a_stated_confidence_below_chance_keeps_the_answer():
    labelled = pseudo_label(
        Dataset.from_dict({"completion": ["yes"], "c": [0.2]}), ["yes", "no"], confidence_column="c"
    )
    assert labelled[0]["label"] == 0 and labelled[0]["teacher_confidence"] == pytest.approx(0.2)
    assert labelled[0]["teacher_probs"] == pytest.approx([0.2, 0.8])


def test_a_form_that_fits_two_labels_is_none():
    data = Dataset.from_dict({"completion": ["c#", "C"], "c": [0.9, 0.9]})
    assert pseudo_label(data, ["C", "C#", "C++"], confidence_column="c")["label"][:] == [1, 0]
    data = Dataset.from_dict({"completion": ["c!"], "c": [0.9]})
    with pytest.raises(PseudoLabelError, match="Row 0: `completion` is 'c!', which is none of the labels 'C', 'C#'"):
        pseudo_label(data, ["C", "C#"], confidence_column="c")


def test_agreement_of_several_answers():
    data = Dataset.from_dict({"samples": [["cat", "Cat.", "big dog", "cat"], ["c++", "cat"], ["C++", "c++"]]})
    labelled = pseudo_label(data, AB, answer_column="samples")
    assert labelled["teacher_probs"][:] == [[0.25, 0.75, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]
    assert labelled["label"][:] == [1, 1, 2]
    check_columns(labelled, AB)


@pytest.mark.parametrize("as_list", [False, True])
def test_listed_probabilities(as_list):
    listed = [
        {"cat": 0.6, "big dog": 0.2, "the": 0.1},
        {"Cat": math.log(0.3), " cat": math.log(0.1), "C++": math.log(0.4)},
        {"cat": 0.0, "C++": -9999.0},
        {"cat": 0.0, "C++": 1.0},
    ]
    if as_list:
        listed = [[{"token": token, "logprob": p} for token, p in row.items()] for row in listed]
    labelled = pseudo_label(Dataset.from_dict({"top": listed}), AB, label_probs_column="top")
    expected = [[0.25, 0.75, 0], [0, 0.5, 0.5], [0, 1, 0], [0, 0, 1]]
    assert torch.allclose(probs_of(labelled), torch.tensor(expected, dtype=torch.float64))
    assert labelled["label"][:2] == [1, 1]


def test_rows_without_a_label_are_dropped_and_counted(caplog):
    data = Dataset.from_dict({"completion": ["cat", "no idea", None, "c++"], "c": [0.9] * 4, "id": range(4)})
    with caplog.at_level(logging.WARNING):
        labelled = pseudo_label(data, AB, confidence_column="c", unmatched="drop")
    assert labelled["id"][:] == [0, 3] and labelled["label"][:] == [1, 2]
    assert "Dropped 2 of 4 rows without a label, the first is row 1." in caplog.text

    data = Dataset.from_dict({"completion": [["cat", "hm", "cat", "cat"], ["hm", "hm"]]})
    labelled = pseudo_label(data, AB, unmatched="drop")
    assert len(labelled) == 1
    assert labelled["teacher_probs"][0] == pytest.approx([1 / 12, 3 / 4 + 1 / 12, 1 / 12])

    data = Dataset.from_dict({"top": [[{"token": "the", "logprob": -0.1}], [{"token": "cat", "logprob": -0.1}]]})
    assert pseudo_label(data, AB, label_probs_column="top", unmatched="drop")["label"][:] == [1]


@pytest.mark.parametrize(
    "columns, arguments, message",
    [
        ({"answer": ["cat"]}, {}, "no column `completion`; columns found: answer.*`answer_column`"),
        ({"completion": ["cat"]}, {}, "Row 0: `completion` holds one answer, 'cat'.*`confidence_column`"),
        ({"completion": [["cat", "cat"], ["cat"]]}, {}, r"Row 1: `completion` holds one answer, \['cat'\]"),
        ({"completion": ["cat"]}, dict(confidence_column="c"), "no column `c`"),
        ({"completion": ["cat"]}, dict(label_probs_column="top"), "no column `top`"),
        ({"completion": ["cat"]}, dict(label_probs_column="p", confidence_column="c"), "not both"),
        ({"completion": ["cat"]}, dict(prompt="{text}"), "need a `teacher`"),
        (
            {"completion": ["cat", "fish"], "c": [1.0, 1.0]},
            dict(confidence_column="c"),
            "Row 1: `completion` is 'fish'",
        ),
        ({"completion": ["cat", None], "c": [1.0, 1.0]}, dict(confidence_column="c"), "Row 1: `completion` is None"),
        ({"completion": [["cat", "eel"]]}, {}, "Row 0: `completion` is 'eel', which is none .* `unmatched='drop'`"),
        ({"completion": [["cat", "cat"], []]}, {}, r"Row 1: `completion` is \[\]"),
        (
            {"completion": ["cat"], "c": [90.0]},
            dict(confidence_column="c"),
            "Row 0: `c` is 90.0.*Divide per cents by 100",
        ),
        ({"completion": ["cat"], "c": [-0.5]}, dict(confidence_column="c"), r"Row 0: `c` is -0.5; .* in \[0, 1\]"),
        ({"completion": ["cat"], "c": [float("nan")]}, dict(confidence_column="c"), "Row 0: `c` is nan"),
        ({"completion": ["cat"], "c": ["high"]}, dict(confidence_column="c"), "Row 0: `c` is 'high'"),
        ({"completion": [["cat", "cat"]], "c": [0.5]}, dict(confidence_column="c"), "Row 0 holds 2 answers"),
        (
            {"top": [{"cat": 90.0, "C++": 10.0}]},
            dict(label_probs_column="top"),
            "Row 0: `top` lists .*sum of at most 1",
        ),
        ({"top": [{"cat": 0.5, "C++": -0.5}]}, dict(label_probs_column="top"), "Row 0: `top` lists"),
        ({"top": [{"cat": float("nan")}]}, dict(label_probs_column="top"), "Row 0: `top` lists"),
        ({"top": [{"cat": 0.5}, {"eel": 0.5}]}, dict(label_probs_column="top"), "Row 1: `top` is"),
        ({"top": [{"cat": 0.5}, None]}, dict(label_probs_column="top"), "Row 1: `top` is None"),
        ({"completion": ["eel"], "c": [0.5]}, dict(confidence_column="c", unmatched="drop"), "No row of `completion`"),
    ],
)
def test_bad_answers_are_one_error(columns, arguments, message):
    with pytest.raises(PseudoLabelError, match=message):
        pseudo_label(Dataset.from_dict(columns), AB, **arguments)
