"""A run in a folder where another has been: what is gone on with, what is made again, what is refused."""

import json
import shutil

import pytest
from peft import LoraConfig

from trl_bbkd.errors import StageError, TargetStoreError

from .helpers import LORA, assert_same_weights, make_rows, make_trainer, weights


CHECKPOINTS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir, other_model_dir):
    folder = tmp_path_factory.mktemp("finished")
    trainer = make_trainer(folder, tiny_model_dir, other_model_dir, **CHECKPOINTS)
    trainer.train()
    return trainer, folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished[1], tmp_path / "run")


class TestOtherTargets:
    """Their folder is deleted, as the error says; the student's checkpoints are still those of the old ones."""

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"posterior_concentration": 30.0}, r"posterior: posterior_concentration: '10.0' there, '30.0' here"),
            ({"prior_gamma": 1.0}, r"prior: prior_gamma: '3.0' there, '1.0' here"),
            ({"posterior_sampling": "expected"}, r"posterior: posterior_sampling: 'drawn' there"),
        ],
        ids=str,
    )
    def test_a_checkpoint_is_not_gone_on_with(self, folder, tiny_model_dir, other_model_dir, config, message):
        shutil.rmtree(folder / "proxy/targets")
        trainer = make_trainer(folder, tiny_model_dir, other_model_dir, **CHECKPOINTS, **config)
        with pytest.raises(ValueError, match=rf"checkpoint-4 belongs to another run \(.*{message}"):
            trainer.train()

    def test_nor_with_other_answers(self, folder, tiny_model_dir, other_model_dir):
        shutil.rmtree(folder / "proxy")
        rows = make_rows(24)
        rows[-1]["completion"] = rows[-1]["completion"] + " Or so."
        trainer = make_trainer(folder, tiny_model_dir, other_model_dir, rows, **CHECKPOINTS)
        with pytest.raises(ValueError, match=r"checkpoint-4 belongs to another run \(.*: rows: "):
            trainer.train()

    def test_nor_with_another_proxy(self, folder, tiny_model_dir, other_model_dir):
        shutil.rmtree(folder / "proxy")
        trainer = make_trainer(folder, tiny_model_dir, other_model_dir, proxy_warmup_epochs=2.0, **CHECKPOINTS)
        with pytest.raises(ValueError, match=r"checkpoint-4 belongs to another run \(.*posterior: proxy: "):
            trainer.train()

    def test_made_again_from_the_same_it_is(self, finished, folder, tiny_model_dir, other_model_dir):
        shutil.rmtree(folder / "proxy/targets"), shutil.rmtree(folder / "checkpoint-4")
        trainer = make_trainer(folder, tiny_model_dir, other_model_dir, **CHECKPOINTS)
        trainer.train()
        assert trainer._initial_global_step == 2
        assert_same_weights(weights(trainer.model), weights(finished[0].model))


class TestFinished:
    def test_a_run_a_second_time_is_the_first(self, finished, folder, tiny_model_dir, other_model_dir, caplog):
        """`Trainer` would take a step more."""
        trainer = make_trainer(folder, tiny_model_dir, other_model_dir, **CHECKPOINTS)
        output = trainer.train()
        assert output.global_step == trainer.state.global_step == 4 and not (folder / "checkpoint-5").exists()
        assert_same_weights(weights(trainer.model), weights(finished[0].model))
        # The last line of a run's log, its summary, is written after its last checkpoint
        assert trainer.state.log_history == finished[0].state.log_history[:4]
        assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4]
        assert "distillation: finished before, in" in caplog.text

    def test_one_with_adapters(self, tmp_path, tiny_model_dir, other_model_dir):
        config = {
            "stages": ["estimate", "distil"],
            "trainer_kwargs": {"peft_config": LoraConfig(**LORA)},
            **CHECKPOINTS,
        }
        first, second = (make_trainer(tmp_path, tiny_model_dir, other_model_dir, **config) for _ in range(2))
        first.train()
        second.train()
        assert_same_weights(weights(second.model), weights(first.model))

    def test_more_steps_are_gone_on_with(self, folder, tiny_model_dir, other_model_dir, caplog):
        trainer = make_trainer(folder, tiny_model_dir, other_model_dir, **CHECKPOINTS | {"max_steps": 6})
        assert trainer.train().global_step == 6
        assert "distillation: going on from" in caplog.text

    def test_another_learning_rate_is_refused(self, folder, tiny_model_dir, other_model_dir):
        trainer = make_trainer(folder, tiny_model_dir, other_model_dir, **CHECKPOINTS, learning_rate=1e-4)
        with pytest.raises(ValueError, match="belongs to another run .*learning_rate: 0.001 there, 0.0001 here"):
            trainer.train()

    def test_the_checkpoint_of_the_configuration_is_taken(self, folder, tiny_model_dir, other_model_dir):
        config = CHECKPOINTS | {"resume_from_checkpoint": str(folder / "checkpoint-2")}
        trainer = make_trainer(folder, tiny_model_dir, other_model_dir, **config)
        trainer.train()
        assert trainer._initial_global_step == 2


