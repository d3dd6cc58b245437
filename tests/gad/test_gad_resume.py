import json
import os
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from tests.processes import Moment, killed_at, train
from trl_bbkd.gad.trainer import GADTrainer
from trl_bbkd.host.resume import is_finished, last_finished_checkpoint

from .helpers import are_different, assert_same_weights, make_trainer, weights


LORA = {"r": 4, "target_modules": "all-linear"}


@pytest.mark.parametrize("resume_at", [2, 4])
@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tiny_model_dir, tmp_path, standard_rows, lora, resume_at):
    """Warm-up has 3 steps: the first checkpoint lies inside it, the second in the adversarial stage."""

    def trainer(name):
        kwargs = {}
        if lora:
            kwargs["peft_config"] = LoraConfig(**LORA, task_type="CAUSAL_LM")
            kwargs["discriminator_peft_config"] = LoraConfig(**LORA)
        return make_trainer(
            tmp_path / name,
            tiny_model_dir,
            standard_rows,
            trainer_kwargs=kwargs,
            max_steps=6,
            save_strategy="steps",
            save_steps=2,
            beta=0.1,
            discriminator_head="likelihood",
        )

    straight = trainer("run")
    straight.train()
    final = straight.state.log_history[5]
    checkpoint = tmp_path / "run" / f"checkpoint-{resume_at}"
    state = json.loads((checkpoint / "gad_state.json").read_text())
    assert (state["phase"], state["warmup_steps"]) == ("warmup" if resume_at == 2 else "adversarial", 3)

    resumed = trainer("run")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(weights(straight.model), weights(resumed.model))
    assert_same_weights(weights(straight.discriminator), weights(resumed.discriminator))
    assert resumed.state.log_history[5]["kl"] == final["kl"] > 0
    states = [
        [
            t.discriminator_trainer.engine.optimizer.state[p]["exp_avg"]
            for p in t.discriminator_trainer.engine.parameters
        ]
        for t in (straight, resumed)
    ]
    assert all((first == second).all() for first, second in zip(*states, strict=True))


def test_an_adapter_discriminator_is_not_loaded_into_the_student(tiny_model_dir, tmp_path, standard_rows):
    """transformers loads every adapter it finds one level below a checkpoint into the student."""
    trainer = make_trainer(
        tmp_path,
        tiny_model_dir,
        standard_rows,
        trainer_kwargs={"discriminator_peft_config": LoraConfig(**LORA)},
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    assert (checkpoint / "discriminator" / "backbone" / "adapter_model.safetensors").is_file()
    assert not list(checkpoint.glob("*/adapter_model.safetensors"))


def test_what_is_missing_is_named(tiny_model_dir, tmp_path, standard_rows):
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3, "beta": 0.1}
    make_trainer(tmp_path, tiny_model_dir, standard_rows, **config).train()
    shutil.move(tmp_path / "warmed_up_student", tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="KL reference of this run.*warmed_up_student"):
        make_trainer(tmp_path, tiny_model_dir, standard_rows, **config).train(str(tmp_path / "checkpoint-3"))
    (tmp_path / "checkpoint-3" / "gad_state.json").unlink()
    with pytest.raises(ValueError, match="gad_state.json is missing"):
        make_trainer(tmp_path, tiny_model_dir, standard_rows, **config).train(str(tmp_path / "checkpoint-3"))


