"""GADTrainer in the place of GRPOTrainer: arguments, rows at every door, reward functions, callbacks, a second train."""

import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig, PromptTuningConfig
from trl import GRPOConfig, LogCompletionsCallback

from trl_bbkd.errors import TeacherDataError
from trl_bbkd.gad.trainer import GADTrainer

from .helpers import (
    are_different,
    assert_same_weights,
    discriminator_steps,
    make_config,
    make_trainer,
    no_model_is_loaded,
    weights,
)


@pytest.fixture
def evaluated(tiny_model_dir, tmp_path, standard_rows):
    return make_trainer(tmp_path, tiny_model_dir, standard_rows, per_device_eval_batch_size=8, max_steps=1)


class TestArguments:
    def test_another_configuration(self, tmp_path, monkeypatch):
        no_model_is_loaded(monkeypatch)
        config = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
        with pytest.raises(TypeError, match="args of GADTrainer must be a GADConfig, got GRPOConfig"):
            GADTrainer("student", args=config)

    def test_a_configuration_in_the_place_of_the_rewards(self, tmp_path):
        with pytest.raises(TypeError, match="second argument of GADTrainer is reward_funcs.*args="):
            GADTrainer("student", make_config(tmp_path))

    def test_a_processor(self, tiny_model_dir, tmp_path):
        with pytest.raises(TypeError, match="processing_class must be a tokenizer, got ProcessorMixin"):
            GADTrainer(tiny_model_dir, args=make_config(tmp_path), processing_class=transformers.ProcessorMixin())

    def test_a_schedule_beside_ours(self, tiny_model_dir, tmp_path):
        with pytest.raises(ValueError, match="warmup_learning_rate changes.*`optimizers` brings another"):
            GADTrainer(
                tiny_model_dir, args=make_config(tmp_path, warmup_learning_rate=1e-3), optimizers=(None, object())
            )

    @pytest.mark.parametrize("given", ["reward_weights", "reward_processing_classes"])
    def test_not_one_for_each_reward(self, tiny_model_dir, tmp_path, standard_rows, monkeypatch, given):
        no_model_is_loaded(monkeypatch)
        config, kwargs = {}, {"reward_funcs": [len]}
        (config if given == "reward_weights" else kwargs)[given] = [1.0, 1.0]
        with pytest.raises(ValueError, match=f"{given} has 2 entries for 1 reward_funcs"):
            make_trainer(tmp_path, tiny_model_dir, standard_rows, trainer_kwargs=kwargs, **config)

    def test_the_critic_reads_no_virtual_tokens(self, tiny_model_dir, tmp_path, standard_rows):
        adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        with pytest.raises(ValueError, match="PromptTuningConfig.*student: critic='trunk' reads its trunk"):
            make_trainer(
                tmp_path,
                tiny_model_dir,
                standard_rows,
                trainer_kwargs={"peft_config": adapter},
                advantage_estimator="gae",
                critic="trunk",
            )

    def test_a_student_of_virtual_tokens_learns_in_both_stages(self, tiny_model_dir, tmp_path, standard_rows):
        adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        trainer = make_trainer(
            tmp_path,
            tiny_model_dir,
            standard_rows,
            trainer_kwargs={"peft_config": adapter},
            beta=0.1,
            learning_rate=0.1,
            max_steps=6,
        )
        before = weights(trainer.model)
        trainer.train()
        kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
        assert kl[0] == 0 and kl[-1] > 0, "the reference is not the warmed-up prompt"
        assert are_different(before, weights(trainer.model))

    def test_a_rollout_function(self, tiny_model_dir, tmp_path, standard_rows):
        seen = []

        def roll_out(prompts, trainer):
            seen.extend(prompts)
            ids = trainer.processing_class(text=prompts)["input_ids"]
            answers = [[5 + len(seen) % 7, trainer.processing_class.eos_token_id] for _ in prompts]
            return {"prompt_ids": ids, "completion_ids": answers, "logprobs": None}

        kwargs = {"rollout_func": roll_out}
        make_trainer(tmp_path, tiny_model_dir, standard_rows, trainer_kwargs=kwargs, max_steps=2).train()
        assert len(seen) == 16

        def with_mask(prompts, trainer):
            return roll_out(prompts, trainer) | {"env_mask": [[1, 1]] * len(prompts)}

        trainer = make_trainer(
            tmp_path, tiny_model_dir, standard_rows, trainer_kwargs={"rollout_func": with_mask}, max_steps=2
        )
        with pytest.raises(ValueError, match="rollout_func returned `env_mask`"):
            trainer.train()


