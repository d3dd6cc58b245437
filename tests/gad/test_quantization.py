import json

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.conftest import build_model
from trl_bbkd.discriminator.model import Discriminator, collate_responses
from trl_bbkd.host._compat import keep_4bit_weights_differentiable
from trl_bbkd.runs.recipe import load_recipe
from trl_bbkd.runs.run import run
from trl_bbkd.seqkd.trainer import train_seqkd

from .helpers import are_different, assert_same_weights, fill_adapters, make_config, make_trainer, weights


bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: the `quantization` extra")

LORA = {"r": 4, "target_modules": "all-linear"}
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
BATCH = collate_responses([[5, 6, 7], [8, 9]], [[20, 21, 22, 2], [30, 31]], pad_token_id=0)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """Wide enough for blocks of 64 weights with one scale."""
    return build_model(tmp_path_factory.mktemp("wide"), hidden_size=64)


def qlora_trainer(output_dir, model_dir, rows, discriminator=None, **config):
    return make_trainer(
        output_dir,
        model_dir,
        rows,
        trainer_kwargs={
            "peft_config": LoraConfig(**LORA, task_type="CAUSAL_LM"),
            "quantization_config": NF4,
        },
        discriminator=discriminator,
        discriminator_lora_kwargs=LORA,
        discriminator_load_in_4bit=discriminator is None,
        **{"beta": 0.1, "learning_rate": 1e-2, "max_steps": 6, **config},
    )


def linear_layers(module):
    return [layer for layer in module.modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)]


@pytest.mark.parametrize("discriminator", [None, "shared"])
@pytest.mark.parametrize("head", ["scalar", "likelihood"])
def test_4_bit_student_and_discriminator_learn(model_dir, tmp_path, standard_rows, discriminator, head):
    trainer = qlora_trainer(tmp_path, model_dir, standard_rows, discriminator, discriminator_head=head)
    layers = linear_layers(trainer.model), linear_layers(trainer.discriminator)
    assert len(layers[0]) == len(layers[1]) == 14
    for first, second in zip(*layers, strict=True):
        assert second.weight.quant_state.quant_type == "nf4"
        assert (first.weight is second.weight) == (discriminator == "shared")
        assert (first.quant_state is second.quant_state) == (discriminator == "shared")
    # PEFT's class for such a layer
    names = {type(module).__name__ for module in trainer.discriminator.modules() if hasattr(module, "lora_A")}
    assert names == {"Linear4bit"}
    quantized = [layer.weight.detach().clone() for layer in layers[1]]
    student, judge = weights(trainer.model), weights(trainer.discriminator)
    trainer.train()
    assert are_different(student, weights(trainer.model))
    assert are_different(judge, weights(trainer.discriminator))
    assert all(torch.equal(before, layer.weight) for before, layer in zip(quantized, layers[1], strict=True))
    trainable = [p.dtype for p in trainer.discriminator.parameters() if p.requires_grad]
    assert set(trainable) == {torch.float32}
    steps = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-7)
    assert steps[-1]["kl"] > 1e-4


def test_the_shared_4_bit_discriminator_equals_a_separate_one(model_dir, tmp_path, standard_rows):
    runs = [qlora_trainer(tmp_path / str(name), model_dir, standard_rows, name) for name in (None, "shared")]
    for trainer in runs:
        fill_adapters(trainer)
    assert_same_weights(weights(runs[0].discriminator), weights(runs[1].discriminator))
    for trainer in runs:
        # Loading a model in 4 bits draws random numbers
        torch.manual_seed(0)
        trainer.train()
    first, second = runs
    assert_same_weights(weights(first.model), weights(second.model))
    assert_same_weights(weights(first.discriminator), weights(second.discriminator))


