"""Proxy-KD and Bayes-KD in SFTTrainer's place: configuration, tokenizer, models, rows, and training again."""

import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import LogCompletionsCallback, SFTConfig, SFTTrainer

from tests.bayeskd.helpers import make_trainer as make_bayes_trainer
from tests.conftest import build_model
from tests.proxykd.helpers import LORA, ON_CPU, make_kd_trainer, make_rows
from trl_bbkd import BayesKDConfig, BayesKDTrainer, ProxyKDConfig, ProxyKDTrainer


PLAIN = {"kl_weight": 0.0, "stages": ["distil"], "warmup_share": 0.0, "alignment_share": 0.0}
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
CHAT = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"].strip()}],
    }
    for row in make_rows(12)
]
MAKERS = {"proxykd": make_kd_trainer, "bayeskd": make_bayes_trainer}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def plain(output_dir, student, **config):
    return make_kd_trainer(output_dir, student, None, **{**PLAIN, **config})


def frozen_adapter(folder, base):
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**LORA)).save_pretrained(folder)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


class TestConfiguration:
    @pytest.mark.parametrize("trainer", [ProxyKDTrainer, BayesKDTrainer])
    def test_that_of_trl_is_refused(self, tmp_path, trainer):
        args = SFTConfig(str(tmp_path), **{k: v for k, v in ON_CPU.items() if k != "max_completion_length"})
        with pytest.raises(TypeError, match="change the class; the fields keep their names"):
            trainer(model="student", args=args)

    @pytest.mark.parametrize(("trainer", "config"), [(ProxyKDTrainer, ProxyKDConfig), (BayesKDTrainer, BayesKDConfig)])
    def test_it_may_stand_second_as_in_trl(self, tmp_path, tiny_model_dir, other_model_dir, trainer, config):
        rows = Dataset.from_list(make_rows(60))
        args = config(str(tmp_path), proxy_model=other_model_dir, **ON_CPU)
        made = trainer(tiny_model_dir, args, train_dataset=rows)
        assert made.args.output_dir == str(tmp_path)
        assert made.proxy_stages.proxy == other_model_dir
        with pytest.raises(TypeError, match="was given two configurations"):
            trainer(tiny_model_dir, args, args, train_dataset=rows)

    def test_metrics_and_optimizer_of_trl_act(self, tmp_path, tiny_model_dir):
        seen = []
        trainer = make_kd_trainer(
            tmp_path,
            tiny_model_dir,
            None,
            trainer_kwargs={
                "compute_metrics": lambda prediction: {"count": float(len(prediction.predictions))},
                "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1}),
                "preprocess_logits_for_metrics": lambda logits, labels: seen.append(1) or logits.argmax(dim=-1),
            },
            **PLAIN,
            max_steps=1,
        )
        trainer.train()
        assert type(trainer.optimizer.optimizer) is torch.optim.SGD
        assert trainer.evaluate()["eval_count"] == len(trainer.eval_dataset) and seen


class TestTokenizer:
    def test_a_template_reaches_rows_and_the_saved_student(self, tmp_path, tiny_model_dir):
        path = tmp_path / "mine.jinja"
        path.write_text(TEMPLATE)
        trainer = plain(tmp_path / "out", tiny_model_dir, rows=CHAT, held_out=2, chat_template_path=str(path))
        for rows in (trainer.train_dataset, trainer.eval_dataset):
            text = trainer.processing_class.decode(rows[0]["input_ids"])
            assert re.fullmatch(r"\[user\].*\[assistant\].*<\|im_end\|>", text)
        trainer.save_model(str(tmp_path / "saved"))
        assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == TEMPLATE

    def test_an_end_token_ends_the_rows_and_generation(self, tmp_path, tiny_model_dir, make):
        config = PLAIN if make is make_kd_trainer else {"prior_weight": 0.0, "posterior_weight": 0.0}
        config = {**config, "stages": ["distil"]}
        trainer = make(tmp_path, tiny_model_dir, None, eos_token="<|endoftext|>", **config)
        end = trainer.processing_class.convert_tokens_to_ids("<|endoftext|>")
        for rows in (trainer.train_dataset, trainer.eval_dataset):
            assert {ids[-1] for ids in rows["input_ids"]} == {end}
        assert end in trainer.model.generation_config.eos_token_id
        trainer.save_model(str(tmp_path / "saved"))
        assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token == "<|endoftext|>"

    def test_the_template_of_another_tokenizer(self, tmp_path, tiny_model_dir):
        other = AutoTokenizer.from_pretrained(tiny_model_dir)
        other.chat_template, other.eos_token = TEMPLATE, "<|endoftext|>"
        other.save_pretrained(tmp_path / "other")
        trainer = plain(
            tmp_path / "out", tiny_model_dir, rows=CHAT, held_out=0, chat_template_path=str(tmp_path / "other")
        )
        text = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
        assert text.startswith("[user]") and text.endswith("<|endoftext|>")
        assert other.eos_token_id in trainer.model.generation_config.eos_token_id
        assert trainer.model.get_input_embeddings().weight.size(0) == 330  # TRL would have made it 384

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"eos_token": "<end>"}, "eos_token='<end>' is no token of the student's tokenizer"),
            ({"pad_token": "<pad>"}, "pad_token='<pad>' is no token of the student's tokenizer"),
            ({"chat_template_path": "none.jinja"}, "chat_template_path='none.jinja' is not there"),
            ({"chat_template_path": "no/such/folder"}, "neither a .jinja file nor a tokenizer"),
        ],
    )
    def test_what_it_lacks_is_one_error(self, tmp_path, tiny_model_dir, config, message):
        with pytest.raises(ValueError, match=message) as error:
            plain(tmp_path, tiny_model_dir, **config)
        assert "\n" not in str(error.value)

    def test_a_template_that_needs_other_tokens(self, tmp_path, tiny_model_dir):
        other = AutoTokenizer.from_pretrained(tiny_model_dir)
        other.add_tokens(["<turn>"])
        other.save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match="has tokens that the student's tokenizer lacks: <turn>"):
            plain(tmp_path / "out", tiny_model_dir, chat_template_path=str(tmp_path / "other"))

    def test_a_processor_is_refused(self, tmp_path, tiny_model_dir, other_model_dir, make):
        with pytest.raises(TypeError, match="processing_class must be a tokenizer, got object"):
            make(tmp_path, tiny_model_dir, other_model_dir, trainer_kwargs={"processing_class": object()})


