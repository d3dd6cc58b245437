import functools
import json
import shutil

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from tests.conftest import build_model
from tests.processes import Moment, killed_at, on_processes, train
from trl_bbkd import ProxyKDConfig, ProxyKDTrainer
from trl_bbkd.data.teacher_data import tokenize_teacher_data
from trl_bbkd.errors import ProxyModelError, StageError, TargetStoreError, TeacherDataError, VocabularyError
from trl_bbkd.host.model_files import load_model
from trl_bbkd.proxykd.weights import row_weights
from trl_bbkd.seqkd.trainer import sft_rows
from trl_bbkd.soft_targets.store import TargetStore

from .helpers import (
    LORA,
    ON_CPU,
    assert_same_weights,
    label_log_probs,
    make_kd_trainer,
    make_rows,
    weights,
)
from .on_processes import one_step


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir, other_model_dir):
    """A finished run: its trainer, and its folder."""
    folder = tmp_path_factory.mktemp("kd") / "run"
    trainer = make_kd_trainer(folder, tiny_model_dir, other_model_dir)
    trainer.train()
    return trainer, folder


MOMENTS = {
    "warmup": "trl.SFTTrainer.training_step",
    "align": "trl.DPOTrainer.training_step",
    "cache": Moment("trl_bbkd.soft_targets.store.TargetStoreWriter.append", call=2),
    "distil": Moment("trl_bbkd.proxykd.trainer.ProxyKDTrainer.training_step", call=3),
}


def killed(moment, *arguments):
    killed_at(MOMENTS[moment], train, make_kd_trainer, *arguments, save_strategy="steps", save_steps=1)


def reuse(finished, folder):
    shutil.copytree(finished[1] / "proxy", folder / "proxy")
    return folder