class TestRows:
    def test_held_out_rows_are_measured_alike_at_every_door(self, tiny_model_dir, tmp_path, standard_rows):
        held_out = Dataset.from_list(standard_rows[12:])
        kwargs = {"eval_dataset": held_out}
        trainer = make_trainer(
            tmp_path, tiny_model_dir, standard_rows, trainer_kwargs=kwargs, per_device_eval_batch_size=8
        )
        expected = trainer.evaluate()["eval_teacher_nll"]
        assert trainer.evaluate(held_out)["eval_teacher_nll"] == expected
        assert trainer.evaluate({"a": held_out})["eval_a_teacher_nll"] == expected
        assert trainer.predict(held_out).metrics["test_teacher_nll"] == expected
        assert trainer.evaluate(held_out.to_iterable_dataset())["eval_teacher_nll"] == pytest.approx(expected)
        trainer.eval_dataset = {"b": held_out}
        assert trainer.evaluate()["eval_b_teacher_nll"] == expected
        trainer.eval_dataset = held_out
        assert trainer.evaluate()["eval_teacher_nll"] == expected

    def test_training_rows_that_were_replaced(self, evaluated, standard_rows):
        evaluated.train_dataset = Dataset.from_list(standard_rows[4:10])
        evaluated.train()
        assert len(evaluated.train_dataset["teacher_ids"]) == 6

    def test_bad_rows_at_a_later_door(self, evaluated, standard_rows):
        with pytest.raises(TeacherDataError, match="has no column `completion`"):
            evaluated.evaluate(Dataset.from_list([{"prompt": "Say hello"}]))
        with pytest.raises(TeacherDataError, match="Row 0: `completion` is empty"):
            evaluated.predict(Dataset.from_list([{"prompt": "Say hello", "completion": ""}]))

    @pytest.mark.parametrize("rows", [None, [{"prompt": "a", "completion": "b"}], DatasetDict()], ids=repr)
    def test_what_is_no_data_set(self, tiny_model_dir, tmp_path, monkeypatch, rows):
        no_model_is_loaded(monkeypatch)
        with pytest.raises(TeacherDataError, match=f"must be a `Dataset`.*got {type(rows).__name__}"):
            GADTrainer(tiny_model_dir, args=make_config(tmp_path), train_dataset=rows)

    def test_a_stream_is_prepared_once(self, tiny_model_dir, tmp_path, standard_rows):
        stream = IterableDataset.from_generator(lambda: iter(standard_rows[:12]))
        assert stream.column_names is None
        trainer = GADTrainer(tiny_model_dir, args=make_config(tmp_path, max_steps=2), train_dataset=stream)
        prepared = trainer.train_dataset
        trainer.train()
        assert trainer.train_dataset is prepared and trainer.state.global_step == 2