@pytest.mark.parametrize("resume_at", [2, 4])
def test_resume(model_dir, tmp_path, standard_rows, resume_at):
    config = {"save_strategy": "steps", "save_steps": 2}
    straight = qlora_trainer(tmp_path, model_dir, standard_rows, "shared", **config)
    straight.train()
    resumed = qlora_trainer(tmp_path, model_dir, standard_rows, "shared", **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{resume_at}"))
    assert_same_weights(weights(straight.model), weights(resumed.model))
    assert_same_weights(weights(straight.discriminator), weights(resumed.discriminator))


def test_a_saved_4_bit_discriminator_is_an_adapter_on_its_checkpoint(model_dir, tmp_path, standard_rows):
    trainer = qlora_trainer(tmp_path, model_dir, standard_rows, max_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    folder = tmp_path / "final" / "discriminator"
    with torch.no_grad():
        expected = trainer.discriminator(**BATCH)[0]
        alone = Discriminator.from_pretrained(folder, dtype=torch.float32, quantization_config=NF4).eval()
        keep_4bit_weights_differentiable(alone)
        torch.testing.assert_close(alone(**BATCH)[0], expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(Discriminator.from_pretrained(folder).eval()(**BATCH)[0], expected, atol=1e-5)
    continued = make_trainer(
        tmp_path, model_dir, standard_rows, discriminator=str(folder), discriminator_load_in_4bit=True
    )
    assert len(linear_layers(continued.discriminator)) == 14
    assert any("lora_" in name for name, p in continued.discriminator.named_parameters() if p.requires_grad)


def test_a_recipe_for_little_memory(model_dir, tmp_path, standard_rows):
    """Student, discriminator and SeqKD in 4 bits, each measured between steps."""
    for split, rows in (("train", standard_rows[:12]), ("test", standard_rows[12:])):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    values = {
        "method": "gad",
        "model_name_or_path": model_dir,
        "dataset_name": str(tmp_path),
        "output_dir": str(tmp_path / "out"),
        "load_in_4bit": True,
        "use_peft": True,
        "lora_target_modules": "all-linear",
        "discriminator": "shared",
        "max_steps": 4,
        "num_train_epochs": 2,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 64,
        "max_completion_length": 12,
        "learning_rate": 1e-2,
        "discriminator_learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    run(load_recipe(tmp_path / "recipe.yaml", []))
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]
    nll = {name: metrics["teacher_nll"] for name, metrics in results.items() if "teacher_nll" in metrics}
    assert nll["GAD"] < nll["undistilled"] and nll["SeqKD"] < nll["undistilled"]


def test_the_baseline_learns_after_its_measurements(model_dir, tokenizer, tmp_path, standard_rows):
    dataset = Dataset.from_list(
        [{**row, "teacher_ids": tokenizer(row["completion"]).input_ids} for row in standard_rows]
    )
    losses = []

    def measure(student):
        student.eval()
        with torch.no_grad():
            losses.append(student(input_ids=BATCH["input_ids"], labels=BATCH["input_ids"]).loss.item())
        student.train()
        return {"loss": losses[-1]}

    result = train_seqkd(
        model_dir,
        make_config(tmp_path, max_steps=4),
        dataset,
        tokenizer,
        measure,
        is_better=lambda new, old: False,
        output_dir=str(tmp_path / "seqkd"),
        max_steps=4,
        learning_rate=1e-2,
        peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"),
        quantization_config=NF4,
    )
    assert result.best_step == 1
    assert len(set(losses)) == 4


def test_evaluation_leaves_the_gradient_as_it_was(model_dir):
    """Otherwise bitsandbytes repacks the weights on CPUs with AVX512-BF16, and training stops or goes wrong."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, quantization_config=NF4)
    keep_4bit_weights_differentiable(model)
    embeddings = model.get_input_embeddings()(BATCH["input_ids"]).detach().requires_grad_()
    gradients = []
    for _ in range(2):
        loss = model.train()(inputs_embeds=embeddings).logits.logsumexp(-1).sum()
        gradients.append(torch.autograd.grad(loss, embeddings)[0])
        with torch.no_grad():
            model.eval()(input_ids=BATCH["input_ids"])
    torch.testing.assert_close(gradients[0], gradients[1], atol=0, rtol=0)
    assert gradients[0].abs().max() > 1e-3
