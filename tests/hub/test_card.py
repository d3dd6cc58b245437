"""The card of a student: its name, its example, and its settings as they were when it ran."""

import ast
import re

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import IntervalStrategy

from tests.proxykd.helpers import make_kd_trainer, make_rows
from tests.reports.test_report import make_report
from trl_bbkd import BayesKDConfig, GADConfig, LLKDConfig
from trl_bbkd.hub.model_card import FIRST_HYPERPARAMETERS, PLACEHOLDER, StudentCard, render_card
from trl_bbkd.hub.settings import changed_settings, hyperparameters


PAPER = {"title": "Black-Box", "id": "2511.10643", "citation": "@article{gad}"}
ON_CPU = {"use_cpu": True, "bf16": False}


def text_of(**changes):
    values = {"base_model": "Qwen/Qwen2.5-0.5B", "name": "student", "repo_id": "me/student"}
    return render_card(StudentCard("GAD", PAPER, ["gad"], **{**values, **changes}))


def code_of(text):
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


class TestExample:
    def test_a_text(self):
        assert 'inputs = tokenizer("Why \\"this\\"?\\nOr that?", return_tensors="pt")' in text_of(
            example='Why "this"?\nOr that?'
        )

    def test_messages_with_what_the_template_was_given(self):
        messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Wärum?"}]
        text = text_of(example=messages, conversational=True, chat_template_kwargs={"enable_thinking": False})
        assert '    {"role": "user", "content": "Wärum?"},\n]' in text and "enable_thinking=False)" in text
        written = code_of(text).partition("messages = ")[2].partition("inputs")[0]
        assert ast.literal_eval(written) == messages

    def test_a_classifiers(self):
        text = text_of(labels=["a", "b"], example="the train is late")
        assert 'tokenizer("the train is late", return_tensors="pt")' in text and '["a", "b"][model(' in text

    @pytest.mark.parametrize("conversational", [True, False])
    def test_without_one_it_says_what_to_put_there(self, conversational):
        assert PLACEHOLDER in text_of(conversational=conversational)

    def test_a_fence_in_it_breaks_nothing(self):
        page = MarkdownIt().enable("table").render(text_of(example="```\n# A heading").split("---\n", 2)[2])
        assert "<h1>A heading" not in page


class TestModelIndex:
    def test_results_are_those_of_the_report(self):
        """As the Hub's own client reads them: the method's student, with intervals, without what is neither good nor bad."""
        intervals = {"valid@t1.0": (0.75, 0.8333333), "teacher_nll": (float("nan"), float("nan"))}
        report = make_report(intervals=intervals)
        data = ModelCard(text_of(datasets=["someone/questions"], report=report)).data
        found = {result.metric_name: result for result in data.eval_results}
        assert data.model_name == "student" and not [name for name in found if name.startswith("length")]
        valid, nll = found["valid, T=1.0"], found["teacher NLL"]
        assert (valid.metric_type, valid.metric_value, nll.metric_value) == ("valid", 0.792, 0.84)
        assert valid.metric_args["low"] == 0.75 and valid.metric_args["high"] == 0.8333 and nll.metric_args is None
        assert {result.dataset_type for result in found.values()} == {"someone/questions"}
        assert {result.verified for result in found.values()} == {False} and valid.dataset_split == "held-out"

    def test_results_on_a_file_name_no_data_set_of_the_hub(self, tmp_path):
        data = ModelCard(text_of(datasets=[f"{tmp_path}/rows.jsonl"], report=make_report())).data
        assert {(result.dataset_type, result.dataset_name) for result in data.eval_results} == {
            ("unknown", "rows.jsonl")
        }