class TestTooFewPrompts:
    @pytest.mark.parametrize(
        ("num_rows", "config", "message"),
        [
            (
                1,
                {},
                "1 training prompts do not fill one batch of 2 prompts.*lower per_device_train_batch_size .8., or",
            ),
            (1, {"max_steps": 3}, "1 training prompts do not fill one batch of 2"),
            (
                3,
                {"gradient_accumulation_steps": 2},
                "3 training prompts.*of 4.*or gradient_accumulation_steps .2., or raise num_generations .4.",
            ),
            (7, {"steps_per_generation": 4}, "7 training prompts.*of 8.*or steps_per_generation .4., or raise"),
            (
                12,
                {"max_prompt_length": 10, "steps_per_generation": 4},
                r"\d training prompts do not fill.*raise max_prompt_length .10., which dropped \d+ of 12 rows",
            ),
        ],
    )
    def test_before_loading(self, tiny_model_dir, tmp_path, standard_rows, monkeypatch, num_rows, config, message):
        no_model_is_loaded(monkeypatch)
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, tiny_model_dir, standard_rows[:num_rows], **config)

    def test_one_batch_is_enough(self, tiny_model_dir, tmp_path, standard_rows):
        make_trainer(tmp_path, tiny_model_dir, standard_rows[:2], max_steps=1).train()

    def test_in_rows_that_were_replaced(self, evaluated, standard_rows):
        evaluated.train_dataset = Dataset.from_list(standard_rows[:1])
        with pytest.raises(ValueError, match="1 training prompts do not fill one batch of 2"):
            evaluated.train()

    def test_of_a_stream_is_told_at_the_end(self, tiny_model_dir, tmp_path, standard_rows):
        stream = Dataset.from_list(standard_rows[:1]).to_iterable_dataset()
        trainer = GADTrainer(tiny_model_dir, args=make_config(tmp_path, max_steps=2), train_dataset=stream)
        with pytest.raises(ValueError, match="GADTrainer took no optimizer step and learned nothing"):
            trainer.train()


class TestRewards:
    def train(self, tmp_path, model, rows, reward):
        trainer = make_trainer(tmp_path, model, rows, trainer_kwargs={"reward_funcs": reward}, max_steps=1)
        trainer.train()
        return trainer.state.log_history[0]

    def test_one_that_names_all_that_grpo_passes(self, tiny_model_dir, tmp_path, standard_rows):
        def strict(prompts, completions, completion_ids, row, trainer_state, log_extra, log_metric):
            return [2.0] * len(prompts)

        assert self.train(tmp_path, tiny_model_dir, standard_rows, strict)["rewards/strict/mean"] == 2.0

    def test_an_asynchronous_one(self, tiny_model_dir, tmp_path, standard_rows):
        async def later(prompts, completions, completion_ids, row, trainer_state, log_extra, log_metric):
            return [3.0] * len(prompts)

        assert self.train(tmp_path, tiny_model_dir, standard_rows, later)["rewards/later/mean"] == 3.0

    def test_an_object(self, tiny_model_dir, tmp_path, standard_rows):
        class Constant:
            def __call__(self, prompts, completions, completion_ids, row, trainer_state, log_extra, log_metric):
                return [4.0] * len(prompts)

        assert self.train(tmp_path, tiny_model_dir, standard_rows, Constant())["rewards/Constant/mean"] == 4.0

    def test_the_teacher_s_answer_is_passed_by_name_and_our_column_is_not(
        self, tiny_model_dir, tmp_path, standard_rows
    ):
        answers, names = [], set()

        def by_name(
            completions, teacher_completion, prompts, completion_ids, row, trainer_state, log_extra, log_metric
        ):
            answers.extend(teacher_completion)
            return [0.0] * len(completions)

        def takes_all(completions, **kwargs):
            names.update(kwargs)
            return [0.0] * len(completions)

        self.train(tmp_path, tiny_model_dir, standard_rows, [by_name, takes_all])
        assert len(answers) == 8 and set(answers) <= {row["completion"] for row in standard_rows}
        assert "teacher_completion" in names and "teacher_ids" not in names


def test_completions_are_logged_by_trl_s_callback(tiny_model_dir, tmp_path, standard_rows, monkeypatch):
    kwargs = {"eval_dataset": Dataset.from_list(standard_rows[12:])}
    trainer = make_trainer(tmp_path, tiny_model_dir, standard_rows, trainer_kwargs=kwargs, max_steps=1)
    callback = LogCompletionsCallback(trainer, num_prompts=2, freq=1)
    tables = []
    monkeypatch.setattr(
        "trl.trainer.callbacks._generate_completions", lambda prompts, **kwargs: tables.append(prompts) or prompts
    )
    trainer.add_callback(callback)
    trainer.train()
    assert tables and tables[0] == [row["prompt"] for row in standard_rows[12:14]]