class TestStages:
    def test_all_are_run_and_reported(self, finished):
        trainer, folder = finished
        assert [report["stage"] for report in trainer.stage_reports] == [
            "proxy warm-up",
            "proxy alignment",
            "soft targets",
            "distillation",
        ]
        assert [report["rows"] for report in trainer.stage_reports] == [3, 15, 14, 14]
        warmup, align = (report["metrics"] for report in trainer.stage_reports[:2])
        assert [entry["at"] for entry in warmup] == ["before", "after"]
        assert [entry["at"] for entry in align] == ["before", "round 1", "round 2"]
        assert warmup[1]["nll"] == pytest.approx(align[0]["nll"], rel=1e-6)
        assert align[2]["nll"] < warmup[0]["nll"]
        for name in ("warmup", "align", "targets"):
            assert (folder / "proxy" / name / "stage.json").is_file()

    def test_the_student_never_sees_rows_of_another_stage(self, finished):
        trainer, folder = finished
        seen = set(trainer.processing_class.batch_decode(trainer.train_dataset["input_ids"][:]))
        prompts = {row["prompt"] for row in make_rows()[8:]}
        aligned = {
            json.loads(line)["prompt"]
            for path in folder.glob("proxy/align/round-*/samples/*")
            for line in path.read_text().splitlines()
        }
        students = {prompt for prompt in prompts if any(text.startswith(prompt) for text in seen)}
        assert len(students) == 14 and len(aligned) == 15 and not students & aligned

    def test_a_second_run_does_nothing_twice(self, finished, tmp_path, tiny_model_dir, other_model_dir, monkeypatch):
        again = make_kd_trainer(reuse(finished, tmp_path), tiny_model_dir, other_model_dir)
        for name in ("_warm_up", "_align"):
            monkeypatch.setattr(again.proxy_stages, name, None)
        monkeypatch.setattr("trl_bbkd.proxykd.stages.store_targets", None)
        again.train()
        assert_same_weights(weights(again.model), weights(finished[0].model))

    @pytest.mark.parametrize("moment", ["warmup", "align", "cache", "distil"])
    def test_killed_in_any_stage_it_goes_on_there(self, finished, tmp_path, tiny_model_dir, other_model_dir, moment):
        killed(moment, tmp_path / "run", tiny_model_dir, other_model_dir)
        files = {name: tmp_path / "run/proxy" / name / "stage.json" for name in ("warmup", "align", "targets")}
        done = [name for name, file in files.items() if file.is_file() and "report" in json.loads(file.read_text())]
        assert len(done) == ["warmup", "align", "cache", "distil"].index(moment)
        stamps = [(tmp_path / "run/proxy" / name / "stage.json").stat().st_mtime_ns for name in done]
        resumed = make_kd_trainer(
            tmp_path / "run", tiny_model_dir, other_model_dir, save_strategy="steps", save_steps=1
        )
        resumed.train()
        assert [(tmp_path / "run/proxy" / name / "stage.json").stat().st_mtime_ns for name in done] == stamps
        assert_same_weights(weights(resumed.model), weights(finished[0].model))
        for file in (finished[1] / "proxy/targets").glob("part-*"):
            assert (tmp_path / "run/proxy/targets" / file.name).read_bytes() == file.read_bytes()
        if moment == "distil":
            assert resumed._initial_global_step == 2

    def test_other_settings_of_a_finished_stage_are_refused(self, finished, tmp_path, tiny_model_dir, other_model_dir):
        folder = reuse(finished, tmp_path)
        with pytest.raises(
            StageError, match=r"align was made from something else \(alignment_beta: 0.1 there, 0.3 here\)"
        ):
            make_kd_trainer(folder, tiny_model_dir, other_model_dir, alignment_beta=0.3).train()
        with pytest.raises(StageError, match=r"warmup was made from something else \(rows: "):
            make_kd_trainer(folder, tiny_model_dir, other_model_dir, rows=make_rows(39)).train()
        with pytest.raises(StageError, match=r"targets was made from something else \(k: 10 there, 5 here\)"):
            make_kd_trainer(folder, tiny_model_dir, other_model_dir, target_top_k=5).train()

    def test_without_distil_it_ends_with_the_targets(self, tmp_path, tiny_model_dir, other_model_dir):
        trainer = make_kd_trainer(tmp_path, tiny_model_dir, other_model_dir, stages=["cache"])
        before = weights(trainer.model)
        assert trainer.train() is None
        assert len(TargetStore(tmp_path / "proxy/targets")) == 14
        assert_same_weights(weights(trainer.model), before)

    def test_handing_in_a_store(self, finished, tmp_path, tiny_model_dir, other_model_dir):
        store = str(finished[1] / "proxy/targets")
        config = {"stages": ["distil"], "target_store": store}
        trainer = make_kd_trainer(tmp_path, tiny_model_dir, None, **config)
        trainer.train()
        assert_same_weights(weights(trainer.model), weights(finished[0].model))
        assert not (tmp_path / "proxy").exists()

    def test_a_store_of_another_k_or_of_other_rows(self, finished, tmp_path, tiny_model_dir):
        config = {"stages": ["distil"], "target_store": str(finished[1] / "proxy/targets")}
        with pytest.raises(TargetStoreError, match="stale.*k: 10 there, 4 here"):
            make_kd_trainer(tmp_path / "k", tiny_model_dir, None, target_top_k=4, **config).train()
        with pytest.raises(TargetStoreError, match="rows have no targets"):
            make_kd_trainer(tmp_path / "rows", tiny_model_dir, None, rows=make_rows(60), **config).train()

    def test_a_store_of_another_proxy(self, finished, tmp_path, tiny_model_dir, other_model_dir):
        config = {"stages": ["distil"], "target_store": str(finished[1] / "proxy/targets")}
        with pytest.raises(TargetStoreError, match="are another proxy's than .*leave proxy_model out"):
            make_kd_trainer(tmp_path, tiny_model_dir, other_model_dir, **config).train()

    def test_lora_proxy_and_lora_student(self, tmp_path, tiny_model_dir, other_model_dir):
        trainer = make_kd_trainer(
            tmp_path,
            tiny_model_dir,
            other_model_dir,
            proxy_lora_kwargs=LORA,
            trainer_kwargs={"peft_config": LoraConfig(**LORA)},
        )
        trainer.train()
        for stage in ("warmup", "align"):
            assert (tmp_path / "proxy" / stage / "adapter_model.safetensors").is_file()
        warmed, aligned = (weights(load_model(str(tmp_path / "proxy" / stage))) for stage in ("warmup", "align"))
        assert any(not torch.equal(value, aligned[name]) for name, value in warmed.items() if "lora_B" in name)
        assert all(value.abs().sum() > 0 for name, value in weights(trainer.model).items() if "lora_B" in name)
        # The targets are the aligned proxy's, not those of the one before or of its base
        store = TargetStore(tmp_path / "proxy/targets")
        aligned = load_model(str(tmp_path / "proxy/align"))
        warmed = load_model(str(tmp_path / "proxy/warmup"))
        for row in trainer.train_dataset.select(range(3)):
            stored = torch.from_numpy(store[row["row_key"]].label_log_probs)
            torch.testing.assert_close(stored, label_log_probs(aligned, row), atol=1e-4, rtol=1e-4)
            assert (stored - label_log_probs(warmed, row)).abs().max() > 1e-3

    def test_a_proxy_in_memory(self, finished, tmp_path, tiny_model_dir, other_model_dir):
        """It is trained like one on disk, and what comes of it is the same."""
        proxy = AutoModelForCausalLM.from_pretrained(other_model_dir, dtype=torch.float32)
        trainer = make_kd_trainer(tmp_path, tiny_model_dir, proxy)
        trainer.train()
        for stage in ("warmup", "align"):
            found, expected = (weights(load_model(str(root / "proxy" / stage))) for root in (tmp_path, finished[1]))
            assert_same_weights(found, expected)
        assert_same_weights(weights(trainer.model), weights(finished[0].model))

    @pytest.mark.parametrize("stage", ["warmup", "align"])
    def test_a_half_finished_stage_is_not_gone_on_with_under_other_settings(
        self, tmp_path, tiny_model_dir, other_model_dir, stage
    ):
        killed(stage, tmp_path / "run", tiny_model_dir, other_model_dir)
        assert (tmp_path / "run/proxy" / stage / "stage.json").is_file()
        # The warm-up was killed before it made anything; as far as that, it may be begun anew
        (tmp_path / "run/proxy/warmup/checkpoint-1").mkdir(exist_ok=True)
        changed = {"warmup": {"proxy_learning_rate": 5e-3}, "align": {"alignment_epochs": 2.0}}[stage]
        with pytest.raises(StageError, match=f"{stage} was made from something else .{list(changed)[0]}: "):
            make_kd_trainer(tmp_path / "run", tiny_model_dir, other_model_dir, **changed).train()

    def test_resume_true_and_nothing_to_resume(self, tmp_path, tiny_model_dir):
        config = {"kl_weight": 0.0, "save_strategy": "steps", "save_steps": 2}
        trainer = make_kd_trainer(tmp_path, tiny_model_dir, None, **config)
        trainer.train(resume_from_checkpoint=True)  # goes on where it is: at the start
        again = make_kd_trainer(tmp_path, tiny_model_dir, None, **config)
        assert again.train(resume_from_checkpoint=True).global_step == trainer.state.global_step > 0
        assert_same_weights(weights(again.model), weights(trainer.model))

    def test_a_proxy_whose_logits_are_not_understood(self, tmp_path, tiny_model_dir, other_model_dir):
        proxy = AutoModelForCausalLM.from_pretrained(other_model_dir, dtype=torch.float32)
        forward = proxy.forward

        def divided(*args, **kwargs):
            output = forward(*args, **kwargs)
            output.logits = output.logits / 7
            return output

        proxy.forward = divided
        with pytest.raises(ValueError, match="turns its hidden states into logits in a way"):
            make_kd_trainer(tmp_path, tiny_model_dir, proxy, stages=["cache", "distil"]).train()

    def test_no_checkpoints_of_the_proxy_are_left(self, tmp_path, tiny_model_dir, other_model_dir):
        config = {"save_strategy": "steps", "save_steps": 1, "preference_weight": 0.0}
        make_kd_trainer(tmp_path, tiny_model_dir, other_model_dir, **config).train()
        assert list(tmp_path.glob("checkpoint-*")) and not list(tmp_path.glob("proxy/**/checkpoint-*"))

    def test_without_dpo_it_is_nll_alone(self, tmp_path, tiny_model_dir, other_model_dir):
        trainer = make_kd_trainer(tmp_path, tiny_model_dir, other_model_dir, preference_weight=0.0)
        trainer.train()
        assert not list(tmp_path.glob("proxy/align/round-*"))
        assert [entry["at"] for entry in trainer.stage_reports[1]["metrics"]] == ["after"]
        assert (tmp_path / "proxy/align/model.safetensors").is_file()

    def test_all_rows_for_the_student(self, tmp_path, tiny_model_dir, other_model_dir):
        config = {"stages": ["cache", "distil"], "distil_on_all_rows": True}
        assert len(make_kd_trainer(tmp_path, tiny_model_dir, other_model_dir, **config).train_dataset) == 32

    def test_rows_divided_by_the_user(self, tmp_path, tiny_model_dir, other_model_dir):
        stages = ["warmup", "align", "align", "distil"] * 2
        rows = [row | {"stage": stage} for row, stage in zip(make_rows(8), stages, strict=True)]
        trainer = make_kd_trainer(tmp_path, tiny_model_dir, other_model_dir, rows=rows, held_out=0)
        assert [len(part) for part in trainer.proxy_stages.rows] == [2, 4, 2]


