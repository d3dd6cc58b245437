"""Small guards of GAD, each of which something here notices the loss of."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from tests.processes import on_processes
from trl_bbkd.data.teacher_data import tokenize_teacher_data
from trl_bbkd.discriminator.model import Discriminator
from trl_bbkd.discriminator.trainer import PairBatch
from trl_bbkd.evaluation.student import teacher_nll
from trl_bbkd.gad.critic import Critic
from trl_bbkd.host.reference import REFERENCE_ADAPTER

from .helpers import FixedSamplesTrainer, are_different, assert_same_weights, make_trainer, weights
from .on_processes import ROWS, trained_evaluated_and_resumed


LORA = {"r": 4, "target_modules": "all-linear"}
DORA = {**LORA, "use_dora": True}


def test_a_value_is_read_before_its_token(tiny_model_dir):
    """The critic may not see the token whose value it tells; what it has seen is prompt and tokens before."""
    critic = Critic(AutoModel.from_pretrained(tiny_model_dir, dtype=torch.float32), trains_backbone=True).eval()
    torch.nn.init.normal_(critic.value_head.weight)
    # Left-padded prompts, right-padded responses
    ids = torch.tensor([[0, 5, 6, 20, 21, 22, 23], [7, 8, 9, 30, 31, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        values = critic(ids, mask, num_response_tokens=4)
        for row, position in [(0, 0), (0, 1), (0, 3), (1, 1)]:
            before = slice(int(mask[row].argmax()), 3 + position)
            hidden = critic.backbone(input_ids=ids[row : row + 1, before]).last_hidden_state[0, -1]
            torch.testing.assert_close(values[row, position], critic.value_head(hidden)[0], atol=1e-4, rtol=1e-4)
        changed = ids.clone()
        changed[0, 3 + 1] = 40
        moved = (critic(changed, mask, num_response_tokens=4) - values)[0].abs() > 1e-3
    assert moved.tolist() == [False, False, True, True]


def test_padding_is_no_part_of_the_warm_up_loss_nor_of_the_teachers_nll(tiny_model_dir, tmp_path, standard_rows):
    """Whatever TRL returns there. Tokens weigh alike, not rows."""
    trainer = make_trainer(tmp_path, tiny_model_dir, standard_rows)
    trainer.current_gradient_accumulation_steps = 1
    log_probs = torch.tensor([[-1.0, -2.0, -50.0], [-3.0, -50.0, -50.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    trainer._teacher_log_probs = lambda model, inputs, with_aux_loss=False: (log_probs, mask, None)
    assert trainer._sft_loss(None, {"num_teacher_tokens": mask.sum()}).item() == 2.0
    assert trainer._metrics["train"]["teacher_nll"] == [2.0]
    trainer._measure_teacher_nll({})
    assert trainer._held_out.pop_means("eval") == {"eval_teacher_nll": 2.0}


def test_two_answers_of_the_teacher_to_one_prompt_stay_two():
    prompt, first, second = [5, 6], [20, 21, 2], [30, 2]
    triples = [(prompt, first, [40]), (prompt, second, [41]), (prompt, first, [42]), ([7], second, [43])]
    pairs = PairBatch.from_triples(triples)
    assert pairs.triples() == triples
    assert (pairs.prompt_ids, pairs.teacher_ids) == ([prompt, prompt, [7]], [first, second, second])


@pytest.mark.parametrize("generations", [2, 6])
def test_length_control_of_an_evaluation_goes_by_its_own_groups(tiny_model_dir, tmp_path, standard_rows, generations):
    """`num_generations_eval` may differ from `num_generations`."""
    trainer = make_trainer(
        tmp_path,
        tiny_model_dir,
        standard_rows,
        FixedSamplesTrainer,
        discriminator_head="likelihood",
        length_control=True,
        num_generations=4,
        num_generations_eval=generations,
        per_device_eval_batch_size=12,
    )
    trainer.model.eval()
    seen, original = [], trainer._calculate_rewards

    def calculate(inputs, prompts, completions, ids):
        rewards = original(inputs, prompts, completions, ids)
        seen.append((rewards[:, 0], torch.tensor([len(row) for row in ids])))
        return rewards

    trainer._calculate_rewards = calculate
    trainer._generate_and_score_completions(
        [row for row in trainer.train_dataset.select(range(12 // generations)) for _ in range(generations)]
    )
    ((rewards, lengths),) = seen
    rewards, lengths = (
        values.double().view(-1, generations) - values.double().view(-1, generations).mean(dim=1, keepdim=True)
        for values in (rewards, lengths)
    )
    assert (lengths**2).sum() > 1 and (rewards**2).sum() > 1
    assert (rewards * lengths).sum().item() == pytest.approx(0, abs=1e-2)


@pytest.fixture(scope="module")
def on_two_processes(tmp_path_factory, tiny_model_dir):
    """What each of two processes ended with, and the folder."""
    folder = tmp_path_factory.mktemp("two")
    return on_processes(2, trained_evaluated_and_resumed, tiny_model_dir, folder), folder


class TestTwoProcesses:
    def test_an_evaluation_is_of_the_rows_of_both(self, on_two_processes, tiny_model_dir):
        """Three samples a process and batch, two of a prompt: the middle prompt is on both."""
        ranks, folder = on_two_processes
        assert ranks[0]["metrics"]["eval_teacher_nll"] == ranks[1]["metrics"]["eval_teacher_nll"]
        student = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        student.load_state_dict(ranks[0]["straight"]["student"])
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        rows, _ = tokenize_teacher_data(Dataset.from_list(ROWS[:6]), tokenizer, max_completion_length=24)
        lengths = [len(ids) for ids in rows["teacher_ids"]]
        assert len(set(lengths)) > 1 and sum(lengths[:3]) != sum(lengths[3:])
        expected = teacher_nll(student, tokenizer, rows.to_list())
        assert ranks[0]["metrics"]["eval_teacher_nll"] == pytest.approx(expected, rel=1e-5)
        characters = [len(text) for rank in ranks for text in rank["judged"]]
        assert len(characters) == 12 and [len(rank["judged"]) for rank in ranks] == [6, 6]
        assert ranks[0]["metrics"]["eval_characters"] == pytest.approx(sum(characters) / 12)

    def test_what_fills_the_last_batches_up_counts_once(self, on_two_processes, tiny_model_dir):
        ranks, _ = on_two_processes
        student = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        student.load_state_dict(ranks[0]["straight"]["student"])
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        rows, _ = tokenize_teacher_data(Dataset.from_list(ROWS[:5]), tokenizer, max_completion_length=24)
        expected = teacher_nll(student, tokenizer, rows.to_list())
        assert ranks[0]["metrics of 5"]["eval_teacher_nll"] == pytest.approx(expected, rel=1e-5)
        # Batches of 3 samples: the first process has samples 0-2 and 6-8, the second 3-5, 9 and two repeated ones
        first, second = (list(map(len, rank["judged of 5"])) for rank in ranks)
        assert (len(first), len(second)) == (6, 6)
        expected = (sum(first) + sum(second[:4])) / 10
        assert expected != pytest.approx((sum(first) + sum(second)) / 12)
        assert ranks[0]["metrics of 5"]["eval_characters"] == pytest.approx(expected)

    @pytest.mark.parametrize("step", [1, 3])
    def test_each_goes_on_with_its_own_half_of_a_generation_batch(self, on_two_processes, step):
        """Warm-up has 2 steps and so has a generation batch: each checkpoint lies amid one."""
        ranks, folder = on_two_processes
        for rank in ranks:
            for name in ("student", "discriminator"):
                assert_same_weights(rank["straight"][name], rank[f"resumed at {step}"][name])
        pairs = [rank["straight"]["pairs"] for rank in ranks]
        assert not all(torch.equal(*both) for pair in zip(*pairs, strict=True) for both in zip(*pair, strict=True))
        for rank in ranks:
            for found, expected in zip(rank[f"resumed at {step}"]["pairs"], rank["straight"]["pairs"], strict=True):
                assert all(torch.equal(*both) for both in zip(found, expected, strict=True))
        files = {path.name for path in (folder / f"checkpoint-{step}").glob("*-[01].safetensors")}
        assert files == {f"{name}-{rank}.safetensors" for name in ("generation_batch", "replay") for rank in range(2)}


def in_bfloat16(model_dir):
    """A LoRA student whose adapter is in bfloat16 on a float32 model, as TRL trains one on a quantised model."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), LoraConfig(**LORA))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def test_a_resumed_adapter_keeps_its_precision(tiny_model_dir, tmp_path, standard_rows):
    """PEFT loads an adapter in float32."""
    config = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "beta": 0.0}
    runs = [make_trainer(tmp_path, in_bfloat16(tiny_model_dir), standard_rows, **config) for _ in range(2)]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for trainer in runs:
        assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert_same_weights(weights(runs[1].model), weights(runs[0].model))


