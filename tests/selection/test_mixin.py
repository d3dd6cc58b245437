import math

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from tests.gad.helpers import weights
from trl_bbkd.errors import LLKDDataError

from .helpers import (
    BY_TEACHER,
    IN_ORDER,
    SETTINGS,
    Recorder,
    Reference,
    assert_same_gradient,
    log,
    make_bayes_trainer,
    make_proxykd_trainer,
    make_sft_trainer,
    selection_rows,
)


ONE_STEP = {"max_steps": 1}


def reference(trainer, student):
    """Of the rows of a trainer that is trained."""
    stores = getattr(trainer.data_collator, "stores", [])
    return Reference(student, trainer.train_dataset, stores, getattr(trainer, "target_weights", []))


class TestGradient:
    @pytest.mark.parametrize(
        ("rule", "weighting"),
        [("class_mean", "product"), ("maxnorm", "sum"), ("global", "teacher"), ("quantile", "student")],
    )
    def test_it_is_that_of_the_kept_rows_alone(self, make, tmp_path, tiny_model_dir, rule, weighting):
        """Which rows are kept, their weights and their gradient: against float64 and logits, row by row."""
        budget, recorder = (0.4 if rule == "quantile" else None), Recorder()
        settings = {"selection_rule": rule, "selection_budget": budget, "selection_weighting": weighting}
        trainer = make(tmp_path, recorder=recorder, **settings, **ONE_STEP)
        trainer.train()
        expected = reference(trainer, tiny_model_dir)
        kept = expected.kept(rule, budget)
        assert 2 <= sum(kept) <= 10 and {True, False} == set(kept)
        row_weights = expected.weights(kept, weighting)
        assert recorder.rows == pytest.approx(
            {name: weight for name, weight in zip(expected.names, row_weights, strict=True) if weight}, rel=1e-5
        )
        tokens = sum(count for count, keep in zip(expected.tokens, kept, strict=True) if keep)
        assert recorder.denominators == [tokens] * 2
        assert_same_gradient(recorder.gradients[0], expected.gradient(row_weights, tokens))
        if rule != "quantile":
            teacher, student = expected.thresholds(rule)
            found = trainer.selector.thresholds()
            assert found.teacher.tolist() == pytest.approx(teacher, rel=1e-6)
            assert found.student.tolist() == pytest.approx(student, rel=1e-5)

    def test_the_logged_loss_is_that_of_the_kept_rows(self, make, tmp_path, tiny_model_dir):
        trainer = make(tmp_path, **ONE_STEP)
        trainer.train()
        expected = reference(trainer, tiny_model_dir)
        kept = expected.kept("class_mean")
        row_weights = expected.weights(kept, "product")
        total = sum(weight * loss.item() for weight, loss in zip(row_weights, expected.losses, strict=True))
        tokens = sum(count for count, keep in zip(expected.tokens, kept, strict=True) if keep)
        assert log(trainer)[0]["loss"] == pytest.approx(total / tokens, rel=1e-4)

    def test_divided_by_the_pool_it_is_smaller_by_the_share_of_kept_tokens(self, make, tmp_path, tiny_model_dir):
        found = {}
        for denominator in ("selected", "pool"):
            recorder = Recorder()
            trainer = make(tmp_path / denominator, recorder=recorder, selection_denominator=denominator, **ONE_STEP)
            trainer.train()
            found[denominator] = recorder
        tokens = reference(trainer, tiny_model_dir).tokens
        assert found["pool"].denominators == [sum(tokens)] * 2
        scale = found["selected"].denominators[0].item() / sum(tokens)
        assert scale < 0.6
        scaled = {name: scale * value for name, value in found["selected"].gradients[0].items()}
        assert_same_gradient(found["pool"].gradients[0], scaled)

    @pytest.mark.parametrize("weighting", ["none", "product"])
    def test_more_rows_that_are_dropped_change_nothing(self, make, tmp_path, weighting):
        rows = selection_rows(48, confidence=lambda number: 0.9 if number % 5 == 0 and number < 16 else 0.1)
        found = []
        for count, size in ((16, 4), (48, 12)):
            recorder = Recorder()
            settings = {"per_device_train_batch_size": size, "selection_weighting": weighting} | BY_TEACHER | ONE_STEP
            trainer = make(tmp_path / f"{count}", rows[:count], recorder=recorder, **settings)
            trainer.train()
            found.append((recorder, weights(trainer.model)))
        (few, after_few), (many, after_many) = found
        assert many.rows == pytest.approx(few.rows, rel=1e-5) and len(few.rows) == 4
        assert_same_gradient(many.gradients[0], few.gradients[0])
        assert_same_gradient(after_many, after_few)

    def test_the_student_is_that_of_sft_on_the_kept_rows(self, tmp_path, tiny_model_dir):
        """One step of TRL's own trainer on the rows that are kept, and no others."""
        rows = selection_rows(16, confidence=lambda number: 0.9 if number % 3 == 0 else 0.1)
        settings = BY_TEACHER | {"selection_weighting": "none"} | ONE_STEP
        trainer = make_sft_trainer(tmp_path / "a", tiny_model_dir, rows, **settings)
        trainer.train()
        plain = plain_trainer(tmp_path / "b", tiny_model_dir, rows[::3], batch=6, accumulation=1, max_steps=1)
        plain.train()
        assert_same_gradient(weights(trainer.model), weights(plain.model))

    def test_the_control_learns_from_random_rows_and_scores_none(self, tmp_path, tiny_model_dir, monkeypatch):
        recorder, settings = Recorder(), {"selection_rule": "random", "selection_budget": 0.5, **ONE_STEP}
        trainer = make_sft_trainer(tmp_path, tiny_model_dir, recorder=recorder, selection_weighting="none", **settings)
        monkeypatch.setattr(trainer, "_uncertainty", lambda pool: pytest.fail("a row was scored"))
        trainer.train()
        assert len(recorder.rows) == 8 and set(recorder.rows.values()) == {1.0}
        found = log(trainer)[0]
        assert found["selection/kept_share"] == 0.5
        assert not [name for name in found if "uncertainty" in name or "threshold_student" in name]

    def test_without_indicators_and_weights_it_is_plain_training_on_the_pools(self, tmp_path, tiny_model_dir):
        settings = {"selection_use_teacher": False, "selection_use_student": False, "selection_weighting": "none"}
        trainer = make_sft_trainer(tmp_path / "a", tiny_model_dir, num_train_epochs=3, **settings)
        trainer.train()
        plain = plain_trainer(tmp_path / "b", tiny_model_dir, selection_rows(), batch=8, num_train_epochs=3)
        plain.train()
        assert trainer.state.global_step == plain.state.global_step == 3
        assert_close_weights(trainer.model, plain.model)
        assert [entry["loss"] for entry in log(trainer)] == pytest.approx(
            [entry["loss"] for entry in log(plain)], rel=1e-4
        )

    def test_so_it_is_with_soft_targets(self, tmp_path, tiny_model_dir, targets):
        settings = {"selection_use_teacher": False, "selection_use_student": False, "selection_weighting": "none"}
        none = {"selection": "none", "per_device_train_batch_size": 8}
        found = []
        for name, config in (("a", settings), ("b", none)):
            trainer = make_bayes_trainer(tmp_path / name, tiny_model_dir, targets, num_train_epochs=3, **config)
            trainer.train()
            assert trainer.state.global_step == 3
            found.append(trainer)
        assert_close_weights(*(trainer.model for trainer in found))
        logged, plain = ([entry["loss"] for entry in log(trainer)] for trainer in found)
        assert logged == pytest.approx(plain, rel=1e-4)
        assert [[entry["num_tokens"] for entry in log(trainer)] for trainer in found][0] == [
            entry["num_tokens"] for entry in log(found[1])
        ]

    def test_it_is_so_for_proxykd_with_row_weights_of_its_own(self, tmp_path, tiny_model_dir, other_model_dir):
        recorder, settings = Recorder(), {"stages": ["cache", "distil"], "sample_weighting": "mean"}
        trainer = make_proxykd_trainer(tmp_path, tiny_model_dir, other_model_dir, recorder, **settings, **ONE_STEP)
        trainer.train()
        assert len(set(trainer.train_dataset["sample_weight"])) > 8
        expected = reference(trainer, tiny_model_dir)
        kept = expected.kept("class_mean")
        tokens = sum(count for count, keep in zip(expected.tokens, kept, strict=True) if keep)
        assert_same_gradient(recorder.gradients[0], expected.gradient(expected.weights(kept, "product"), tokens))

    @pytest.mark.parametrize("source", ["cache", "live"])
    def test_proxykd_steps_over_pools_of_which_nothing_is_kept(
        self, tmp_path, tiny_model_dir, other_model_dir, source
    ):
        rows, recorder = selection_rows(confidence=lambda number: 0.9 if number < 8 else 0.1), Recorder()
        settings = {"stages": ["cache", "distil"], "sample_weighting": "mean", "target_source": source}
        settings |= BY_TEACHER | IN_ORDER | ONE_STEP
        trainer = make_proxykd_trainer(tmp_path, tiny_model_dir, other_model_dir, recorder, rows, **settings)
        trainer.train()
        assert [len(batch) for batch in recorder.batches] == [8, 0]
        assert all(gradient.isfinite().all() for gradient in recorder.gradients[0].values())
        assert math.isfinite(log(trainer)[0]["loss"]) and log(trainer)[0]["loss"] > 0

    def test_in_the_warm_up_every_row_is_kept_with_its_weight(self, make, tmp_path, tiny_model_dir):
        recorder = Recorder()
        trainer = make(tmp_path, recorder=recorder, selection_warmup_steps=1, max_steps=2)
        trainer.train()
        expected = reference(trainer, tiny_model_dir)
        everything = dict(zip(expected.names, expected.weights([True] * 16, "product"), strict=True))
        first = {row: weight for batch in recorder.batches[:2] for row, weight in batch.items()}
        assert first == pytest.approx(everything, rel=1e-5)
        assert sum(map(len, recorder.batches[2:])) < 10


