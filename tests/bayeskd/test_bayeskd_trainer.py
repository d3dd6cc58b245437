import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from tests.processes import Moment, killed_at, on_processes, train
from tests.proxykd.on_processes import one_step
from trl_bbkd.data.teacher_data import tokenize_teacher_data
from trl_bbkd.errors import NGramError, StageError, TargetStoreError
from trl_bbkd.host.model_files import load_model
from trl_bbkd.seqkd.trainer import sft_rows
from trl_bbkd.soft_targets.store import TargetStore

from .helpers import (
    LORA,
    ON_CPU,
    SETTINGS,
    are_alike,
    assert_same_weights,
    make_rows,
    make_trainer,
    stored_targets,
    weights,
)


NAMES = ("prior", "posterior")
LOGGED = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir, other_model_dir):
    """A finished run: its trainer, and its folder."""
    folder = tmp_path_factory.mktemp("bayes") / "run"
    trainer = make_trainer(folder, tiny_model_dir, other_model_dir)
    trainer.train()
    return trainer, folder


def is_target_file(name, file):
    return Path(file.name).parts[-2:] == (name, "part-00000.targets")


# Of `append` the second batch's targets are on disk, its index is not
MOMENTS = {
    name: Moment(
        "trl_bbkd.soft_targets.store._flush", call=2, counts=functools.partial(is_target_file, name), after=True
    )
    for name in NAMES
} | {
    "warmup": Moment("trl.SFTTrainer.training_step", call=3),
    "distil": Moment("trl_bbkd.bayeskd.trainer.BayesKDTrainer.training_step", call=3),
}


def reuse(finished, folder):
    shutil.copytree(finished[1] / "proxy", folder / "proxy")
    return folder


def training_log(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def store_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("proxy/targets/*/part-*"))}


def plain_sft(output_dir, student, **config):
    """SFT of TRL on the rows of `make_trainer`."""
    tokenizer = AutoTokenizer.from_pretrained(student)
    train, test = (
        sft_rows(tokenize_teacher_data(Dataset.from_list(rows), tokenizer, max_completion_length=16)[0], tokenizer)
        for rows in (make_rows(24)[8:], make_rows(24)[:8])
    )
    settings = {name: value for name, value in ON_CPU.items() if name != "max_completion_length"}
    settings |= {name: SETTINGS[name] for name in ("learning_rate", "per_device_eval_batch_size")} | config
    args = SFTConfig(str(output_dir), max_length=None, **settings)
    return SFTTrainer(student, args, train_dataset=train, eval_dataset=test, processing_class=tokenizer)


