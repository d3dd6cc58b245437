"""Student, discriminator and critic can learn, and have an embedding for every token, or are refused before they are built."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from trl_bbkd.discriminator.model import Discriminator, build_discriminator
from trl_bbkd.evaluation.student import generate_completions
from trl_bbkd.host.preflight import refuse_short_embeddings

from .helpers import are_different, assert_same_weights, make_trainer, no_model_is_loaded, weights


LORA = {"r": 4, "target_modules": ["q_proj"]}


def load(path, model_class=AutoModelForCausalLM):
    return model_class.from_pretrained(path, dtype=torch.float32)


@pytest.fixture(scope="module")
def adapter_dir(tiny_model_dir, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("adapter"))
    get_peft_model(load(tiny_model_dir), LoraConfig(**LORA, task_type="CAUSAL_LM")).save_pretrained(folder)
    return folder


@pytest.fixture
def refused(tiny_model_dir, tmp_path, standard_rows, monkeypatch, tokenizer):
    """Calls GADTrainer, which must raise before it loads a model."""

    def call(message, student=tiny_model_dir, config=None, **trainer_kwargs):
        trainer_kwargs = {"processing_class": tokenizer, **trainer_kwargs}
        with monkeypatch.context() as patched, pytest.raises(ValueError, match=message) as error:
            no_model_is_loaded(patched)
            make_trainer(tmp_path, student, standard_rows, trainer_kwargs=trainer_kwargs, **(config or {}))
        assert "\n" not in str(error.value)

    return call


class TestFrozen:
    def test_student(self, refused, tiny_model_dir, adapter_dir):
        frozen = PeftModel.from_pretrained(load(tiny_model_dir), adapter_dir)
        message = "The student has no trainable parameter.*is_trainable=True"
        refused(message, frozen)
        # Where the reference's adapter would turn it on again
        refused(message, frozen, {"beta": 0.1})
        refused("The student has no trainable parameter.*requires_grad", load(tiny_model_dir).requires_grad_(False))

    def test_student_with_the_configuration_of_a_saved_adapter(self, refused, adapter_dir):
        refused(
            "The student's LoraConfig has inference_mode=True", peft_config=PeftConfig.from_pretrained(adapter_dir)
        )

    def test_student_that_is_an_adapters_path(self, refused, adapter_dir):
        refused("The student .* is an adapter. Hand in PeftModel.from_pretrained", str(adapter_dir))

    def test_student_whose_adapter_has_another_name(self, refused, tiny_model_dir):
        named = get_peft_model(load(tiny_model_dir), LoraConfig(**LORA, task_type="CAUSAL_LM"), adapter_name="mine")
        refused("The student's adapter is named mine, but GRPO trains one named 'default'", named)

    def test_student_whose_adapter_is_trainable(self, tiny_model_dir, tmp_path, standard_rows, adapter_dir, tokenizer):
        student = PeftModel.from_pretrained(load(tiny_model_dir), adapter_dir, is_trainable=True)
        kwargs = {"processing_class": tokenizer}
        trainer = make_trainer(tmp_path, student, standard_rows, trainer_kwargs=kwargs, max_steps=2)
        before = weights(trainer.model)
        trainer.train()
        assert are_different(before, weights(trainer.model))

    def test_discriminator(self, refused, tiny_model_dir, adapter_dir):
        message = "The discriminator has no trainable parameter"
        frozen = load(tiny_model_dir, AutoModel).requires_grad_(False)
        refused(message, discriminator=frozen)
        refused(message, discriminator=PeftModel.from_pretrained(load(tiny_model_dir), adapter_dir))
        refused(message, discriminator=Discriminator(frozen, "scalar"))
        refused(
            "The discriminator's LoraConfig has inference_mode=True",
            discriminator_peft_config=PeftConfig.from_pretrained(adapter_dir),
        )

    def test_discriminator_that_shall_not_learn(self, tiny_model_dir, tmp_path, standard_rows):
        frozen = load(tiny_model_dir, AutoModel).requires_grad_(False)
        kwargs = {"discriminator": frozen}
        make_trainer(tmp_path, tiny_model_dir, standard_rows, trainer_kwargs=kwargs, discriminator_updates_per_batch=0)

    def test_critic(self, refused):
        config = {"advantage_estimator": "gae", "critic": "copy"}
        refused(
            "The critic's LoraConfig has inference_mode=True",
            config={**config, "critic_lora_kwargs": {**LORA, "inference_mode": True}},
        )


class TestAdapterWithoutEffect:
    def test_virtual_tokens(self, refused):
        refused(
            "PromptTuningConfig is not supported for the discriminator",
            discriminator_peft_config=PromptTuningConfig(num_virtual_tokens=4),
        )

    def test_beside_an_adapter(self, refused, tiny_model_dir):
        adapted = get_peft_model(load(tiny_model_dir, AutoModel), LoraConfig(**LORA))
        refused(
            "The discriminator has an adapter already",
            discriminator=adapted,
            discriminator_peft_config=LoraConfig(**LORA),
        )

    def test_beside_a_discriminator(self, refused, tiny_model_dir, tmp_path):
        discriminator = build_discriminator(tiny_model_dir, "scalar")
        discriminator.save_pretrained(tmp_path / "saved")
        for start in (discriminator, str(tmp_path / "saved")):
            refused(
                "discriminator_lora_kwargs. would have no effect",
                config={"discriminator_lora_kwargs": LORA},
                discriminator=start,
            )

    def test_another_reduction_than_the_saved_one(self, tiny_model_dir):
        discriminator = build_discriminator(tiny_model_dir, "likelihood", "mean")
        with pytest.raises(ValueError, match="takes the mean over.*discriminator_likelihood_reduction is 'sum'"):
            build_discriminator(discriminator, "likelihood", "sum")

    @pytest.mark.parametrize(
        "adapter",
        [
            {"target_modules": ["q_proj", "lm_head"]},
            {"target_modules": ".*(q_proj|head)"},
            {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
            {"target_modules": ["q_proj"], "trainable_token_indices": [5]},
        ],
        ids=str,
    )
    def test_on_the_output_layer_of_a_likelihood_head(self, tiny_model_dir, tmp_path, standard_rows, adapter):
        with pytest.raises(ValueError, match="The discriminator has an adapter on its output layer"):
            build_discriminator(tiny_model_dir, "likelihood", peft_config=LoraConfig(r=4, **adapter))
        with pytest.raises(ValueError, match="output layer|lm_head"):
            kwargs = {"peft_config": LoraConfig(r=4, **adapter, task_type="CAUSAL_LM")}
            make_trainer(tmp_path, tiny_model_dir, standard_rows, trainer_kwargs=kwargs)

    @pytest.mark.parametrize(
        "adapter",
        [
            {"target_modules": "all-linear"},
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            {"target_modules": ["embed_tokens"]},
        ],
        ids=str,
    )
    def test_every_parameter_of_another_one_learns(self, tiny_model_dir, adapter):
        discriminator = build_discriminator(tiny_model_dir, "likelihood", peft_config=LoraConfig(r=4, **adapter))
        ids = torch.arange(5, 15)[None]
        response = torch.ones_like(ids)
        response[:, :4] = 0
        discriminator(ids, torch.ones_like(ids), response).scores.sum().backward()
        assert all(p.grad is not None for p in discriminator.parameters() if p.requires_grad)


@pytest.fixture
def grown(tokenizer_with_a_token, tiny_model_dir):
    """A student with an added token, and its tokenizer."""
    student = load(tiny_model_dir)
    student.resize_token_embeddings(len(tokenizer_with_a_token))
    return student


@pytest.fixture
def tokenizer_with_a_token():
    from tests.conftest import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<answer>"])
    return tokenizer


@pytest.fixture
def rows_with_a_token(standard_rows):
    return [{**row, "completion": "<answer>" + row["completion"]} for row in standard_rows]


class TestAddedTokens:
    @pytest.mark.parametrize("head", ["scalar", "likelihood"])
    @pytest.mark.parametrize("lora", [False, True])
    def test_all_models_have_them(
        self, grown, tokenizer_with_a_token, tmp_path, rows_with_a_token, tiny_model_dir, head, lora
    ):
        kwargs = {"processing_class": tokenizer_with_a_token}
        if lora:
            kwargs["discriminator_peft_config"] = LoraConfig(r=4, target_modules="all-linear")
        vector = grown.get_input_embeddings().weight[-1].clone()
        trainer = make_trainer(
            tmp_path,
            grown,
            rows_with_a_token,
            trainer_kwargs=kwargs,
            max_steps=4,
            beta=0.1,
            discriminator_head=head,
            advantage_estimator="gae",
            critic="copy",
        )
        old = load(tiny_model_dir).get_input_embeddings().weight
        for model in (trainer.discriminator.backbone, trainer.critic_trainer.critic.backbone, trainer.ref_model):
            own = model.get_input_embeddings().weight
            assert torch.equal(own[-1], vector) and torch.equal(own[:-1], old)
        trainer.train()
        trainer.save_model()
        saved = Discriminator.from_pretrained(tmp_path / "discriminator")
        assert_same_weights(weights(trainer.discriminator), weights(saved))

    def test_a_run_goes_on(self, grown, tokenizer_with_a_token, tmp_path, rows_with_a_token, tiny_model_dir):
        config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "beta": 0.1}
        kwargs = {"processing_class": tokenizer_with_a_token}
        start = {name: value.clone() for name, value in grown.state_dict().items()}
        first = make_trainer(tmp_path, grown, rows_with_a_token, trainer_kwargs=kwargs, **config)
        first.train()
        again = load(tiny_model_dir)
        again.resize_token_embeddings(len(tokenizer_with_a_token))
        again.load_state_dict(start)
        second = make_trainer(tmp_path, again, rows_with_a_token, trainer_kwargs=kwargs, **config)
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert_same_weights(weights(first.model), weights(second.model))
        assert_same_weights(weights(first.discriminator), weights(second.discriminator))

    def test_embeddings_that_were_not_resized(self, refused, tiny_model_dir, tokenizer_with_a_token):
        message = r"ids up to (\d+), but the student has embeddings for \1 tokens. Resize them, model.resize_token"
        refused(message, processing_class=tokenizer_with_a_token)
        refused(message, load(tiny_model_dir), processing_class=tokenizer_with_a_token)

    def test_padded_embeddings_are_fine(self, tokenizer):
        refuse_short_embeddings(tokenizer, len(tokenizer) + 50, "student")

    def test_a_student_without_a_checkpoint(self, refused, tiny_model_dir):
        student = load(tiny_model_dir)
        student.config._name_or_path = ""
        refused("no checkpoint is known from which to start its discriminator, KL reference", student)


@pytest.fixture(scope="module")
def moe_dir(tmp_path_factory):
    from tests.conftest import build_tokenizer

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    folder = str(tmp_path_factory.mktemp("moe"))
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class TestMixtureOfExperts:
    def first_step(self, moe_dir, folder, rows, **config):
        trainer = make_trainer(folder, moe_dir, rows, max_steps=1, num_train_epochs=1, learning_rate=0.0, **config)
        trainer.train()
        return trainer.state.log_history[0]

    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_the_warm_up_balances_its_experts(self, moe_dir, tmp_path, standard_rows, accumulation):
        batch = {
            "per_device_train_batch_size": 8 // accumulation,
            "gradient_accumulation_steps": accumulation,
        }
        without = self.first_step(moe_dir, tmp_path / "0", standard_rows, router_aux_loss_coef=0.0, **batch)
        step = self.first_step(moe_dir, tmp_path / "2", standard_rows, router_aux_loss_coef=2.0, **batch)
        assert step["adversarial_phase"] == 0 and "aux_loss" not in without
        assert step["aux_loss"] > 1
        assert step["loss"] - without["loss"] == pytest.approx(2.0 * step["aux_loss"], rel=1e-4)

    def test_it_samples_whatever_its_configuration_returns(self, moe_dir, tmp_path, standard_rows, tokenizer):
        model = AutoModelForCausalLM.from_pretrained(moe_dir)
        model.config.output_router_logits = True
        model.save_pretrained(tmp_path / "moe")
        tokenizer.save_pretrained(tmp_path / "moe")
        assert "aux_loss" in self.first_step(str(tmp_path / "moe"), tmp_path / "out", standard_rows)
        prompts = [row["prompt"] for row in standard_rows[:2]]
        assert len(generate_completions(model, tokenizer, prompts, max_new_tokens=4)) == 2
        assert model.config.output_router_logits is True

    def test_it_has_no_part_in_the_teacher_s_nll(self, moe_dir, tmp_path, standard_rows):
        nll = []
        for coefficient in (0.0, 2.0):
            trainer = make_trainer(
                tmp_path, moe_dir, standard_rows, router_aux_loss_coef=coefficient, per_device_eval_batch_size=8
            )
            nll.append(trainer.evaluate(Dataset.from_list(standard_rows[12:]))["eval_teacher_nll"])
        assert nll[0] == nll[1]


def test_the_output_layer_is_cast_in_the_warm_up_as_well(tiny_model_dir, tmp_path, standard_rows):
    kwargs = {"cast_lm_head_to_fp32": True, "model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = make_trainer(tmp_path, tiny_model_dir, standard_rows, **kwargs)
    ids = torch.arange(5, 15)[None]
    with trainer._sft_temperature():
        log_probs, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 5)
    hidden = trainer.model.base_model(ids).last_hidden_state.float()
    logits = hidden @ trainer.model.lm_head.weight.float().T
    expected = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)[:, -5:]
    torch.testing.assert_close(log_probs.float(), expected, atol=1e-5, rtol=1e-5)
