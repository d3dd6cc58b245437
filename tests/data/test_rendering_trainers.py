"""What a row's own fields do in the trainers: reasoning, tools, template settings and the template's end of turn."""

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from trl_bbkd import BayesKDConfig, GADConfig, ProxyAlignmentConfig, ProxyKDConfig
from trl_bbkd.data.teacher_data import tokenize_teacher_data
from trl_bbkd.errors import TeacherDataError
from trl_bbkd.gad.trainer import GADTrainer

from ..conftest import SENTENCES
from ..gad.helpers import make_config
from ..gad.helpers import make_trainer as make_gad
from ..proxykd.helpers import make_aligner, make_kd_trainer


# ChatML with reasoning in brackets, tools in front and a setting
TEMPLATE = (
    "{% if tools %}{{ tools[0].name }}: {% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}({{ message.reasoning_content }}) {% endif %}{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRIEF = TEMPLATE.replace("{% for", "{% if brief %}Be brief. {% endif %}{% for", 1)


def make_rows(count=12):
    return [
        {
            "prompt": [{"role": "user", "content": SENTENCES[2 * row % 8]}],
            "completion": [{"role": "assistant", "content": "Yes.", "reasoning_content": f"a dog {row}"}],
            "tools": [{"name": f"cat{row}"}] if row % 3 else None,
            "chat_template_kwargs": {"brief": row % 2 == 0},
        }
        for row in range(count)
    ]


@pytest.fixture
def tokenizer(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir, padding_side="left")
    tokenizer.chat_template = BRIEF
    return tokenizer


class Recording(GADTrainer):
    pairs = ()

    def _collect_pairs(self, inputs, completion_ids):
        collected = super()._collect_pairs(inputs, completion_ids)
        self.pairs = [*self.pairs, (inputs, collected)]
        return collected


def test_gad_samples_from_the_prompt_that_the_teachers_answer_follows(tiny_model_dir, tmp_path, tokenizer):
    trainer = make_gad(
        tmp_path,
        tiny_model_dir,
        make_rows(),
        trainer_class=Recording,
        trainer_kwargs={"processing_class": tokenizer},
        max_steps=2,
        max_completion_length=20,
    )
    trainer.train()
    asked = set()
    for inputs, pairs in trainer.pairs:
        for row, ids in zip(inputs[::4], pairs.prompt_ids, strict=True):
            text = tokenizer.decode(ids)
            number = row["completion"][0]["reasoning_content"].split()[-1]
            assert text.startswith(f"cat{number}: " if row["tools"] else ("Be brief. ", "<|im_start|>user"))
            assert ("Be brief. " in text) is row["chat_template_kwargs"]["brief"]
            asked.add(text)
        answers = [tokenizer.decode(ids) for ids in pairs.teacher_ids]
        assert answers == [
            f"(a dog {row['completion'][0]['reasoning_content'].split()[-1]}) Yes.<|im_end|>" for row in inputs[::4]
        ]
    assert len(asked) > 2


def test_gad_learns_and_shows_the_templates_end_of_turn(tiny_model_dir, tmp_path, tokenizer):
    """A base model's tokenizer and settings, whose end is another one."""
    tokenizer.eos_token = "<|endoftext|>"
    end, eos = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.generation_config.eos_token_id = eos
    trainer = make_gad(
        tmp_path,
        model,
        make_rows(),
        trainer_kwargs={"processing_class": tokenizer, "discriminator": tiny_model_dir},
        max_completion_length=20,
    )
    assert all(row["teacher_ids"][-1] == end for row in trainer.train_dataset)
    assert set(trainer.eos_token_ids) == {end, eos}
    assert set(trainer.generation_config.eos_token_id) == set(trainer.generation_kwargs["eos_token_id"]) == {end, eos}
    trainer._prompt_ids, trainer.num_generations = [[5, 6]] * 3, 3
    pairs = trainer._collect_pairs([trainer.train_dataset[0]] * 3, [[20, eos], [20, end], [20, 21]])
    assert pairs.student_ids == [[20, end], [20, end], [20, 21]]
    trainer.save_model(str(tmp_path / "saved"))
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert set(saved.eos_token_id) == {end, eos}


@pytest.mark.parametrize("is_lora", [False, True])
def test_a_student_of_soft_targets_stops_there_too(tiny_model_dir, tmp_path, tokenizer, is_lora):
    tokenizer.eos_token = "<|endoftext|>"
    end, eos = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.generation_config.eos_token_id = eos
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")) if is_lora else model
    settings = {"kl_weight": 0.0, "stages": ["distil"], "distil_on_all_rows": True, "max_steps": 1}
    given = {"processing_class": tokenizer}
    trainer = make_kd_trainer(tmp_path, model, None, make_rows(), held_out=0, trainer_kwargs=given, **settings)
    trainer.train()
    assert set(trainer.model.generation_config.eos_token_id) == {end, eos}
    if not is_lora:
        trainer.save_model(str(tmp_path / "saved"))
        assert set(GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id) == {end, eos}


def test_strings_end_with_the_tokenizers_end(tiny_model_dir, tmp_path, standard_rows, tokenizer):
    tokenizer.eos_token = "<|endoftext|>"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    trainer = make_gad(
        tmp_path,
        model,
        standard_rows,
        trainer_kwargs={"processing_class": tokenizer, "discriminator": tiny_model_dir},
        max_completion_length=40,
    )
    assert trainer.eos_token_ids == [tokenizer.eos_token_id]
    assert {row["teacher_ids"][-1] for row in trainer.train_dataset} == {tokenizer.eos_token_id}


@pytest.mark.parametrize("reasoning", ["keep", "drop"])
@pytest.mark.parametrize("method", ["gad", "proxykd", "alignment"])
def test_each_trainer_has_the_key(tiny_model_dir, other_model_dir, tmp_path, tokenizer, method, reasoning):
    settings = {"trainer_kwargs": {"processing_class": tokenizer}, "reasoning": reasoning, "max_completion_length": 20}
    if method == "gad":
        rows = make_gad(tmp_path, tiny_model_dir, make_rows(), **settings).train_dataset["teacher_ids"]
    elif method == "alignment":
        rows = make_aligner(tmp_path, other_model_dir, make_rows(), **settings).train_dataset["teacher_ids"]
    else:
        made = make_kd_trainer(tmp_path, tiny_model_dir, other_model_dir, make_rows(), held_out=2, **settings)
        rows = [[label for label in row["labels"] if label != -100] for row in made.train_dataset]
    answers = [tokenizer.decode(ids) for ids in rows]
    assert answers and all(answer.endswith("Yes.<|im_end|>") for answer in answers)
    assert all(("(a dog " in answer) is (reasoning == "keep") for answer in answers)


@pytest.mark.parametrize("config", [GADConfig, ProxyKDConfig, BayesKDConfig, ProxyAlignmentConfig])
def test_another_policy_is_refused(tmp_path, config):
    with pytest.raises(ValueError, match="reasoning must be one of keep, drop, got 'hide'"):
        config(str(tmp_path), use_cpu=True, bf16=False, reasoning="hide")


def test_alignment_pairs_follow_the_rows_prompt(other_model_dir, tmp_path, tokenizer):
    trainer = make_aligner(
        tmp_path,
        other_model_dir,
        make_rows(),
        held_out=0,
        trainer_kwargs={"processing_class": tokenizer},
        num_rounds=1,
        preference_weight=0.0,
        max_completion_length=20,
    )
    expected, _ = tokenize_teacher_data(Dataset.from_list(make_rows()), tokenizer, max_completion_length=20)
    trainer._begin_round(1)
    assert list(trainer.train_dataset["prompt_ids"]) == list(expected["prompt_ids"])


def test_errors_come_before_any_model_is_loaded(tmp_path, tiny_model_dir, tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(TeacherDataError, match="has no chat template"):
        GADTrainer(
            tiny_model_dir,
            args=make_config(tmp_path),
            train_dataset=Dataset.from_list(make_rows()),
            processing_class=tokenizer,
        )