@pytest.mark.parametrize("discriminator", [None, "shared"])
def test_dora_is_trained_saved_loaded_and_a_reference(tiny_model_dir, tmp_path, standard_rows, discriminator):
    """Its magnitudes are a third kind of weight beside LoRA's matrices."""

    def dora_trainer():
        return make_trainer(
            tmp_path,
            tiny_model_dir,
            standard_rows,
            trainer_kwargs={
                "peft_config": LoraConfig(**DORA, task_type="CAUSAL_LM"),
                "discriminator_peft_config": LoraConfig(**DORA),
            },
            discriminator=discriminator,
            max_steps=4,
            learning_rate=1e-2,
            beta=0.1,
            save_strategy="steps",
            save_steps=1,
        )

    def magnitudes(module, adapter="default"):
        return {n: p for n, p in weights(module).items() if f"lora_magnitude_vector.{adapter}" in n}

    trainer = dora_trainer()
    before = magnitudes(trainer.model), magnitudes(trainer.discriminator)
    trainer.train()
    assert len(before[0]) == len(before[1]) == 14
    assert are_different(before[0], magnitudes(trainer.model))
    assert are_different(before[1], magnitudes(trainer.discriminator))
    # Two steps of warm-up
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-7) and kl[1] > 1e-4
    of_reference = f".{REFERENCE_ADAPTER}"
    reference = {n.replace(of_reference, ""): p for n, p in weights(trainer.model).items() if of_reference in n}
    warmed_up = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert_same_weights({n.removesuffix(".weight") + ".weight": p for n, p in warmed_up.items()}, reference)
    resumed = dora_trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_weights(weights(resumed.model), weights(trainer.model))
    assert_same_weights(weights(resumed.discriminator), weights(trainer.discriminator))

    trainer.save_model(tmp_path / "final")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    student = PeftModel.from_pretrained(base, tmp_path / "final").eval()
    judge = Discriminator.from_pretrained(tmp_path / "final" / "discriminator").eval()
    with torch.no_grad():
        trainer.model.eval()
        torch.testing.assert_close(student(ids).logits, trainer.model(ids).logits, atol=1e-5, rtol=1e-5)
        scores = [module(**batch, response_mask=torch.ones_like(ids))[0] for module in (judge, trainer.discriminator)]
        torch.testing.assert_close(*scores, atol=1e-5, rtol=1e-5)
