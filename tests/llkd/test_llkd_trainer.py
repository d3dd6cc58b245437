import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, log_softmax
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LabelSmoother

from tests.conftest import build_tokenizer
from tests.gad.helpers import are_different, assert_same_weights, weights
from tests.llkd.helpers import (
    LORA,
    NAMES,
    ON_CPU,
    GradientRecorder,
    build_decoder,
    build_encoder,
    logged,
    make_rows,
    make_trainer,
    save_student,
    sequential_step,
    students_with_and_without_evaluation,
)
from tests.processes import on_processes
from trl_bbkd.llkd.trainer import LLKDTrainer, classification_metrics
from trl_bbkd.selection.mixin import SELECTION_FILE, SELECTION_WEIGHT


class Spy(LLKDTrainer):
    """Remembers the pools of each step, and the micro-batches that were learned from."""

    def __init__(self, *args, **kwargs):
        self.pools, self.learned = [], []
        super().__init__(*args, **kwargs)

    def _kept(self, pools):
        self.pools.append(pools)
        return super()._kept(pools)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            self.learned.append(dict(inputs))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def one_step(tmp_path, model=None, rows=None, trainer_class=Spy, **config):
    """A trainer after one step, and the step's gradient; the pool is all rows."""
    recorder = GradientRecorder()
    rows = make_rows(16) if rows is None else rows
    config = {"per_device_train_batch_size": 8, "max_steps": 1, **config}
    trainer = make_trainer(
        tmp_path, model, rows, trainer_class, trainer_kwargs={"callbacks": [recorder]}, max_grad_norm=0.0, **config
    )
    trainer.train()
    return trainer, recorder.gradients[0]


def slow_step(model, rows, denominator="selected", keep=None):
    """The kept rows, their weights and the gradient of a first step, one row at a time, in float64."""
    model, tokenizer = copy.deepcopy(model).double(), build_tokenizer()
    texts = [torch.tensor([tokenizer(text)["input_ids"][: ON_CPU["max_length"]]]) for text in rows["text"]]
    logits = [model(input_ids=ids).logits[0] for ids in texts]
    entropy = [-(log_softmax(row, -1).exp() * log_softmax(row, -1)).sum().item() / math.log(3) for row in logits]
    confidence, label = rows["teacher_confidence"][:], rows["label"][:]
    if keep is None:
        keep = []
        for i, y in enumerate(label):
            same = [j for j in range(len(label)) if label[j] == y]
            means = [sum(signal[j] for j in same) / len(same) for signal in (confidence, entropy)]
            if confidence[i] >= means[0] and entropy[i] >= means[1]:
                keep.append(i)
    raw = {i: confidence[i] * entropy[i] for i in keep}
    weight = {i: value * len(keep) / sum(raw.values()) for i, value in raw.items()}
    number = len(keep) if denominator == "selected" else len(label)
    loss = sum(weight[i] * cross_entropy(logits[i], torch.tensor(label[i])) for i in keep) / number
    model.zero_grad()
    loss.backward()
    gradient = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return keep, loss.item(), gradient


def assert_same_gradient(found, expected, rtol=1e-4, atol=1e-6):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("denominator", ["selected", "pool"])
@pytest.mark.parametrize("build", [build_encoder, build_decoder])
def test_a_step_learns_from_the_kept_rows_alone(tmp_path, build, denominator):
    model = build()
    # What a decoder takes for padding
    model.config.pad_token_id = 0
    keep, loss, gradient = slow_step(model, make_rows(16), denominator)
    assert 0 < len(keep) < 8
    one_class = make_rows(16).remove_columns("label").add_column("label", [0] * 16)
    assert keep != slow_step(model, one_class)[0]
    trainer, found = one_step(tmp_path, build(), selection_denominator=denominator)
    assert_same_gradient(found, gradient)
    assert len(trainer.pools[0][0]["row_id"]) == 16
    assert [len(batch["labels"]) for batch in trainer.learned] == [len(keep)]
    assert logged(trainer, "loss") == [pytest.approx(loss, rel=1e-5)]
    assert logged(trainer, "selection/kept_share") == [pytest.approx(len(keep) / 16)]
    # Padded as they would be alone
    assert trainer.learned[0]["attention_mask"].any(dim=0).all()
    assert set(trainer.learned[0]) <= {"input_ids", "attention_mask", "token_type_ids", "labels", SELECTION_WEIGHT}