class TestModels:
    def test_a_frozen_student_is_refused(self, tmp_path, tiny_model_dir, make, other_model_dir):
        student = frozen_adapter(tmp_path / "adapter", tiny_model_dir)
        with pytest.raises(ValueError, match="The student has no trainable parameter.*is_trainable=True"):
            make(tmp_path / "out", student, other_model_dir)
        assert not (tmp_path / "out").exists()

    def test_a_frozen_proxy_is_refused_where_it_is_to_learn(self, tmp_path, tiny_model_dir, make, other_model_dir):
        proxy = AutoModelForCausalLM.from_pretrained(other_model_dir).requires_grad_(False)
        with pytest.raises(ValueError, match="The proxy has no trainable parameter"):
            make(tmp_path, tiny_model_dir, proxy)
        make(tmp_path, tiny_model_dir, proxy, stages=["estimate" if make is make_bayes_trainer else "cache", "distil"])

    @pytest.mark.parametrize("adapter", [PromptTuningConfig, PrefixTuningConfig])
    def test_virtual_tokens_are_refused(self, tmp_path, tiny_model_dir, make, other_model_dir, adapter):
        config = adapter(task_type="CAUSAL_LM", num_virtual_tokens=2)
        with pytest.raises(ValueError, match=f"{adapter.__name__} is not supported for the student"):
            make(tmp_path, tiny_model_dir, other_model_dir, trainer_kwargs={"peft_config": config})
        proxy = get_peft_model(AutoModelForCausalLM.from_pretrained(other_model_dir), config)
        proxy.save_pretrained(tmp_path / "adapter")
        for given in (proxy, str(tmp_path / "adapter")):
            with pytest.raises(ValueError, match=f"{adapter.__name__} is not supported for the proxy"):
                make(tmp_path / "out", tiny_model_dir, given)

    def test_an_adapter_read_from_disk_as_configuration_is_refused(self, tmp_path, tiny_model_dir):
        frozen_adapter(tmp_path / "adapter", tiny_model_dir)
        config = LoraConfig.from_pretrained(tmp_path / "adapter")
        with pytest.raises(ValueError, match="inference_mode=True"):
            make_kd_trainer(tmp_path / "out", tiny_model_dir, None, trainer_kwargs={"peft_config": config}, **PLAIN)

    def test_an_adapters_path_is_no_student(self, tmp_path, tiny_model_dir):
        frozen_adapter(tmp_path / "adapter", tiny_model_dir)
        with pytest.raises(ValueError, match="is an adapter. Hand in PeftModel.from_pretrained"):
            plain(tmp_path / "out", str(tmp_path / "adapter"))

    def test_tokens_without_an_embedding(self, tmp_path, tiny_model_dir):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        tokenizer.add_tokens(["<new>"])
        rows = [{"prompt": "a <new>", "completion": "b"}, *make_rows(12)]
        with pytest.raises(ValueError, match="Row 0 has token 330, but the models have 330 embeddings only"):
            make_kd_trainer(
                tmp_path,
                tiny_model_dir,
                None,
                rows=rows,
                held_out=0,
                trainer_kwargs={"processing_class": tokenizer},
                **PLAIN,
            )