def test_save_model_leaves_student_and_discriminator(tiny_model_dir, tmp_path, standard_rows):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_bbkd.discriminator.model import Discriminator

    trainer = make_trainer(tmp_path / "run", tiny_model_dir, standard_rows, max_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert_same_weights(weights(trainer.model), weights(student))
    assert are_different(weights(student), weights(AutoModelForCausalLM.from_pretrained(tiny_model_dir)))
    discriminator = Discriminator.from_pretrained(tmp_path / "final" / "discriminator")
    assert_same_weights(weights(trainer.discriminator), weights(discriminator))
    assert AutoTokenizer.from_pretrained(tmp_path / "final").eos_token == "<|im_end|>"


EVERYTHING_ON = {
    "max_steps": 6,
    "num_train_epochs": 6,
    "warmup_epochs": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "beta": 0.1,
    "discriminator_head": "likelihood",
    "advantage_estimator": "gae",
    "critic": "copy",
    "critic_learning_rate": 1e-3,
    "discriminator_replay_size": 40,
}


def everything(trainer):
    """Weights and optimizer states of student, discriminator and critic, and the replayed pairs."""
    critic, replay = trainer.critic_trainer, trainer.discriminator_trainer.replay
    optimizers = [trainer.optimizer, trainer.discriminator_trainer.engine.optimizer, critic.engine.optimizer]
    states = [
        torch.as_tensor(value).clone()
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        for _, value in sorted(getattr(optimizer, "optimizer", optimizer).state[parameter].items())
    ]
    modules = (trainer.model, trainer.discriminator, critic.critic)
    return [weights(module) for module in modules], states, list(replay.pairs), replay.generator.get_state()


@pytest.mark.parametrize(
    "cycle",
    [
        {"steps_per_generation": 4},
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 2},
    ],
    ids=["4 steps a batch", "2 micro-batches, 2 iterations"],
)
def test_a_run_resumed_at_any_step_ends_like_an_uninterrupted_one(tiny_model_dir, tmp_path, standard_rows, cycle):
    def trainer():
        return make_trainer(tmp_path, tiny_model_dir, standard_rows, **EVERYTHING_ON, **cycle)

    straight = trainer()
    straight.train()
    expected_weights, expected_states, expected_pairs, expected_generator = everything(straight)
    assert straight.discriminator_trainer.replay.pairs
    for step in range(1, 6):
        resumed = trainer()
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        found_weights, found_states, found_pairs, found_generator = everything(resumed)
        for expected, found in zip(expected_weights, found_weights, strict=True):
            assert_same_weights(expected, found)
        assert all(torch.equal(*pair) for pair in zip(expected_states, found_states, strict=True)), step
        assert found_pairs == expected_pairs
        assert torch.equal(found_generator, expected_generator)


def test_a_run_killed_while_saving_goes_on_from_the_checkpoint_before(tiny_model_dir, tmp_path, standard_rows):
    config = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    straight = make_trainer(tmp_path / "straight", tiny_model_dir, standard_rows, **config)
    straight.train()

    second_time_it_saves = Moment("trl_bbkd.gad.trainer.GADTrainer._save_rng_state", call=2)
    killed_at(second_time_it_saves, train, make_trainer, tmp_path / "run", tiny_model_dir, standard_rows, **config)
    half_written = tmp_path / "run" / "checkpoint-4"
    assert (half_written / "gad_state.json").is_file() and not is_finished(half_written)

    resumed = make_trainer(tmp_path / "run", tiny_model_dir, standard_rows, **config)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights(straight.model), weights(resumed.model))
    assert_same_weights(weights(straight.discriminator), weights(resumed.discriminator))
    assert is_finished(half_written)


def test_a_checkpoint_cut_inside_its_last_file_is_not_finished(tmp_path):
    state = tmp_path / "trainer_state.json"
    state.write_text(json.dumps({"global_step": 2}))
    assert is_finished(tmp_path)
    os.truncate(state, 5)
    assert not is_finished(tmp_path)


def test_two_runs_are_not_mixed_up_in_one_folder(tiny_model_dir, tmp_path, standard_rows):
    config = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, tiny_model_dir, standard_rows, **config).train()
    with pytest.raises(ValueError, match="holds checkpoints of another run.*checkpoint-2.*Choose another output_dir"):
        make_trainer(tmp_path, tiny_model_dir, standard_rows, **config).train()
    other = make_trainer(tmp_path, tiny_model_dir, standard_rows, **config, num_generations=2)
    with pytest.raises(ValueError, match="belongs to another run.*num_generations: 4 there, 2 here.*Resume with its"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert other.state.global_step == 0
    with pytest.raises(ValueError, match="no finished checkpoint"):
        make_trainer(tmp_path / "empty", tiny_model_dir, standard_rows, **config).train(resume_from_checkpoint=True)


class StoppedWhileSaving(GADTrainer):
    def _save_rng_state(self, output_dir):
        raise KeyboardInterrupt


def test_a_checkpoint_that_is_written_over_is_not_finished_meanwhile(tiny_model_dir, tmp_path, standard_rows):
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, tiny_model_dir, standard_rows, **config).train()
    stopped = make_trainer(tmp_path, tiny_model_dir, standard_rows, StoppedWhileSaving, **config)
    with pytest.raises(KeyboardInterrupt):
        stopped.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert last_finished_checkpoint(tmp_path).name == "checkpoint-2"