def plain_trainer(output_dir, student, rows, batch, accumulation=2, **config):
    """TRL's own, on the same rows."""
    names = ("learning_rate", "lr_scheduler_type", "max_grad_norm", "optim")
    args = SFTConfig(
        str(output_dir),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        gradient_checkpointing=False,
        max_length=None,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **{name: SETTINGS[name] for name in names},
        **config,
    )
    return SFTTrainer(student, args, train_dataset=Dataset.from_list(rows))


def assert_close_weights(model, other):
    """But for the rounding of a batch that is learned from in pieces."""
    for name, value in weights(model).items():
        torch.testing.assert_close(value, weights(other)[name], atol=1e-6, rtol=1e-4, msg=name)


class TestCost:
    def test_no_more_rows_have_gradients_at_once_than_the_batch_has(self, make, tmp_path):
        """In the first steps a whole pool is kept."""
        trainer = make(tmp_path, selection_warmup_steps=9, num_train_epochs=1)
        seen = {True: [], False: []}
        trainer.model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: seen[torch.is_grad_enabled()].append(output.shape[0])
        )
        trainer.train()
        size = trainer.args.per_device_train_batch_size
        assert max(seen[True]) == size < max(seen[False]) and sum(seen[True]) == sum(seen[False]) == 16

    def test_a_dropped_row_goes_through_no_forward_with_gradients_and_no_backward(self, make, tmp_path):
        recorder, seen = Recorder(), {True: 0, False: 0}
        backward = []
        trainer = make(tmp_path, recorder=recorder, num_train_epochs=3)

        def spy(module, args, output):
            seen[torch.is_grad_enabled()] += output.shape[0]
            if output.requires_grad:
                output.register_hook(lambda gradient: backward.append(len(gradient)))

        trainer.model.get_input_embeddings().register_forward_hook(spy)
        trainer.train()
        learned = sum(len(batch) or 1 for batch in recorder.batches)
        assert learned < 3 * 16 / 2
        assert seen == {True: learned, False: 3 * 16}
        assert sum(backward) == learned

    def test_what_is_kept_is_no_wider_than_its_longest_row(self, make, tmp_path):
        """The longer half of the rows is dropped, and its padding with it."""
        sizes = [len(row["prompt"] + row["completion"]) for row in selection_rows()]
        middle = sorted(sizes)[8]
        rows = selection_rows(confidence=lambda number: 0.9 if sizes[number] < middle else 0.1)
        widths, longest = [], []
        trainer = make(tmp_path, rows, **BY_TEACHER, **ONE_STEP)
        step = trainer.training_step

        def spy(model, inputs, num_items_in_batch=None):
            widths.append(inputs["input_ids"].size(1))
            longest.append(inputs["attention_mask"].sum(1).max().item())
            return step(model, inputs, num_items_in_batch)

        trainer.training_step = spy
        trainer.train()
        assert widths == longest
        assert max(widths) < max(map(len, trainer.train_dataset["input_ids"]))

    def test_dropout_is_off_while_a_pool_is_scored_and_on_where_it_is_learned_from(self, make, tmp_path):
        modes = {True: set(), False: set()}
        trainer = make(tmp_path, max_steps=2)
        trainer.model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: modes[torch.is_grad_enabled()].add(module.training)
        )
        trainer.train()
        assert modes == {True: {True}, False: {False}}


