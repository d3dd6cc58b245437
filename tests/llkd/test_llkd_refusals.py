"""What LLKDTrainer refuses, and says of it."""

import math

import pytest
from datasets import ClassLabel, Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig

from tests.conftest import build_tokenizer
from tests.llkd.helpers import LORA, NAMES, ON_CPU, build_encoder, make_rows, make_trainer, save_student
from trl_bbkd.errors import LLKDDataError
from trl_bbkd.llkd.config import LLKDConfig
from trl_bbkd.llkd.trainer import LLKDTrainer, max_positions


def without(column):
    return make_rows().remove_columns(column)


def replaced(column, value, row=3, rows=None):
    values = (make_rows() if rows is None else rows)[column][:]
    values[row] = value
    return without(column).add_column(column, values)


def plain_labels(value=None):
    labels = make_rows()["label"][:]
    labels[3] = labels[3] if value is None else value
    return without("label").add_column("label", labels)


def gold(value):
    values = make_rows()["label"][:]
    values[3] = value
    return make_rows().add_column("gold", values)


BAD_ROWS = {
    "missing confidence": (without("teacher_confidence"), r"`teacher_confidence`.*pseudo_label"),
    "percent": (replaced("teacher_confidence", 85.0), r"Row 3: `teacher_confidence` is 85\.0.*Divide"),
    "NaN": (replaced("teacher_confidence", math.nan), "Row 3: `teacher_confidence` is nan"),
    "no text": (without("text"), "training rows have no column `text`, and no `input_ids`.*text_column"),
    "text is none": (replaced("text", None), "Row 3 of the training rows: `text` is None"),
    "empty text": (replaced("text", ""), "Row 3 of the training rows has 0 tokens.*Drop it"),
    "no label": (without("label"), "training rows have no column `label`.*pseudo_label"),
    "label outside": (plain_labels(3), "Row 3 of the training rows: `label` is 3, .* 3 classes, 0 to 2"),
    "negative label": (plain_labels(-1), "Row 3 of the training rows: `label` is -1"),
    "label is none": (
        without("label").add_column("label", [None, *make_rows()["label"][1:]]),
        "Row 0 of the training rows: `label` is None",
    ),
    "label is a name": (
        without("label").add_column("label", ["sky"] * 32),
        "Row 0 of the training rows: `label` is 'sky'.*class_encode_column",
    ),
    "class never seen": (
        make_rows().filter(lambda row: row["label"] != 1),
        r"No row has label 1 \('fruit'\).*allow_missing_classes",
    ),
    "gold outside": (gold(5), "Row 3 of the training rows: `gold` is 5"),
    "fewer rows than a pool": (make_rows(6), "A pool of 8 rows .* larger than the data set of 6. Lower pool_factor"),
    "no rows": (make_rows().select([]), "train_dataset has no rows"),
    "no data set": (None, "train_dataset is missing"),
    "stream": (make_rows().to_iterable_dataset(), "IterableDataset.*Turn streaming off"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows(tmp_path, name):
    rows, message = BAD_ROWS[name]
    with pytest.raises(LLKDDataError, match=message):
        LLKDTrainer(
            build_encoder(),
            LLKDConfig(str(tmp_path), **ON_CPU),
            train_dataset=rows,
            processing_class=build_tokenizer(),
        )


def test_a_missing_class_can_be_allowed(tmp_path):
    rows = make_rows(60).filter(lambda row: row["label"] != 2)
    trainer = make_trainer(tmp_path, rows=rows, allow_missing_classes=True, max_steps=2)
    trainer.train()
    assert trainer.model.config.num_labels == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (make_rows(6).remove_columns("label"), "The evaluation rows have no column `label`.*true one"),
        (make_rows(6).remove_columns("text"), "The evaluation rows have no column `text`"),
        (make_rows(6).cast_column("label", ClassLabel(names=NAMES[::-1])), "evaluation rows the classes are animal"),
        (
            make_rows(6).remove_columns("label").add_column("label", [0, 1, 2, 3, 0, 1]),
            "Row 3 of the evaluation rows: `label` is 3",
        ),
    ],
)
def test_bad_evaluation_rows(tmp_path, rows, message):
    with pytest.raises(LLKDDataError, match=message):
        make_trainer(tmp_path, trainer_kwargs={"eval_dataset": rows})