class TestSettings:
    def test_what_matters_comes_first(self, tmp_path):
        config = GADConfig(
            str(tmp_path), per_device_train_batch_size=8, gradient_accumulation_steps=2, num_generations=4, **ON_CPU
        )
        found = hyperparameters(config, 7, ("num_generations", "discriminator_learning_rate"), LoraConfig(r=4))
        assert list(found)[:4] == [
            "learning_rate",
            "sequences per optimizer step",
            "optimizer steps",
            "num_train_epochs",
        ]
        batch = "16 = 8 per device × 2 accumulated × 1 process (4 prompts × 4 samples)"
        assert found["sequences per optimizer step"] == batch
        assert list(found)[4:7] == ["adapter", "num_generations", "discriminator_learning_rate"]
        assert found["adapter"].startswith("LORA, r 4, lora_alpha 8")

    def test_a_selections_settings_lead_only_where_it_acts(self, tmp_path):
        leading = ("selection_rule",)
        assert "selection_rule" in hyperparameters(LLKDConfig(str(tmp_path), **ON_CPU), 1, leading)
        assert "selection_rule" not in hyperparameters(BayesKDConfig(str(tmp_path), **ON_CPU), 1, leading)

    def test_those_that_were_changed(self, tmp_path):
        changes = {"max_steps": 5, "adam_beta2": 0.95, "hub_token": "hf_abcdefgh123", "logging_steps": 3, "seed": 42}
        found = changed_settings(LLKDConfig(str(tmp_path), eval_strategy="epoch", **changes, **ON_CPU))
        assert found["max_steps"] == 5 and found["adam_beta2"] == 0.95 and found["use_cpu"] is True
        assert found["eval_strategy"] == IntervalStrategy.EPOCH
        assert not {"hub_token", "logging_steps", "output_dir", "seed", "report_to"} & found.keys()

    def test_ten_are_seen_and_the_rest_is_folded(self):
        settings = {f"setting_{number}": number for number in range(FIRST_HYPERPARAMETERS + 2)}
        text = text_of(
            hyperparameters=settings,
            changed_settings={"setting_0": 0, "adam_beta2": 0.95},
            recipe_settings={"lora_r": 8},
        )
        seen, folded = text.split("<details>")
        assert f"setting_{FIRST_HYPERPARAMETERS - 1} |" in seen and f"setting_{FIRST_HYPERPARAMETERS} |" not in seen
        assert re.findall(r"\| (\w+) \| `", folded) == ["setting_10", "setting_11", "adam_beta2", "lora_r"]
        page = MarkdownIt().enable("table").render(text.split("---\n", 2)[2])
        assert page.count("<table>") == 2 and page.count("<details>") == page.count("</details>") == 1

    def test_hardware(self):
        assert "Trained on 2 × NVIDIA H100 with trl-bbkd " in text_of(hardware="2 × NVIDIA H100")


class TestWithoutARecipe:
    @pytest.fixture(scope="class")
    def card(self, tmp_path_factory, tiny_model_dir, other_model_dir, conversational_rows):
        folder = tmp_path_factory.mktemp("some") / "folder"
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        model.config._name_or_path = "Qwen/Qwen2.5-0.5B-Instruct"
        held_out = {**conversational_rows[0], "prompt": [{"role": "user", "content": "What is held out?"}]}
        secret = {**held_out, "prompt": [{"role": "user", "content": "My password is x"}]}
        trainer = make_kd_trainer(
            folder,
            model,
            other_model_dir,
            rows=[secret, held_out, *conversational_rows, *conversational_rows],
            held_out=2,
            trainer_kwargs={"processing_class": AutoTokenizer.from_pretrained(tiny_model_dir, padding_side="left")},
            adam_beta2=0.95,
        )
        trainer.create_model_card(teacher_name="GPT-5")
        return (folder / "README.md").read_text()

    def test_its_title_is_the_models_name(self, card):
        assert "\n# Qwen2.5-0.5B-Instruct-ProxyKD\n" in card and "model_name: Qwen2.5-0.5B-Instruct-ProxyKD\n" in card
        assert "# folder" not in card

    def test_its_example_is_a_held_out_row_that_is_no_secret(self, card):
        assert 'messages = [{"role": "user", "content": "What is held out?"}]' in card and "password" not in card

    def test_its_settings(self, card):
        seen, folded = card.split("<details>", 1)
        for row in ("learning_rate | `0.001`", "alignment_rounds | `2`", "kl_weight |", "target_top_k | `10`"):
            assert f"| {row}" in seen, row
        assert "4 = 4 per device × 1 accumulated × 1 process" in seen
        assert "| adam_beta2 | `0.95` |" in folded and "Trained on CPU with" in folded
        assert "use_cpu" in folded and "recipe" not in card

    def test_its_example_runs(self, card, tiny_model_dir, capsys):
        torch.manual_seed(0)
        exec(re.sub(r"^student = .*$", f"student = {tiny_model_dir!r}", code_of(card), flags=re.MULTILINE), {})
        assert capsys.readouterr().out


def test_an_example_from_training_rows_where_none_are_held_out(tmp_path, tiny_model_dir, other_model_dir):
    trainer = make_kd_trainer(tmp_path, tiny_model_dir, other_model_dir, held_out=0)
    assert trainer.card.example == make_rows()[0]["prompt"] and not trainer.card.conversational


def test_a_secret_below_a_setting_is_not_told(tmp_path):
    args = GADConfig(
        str(tmp_path), use_cpu=True, bf16=False, model_init_kwargs={"token": "mirror-4f9c", "dtype": "float32"}
    )
    assert changed_settings(args)["model_init_kwargs"] == {"dtype": "float32"}