class TestLoss:
    def test_kl_weight_0_is_sft(self, tmp_path, tiny_model_dir):
        """Loss, gradients and weights of plain SFT on the same rows, without a proxy."""
        config = {"kl_weight": 0.0, "max_steps": 3, "gradient_accumulation_steps": 2}
        trainer = make_kd_trainer(tmp_path / "kd", tiny_model_dir, None, **config)
        trainer.train()
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        rows = Dataset.from_list(make_rows()[8:])
        rows = tokenize_teacher_data(rows, tokenizer, max_completion_length=16)[0]
        rows = rows.select(
            [list(rows["prompt"]).index(prompt) for prompt in trainer.proxy_stages.rows.distil["prompt"]]
        )
        settings = {key: value for key, value in ON_CPU.items() if key != "max_completion_length"}
        sft = SFTTrainer(
            tiny_model_dir,
            SFTConfig(
                str(tmp_path / "sft"),
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                max_length=None,
                max_steps=3,
                gradient_accumulation_steps=2,
                num_train_epochs=1,
                **settings,
            ),
            train_dataset=sft_rows(rows, tokenizer),
            processing_class=tokenizer,
        )
        set_seed(42)
        sft.train()
        kd_log, sft_log = ([x for x in t.state.log_history if "loss" in x] for t in (trainer, sft))
        for found, expected in zip(kd_log, sft_log, strict=True):
            for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
                assert found[name] == pytest.approx(expected[name], rel=1e-5), name
        for name, value in weights(trainer.model).items():
            torch.testing.assert_close(value, weights(sft.model)[name], atol=2e-5, rtol=1e-4)

    def test_loss_is_equation_11(self, finished, tmp_path, tiny_model_dir):
        """The first step's loss, from the store, the formula and all logits."""
        store_path = finished[1] / "proxy/targets"
        config = {"stages": ["distil"], "target_store": str(store_path), "kl_weight": 7.0, "sample_weighting": "sum"}
        trainer = make_kd_trainer(
            tmp_path, tiny_model_dir, None, per_device_train_batch_size=14, max_steps=1, **config
        )
        trainer.train()
        store = TargetStore(store_path)
        log_likelihoods = np.array(
            [store[key].label_log_probs.sum(dtype=np.float64) for key in trainer.train_dataset["row_key"]]
        )
        tokens = np.array([len(store[key].label_log_probs) for key in trainer.train_dataset["row_key"]])
        row_weight = row_weights(log_likelihoods, tokens, "sum").weights
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
        total = nll_total = kl_total = 0.0
        for weight, row in zip(row_weight, trainer.train_dataset, strict=True):
            targets = store[row["row_key"]]
            log_probs = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
            scored = torch.tensor(row["labels"])[1:] != -100
            log_probs, labels = log_probs[scored], torch.tensor(row["labels"])[1:][scored]
            nll = -log_probs.gather(1, labels[:, None]).sum()
            probs = torch.tensor(targets.log_probs).double().softmax(-1)
            kl = (probs * (probs.log() - log_probs.gather(1, torch.tensor(targets.ids)))).sum()
            total += (nll + 7.0 * weight * kl).item()
            nll_total += nll.item()
            kl_total += kl.item()
        log = trainer.state.log_history[0]
        assert log["loss"] == pytest.approx(total / tokens.sum(), rel=1e-4)
        assert log["nll"] == pytest.approx(nll_total / tokens.sum(), rel=1e-4)
        assert log["kl"] == pytest.approx(kl_total / tokens.sum(), rel=1e-4)
        assert log["sample_weight"] == pytest.approx(row_weight.mean(), rel=1e-4)

    def test_live_and_cached_proxy_agree(self, tmp_path, tiny_model_dir, other_model_dir):
        """The cache holds the whole vocabulary here, so that only its coding differs."""
        config = {"stages": ["cache", "distil"], "max_steps": 2}
        size = AutoModelForCausalLM.from_pretrained(tiny_model_dir).config.vocab_size
        cached = make_kd_trainer(tmp_path / "cache", tiny_model_dir, other_model_dir, target_top_k=size, **config)
        live = make_kd_trainer(tmp_path / "live", tiny_model_dir, other_model_dir, target_source="live", **config)
        cached.train()
        live.train()
        logs = [[line for line in trainer.state.log_history if "loss" in line] for trainer in (cached, live)]
        for found, expected in zip(*logs, strict=True):
            for name in ("loss", "kl", "nll", "grad_norm", "sample_weight"):
                assert found[name] == pytest.approx(expected[name], rel=2e-3), name
        assert not any(parameter.requires_grad for parameter in live.live_proxy.parameters())

    @pytest.mark.parametrize(("source", "of_two"), [("cache", (2, 2)), ("live", (4, 1))], ids=["cache", "live"])
    def test_batch_shapes_and_processes_change_nothing(self, finished, tmp_path, tiny_model_dir, source, of_two):
        """1 x 8, 2 x 4 and 8 x 1 on one process, and as many rows on two: one loss and one gradient."""
        proxy = str(finished[1] / "proxy/align")
        step = functools.partial(
            one_step,
            make_kd_trainer,
            tiny_model_dir,
            proxy,
            logged=("loss", "num_tokens"),
            stages=["cache", "distil"],
            target_source=source,
        )
        found = []
        for per_device, accumulation in ((8, 1), (4, 2), (1, 8)):
            found.append(step(tmp_path / f"1-{per_device}-{accumulation}", per_device, accumulation))
        ranks = on_processes(2, step, tmp_path / "2", *of_two)
        assert_same_weights(ranks[0]["student"], ranks[1]["student"])
        for other in (*found[1:], ranks[0]):
            assert other["log"] == pytest.approx(found[0]["log"], rel=1e-6)
            for name, gradient in found[0]["gradient"].items():
                torch.testing.assert_close(other["gradient"][name], gradient, atol=1e-6, rtol=0)

    def test_evaluation_is_on_the_teachers_text(self, finished):
        trainer, folder = finished
        metrics = trainer.evaluate()
        assert {"eval_loss", "eval_entropy", "eval_mean_token_accuracy"} <= metrics.keys()
        assert metrics["eval_loss"] < 10

    def test_the_student_learns_the_proxy(self, tmp_path, tiny_model_dir, other_model_dir):
        config = {"stages": ["cache", "distil"], "hard_weight": 0.0, "kl_weight": 1.0, "num_train_epochs": 30}
        trainer = make_kd_trainer(tmp_path, tiny_model_dir, other_model_dir, learning_rate=1e-2, **config)
        trainer.train()
        kl = [line["kl"] for line in trainer.state.log_history if "kl" in line]
        assert kl[-1] < 0.4 * kl[0]

    def test_bfloat16(self, finished, tmp_path, tiny_model_dir):
        config = {"stages": ["distil"], "target_store": str(finished[1] / "proxy/targets"), "bf16": True}
        trainer = make_kd_trainer(tmp_path, tiny_model_dir, None, **config)
        trainer.train()
        expected = [line["loss"] for line in finished[0].state.log_history if "loss" in line]
        found = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        assert found == pytest.approx(expected, rel=0.03) and found != expected