def without(name):
    return [{key: value for key, value in row.items() if key != name} for row in selection_rows()]


def with_value(name, value, row=5):
    rows = selection_rows()
    rows[row][name] = value
    return rows


class TestBadInput:
    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (
                without("teacher_confidence"),
                "needs a column `teacher_confidence`.* Make it with `trl_bbkd.pseudo_label`",
            ),
            (
                with_value("teacher_confidence", math.nan),
                "Row 5: `teacher_confidence` is nan; it must be a number from 0",
            ),
            (with_value("teacher_confidence", None), "Row 5: `teacher_confidence` is None; .*drop rows for which"),
            (
                with_value("teacher_confidence", 1.5),
                "Row 5: `teacher_confidence` is 1.5; .* Divide percentages by 100",
            ),
            (with_value("teacher_confidence", -0.1), "Row 5: `teacher_confidence` is -0.1; .*turn log-probabilities"),
            (with_value("group", -1), "Row 5: `group` is -1; it must be 0 or more"),
            (with_value("group", None), "Row 5: `group` is None; it must be an integer"),
            (
                [row | {"group": str(row["group"])} for row in selection_rows()],
                "Row 0: `group` is '.'; it must be an int",
            ),
            ([row | {"row_id": "a"} for row in selection_rows()], "Row 0: `row_id` is 'a'; it must be an integer"),
            (selection_rows(7), "A pool of 8 rows .*is larger than the data set of 7. Lower pool_factor"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_rows_that_cannot_be_selected_by_are_refused_before_training(self, make, tmp_path, rows, message):
        with pytest.raises(LLKDDataError, match=message):
            make(tmp_path, rows)

    def test_a_column_that_is_not_there_is_no_error_without_selection(self, make, tmp_path):
        trainer = make(tmp_path, without("teacher_confidence"), selection="none", **ONE_STEP)
        trainer.train()
        assert trainer.selector is None and not any("selection" in name for name in log(trainer)[0])

    def test_rows_without_groups_are_one_group(self, make, tmp_path):
        trainer = make(tmp_path, without("group"), **ONE_STEP)
        trainer.train()
        assert len(trainer.selector.thresholds().teacher) == 1
        assert 0 < log(trainer)[0]["selection/kept_share_0"] == log(trainer)[0]["selection/kept_share"] < 1

    def test_a_stream_is_refused(self, tmp_path, tiny_model_dir):
        stream = Dataset.from_list(selection_rows()).to_iterable_dataset()
        with pytest.raises(LLKDDataError, match="needs a `Dataset`, not a stream. Turn streaming off"):
            make_sft_trainer(tmp_path, tiny_model_dir, stream, max_steps=1)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"packing": True, "max_length": 64}, "packing=True .*Set it to False"),
            ({"padding_free": True}, "padding_free=True .*Set it to False"),
            ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy='batch_rebalance' .*no pool"),
            ({"selection": "lkd"}, "selection must be one of none, llkd, got 'lkd'"),
            (
                {"selection_rule": "median"},
                "selection_rule is 'median'; it must be one of class_mean, maxnorm, global",
            ),
            (
                {"selection_weighting": "both"},
                "selection_weighting is 'both'; it must be one of product, sum, teacher",
            ),
            ({"selection_denominator": "all"}, "selection_denominator must be one of selected, pool, got 'all'"),
            ({"selection_momentum": 1.0}, "selection_momentum is 1.0; it must be at least 0 and below 1"),
            ({"selection_momentum": math.nan}, "selection_momentum is nan; it must be at least 0 and below 1"),
            ({"selection_rule": "quantile"}, "selection_budget is None; rule: quantile needs a share between 0 and 1"),
            ({"selection_rule": "quantile", "selection_budget": 1.0}, "selection_budget is 1.0; .*between 0 and 1"),
            ({"selection_budget": 0.5}, "selection_budget is for the rules quantile and random"),
            ({"selection_warmup_steps": -1}, "selection_warmup_steps is -1; it must be at least 0"),
            ({"pool_factor": 0}, "pool_factor must be a whole number of at least 1, got 0"),
            ({"pool_factor": 1.5}, "pool_factor must be a whole number of at least 1, got 1.5"),
        ],
        ids=str,
    )
    def test_settings_that_select_nothing_are_refused(self, make, tmp_path, config, message):
        if make.kind == "bayeskd" and config.keys() & {"packing", "padding_free"}:
            message = f"{next(iter(config))}=True is not possible with soft targets"
        with pytest.raises(ValueError, match=message):
            make(tmp_path, **config)

    @pytest.mark.parametrize(
        ("saved", "message"),
        [
            ({"selection": "none"}, "has no selection.safetensors: it is of a run without selection"),
            ({"selection_rule": "global"}, "another run .selection_rule: 'global' there, 'class_mean' here"),
            ({"rows": selection_rows(24)}, "is of 24 rows, and `train_dataset` has 16"),
            ({"rows": selection_rows(16, groups=5)}, "has 5 groups, but num_groups is 3"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_a_checkpoint_of_another_run_is_refused(self, tmp_path, tiny_model_dir, saved, message):
        settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
        make_sft_trainer(tmp_path / "a", tiny_model_dir, **settings | saved).train()
        other = make_sft_trainer(tmp_path / "b", tiny_model_dir, max_steps=2)
        with pytest.raises(ValueError, match=message):
            other.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-1"))

    @pytest.mark.parametrize("config", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}], ids=str)
    def test_another_loss_of_trl_is_refused(self, tmp_path, tiny_model_dir, config):
        with pytest.raises(ValueError, match=f"{next(iter(config))} is not possible with selection='llkd'"):
            make_sft_trainer(tmp_path, tiny_model_dir, **config)