@pytest.mark.parametrize("accepts_loss_kwargs", [True, False])
@pytest.mark.parametrize("selection", ["llkd", "none"])
def test_a_step_does_not_depend_on_how_it_is_cut(tmp_path, selection, accepts_loss_kwargs):
    # 1 x 8, 2 x 4 and 4 x 2 rows; of the last ones' pools some keep nothing
    rows, gradients, losses = make_rows(16 if selection == "llkd" else 8), [], []
    for count in (1, 2, 4):
        model = build_encoder()
        # Whether transformers passes a student the number of rows
        model.accepts_loss_kwargs = accepts_loss_kwargs
        trainer, gradient = one_step(
            tmp_path / str(count),
            model,
            rows,
            selection=selection,
            per_device_train_batch_size=8 // count,
            gradient_accumulation_steps=count,
        )
        assert len(trainer.learned) == count
        gradients.append(gradient)
        losses += logged(trainer, "loss")
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-5)
    for gradient in gradients[1:]:
        assert_same_gradient(gradient, gradients[0])
    if selection == "llkd":
        assert any((batch["labels"] == -100).all() for batch in trainer.learned)


def test_two_processes_take_the_step_of_one_though_one_keeps_nothing(tmp_path):
    one = sequential_step(tmp_path / "one", 8)
    ranks = on_processes(2, sequential_step, tmp_path / "two", 4)
    for rank, found in enumerate(ranks):
        assert found["num_processes"] == 2
        assert_same_gradient(found["gradient"], one["gradient"])
        assert found["kept_share"] == one["kept_share"]
        assert 0 < one["kept_share"][0] < 0.5
        for name, value in one["state"].items():
            # What they were scored beside differs, and so does rounding
            torch.testing.assert_close(found["state"][name], value, rtol=1e-5, atol=1e-6, equal_nan=True)
        if rank:
            first = ranks[0]["state"]
            assert all(torch.equal(found["state"][name].nan_to_num(), first[name].nan_to_num()) for name in first)


def test_an_evaluation_before_training_changes_nothing_on_two_processes(tmp_path):
    """It marks the bare model as prepared, and unless the mark is taken off DDP leaves it alone."""
    ranks = on_processes(2, students_with_and_without_evaluation, tmp_path)
    for name, expected in ranks[0][False].items():
        for found in ranks:
            assert torch.equal(found[True][name], expected) and torch.equal(found[False][name], expected), name