class TestStages:
    def test_all_are_run_and_reported(self, finished):
        trainer, folder = finished
        names = [report["stage"] for report in trainer.stage_reports]
        assert names == ["proxy warm-up", "estimate of the teacher", "distillation"]
        assert [report["rows"] for report in trainer.stage_reports] == [16, 16, 16]
        (metrics,) = trainer.stage_reports[1]["metrics"]
        assert metrics["tokens"] == sum(len(row) for row in stored_targets(trainer.data_collator.stores[0]).values())
        assert 0 < metrics["contexts_seen_once"] < 1
        for name in ("warmup", "targets/prior", "targets/posterior"):
            assert (folder / "proxy" / name / "stage.json").is_file()

    def test_a_second_run_does_nothing_twice(self, finished, tmp_path, tiny_model_dir, other_model_dir, monkeypatch):
        again = make_trainer(reuse(finished, tmp_path), tiny_model_dir, other_model_dir)
        for name in ("_warm_up", "_estimated", "loaded_proxy"):
            monkeypatch.setattr(again.proxy_stages, name, None)
        again.train()
        assert_same_weights(weights(again.model), weights(finished[0].model))
        assert again.calibration == finished[0].calibration
        assert again.stage_reports[:2] == finished[0].stage_reports[:2]

    @pytest.mark.parametrize("moment", ["warmup", "prior", "posterior", "distil"])
    def test_killed_at_any_moment_it_goes_on_there(self, finished, tmp_path, tiny_model_dir, other_model_dir, moment):
        folder = tmp_path / "run"
        arguments = (make_trainer, folder, tiny_model_dir, other_model_dir)
        killed_at(MOMENTS[moment], train, *arguments, save_strategy="steps", save_steps=1)
        files = [folder / "proxy" / name / "stage.json" for name in ("warmup", "targets/posterior")]
        done = [file for file in files if file.is_file() and "report" in json.loads(file.read_text())]
        assert len(done) == {"warmup": 0, "prior": 1, "posterior": 1, "distil": 2}[moment]
        stamps = [file.stat().st_mtime_ns for file in done]
        if moment in NAMES:
            rows = [len(TargetStore(folder / "proxy/targets" / name)) for name in NAMES]
            assert rows == {"prior": [4, 4], "posterior": [8, 4]}[moment]
        resumed = make_trainer(folder, tiny_model_dir, other_model_dir, save_strategy="steps", save_steps=1)
        resumed.train()
        assert [file.stat().st_mtime_ns for file in done] == stamps
        assert_same_weights(weights(resumed.model), weights(finished[0].model))
        assert store_files(folder) == store_files(finished[1])
        if moment == "distil":
            assert resumed._initial_global_step == 2

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"posterior_concentration": 5.0}, r"targets/p.* \(posterior_concentration: '10.0' there, '5.0' here\)"),
            ({"prior_gamma": 2.0}, r"targets/p.* \(prior_gamma: '3.0' there, '2.0' here\)"),
            ({"ngram_context_length": 1}, r"targets/p.* \(ngram_context_length: '2' there, '1' here\)"),
            (
                {"posterior_sampling": "expected"},
                r"targets/p.* \(posterior_sampling: 'drawn' there, 'expected' here\)",
            ),
            ({"target_top_k": 4}, r"targets/p.* \(k: 16 there, 4 here\)"),
            ({"seed": 1}, r"warmup .* \(seed: 42 there, 1 here\)"),
            ({"proxy_warmup_epochs": 2.0}, r"warmup .* \(proxy_warmup_epochs: 1.0 there, 2.0 here\)"),
        ],
        ids=str,
    )
    def test_other_settings_of_a_finished_stage_are_refused(
        self, finished, tmp_path, tiny_model_dir, other_model_dir, config, message
    ):
        trainer = make_trainer(reuse(finished, tmp_path), tiny_model_dir, other_model_dir, **config)
        with pytest.raises(StageError, match=message):
            trainer.train()

    def test_other_settings_of_half_an_estimate_are_refused(self, finished, tmp_path, tiny_model_dir, other_model_dir):
        for stage in (reuse(finished, tmp_path) / "proxy/targets").glob("*/stage.json"):
            stage.unlink()
        for name, value, found in [("prior_gamma", 2.0, "3.0"), ("posterior_concentration", 5.0, "10.0")]:
            trainer = make_trainer(tmp_path, tiny_model_dir, other_model_dir, **{name: value})
            with pytest.raises(TargetStoreError, match=rf"stale \({name}: {found} there, {value} here\)"):
                trainer.train()

    def test_a_seed_of_its_own_where_the_proxy_is_handed_in(self, finished, tmp_path, tiny_model_dir):
        """Without a warm-up the seed is the draws' alone."""
        proxy = str(finished[1] / "proxy/warmup")
        config = {"stages": ["estimate", "distil"], "max_steps": 1}
        make_trainer(tmp_path / "run", tiny_model_dir, proxy, **config).train()
        assert store_files(tmp_path / "run") == store_files(finished[1])
        with pytest.raises(StageError, match=r"\(seed: '42' there, '1' here\)"):
            make_trainer(tmp_path / "run", tiny_model_dir, proxy, seed=1, **config).train()
        make_trainer(tmp_path / "other", tiny_model_dir, proxy, seed=1, **config).train()
        prior, posterior = (
            [stored_targets(TargetStore(root / "proxy/targets" / name)) for root in (tmp_path / "other", finished[1])]
            for name in NAMES
        )
        assert prior[0] == prior[1] and posterior[0] != posterior[1]

    def test_other_answers_are_refused(self, finished, tmp_path, tiny_model_dir, other_model_dir):
        trainer = make_trainer(reuse(finished, tmp_path), tiny_model_dir, other_model_dir, rows=make_rows(23))
        with pytest.raises(StageError, match=r"warmup was made from something else \(rows: "):
            trainer.train()

    def test_counts_of_other_answers_are_refused(self, finished, tmp_path, tiny_model_dir):
        """As many tokens, but other prompts' answers, where a run was stopped before its first target."""
        shutil.rmtree(reuse(finished, tmp_path) / "proxy/targets")
        rows = make_rows(24)
        rows = [
            row | {"completion": other["completion"]} for row, other in zip(rows, rows[8:] + rows[:8], strict=True)
        ]
        with pytest.raises(NGramError, match="counts in .*ngrams.* made from something else: .*corpus.* differ"):
            make_trainer(tmp_path, tiny_model_dir, None, rows[:8] + rows[:16], posterior_weight=0.0).train()

    def test_without_distil_it_ends_with_the_targets(self, finished, tmp_path, tiny_model_dir, other_model_dir):
        trainer = make_trainer(tmp_path, tiny_model_dir, other_model_dir, stages=["warmup", "estimate"])
        before = weights(trainer.model)
        assert trainer.train() is None
        assert_same_weights(weights(trainer.model), before)
        assert store_files(tmp_path) == store_files(finished[1])

    def test_targets_that_are_handed_in_make_the_same_student(self, finished, tmp_path, tiny_model_dir):
        config = {"stages": ["distil"], "target_store": str(finished[1] / "proxy/targets")}
        trainer = make_trainer(tmp_path, tiny_model_dir, None, **config)
        trainer.train()
        assert_same_weights(weights(trainer.model), weights(finished[0].model))
        assert not (tmp_path / "proxy").exists() and trainer.calibration is None

    def test_the_student_does_not_depend_on_the_stages_before(self, tmp_path, tiny_model_dir, other_model_dir):
        """Dropout is as if distillation were all."""
        lora = {"trainer_kwargs": {"peft_config": LoraConfig(**LORA, lora_dropout=0.5)}}
        whole = make_trainer(tmp_path / "whole", tiny_model_dir, other_model_dir, **lora)
        whole.train()
        config = {"stages": ["distil"], "target_store": str(tmp_path / "whole/proxy/targets")}
        alone = make_trainer(tmp_path / "alone", tiny_model_dir, None, **config, **lora)
        alone.train()
        assert_same_weights(weights(alone.model), weights(whole.model))

    def test_targets_of_another_k_or_of_other_rows_or_of_none(self, finished, tmp_path, tiny_model_dir):
        config = {"stages": ["distil"], "target_store": str(finished[1] / "proxy/targets")}
        with pytest.raises(TargetStoreError, match="stale.*k: 16 there, 4 here"):
            make_trainer(tmp_path / "k", tiny_model_dir, None, target_top_k=4, **config).train()
        with pytest.raises(
            TargetStoreError, match="24 of the student's 40 rows have no targets .*'estimate' into stages"
        ):
            make_trainer(tmp_path / "rows", tiny_model_dir, None, rows=make_rows(48), **config).train()
        with pytest.raises(TargetStoreError, match="prior is no store of soft targets: store.json is missing"):
            make_trainer(tmp_path / "no", tiny_model_dir, None, **config | {"target_store": str(tmp_path)}).train()

    def test_targets_of_other_settings_or_in_each_others_place(self, finished, tmp_path, tiny_model_dir):
        config = {"stages": ["distil"], "target_store": str(finished[1] / "proxy/targets")}
        with pytest.raises(TargetStoreError, match="stale .prior_gamma: 3.0 there, 9.0 here"):
            make_trainer(tmp_path / "gamma", tiny_model_dir, None, prior_gamma=9.0, **config).train()
        with pytest.raises(TargetStoreError, match="posterior_concentration: 10.0 there, 1.0 here"):
            make_trainer(tmp_path / "kappa", tiny_model_dir, None, posterior_concentration=1.0, **config).train()
        for name, other in zip(NAMES, reversed(NAMES), strict=True):
            shutil.copytree(finished[1] / "proxy/targets" / name, tmp_path / "swapped" / other)
        config["target_store"] = str(tmp_path / "swapped")
        with pytest.raises(TargetStoreError, match="target: posterior there, prior here"):
            make_trainer(tmp_path / "run", tiny_model_dir, None, **config).train()

    def test_a_target_less_or_more_needs_no_other_estimate(self, finished, tmp_path, tiny_model_dir, other_model_dir):
        folder = reuse(finished, tmp_path)
        for weight in ("prior_weight", "posterior_weight"):
            trainer = make_trainer(folder, tiny_model_dir, other_model_dir, **{weight: 0.0})
            trainer.proxy_stages._estimated = None
            trainer.train()
            assert len(trainer.data_collator.stores) == 1
        shutil.rmtree(folder / "proxy/targets/posterior")
        make_trainer(folder, tiny_model_dir, other_model_dir).train()
        assert store_files(folder) == store_files(finished[1])

    def test_a_tail_as_a_bucket_where_the_targets_are_whole(self, finished, tmp_path, tiny_model_dir, other_model_dir):
        """In float32 probabilities may sum to a little more than 1: what is left is 0, and not below."""
        trainer = make_trainer(
            reuse(finished, tmp_path),
            tiny_model_dir,
            other_model_dir,
            target_tail="bucket",
            logging_nan_inf_filter=False,
        )
        trainer.train()
        losses = [entry for entry in trainer.state.log_history if "kl_prior" in entry]
        assert all(0 < entry[name] < 100 for entry in losses for name in ("loss", "kl_prior", "kl_posterior"))

    def test_targets_of_another_proxy(self, finished, tmp_path, tiny_model_dir, other_model_dir):
        config = {"stages": ["distil"], "target_store": str(finished[1] / "proxy/targets")}
        with pytest.raises(TargetStoreError, match="are another proxy's than .*leave proxy_model out"):
            make_trainer(tmp_path, tiny_model_dir, other_model_dir, **config).train()

    def test_a_proxy_in_memory_and_a_lora_student(self, finished, tmp_path, tiny_model_dir, other_model_dir):
        proxy = AutoModelForCausalLM.from_pretrained(other_model_dir, dtype=torch.float32)
        lora = {"trainer_kwargs": {"peft_config": LoraConfig(**LORA)}}
        trainer = make_trainer(tmp_path, tiny_model_dir, proxy, **lora)
        trainer.train()
        assert store_files(tmp_path) == store_files(finished[1])
        assert all(value.abs().sum() > 0 for name, value in weights(trainer.model).items() if "lora_B" in name)

    def test_a_lora_proxy(self, tmp_path, tiny_model_dir, other_model_dir):
        settings = {"posterior_sampling": "expected", "proxy_warmup_epochs": 8.0}
        config = {"proxy_lora_kwargs": LORA, "stages": ["warmup", "estimate"], **settings}
        trainer = make_trainer(tmp_path / "run", tiny_model_dir, other_model_dir, **config)
        trainer.train()
        assert (tmp_path / "run/proxy/warmup/adapter_model.safetensors").is_file()
        found = stored_targets(TargetStore(tmp_path / "run/proxy/targets/posterior"))
        assert len(found) == 16
        # The posterior is of the adapted proxy: the merged model gives the same, and its base another
        merged = load_model(str(tmp_path / "run/proxy/warmup")).merge_and_unload()
        for proxy, is_same in ((merged, True), (other_model_dir, False)):
            folder = tmp_path / f"from {is_same}"
            make_trainer(folder, tiny_model_dir, proxy, stages=["estimate"], **settings).train()
            assert are_alike(found, stored_targets(TargetStore(folder / "proxy/targets/posterior"))) == is_same