def test_rows_longer_than_the_student(tmp_path):
    rows = make_rows(8).remove_columns("text").add_column("text", ["A"] * 7 + ["A dog has four legs. " * 20])
    with pytest.raises(
        LLKDDataError,
        match=r"Row 7 of the training rows has \d+ tokens, but the student takes 64 at most. Set max_length to 64",
    ):
        make_trainer(tmp_path, rows=rows, max_length=None)
    make_trainer(tmp_path, rows=rows, max_length=64)


def test_positions_of_roberta_start_after_its_padding():
    assert max_positions(RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512
    assert max_positions(LlamaConfig(max_position_embeddings=77)) == 77


def test_bad_students(tmp_path):
    with pytest.raises(ValueError, match="num_labels=1 .*one of two or more classes"):
        make_trainer(tmp_path, build_encoder(num_labels=1))
    with pytest.raises(ValueError, match="num_labels=5, but there are 3 classes: sky, fruit, animal"):
        make_trainer(tmp_path, build_encoder(num_labels=5))
    named = build_encoder()
    named.config.id2label = dict(enumerate(NAMES[::-1]))
    with pytest.raises(ValueError, match="student's classes are animal, fruit, sky, but those of the rows are sky"):
        make_trainer(tmp_path, named)
    path = save_student(tmp_path / "student", build_encoder())
    with pytest.raises(ValueError, match="nothing names them. Set `labels`"):
        make_trainer(tmp_path, path, Dataset.from_list(list(make_rows())))
    generator = LlamaForCausalLM(
        LlamaConfig(vocab_size=330, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    generator.config.num_labels = 3
    with pytest.raises(ValueError, match="not \\(rows, classes\\).*AutoModelForSequenceClassification"):
        make_trainer(tmp_path, generator).train()


def test_bad_adapters(tmp_path):
    with pytest.raises(ValueError, match="leaves the new head untrained. Set 'SEQ_CLS'"):
        make_trainer(tmp_path, trainer_kwargs={"peft_config": LoraConfig(**LORA | {"task_type": "CAUSAL_LM"})})
    adapted = make_trainer(tmp_path, trainer_kwargs={"peft_config": LoraConfig(**LORA)}).model
    with pytest.raises(ValueError, match="has an adapter already"):
        make_trainer(tmp_path, adapted, trainer_kwargs={"peft_config": LoraConfig(**LORA)})
    make_trainer(tmp_path, adapted, max_steps=1).train()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"selection": "lkd"}, "selection must be one of none, llkd, got 'lkd'"),
        ({"selection_denominator": "batch"}, "selection_denominator must be one of selected, pool"),
        ({"pool_factor": 0}, "pool_factor must be .*at least 1, got 0"),
        ({"pool_factor": 1.5}, "pool_factor must be a whole number.*got 1.5"),
        ({"selection_rule": "quantile"}, "budget"),
        ({"max_length": 0}, "max_length must be at least 1 or None"),
        ({"labels": ["a", "a"]}, "labels must be a list of different names"),
        ({"labels": ["a"]}, "at least two classes"),
    ],
)
def test_bad_settings(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        LLKDConfig(str(tmp_path), **{**ON_CPU, **config})


def test_batches_that_size_themselves_are_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_rebalance.* no pool can be drawn"):
        make_trainer(tmp_path, train_sampling_strategy="batch_rebalance")


def test_names_in_labels_agree_with_the_column(tmp_path):
    with pytest.raises(
        LLKDDataError, match="classes are sky, fruit, animal, but those to learn are fruit, sky, animal"
    ):
        make_trainer(tmp_path, labels=["fruit", "sky", "animal"])


def test_defaults_are_those_of_the_reference():
    config = LLKDConfig("unused", use_cpu=True)
    assert (config.selection, config.learning_rate, config.per_device_train_batch_size) == ("llkd", 2e-5, 32)
    assert (config.warmup_steps, config.num_train_epochs, config.selection_warmup_steps) == (0.1, 3.0, 50)
    assert (config.selection_momentum, config.selection_rule, config.selection_denominator) == (
        0.99,
        "maxnorm",
        "selected",
    )