def test_without_selection_it_is_transformers_trainer(tmp_path):
    rows, tokenizer = make_rows(24), build_tokenizer()
    config = {key: value for key, value in ON_CPU.items() if key in TrainingArguments.__dataclass_fields__}
    plain = Trainer(
        build_encoder(dropout=0.1),
        TrainingArguments(str(tmp_path / "plain"), **config, max_steps=5),
        train_dataset=rows.map(lambda row: tokenizer(row["text"])).remove_columns("teacher_confidence"),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    plain.train()
    ours = make_trainer(tmp_path / "ours", build_encoder(dropout=0.1), rows, selection="none", max_steps=5)
    ours.train()
    assert logged(ours, "loss") == pytest.approx(logged(plain, "loss"), abs=1e-6)
    for name, value in weights(plain.model).items():
        torch.testing.assert_close(weights(ours.model)[name], value, rtol=0, atol=2e-6)
    assert not [line for line in ours.state.log_history if any(key.startswith("selection/") for key in line)]


def test_without_selection_rows_need_no_confidence(tmp_path):
    trainer = make_trainer(
        tmp_path, rows=make_rows(8).remove_columns("teacher_confidence"), selection="none", max_steps=1
    )
    trainer.train()
    assert math.isfinite(logged(trainer, "loss")[0])


def test_when_every_row_is_kept_unweighted_it_is_plain_training(tmp_path):
    shared = {"rows": make_rows(16), "train_sampling_strategy": "sequential"}
    _, plain = one_step(tmp_path / "plain", selection="none", per_device_train_batch_size=16, **shared)
    _, kept = one_step(
        tmp_path / "kept",
        selection_use_teacher=False,
        selection_use_student=False,
        selection_weighting="none",
        **shared,
    )
    assert_same_gradient(kept, plain, rtol=1e-5, atol=1e-7)


def test_a_step_of_which_nothing_is_kept_is_finite(tmp_path):
    # Of the one row that the teacher is sure of the student is sure as well
    rows = make_rows(16)
    rows = rows.remove_columns("teacher_confidence").add_column("teacher_confidence", [0.5] * 15 + [1.0])

    class Contrary(Spy):
        def _uncertainty(self, pool):
            return 1.0 - pool["teacher_confidence"]

    trainer, gradient = one_step(tmp_path, rows=rows, trainer_class=Contrary, selection_rule="global")
    assert logged(trainer, "selection/kept_share") == [0.0]
    assert logged(trainer, "loss") == [0.0]
    assert all(not value.any() for value in gradient.values())
    assert all(value.isfinite().all() for value in weights(trainer.model).values())
    assert (trainer.learned[0]["labels"] == -100).all()


def test_a_discarded_row_changes_nothing(tmp_path):
    # The teacher is unsure of rows that are added; its threshold stays below the others' confidence
    rows = make_rows(8)
    sure = rows.remove_columns("teacher_confidence").add_column("teacher_confidence", [0.9] * 8)
    more = Dataset.from_list([*sure, *(row | {"teacher_confidence": 0.1} for row in make_rows(8, seed=1))])
    more = more.cast(sure.features)
    shared = {"selection_rule": "global", "selection_use_student": False, "selection_weighting": "teacher"}
    _, alone = one_step(tmp_path / "alone", rows=sure, per_device_train_batch_size=4, **shared)
    trainer, beside = one_step(tmp_path / "beside", rows=more, **shared)
    assert logged(trainer, "selection/kept_share") == [0.5]
    assert_same_gradient(beside, alone, rtol=1e-5, atol=1e-7)


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path):
    rows = make_rows(64, gold=True)
    config = {"max_steps": 12, "save_strategy": "steps", "save_steps": 4, "selection_warmup_steps": 2}
    config |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}

    def trainer(folder):
        return make_trainer(folder, build_encoder(dropout=0.1), rows, Spy, **config)

    whole = trainer(tmp_path / "whole")
    whole.train()
    for step in (4, 8):  # in the first epoch, and at an epoch's end
        resumed = trainer(tmp_path / "whole")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same_weights(weights(resumed.model), weights(whole.model))
        for name, value in whole.selector.state_dict().items():
            assert torch.equal(resumed.selector.state_dict()[name].nan_to_num(), value.nan_to_num()), name
        assert all(
            torch.equal(value, whole.tally.state_dict()[name]) for name, value in resumed.tally.state_dict().items()
        )
        for found, expected in zip(resumed.pools[::-1], whole.pools[::-1], strict=False):
            assert [pool["row_id"].tolist() for pool in found] == [pool["row_id"].tolist() for pool in expected]
        assert len(resumed.pools) == 12 - step
    state = load_file(tmp_path / "whole" / "checkpoint-4" / SELECTION_FILE)
    assert state["step"] == 4
    assert not torch.equal(state["group_mean"], whole.selector.group_mean)


def test_a_run_is_resumed_with_its_own_settings_only(tmp_path):
    config = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, **config).train()
    with pytest.raises(ValueError, match="output_dir holds checkpoints of another run"):
        make_trainer(tmp_path, **config).train()
    with pytest.raises(ValueError, match="selection_rule: 'class_mean' there, 'maxnorm' here"):
        make_trainer(tmp_path, selection_rule="maxnorm", **config).train(resume_from_checkpoint=True)