class TestWithoutAProxy:
    def test_without_weights_it_is_sft(self, tmp_path, tiny_model_dir):
        """Loss, gradients and weights, and nothing is made of a proxy."""
        config = {"max_steps": 3, "gradient_accumulation_steps": 2}
        trainer = make_trainer(tmp_path / "kd", tiny_model_dir, None, prior_weight=0.0, posterior_weight=0.0, **config)
        trainer.train()
        sft = plain_sft(tmp_path / "sft", tiny_model_dir, **config)
        sft.train()
        for found, expected in zip(training_log(trainer), training_log(sft), strict=True):
            assert {name: found[name] for name in LOGGED} == pytest.approx(
                {name: expected[name] for name in LOGGED}, rel=1e-5
            )
            assert not [name for name in found if name.startswith("kl")]
        for name, value in weights(trainer.model).items():
            torch.testing.assert_close(value, weights(sft.model)[name], atol=2e-5, rtol=1e-4)
        assert not (tmp_path / "kd/proxy").exists() and not trainer.has_own_proxy

    def test_the_prior_needs_none(self, finished, tmp_path, tiny_model_dir):
        trainer = make_trainer(tmp_path, tiny_model_dir, None, posterior_weight=0.0)
        trainer.train()
        assert {path.name for path in (tmp_path / "proxy").iterdir()} == {"ngrams", "targets"}
        assert stored_targets(TargetStore(tmp_path / "proxy/targets/prior")) == stored_targets(
            finished[0].data_collator.stores[0]
        )
        assert "kl_prior" in training_log(trainer)[0] and "kl_posterior" not in training_log(trainer)[0]
        assert trainer.calibration is None and trainer.warnings == []

    def test_without_draws_the_posterior_is_the_prior(self, tmp_path, tiny_model_dir):
        trainer = make_trainer(tmp_path, tiny_model_dir, None, posterior_draws=0)
        trainer.train()
        prior, posterior = (stored_targets(store) for store in trainer.data_collator.stores)
        assert prior == posterior
        log = training_log(trainer)[0]
        assert log["kl_prior"] == pytest.approx(log["kl_posterior"], rel=1e-6)