class TestRefused:
    """Everything here is said before any training step."""

    def test_no_proxy(self, tmp_path, tiny_model_dir):
        with pytest.raises(ProxyModelError, match="needs a proxy: set `proxy_model`"):
            make_kd_trainer(tmp_path, tiny_model_dir, None)

    def test_the_student_as_proxy(self, tmp_path, tiny_model_dir):
        with pytest.raises(ProxyModelError, match="The proxy is the student"):
            make_kd_trainer(tmp_path, tiny_model_dir, f"{tiny_model_dir}/../{tiny_model_dir.rsplit('/', 1)[1]}")

    def test_an_adapter_without_its_base(self, tmp_path, tiny_model_dir):
        (tmp_path / "adapter").mkdir()
        config = tmp_path / "adapter/adapter_config.json"
        config.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/no/such/model"}))
        with pytest.raises(ProxyModelError, match="its base model /no/such/model is not there"):
            make_kd_trainer(tmp_path / "run", tiny_model_dir, str(tmp_path / "adapter"))
        config.write_text(json.dumps({"peft_type": "LORA"}))
        with pytest.raises(ProxyModelError, match="does not name its base model"):
            make_kd_trainer(tmp_path / "run", tiny_model_dir, str(tmp_path / "adapter"))

    def test_another_tokenizer(self, tmp_path, tiny_model_dir):
        proxy = build_model(tmp_path / "proxy", hidden_size=48)
        tokenizer = json.loads((tmp_path / "proxy/tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        first, second = (next(t for t, i in vocabulary.items() if i == number) for number in (300, 301))
        vocabulary[first], vocabulary[second] = 301, 300
        (tmp_path / "proxy/tokenizer.json").write_text(json.dumps(tokenizer))
        with pytest.raises(VocabularyError, match="2 ids differ: id 300 is .* GAD .* SeqKD"):
            make_kd_trainer(tmp_path / "run", tiny_model_dir, proxy)

    def test_rows_longer_than_the_context(self, tmp_path, tiny_model_dir, other_model_dir):
        with pytest.raises(TeacherDataError, match="No room for an answer.*context is 512 tokens"):
            make_kd_trainer(tmp_path, tiny_model_dir, other_model_dir, max_completion_length=600)

    def test_a_stage_without_rows(self, tmp_path, tiny_model_dir, other_model_dir):
        with pytest.raises(TeacherDataError, match="'warmup' has no rows .* Raise warmup_share"):
            make_kd_trainer(tmp_path, tiny_model_dir, other_model_dir, warmup_share=0.0)
        with pytest.raises(TeacherDataError, match="Round 16 of 40 has an empty shard: alignment has 15 rows"):
            make_kd_trainer(tmp_path, tiny_model_dir, other_model_dir, alignment_rounds=40)

    def test_patience_without_held_out_rows(self, tmp_path, tiny_model_dir, other_model_dir):
        with pytest.raises(ValueError, match="alignment_patience needs eval_dataset"):
            make_kd_trainer(tmp_path, tiny_model_dir, other_model_dir, held_out=0, alignment_patience=1)

    def test_another_run_in_the_folder(self, tmp_path, tiny_model_dir):
        config = {"kl_weight": 0.0, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
        make_kd_trainer(tmp_path, tiny_model_dir, None, **config).train()
        with pytest.raises(ValueError, match="belongs to another run.*seed: 42 there, 1 here"):
            make_kd_trainer(tmp_path, tiny_model_dir, None, seed=1, **config).train()

    def test_streaming(self, tmp_path, tiny_model_dir, other_model_dir):
        stream = Dataset.from_list(make_rows()).to_iterable_dataset()
        with pytest.raises(TeacherDataError, match="not a stream"):
            ProxyKDTrainer(
                tiny_model_dir, other_model_dir, ProxyKDConfig(str(tmp_path), **ON_CPU), train_dataset=stream
            )

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"kl_weight": -1.0}, "kl_weight must be at least 0, got -1.0"),
            ({"hard_weight": -1.0}, "hard_weight must be at least 0, got -1.0"),
            ({"kl_weight": 0.0, "hard_weight": 0.0}, "both 0: there is no loss"),
            ({"warmup_share": 0.6, "alignment_share": 0.4}, "leave the student no rows"),
            ({"warmup_share": -0.1}, "warmup_share is a share and must lie between 0 and 1, got -0.1"),
            ({"stages": ["warmup", "aline"]}, "stages must be some of warmup, align, cache, distil"),
            ({"stages": ["distil"]}, "stages leaves out 'cache', so target_store has to name a folder"),
            ({"target_store": "somewhere"}, "takes the place of all stages before 'distil'"),
            ({"stages": ["distil"], "target_source": "live"}, "computed in the stage 'cache'"),
            ({"sample_temperature": 0.0}, "sample_temperature must be positive, got 0.0"),
            ({"sample_top_p": 0.0}, r"sample_top_p must lie in \(0, 1\], got 0.0"),
            ({"alignment_patience": 0}, "alignment_patience must be at least 1, got 0"),
            ({"use_vllm": True}, "use_vllm=True needs vLLM"),
            ({"proxy_lora_kwargs": {"rank": 4}}, "proxy_lora_kwargs: .*rank"),
            ({"save_only_model": True}, "save_only_model=True is not possible"),
            ({"target_top_k": 0}, "target_top_k must be at least 1, got 0"),
            ({"alignment_rounds": 0}, "alignment_rounds must be at least 1, got 0"),
            ({"distillation_temperature": 0.0}, "distillation_temperature must be positive, got 0.0"),
            ({"distillation_temperature": 2.0, "target_tail": "bucket"}, "needs target_tail='renormalize'"),
            ({"target_source": "live", "target_tail": "bucket"}, "a live proxy's targets are whole"),
            ({"packing": True}, "packing=True is not possible with soft targets: a row's targets"),
            ({"padding_free": True}, "padding_free=True is not possible with soft targets"),
            ({"loss_type": "dft"}, "loss_type='dft' is not possible with soft targets"),
        ],
    )
    def test_settings(self, tmp_path, tiny_model_dir, other_model_dir, config, message):
        with pytest.raises(ValueError, match=message):
            make_kd_trainer(tmp_path, tiny_model_dir, other_model_dir, **config)