def test_an_adapter_and_its_head_are_trained(tmp_path):
    path = save_student(tmp_path / "student", build_encoder())
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer_kwargs = {"peft_config": LoraConfig(**LORA)}
    trainer = make_trainer(tmp_path / "run", path, trainer_kwargs=trainer_kwargs, **config)
    before = weights(trainer.model)
    trainer.train()
    changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
    assert any("lora_B" in name for name in changed)
    assert any("classifier.modules_to_save" in name for name in changed)
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    assert 0 < min(logged(trainer, "selection/kept_share")) < 1

    resumed = make_trainer(tmp_path / "run", path, trainer_kwargs={"peft_config": LoraConfig(**LORA)}, **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same_weights(weights(resumed.model), weights(trainer.model))


def test_a_path_is_loaded_with_a_head_for_the_classes(tmp_path):
    base = build_encoder(num_labels=2).bert
    path = save_student(tmp_path / "base", base)
    trainer = make_trainer(tmp_path / "run", path, trainer_kwargs={"processing_class": None}, max_steps=1)
    assert trainer.model.config.id2label == dict(enumerate(NAMES))
    assert torch.equal(trainer.model.bert.embeddings.word_embeddings.weight, base.embeddings.word_embeddings.weight)
    trainer.train()
    trainer.save_model()
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert saved.config.id2label == dict(enumerate(NAMES))
    assert saved.config.label2id == {"sky": 0, "fruit": 1, "animal": 2}
    assert saved.classifier.weight.dtype == torch.float32
    assert (tmp_path / "run" / "tokenizer.json").is_file()

    # The same head for the same seed, another for another; names from `labels`
    numbers = Dataset.from_list(list(make_rows()))
    again = make_trainer(tmp_path / "again", path, numbers, labels=NAMES, max_steps=1)
    assert again.model.config.id2label == dict(enumerate(NAMES))
    other = make_trainer(tmp_path / "other", path, numbers, labels=NAMES, max_steps=1, seed=7)
    fresh = make_trainer(tmp_path / "fresh", path, numbers, labels=NAMES, max_steps=1)
    assert torch.equal(again.model.classifier.weight, fresh.model.classifier.weight)
    assert are_different(weights(again.model.classifier), weights(other.model.classifier))


def test_rows_may_be_tokens_already(tmp_path):
    tokenizer = build_tokenizer()
    text = make_rows(16)
    tokens = text.map(lambda row: dict(tokenizer(row["text"]))).remove_columns(["text"])
    _, first = one_step(tmp_path / "text", rows=text)
    _, second = one_step(tmp_path / "tokens", rows=tokens)
    assert_same_gradient(first, second, rtol=0, atol=0)


def test_long_texts_are_cut(tmp_path):
    rows = make_rows(8).remove_columns("text").add_column("passage", ["A dog has four legs. " * 20] * 8)
    trainer = make_trainer(tmp_path, rows=rows, text_column="passage", max_length=5)
    assert {len(ids) for ids in trainer.train_dataset["input_ids"]} == {5}


@pytest.mark.parametrize("build", [build_encoder, build_decoder])
def test_evaluation_says_accuracy_and_macro_f1(tmp_path, build):
    held_out = make_rows(12, seed=5)
    # Columns of pseudo-labelled rows are no input of the student
    trainer = make_trainer(tmp_path, build(), trainer_kwargs={"eval_dataset": held_out}, max_steps=1)
    found = trainer.evaluate()
    tokenizer, model = build_tokenizer(), trainer.model
    logits = torch.cat(
        [model(input_ids=torch.tensor([tokenizer(text)["input_ids"][:24]])).logits for text in held_out["text"]]
    )
    gold, predicted = torch.tensor(held_out["label"][:]), logits.argmax(dim=1)
    assert found["eval_accuracy"] == pytest.approx((gold == predicted).double().mean().item())
    assert found["eval_loss"] == pytest.approx(cross_entropy(logits, gold).item(), rel=1e-4)
    scores = []
    for label in range(3):
        true = sum(1 for g, p in zip(gold, predicted, strict=True) if g == p == label)
        of_gold, of_predicted = (gold == label).sum().item(), (predicted == label).sum().item()
        if of_gold + of_predicted:
            precision = true / of_predicted if of_predicted else 0.0
            recall = true / of_gold if of_gold else 0.0
            scores.append(2 * precision * recall / (precision + recall) if true else 0.0)
    assert found["eval_macro_f1"] == pytest.approx(sum(scores) / len(scores))
    # Rows handed in later are text as well, and need no labels to be predicted
    assert trainer.evaluate(held_out)["eval_accuracy"] == found["eval_accuracy"]
    output = trainer.predict(held_out.remove_columns(["label", "teacher_confidence"]))
    torch.testing.assert_close(torch.tensor(output.predictions), logits, rtol=1e-4, atol=1e-5)
    # Nothing of it moved the thresholds
    assert trainer.selector.step == 0
    both = make_trainer(
        tmp_path, build(), trainer_kwargs={"eval_dataset": {"a": held_out, "b": make_rows(6)}}
    ).evaluate()
    assert both["eval_a_accuracy"] == found["eval_accuracy"] and "eval_b_macro_f1" in both


class StrictEncoder(BertForSequenceClassification):
    """Takes its own inputs and no others, as some students do."""

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None):
        return super().forward(input_ids, attention_mask, token_type_ids, labels=labels)