class TestLoss:
    def test_it_is_equation_6(self, finished, tmp_path, tiny_model_dir):
        """The first step's loss and metrics, from the stores, the formula and all logits."""
        config = {"stages": ["distil"], "target_store": str(finished[1] / "proxy/targets"), "max_steps": 1}
        config |= {"prior_weight": 0.7, "posterior_weight": 2.0, "per_device_train_batch_size": 16}
        trainer = make_trainer(tmp_path, tiny_model_dir, None, **config)
        trainer.train()
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
        stores = [TargetStore(finished[1] / "proxy/targets" / name) for name in NAMES]
        sums, tokens = {"nll": 0.0, "kl_prior": 0.0, "kl_posterior": 0.0}, 0
        for row in trainer.train_dataset:
            with torch.no_grad():
                log_probs = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
            scored = torch.tensor(row["labels"])[1:] != -100
            log_probs, labels = log_probs[scored], torch.tensor(row["labels"])[1:][scored]
            tokens += len(labels)
            sums["nll"] -= log_probs.gather(1, labels[:, None]).sum().item()
            for name, store in zip(NAMES, stores, strict=True):
                targets = store[row["row_key"]]
                probs = torch.tensor(targets.log_probs).double().softmax(-1)
                chosen = log_probs.gather(1, torch.tensor(targets.ids))
                sums[f"kl_{name}"] += (torch.xlogy(probs, probs) - probs * chosen).sum().item()
        means = {name: value / tokens for name, value in sums.items()}
        means["loss"] = means["nll"] + 0.7 * means["kl_prior"] + 2.0 * means["kl_posterior"]
        log = training_log(trainer)[0]
        assert {name: log[name] for name in means} == pytest.approx(means, rel=1e-4)

    def test_targets_sum_to_1_where_nothing_is_cut_off(self, tmp_path, tiny_model_dir, other_model_dir):
        config = {"stages": ["estimate"], "target_top_k": 64}
        make_trainer(tmp_path, tiny_model_dir, other_model_dir, **config).train()
        for name in NAMES:
            store = TargetStore(tmp_path / "proxy/targets" / name)
            for key in store.keys:
                np.testing.assert_allclose(np.exp(store[key].log_probs).sum(axis=1), 1.0, atol=3e-4)

    def test_the_student_learns_the_posterior(self, finished, tmp_path, tiny_model_dir):
        config = {"stages": ["distil"], "target_store": str(finished[1] / "proxy/targets"), "hard_weight": 0.0}
        trainer = make_trainer(tmp_path, tiny_model_dir, None, num_train_epochs=20, prior_weight=0.0, **config)
        trainer.train()
        assert training_log(trainer)[-1]["kl_posterior"] < 0.8 * training_log(trainer)[0]["kl_posterior"]

    def test_evaluation_is_that_of_sft(self, finished, tmp_path, tiny_model_dir):
        config = {"stages": ["distil"], "target_store": str(finished[1] / "proxy/targets")}
        found = make_trainer(tmp_path / "kd", tiny_model_dir, None, **config).evaluate()
        expected = plain_sft(tmp_path / "sft", tiny_model_dir).evaluate()
        for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
            assert found[name] == pytest.approx(expected[name], rel=1e-6)

    def test_batches_of_any_shape_make_the_same_gradient(self, finished, tmp_path, tiny_model_dir):
        """1 x 8, 2 x 4 and 8 x 1: one loss and one gradient."""
        proxy = str(finished[1] / "proxy/warmup")
        found = [
            estimate_and_step(tiny_model_dir, proxy, reuse(finished, tmp_path / f"{size}"), size, 8 // size)
            for size in (8, 4, 1)
        ]
        for other in found[1:]:
            assert_same_step(other, found[0], ("loss", "num_tokens"))


estimate_and_step = functools.partial(
    one_step,
    make_trainer,
    logged=("loss", "nll", "kl_prior", "kl_posterior", "num_tokens"),
    stages=["estimate", "distil"],
)


def assert_same_step(found, expected, logged):
    for name in logged:
        assert found["log"][name] == pytest.approx(expected["log"][name], rel=1e-6), name
    for name, gradient in expected["gradient"].items():
        torch.testing.assert_close(found["gradient"][name], gradient, atol=1e-6, rtol=0)


class TestTwoProcesses:
    @pytest.fixture(scope="class")
    def both(self, finished, tmp_path_factory, tiny_model_dir):
        """One step on two processes, after an estimate that they have made together, and one on one process."""
        folder, proxy = tmp_path_factory.mktemp("two"), str(finished[1] / "proxy/warmup")
        ranks = on_processes(2, estimate_and_step, tiny_model_dir, proxy, folder, 2, 2)
        return folder, ranks, estimate_and_step(tiny_model_dir, proxy, reuse(finished, folder / "one"), 4, 2)

    def test_their_gradient_is_that_of_one(self, both):
        _, ranks, one = both
        assert_same_weights(ranks[0]["student"], ranks[1]["student"])
        for rank in ranks:
            assert_same_step(rank, one, one["log"])

    def test_their_targets_are_those_of_one(self, finished, both):
        folder = both[0] / "proxy/targets"
        for name in NAMES:
            assert len(list((folder / name).glob("part-*.index"))) == 2
            found, expected = (
                stored_targets(TargetStore(root / name)) for root in (folder, finished[1] / "proxy/targets")
            )
            assert found == expected

    def test_their_calibration_is_that_of_one(self, finished, both):
        expected = dict(finished[0].calibration)
        for rank in both[1]:
            found = dict(rank["calibration"])
            for row, other in zip(found.pop("table"), expected["table"], strict=True):
                assert row == pytest.approx(other, rel=1e-9)
            assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-9)

    def test_one_process_goes_on_with_what_two_have_begun(self, finished, both, tmp_path, tiny_model_dir):
        """The second process was killed before its first batch."""
        shutil.copytree(both[0] / "proxy", tmp_path / "proxy")
        (tmp_path / "proxy/targets/posterior/stage.json").unlink()
        for name in NAMES:
            for file in (tmp_path / "proxy/targets" / name).glob("part-00001.*"):
                file.unlink()
            assert 0 < len(TargetStore(tmp_path / "proxy/targets" / name)) < 16
        proxy = str(finished[1] / "proxy/warmup")
        trainer = make_trainer(tmp_path, tiny_model_dir, proxy, stages=["estimate", "distil"])
        trainer.train()
        for store, expected in zip(trainer.data_collator.stores, finished[0].data_collator.stores, strict=True):
            assert stored_targets(store) == stored_targets(expected)
        assert_same_weights(weights(trainer.model), weights(finished[0].model))