class TestWarnings:
    def test_weights_that_are_a_length_penalty(self, tmp_path, tiny_model_dir, other_model_dir):
        config = {"stages": ["cache", "distil"], "max_steps": 1}
        by_sum = make_kd_trainer(tmp_path / "sum", tiny_model_dir, other_model_dir, sample_weighting="sum", **config)
        by_sum.train()
        assert "are a length penalty" in by_sum.warnings[0]["text"]
        by_mean = make_kd_trainer(tmp_path / "mean", tiny_model_dir, other_model_dir, **config)
        by_mean.train()
        assert by_mean.warnings == []

    def test_an_alignment_that_lowers_agreement(self, finished):
        trainer = finished[0]
        kept = trainer.proxy_stages.reports

        def warnings_of(error):
            metrics = [{"top1_agreement": share, "top1_agreement_se": error} for share in (0.8, 0.7)]
            trainer.proxy_stages.reports = [{"stage": "proxy alignment", "metrics": metrics}]
            return [warning["text"] for warning in trainer.warnings if "alignment lowered" in warning["text"]]

        assert (
            "from 0.800 to 0.700 of held-out positions (standard error of the difference 0.028)"
            in warnings_of(0.02)[0]
        )
        assert warnings_of(0.04) == []  # within noise
        trainer.proxy_stages.reports = kept