def test_evaluation_is_no_step_where_generation_leaves_the_training_mode(tiny_model_dir, tmp_path, standard_rows):
    """TRL does so with continuous batching."""

    class Careless(GADTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            output = super()._generate_single_turn(*args, **kwargs)
            self.model.train()
            return output

    trainer = make_trainer(tmp_path, tiny_model_dir, standard_rows, Careless, per_device_eval_batch_size=8)
    before = weights(trainer.discriminator)
    metrics = trainer.evaluate(Dataset.from_list(standard_rows[12:]))
    assert discriminator_steps(trainer) == 0 and not trainer.model.training
    assert_same_weights(before, weights(trainer.discriminator))
    assert {"eval_teacher_nll", "eval_discriminator/accuracy"} <= set(metrics)


class TestTrainingAgain:
    CONFIG = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "beta": 0.1}

    @pytest.mark.parametrize("lora", [False, True])
    def test_a_second_call_begins_at_the_warm_up(self, tiny_model_dir, tmp_path, standard_rows, lora):
        adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
        kwargs = {"peft_config": adapter}
        trainer = make_trainer(
            tmp_path, tiny_model_dir, standard_rows, trainer_kwargs=kwargs, **self.CONFIG | {"learning_rate": 1e-2}
        )
        trainer.train()
        first = weights(trainer.model)
        assert trainer.train().global_step == 4
        assert are_different(first, weights(trainer.model))
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [entry["adversarial_phase"] for entry in steps] == [0, 0, 1, 1]
        assert steps[2]["kl"] == 0 < steps[3]["kl"], "the reference is that of the first call"

    def test_a_second_call_learns_from_fresh_samples(self, tiny_model_dir, tmp_path, standard_rows):
        """The first one ends in the middle of a generation batch."""
        batches = []

        class Counting(GADTrainer):
            def _generate(self, prompts):
                batches.append(self.state.global_step)
                return super()._generate(prompts)

        trainer = make_trainer(tmp_path, tiny_model_dir, standard_rows, Counting, max_steps=3, steps_per_generation=2)
        trainer.train()
        trainer.train()
        assert batches == [0, 2, 0, 2]

    def test_a_checkpoint_of_the_first_call_is_gone_on_with(self, tiny_model_dir, tmp_path, standard_rows):
        trainer = make_trainer(tmp_path, tiny_model_dir, standard_rows, **self.CONFIG)
        trainer.train()
        student, discriminator = weights(trainer.model), weights(trainer.discriminator)
        for step in (1, 3):
            trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
            assert_same_weights(student, weights(trainer.model))
            assert_same_weights(discriminator, weights(trainer.discriminator))
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 4
        assert_same_weights(student, weights(trainer.model))

    def test_another_trainer_s_checkpoints_are_still_refused(self, tiny_model_dir, tmp_path, standard_rows):
        make_trainer(tmp_path, tiny_model_dir, standard_rows, **self.CONFIG).train()
        with pytest.raises(ValueError, match="output_dir holds checkpoints of another run"):
            make_trainer(tmp_path, tiny_model_dir, standard_rows, **self.CONFIG).train()


@pytest.mark.slow
def test_a_compiled_run_ends_alike(tiny_model_dir, tmp_path, standard_rows):
    ends = []
    for name, compiled in (("plain", {}), ("compiled", {"torch_compile": True, "torch_compile_backend": "eager"})):
        config = {"max_steps": 4, "beta": 0.1, "discriminator_head": "likelihood", "save_strategy": "steps"}
        trainer = make_trainer(tmp_path / name, tiny_model_dir, standard_rows, save_steps=4, **config, **compiled)
        trainer.train()
        ends.append((weights(trainer.model), weights(trainer.discriminator)))
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0].values(), ends[1][0].values(), strict=True))
    assert_same_weights(ends[0][1], ends[1][1])