class TestCalibration:
    def test_it_is_of_all_held_out_tokens_and_of_the_runs_settings(self, finished):
        found = finished[0].calibration
        held_out = finished[0].eval_dataset
        assert found["tokens"] == sum(label != -100 for row in held_out for label in row["labels"][1:])
        assert (found["draws"], found["concentration"]) == (10, 10.0)
        agreement = finished[0].stage_reports[0]["metrics"][1]["nll"]
        assert found["proxy"] == pytest.approx(agreement, rel=0.05)
        row = next(row for row in found["table"] if (row["draws"], row["concentration"]) == (10, 10.0))
        assert (row["expected"], row["drawn"]) == (found["posterior"], found["posterior_drawn"])

    def test_there_is_none_without_held_out_rows(self, tmp_path, tiny_model_dir, other_model_dir):
        trainer = make_trainer(tmp_path, tiny_model_dir, other_model_dir, held_out=0, stages=["estimate"])
        trainer.train()
        assert trainer.calibration is None and trainer.warnings == []

    def test_a_posterior_worse_than_the_proxy_is_warned_about(self, finished, tmp_path, tiny_model_dir):
        """Counts of answers that the held-out ones have nothing in common with, and a prior that outweighs the proxy."""
        assert finished[0].calibration["posterior"] < finished[0].calibration["proxy"]
        assert finished[0].warnings == []
        rows = [*make_rows(8), *(row | {"completion": " #%$@"[: 2 + i % 4]} for i, row in enumerate(make_rows(16)))]
        proxy, config = str(finished[1] / "proxy/warmup"), {"posterior_concentration": 1000.0, "stages": ["estimate"]}
        trainer = make_trainer(tmp_path, tiny_model_dir, proxy, rows, **config)
        trainer.train()
        (warning,) = trainer.warnings
        assert warning["step"] == 0 and "worse than the proxy alone" in warning["text"]
        assert "lower posterior_concentration" in warning["text"]
        assert f"{trainer.calibration['posterior']:.3f}" in warning["text"]