class TestOtherHeldOutRows:
    def test_the_calibration_is_of_them(self, finished, folder, tiny_model_dir, other_model_dir):
        """The estimate is not made again."""
        rows = make_rows(24)
        rows[0]["completion"] = rows[0]["completion"] + " Or so."
        trainer = make_trainer(folder, tiny_model_dir, other_model_dir, rows, **CHECKPOINTS)
        trainer.proxy_stages._estimated = None
        trainer.train()
        assert trainer.calibration["tokens"] > finished[0].calibration["tokens"]

    def test_there_is_one_as_soon_as_there_are_some(self, finished, tmp_path, tiny_model_dir, other_model_dir):
        arguments, config = (tmp_path, tiny_model_dir, other_model_dir), {"stages": ["estimate"]}
        without = make_trainer(*arguments, make_rows(24)[8:], held_out=0, **config)
        without.train()
        assert without.calibration is None
        trainer = make_trainer(*arguments, **config)
        trainer.proxy_stages._estimated = None
        trainer.train()
        assert trainer.calibration["tokens"] == finished[0].calibration["tokens"]


class TestWarmUp:
    @pytest.mark.parametrize(
        ("config", "message"),
        [({"weight_decay": 5.0}, "weight_decay: 0.0 there, 5.0 here"), ({"optim": "sgd"}, "optim: .* there, .*sgd")],
        ids=str,
    )
    def test_another_optimizer_is_refused(self, folder, tiny_model_dir, other_model_dir, config, message):
        trainer = make_trainer(folder, tiny_model_dir, other_model_dir, **config, save_strategy="no")
        shutil.rmtree(folder / "checkpoint-2"), shutil.rmtree(folder / "checkpoint-4")
        with pytest.raises(StageError, match=message):
            trainer.train()

    def test_rows_that_are_there_twice_are_other_rows(self, finished, tmp_path, tiny_model_dir, other_model_dir):
        shutil.copytree(finished[1] / "proxy", tmp_path / "proxy")
        rows = make_rows(24)
        trainer = make_trainer(tmp_path, tiny_model_dir, other_model_dir, rows + rows[8:])
        with pytest.raises(StageError, match=r"warmup was made from something else \(rows: "):
            trainer.train()

    def test_a_stage_that_has_made_nothing_is_begun_again(self, tmp_path, tiny_model_dir, other_model_dir):
        """A run that failed at once, with settings that were then mended."""
        (tmp_path / "proxy/warmup").mkdir(parents=True)
        begun = {"fingerprint": {"proxy_learning_rate": 5.0}}
        (tmp_path / "proxy/warmup/stage.json").write_text(json.dumps(begun))
        make_trainer(tmp_path, tiny_model_dir, other_model_dir, stages=["warmup"]).train()
        assert "report" in json.loads((tmp_path / "proxy/warmup/stage.json").read_text())

    def test_one_that_has_made_something_is_not(self, tmp_path, tiny_model_dir, other_model_dir):
        (tmp_path / "proxy/warmup/checkpoint-1").mkdir(parents=True)
        begun = {"fingerprint": {"proxy_learning_rate": 5.0}}
        (tmp_path / "proxy/warmup/stage.json").write_text(json.dumps(begun))
        with pytest.raises(StageError, match="warmup was made from something else"):
            make_trainer(tmp_path, tiny_model_dir, other_model_dir, stages=["warmup"]).train()


class TestWarnings:
    def test_a_posterior_worse_than_the_proxy_is_logged_before_the_student_learns(
        self, tmp_path, tiny_model_dir, other_model_dir, caplog
    ):
        # Counts of answers that the held-out ones have nothing in common with
        rows = [*make_rows(8), *(row | {"completion": " #%$@"[: 2 + i % 4]} for i, row in enumerate(make_rows(16)))]
        trainer = make_trainer(
            tmp_path, tiny_model_dir, other_model_dir, rows, stages=["estimate"], posterior_concentration=1e4
        )
        trainer.train()
        loss = trainer.calibration["posterior"] - trainer.calibration["proxy"]
        assert loss > 2 * trainer.calibration["gain_se"] > 0
        assert "predicts held-out teacher text worse than the proxy alone" in caplog.text
        trainer.proxy_stages.calibration["gain_se"] = loss
        assert trainer.warnings == []  # within noise

    def test_log_probabilities_that_nothing_reads(self, tmp_path, tiny_model_dir, caplog):
        rows = [row | {"top_logprobs": None} for row in make_rows(8)]
        config = {"posterior_weight": 0.0, "prior_weight": 1.0, "stages": ["estimate"], "held_out": 0}
        make_trainer(tmp_path, tiny_model_dir, None, rows, **config).train()
        assert "`top_logprobs` was not used" in caplog.text

    def test_a_store_made_without_them(self, finished, tmp_path, tiny_model_dir):
        rows = [row | {"top_logprobs": None} for row in make_rows(24)]
        config = {"stages": ["distil"], "target_store": str(finished[1] / "proxy/targets")}
        with pytest.raises(TargetStoreError, match="have `top_logprobs`, but the posterior in .* was made without"):
            make_trainer(tmp_path, tiny_model_dir, None, rows, **config).train()