def test_a_run_made_longer_keeps_its_warmup(tiny_model_dir, tmp_path, standard_rows):
    """Warm-up is a share of the steps: of more steps it would be longer."""
    config = {"save_strategy": "steps", "save_steps": 4, "warmup_learning_rate": 1e-2, "learning_rate": 1e-3}
    make_trainer(tmp_path, tiny_model_dir, standard_rows, max_steps=4, **config).train()
    longer = make_trainer(tmp_path, tiny_model_dir, standard_rows, max_steps=12, **config)
    longer.train(resume_from_checkpoint=True)
    rates = [entry["learning_rate"] for entry in longer.state.log_history if "learning_rate" in entry]
    assert len(rates) == 12 and rates[:2] == [1e-2, 1e-2] and set(rates[4:]) == {1e-3}


class AtStep(TrainerCallback):
    """Keeps the student's weights after a step."""

    def __init__(self, step):
        self.step, self.weights = step, None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.weights = weights(model)


def test_the_reference_of_an_embedding_adapter_is_the_warmed_up_student(tiny_model_dir, tmp_path, standard_rows):
    """Warm-up has 2 of the 4 steps."""
    adapter = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    warmed_up = AtStep(2)
    trainer = make_trainer(
        tmp_path,
        tiny_model_dir,
        standard_rows,
        trainer_kwargs={"peft_config": adapter, "callbacks": [warmed_up]},
        max_steps=4,
        learning_rate=1e-2,
        beta=0.1,
    )
    start = weights(trainer.model)
    trainer.train()
    end = weights(trainer.model)
    embeddings = [name for name in end if "lora_embedding" in name and name.endswith("default")]
    assert len(embeddings) == 2
    for name in embeddings:
        reference = end[name.removesuffix("default") + "ref"]
        assert torch.equal(reference, warmed_up.weights[name])
        assert not torch.equal(reference, start[name]) and not torch.equal(reference, end[name])
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-7) and kl[1] > 1e-4


class TestFinished:
    """transformers takes a step more from the last checkpoint, unless it is at the end of an epoch."""

    @pytest.mark.parametrize(
        "length", [{"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 1.5}, {"max_steps": -1}], ids=str
    )
    def test_a_run_is_not_trained_further(self, tiny_model_dir, tmp_path, standard_rows, caplog, length):
        config = {"save_strategy": "steps", "save_steps": 1, "beta": 0.1, "discriminator_replay_size": 40, **length}
        config |= {"advantage_estimator": "gae", "critic": "copy"}
        first = make_trainer(tmp_path, tiny_model_dir, standard_rows, **config)
        first.train()
        steps = first.state.global_step
        second = make_trainer(tmp_path, tiny_model_dir, standard_rows, **config)
        output = second.train(resume_from_checkpoint=True)
        assert output.global_step == second.state.global_step == steps
        assert not (tmp_path / f"checkpoint-{steps + 1}").exists()
        for one, other in (
            (first.model, second.model),
            (first.discriminator, second.discriminator),
            (first.critic_trainer.critic, second.critic_trainer.critic),
        ):
            assert_same_weights(weights(one), weights(other))
        assert second.monitor.state() == first.monitor.state()
        assert second.state.log_history == first.state.log_history[:-1]  # all but the end's summary
        assert "training: finished before, in" in caplog.text

    def test_the_best_student_is_taken(self, tiny_model_dir, tmp_path, standard_rows):
        config = {
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "per_device_eval_batch_size": 8,
            "load_best_model_at_end": True,
            "metric_for_best_model": "teacher_nll",
            "greater_is_better": True,  # so that the first is best
        }
        kwargs = {"eval_dataset": Dataset.from_list(standard_rows[12:])}
        first = make_trainer(tmp_path / "a", tiny_model_dir, standard_rows, trainer_kwargs=kwargs, **config)
        first.train()
        assert first.state.best_model_checkpoint.endswith("checkpoint-1")
        shutil.move(tmp_path / "a", tmp_path / "b")
        second = make_trainer(tmp_path / "b", tiny_model_dir, standard_rows, trainer_kwargs=kwargs, **config)
        second.train(resume_from_checkpoint=True)
        assert_same_weights(weights(first.model), weights(second.model))
        assert_same_weights(weights(first.discriminator), weights(second.discriminator))

    def test_a_longer_run_goes_on(self, tiny_model_dir, tmp_path, standard_rows):
        config = {"save_strategy": "steps", "save_steps": 1}
        make_trainer(tmp_path, tiny_model_dir, standard_rows, **config, max_steps=2).train()
        longer = make_trainer(tmp_path, tiny_model_dir, standard_rows, **config, max_steps=3)
        assert longer.train(resume_from_checkpoint=True).global_step == 3