@pytest.mark.parametrize("selection", ["llkd", "none"])
def test_what_is_carried_is_no_input_of_the_student(tmp_path, selection):
    rows, model = make_rows(16, gold=True), build_encoder()
    model.__class__ = StrictEncoder
    trainer_kwargs = {"eval_dataset": rows}
    trainer = make_trainer(tmp_path, model, rows, trainer_kwargs=trainer_kwargs, selection=selection, max_steps=1)
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer.predict(rows.remove_columns("label")).predictions.shape == (16, 3)


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 1.5}], ids=str)
def test_a_finished_run_is_not_trained_further(tmp_path, length, caplog):
    """transformers would take a step more."""
    config = {"save_strategy": "steps", "save_steps": 1, **length}
    rows = make_rows(16)
    first = make_trainer(tmp_path, build_encoder(), rows, **config)
    first.train()
    second = make_trainer(tmp_path, build_encoder(), rows, **config)
    assert second.train(resume_from_checkpoint=True).global_step == first.state.global_step
    assert second.state.global_step == first.state.global_step
    assert not (tmp_path / f"checkpoint-{first.state.global_step + 1}").exists()
    assert_same_weights(weights(first.model), weights(second.model))
    # What the report reads
    for name, value in first.tally.state_dict().items():
        assert torch.equal(value, second.tally.state_dict()[name]), name
    assert "training: finished before, in" in caplog.text


def test_a_second_call_trains_again(tmp_path):
    trainer = make_trainer(tmp_path, build_encoder(), make_rows(16), save_strategy="steps", save_steps=1, max_steps=2)
    trainer.train()
    before = weights(trainer.model)
    assert trainer.train().global_step == 2
    assert any(not torch.equal(before[name], value) for name, value in weights(trainer.model).items())


def test_macro_f1_by_hand():
    logits = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 1, 1, 3]), 5).float().numpy()
    found = classification_metrics(EvalPrediction(logits, torch.tensor([0, 1, 1, 1, 0, 0]).numpy()))
    # Class 0: 1 right of 3 rows and 2 predictions; class 1: 2 of 3 and 3; class 3: predicted only; 2 and 4: nowhere
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["macro_f1"] == pytest.approx((2 / 5 + 4 / 6 + 0) / 3)


def test_the_teachers_accuracy_is_logged_where_it_is_known(tmp_path):
    rows = make_rows(16, gold=True)
    gold = [None if number < 4 else label for number, label in enumerate(rows["gold"])]
    rows = rows.remove_columns("gold").add_column("gold", gold)
    keep, _, _ = slow_step(build_encoder(), rows)
    trainer, _ = one_step(tmp_path, rows=rows)

    def accuracy(numbers):
        checked = [i for i in numbers if gold[i] is not None]
        return sum(gold[i] == rows["label"][i] for i in checked) / len(checked)

    assert logged(trainer, "selection/teacher_accuracy_kept") == [pytest.approx(accuracy(keep))]
    dropped = [i for i in range(16) if i not in keep]
    assert logged(trainer, "selection/teacher_accuracy_dropped") == [pytest.approx(accuracy(dropped))]
    assert accuracy(keep) != accuracy(dropped)
    assert "gold" not in trainer.learned[0]
    # Without the column nothing is said of it
    trainer, _ = one_step(tmp_path / "without")
    assert not logged(trainer, "selection/teacher_accuracy_kept")


def test_label_smoothing_is_transformers(tmp_path):
    shared = {"label_smoothing_factor": 0.2, "rows": make_rows(8), "selection": "none"}
    _, gradient = one_step(tmp_path, **shared)
    model, tokenizer = build_encoder(), build_tokenizer()
    batch = tokenizer(shared["rows"]["text"][:], padding=True, truncation=True, max_length=24, return_tensors="pt")
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    LabelSmoother(0.2)({"logits": logits}, torch.tensor(shared["rows"]["label"][:])).backward()
    assert_same_gradient(gradient, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def test_the_card_is_a_classifiers(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "AutoModelForSequenceClassification" in card
    assert "hub_token" not in card and "2411.08028" in card