class TestRows:
    def test_one_loss_whichever_door_they_come_through(self, tmp_path, tiny_model_dir, make):
        config = PLAIN if make is make_kd_trainer else {"prior_weight": 0.0, "posterior_weight": 0.0}
        whole = {"max_completion_length": 64, "per_device_eval_batch_size": 8}
        trainer = make(tmp_path, tiny_model_dir, None, **{**config, **whole, "stages": ["distil"]})
        rows = Dataset.from_list(make_rows()[:8])
        # TRL's on the same rows, which end alike
        sft = SFTTrainer(
            tiny_model_dir,
            SFTConfig(str(tmp_path / "sft"), **{k: v for k, v in ON_CPU.items() if k != "max_completion_length"}),
            train_dataset=rows,
            eval_dataset=rows,
        )
        at_init = trainer.evaluate()["eval_loss"]
        assert at_init == pytest.approx(sft.evaluate()["eval_loss"], abs=1e-5)
        assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(at_init, abs=1e-6)
        assert trainer.evaluate({"held": rows})["eval_held_loss"] == pytest.approx(at_init, abs=1e-6)
        assert trainer.predict(rows).metrics["test_loss"] == pytest.approx(at_init, abs=1e-6)
        assert trainer.evaluate(rows.to_iterable_dataset())["eval_loss"] == pytest.approx(at_init, abs=1e-5)
        trainer.eval_dataset = rows
        assert trainer.evaluate()["eval_loss"] == pytest.approx(at_init, abs=1e-6)

    def test_a_replaced_training_set_is_refused(self, tmp_path, tiny_model_dir):
        trainer = plain(tmp_path, tiny_model_dir)
        trainer.train_dataset = Dataset.from_list(make_rows())
        with pytest.raises(ValueError, match="train_dataset was replaced.*make a new trainer"):
            trainer.train()

    def test_unused_columns_may_be_kept(self, tmp_path, tiny_model_dir, other_model_dir):
        trainer = make_kd_trainer(
            tmp_path,
            tiny_model_dir,
            other_model_dir,
            stages=["cache", "distil"],
            remove_unused_columns=False,
            max_steps=1,
        )
        trainer.train()
        assert trainer.state.global_step == 1 and trainer.evaluate()["eval_loss"] > 0

    def test_completions_are_logged(self, tmp_path, tiny_model_dir):
        trainer = plain(tmp_path, tiny_model_dir, max_steps=1)
        callback = LogCompletionsCallback(trainer, num_prompts=2, freq=1)
        trainer.add_callback(callback)
        trainer.train()
        assert [row[1] for row in callback.table] == [row["prompt"] for row in make_rows()[:2]]

    def test_rows_that_fill_no_batch(self, tmp_path, tiny_model_dir):
        config = {"rows": make_rows(3), "held_out": 0}
        with pytest.raises(ValueError, match="3 training rows do not fill one batch of 4 rows.*dataloader_drop_last"):
            plain(tmp_path, tiny_model_dir, dataloader_drop_last=True, **config)
        trainer = plain(tmp_path, tiny_model_dir, max_steps=1, **config)
        trainer.train()
        assert trainer.state.global_step == 1

    def test_a_pool_larger_than_the_rows_is_told_before_the_student_is_loaded(
        self, tmp_path, monkeypatch, tiny_model_dir
    ):
        monkeypatch.setattr(SFTTrainer, "__init__", lambda *args, **kwargs: pytest.fail("it was loaded"))
        rows = [{**row, "teacher_confidence": 0.5} for row in make_rows(8)]
        with pytest.raises(ValueError, match="A pool of 16 rows.*larger than the data set of 8"):
            plain(tmp_path, tiny_model_dir, rows=rows, held_out=0, selection="llkd")
        with pytest.raises(ValueError, match="needs a column `teacher_confidence`"):
            plain(tmp_path, tiny_model_dir, rows=make_rows(40), held_out=0, selection="llkd")

    def test_max_length_that_leaves_no_answer_is_told_before_the_student_is_loaded(
        self, tmp_path, monkeypatch, tiny_model_dir
    ):
        monkeypatch.setattr(SFTTrainer, "__init__", lambda *args, **kwargs: pytest.fail("it was loaded"))
        with pytest.raises(ValueError, match="max_length=2 cuts off every answer"):
            plain(tmp_path, tiny_model_dir, max_length=2)


class TestTrainingAgain:
    def test_a_second_train_and_a_resumption(self, tmp_path, tiny_model_dir, other_model_dir, make):
        """The proxy, on disk or in memory, has learned since: it is not taken for another one."""
        student = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        student |= {"alignment_rounds": 1} if make is make_kd_trainer else {}
        for name, proxy in (
            ("path", build_model(tmp_path / "proxy", hidden_size=48)),
            ("memory", AutoModelForCausalLM.from_pretrained(other_model_dir)),
        ):
            trainer = make(tmp_path / name, tiny_model_dir, proxy, **student)
            trainer.train()
            stages = trainer.stage_reports
            weight = trainer.model.get_input_embeddings().weight.detach().clone()
            for resume in (None, True):
                trainer.train(resume_from_checkpoint=resume)
                assert trainer.state.global_step == 2
                assert torch.equal(trainer.model.get_input_embeddings().weight, weight)
                assert trainer.stage_reports == stages

    def test_without_checkpoints_it_trains_on(self, tmp_path, tiny_model_dir):
        trainer = plain(tmp_path, tiny_model_dir, max_steps=1)
        trainer.train()
        weight = trainer.model.get_input_embeddings().weight.detach().clone()
        trainer.train()
        assert not torch.equal(trainer.model.get_input_embeddings().weight, weight)
