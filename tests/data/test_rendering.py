"""How conversational rows become prompt and answer, through the chat templates that well-known families have."""

import json
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from trl_bbkd.data.rendering import ChatRenderer
from trl_bbkd.data.teacher_data import (
    answer_text,
    check_teacher_data,
    end_token_id,
    prompt_ids_of,
    prompt_token_ids,
    tokenize_teacher_data,
)
from trl_bbkd.errors import TeacherDataError
from trl_bbkd.evaluation.student import evaluate_student, evaluate_teacher, generate_completion_ids, teacher_nll
from trl_bbkd.preference.sampling import ModelSampler
from trl_bbkd.seqkd.trainer import sft_rows
from trl_bbkd.soft_targets.rows import soft_target_rows

from ..conftest import build_tokenizer


TEMPLATES = Path(trl.__file__).parent / "chat_templates"
# Template, tokens that it writes, and the tokenizer's end-of-sequence token
FAMILIES = {
    "qwen3": ("qwen3", ["<think>", "</think>", "<tool_call>", "</tool_call>"], "<|im_end|>"),
    "qwen25": ("qwen2_5", [], "<|im_end|>"),
    "llama3": ("llama3", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|endoftext|>"),
    "gemma": ("gemma", ["<start_of_turn>", "<end_of_turn>"], "<|endoftext|>"),
    "phi3": ("phi3", ["<|user|>", "<|assistant|>", "<|end|>"], "<|endoftext|>"),
    "cohere2": (
        "cohere2",
        ["<|END_OF_TURN_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|CHATBOT_TOKEN|>"],
        "<|END_OF_TURN_TOKEN|>",
    ),
    "r1": ("deepseek_r1_distill", ["<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"], "<｜end▁of▁sentence｜>"),
    "gptoss": ("gptoss", ["<|start|>", "<|end|>", "<|return|>", "<|message|>", "<|channel|>"], "<|return|>"),
}
USER = [{"role": "user", "content": "What is 2+2?"}]
FOUR = [{"role": "assistant", "content": "4"}]
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds", "parameters": {"type": "object"}}}
CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"x": 2}}}
HISTORY = [
    *USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "It is four.", "name": "add", "tool_call_id": "c1"},
]


@pytest.fixture(scope="module")
def family():
    made = {}

    def get(name):
        if name not in made:
            template, tokens, eos = FAMILIES[name]
            tokenizer = build_tokenizer()
            tokenizer.add_tokens(tokens)
            tokenizer.bos_token, tokenizer.eos_token = "<|endoftext|>", eos
            tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
            made[name] = tokenizer
        return made[name]

    return get


def learned(tokenizer, prompt, completion, row=None, **settings):
    """The texts of prompt and answer, and the counts."""
    data = Dataset.from_list([{"prompt": prompt, "completion": completion, **(row or {})}])
    data, counts = tokenize_teacher_data(data, tokenizer, **{"max_completion_length": 200, **settings})
    return tokenizer.decode(data[0]["prompt_ids"]), tokenizer.decode(data[0]["teacher_ids"]), counts


def thought(name="reasoning_content", text="2 and 2 is 4"):
    return [{"role": "assistant", "content": "4", name: text}]


INLINE = [{"role": "assistant", "content": "<think>\n2 and 2 is 4\n</think>\n\n4"}]
EVERY_FORM = [thought("reasoning_content"), thought("reasoning"), thought("thinking"), INLINE]


class TestReasoning:
    @pytest.mark.parametrize("completion", EVERY_FORM)
    def test_is_kept_as_the_template_spells_it(self, family, completion):
        _, answer, counts = learned(family("qwen3"), USER, completion)
        assert answer == "<think>\n2 and 2 is 4\n</think>\n\n4<|im_end|>"
        assert (counts.reasoning_kept, counts.reasoning_dropped) == (1, 0)
        assert "answers with reasoning (kept): 1" in str(counts)

    @pytest.mark.parametrize("completion", EVERY_FORM)
    @pytest.mark.parametrize("name", ["qwen3", "qwen25"])
    def test_is_dropped_where_the_user_says_so(self, family, completion, name):
        _, answer, counts = learned(family(name), USER, completion, reasoning="drop")
        _, plain, _ = learned(family(name), USER, FOUR)
        assert answer == plain and "2 and 2" not in answer
        assert (counts.reasoning_kept, counts.reasoning_dropped) == (0, 1)

    def test_template_without_reasoning(self, family):
        with pytest.raises(TeacherDataError, match=r"Row 0 has reasoning \(`reasoning_content`, .*`reasoning: drop`"):
            learned(family("qwen25"), USER, thought())
        # What stands in the answer's text is text
        assert learned(family("qwen25"), USER, INLINE)[1] == INLINE[0]["content"] + "<|im_end|>"

    def test_prompt_that_closes_reasoning_has_no_place_for_it(self, family):
        with pytest.raises(TeacherDataError, match="which the chat template does not render here.*enable_thinking"):
            learned(family("qwen3"), USER, thought(), {"chat_template_kwargs": {"enable_thinking": False}})

    @pytest.mark.parametrize("completion", EVERY_FORM)
    def test_prompt_that_opens_reasoning(self, family, completion):
        prompt, answer, _ = learned(family("r1"), USER, completion)
        assert prompt.endswith("<think>\n")
        assert answer == "2 and 2 is 4\n</think>\n\n4<｜end▁of▁sentence｜>"
        assert learned(family("r1"), USER, FOUR)[1] == "\n</think>\n\n4<｜end▁of▁sentence｜>"

    def test_of_earlier_turns_the_template_decides_and_it_is_counted(self, family):
        talk = [*USER, *thought(text="two twos"), {"role": "user", "content": "And 3+3?"}]
        prompt, _, counts = learned(family("qwen3"), talk, FOUR)
        assert "two twos" not in prompt and counts.earlier_reasoning_left_out == 1
        assert "prompts without the reasoning of earlier turns: 1" in str(counts)
        assert learned(family("qwen3"), talk, FOUR, reasoning="drop")[2].earlier_reasoning_left_out == 0
        with pytest.raises(TeacherDataError, match="Row 0 has reasoning"):
            learned(family("qwen25"), talk, FOUR)

    @pytest.mark.parametrize("policy", ["keep", "drop"])
    def test_without_an_answer(self, family, policy):
        completion = [{"role": "assistant", "content": "<think>\n2 and 2\n</think>\n\n"}]
        with pytest.raises(TeacherDataError, match="Row 0: `completion` has reasoning and no answer after it"):
            learned(family("qwen3"), USER, completion, reasoning=policy)

    def test_that_is_no_text(self, family):
        with pytest.raises(TeacherDataError, match="Row 0: `completion` has a `thinking` that is 7, no text"):
            learned(family("qwen3"), USER, thought("thinking", 7))

    def test_two_different_reasonings(self, family):
        message = thought()[0] | {"thinking": "another"}
        with pytest.raises(TeacherDataError, match="Row 0: `completion` has a message with different texts under"):
            learned(family("qwen3"), USER, [message])


class TestColumns:
    @pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["list", "json"])
    def test_tools_are_in_the_prompt(self, family, tools):
        prompt, answer, _ = learned(family("qwen25"), USER, FOUR, {"tools": tools})
        expected = family("qwen25").apply_chat_template(USER, tools=[TOOL], add_generation_prompt=True, tokenize=False)
        assert prompt == expected and '"name": "add"' in prompt
        assert answer == "4<|im_end|>"

    def test_every_row_has_its_own(self, family):
        rows = [
            {"prompt": USER, "completion": FOUR, "tools": None, "chat_template_kwargs": {"enable_thinking": False}},
            {"prompt": USER, "completion": FOUR, "tools": [TOOL], "chat_template_kwargs": None},
        ]
        tokenizer = family("qwen3")
        data, _ = tokenize_teacher_data(Dataset.from_list(rows), tokenizer, max_completion_length=200)
        first, second = tokenizer.batch_decode(data["prompt_ids"][:])
        assert "# Tools" not in first and first.endswith("<think>\n\n</think>\n\n")
        assert "# Tools" in second and second.endswith("assistant\n")
        assert tokenizer.batch_decode(data["teacher_ids"][:]) == ["4<|im_end|>", "<think>\n\n</think>\n\n4<|im_end|>"]

    def test_a_rows_settings_come_before_the_configurations(self, family):
        row = {"chat_template_kwargs": {"enable_thinking": True}}
        settings = {"chat_template_kwargs": {"enable_thinking": False}}
        assert learned(family("qwen3"), USER, FOUR, row, **settings)[0].endswith("assistant\n")
        assert learned(family("qwen3"), USER, FOUR, **settings)[0].endswith("</think>\n\n")

    def test_keys_that_arrow_fills_in_are_absent(self, family):
        other = json.loads(json.dumps(TOOL).replace("description", "summary"))
        data = Dataset.from_list([{"prompt": USER, "completion": FOUR, "tools": [tool]} for tool in (TOOL, other)])
        assert data[0]["tools"][0]["function"]["summary"] is None
        data, _ = tokenize_teacher_data(data, family("qwen25"), max_completion_length=9)
        assert "summary" not in family("qwen25").decode(data[0]["prompt_ids"])

    @pytest.mark.parametrize(
        "name, row, message",
        [
            ("gemma", {"tools": [TOOL]}, "Row 0: the chat template does not render `tools`"),
            ("qwen25", {"tools": "[{"}, "Row 0: `tools` is a string that is no JSON"),
            ("qwen25", {"tools": ["add"]}, r"Row 0: `tools` is \['add'\]; it must be a list of JSON schemas"),
            ("qwen25", {"chat_template_kwargs": "no"}, "Row 0: `chat_template_kwargs` is 'no'; it must be a dict"),
        ],
    )
    def test_what_cannot_be_rendered_is_named(self, family, name, row, message):
        with pytest.raises(TeacherDataError, match=message):
            learned(family(name), USER, FOUR, row)

    @pytest.mark.parametrize(
        "column, value", [("tools", [TOOL]), ("chat_template_kwargs", {"enable_thinking": False})]
    )
    def test_a_string_goes_through_no_template(self, column, value):
        with pytest.raises(TeacherDataError, match=f"Row 0: `{column}` goes through a chat template"):
            check_teacher_data(Dataset.from_list([{"prompt": "a", "completion": "b", column: value}]))


class TestMessages:
    def test_calls_in_the_prompt_are_rendered(self, family):
        prompt, answer, _ = learned(family("qwen3"), HISTORY, FOUR)
        assert '<tool_call>\n{"name": "add", "arguments": {"x": 2}}\n</tool_call>' in prompt
        assert "It is four." in prompt and "None" not in prompt
        assert answer.endswith("4<|im_end|>")

    @pytest.mark.parametrize("content", [None, "", "Let me add."])
    def test_an_answer_that_calls_a_tool(self, family, content):
        completion = [{"role": "assistant", "content": content, "tool_calls": [CALL]}]
        _, answer, _ = learned(family("qwen25"), USER, completion)
        text = content or ""
        assert answer.strip() == (
            f'{text}\n<tool_call>\n{{"name": "add", "arguments": {{"x": 2}}}}\n</tool_call><|im_end|>'.strip()
        )
        with pytest.raises(TeacherDataError, match="does not render `tool_calls` of a message of 'assistant'"):
            learned(family("llama3"), USER, completion)

    @pytest.mark.parametrize(
        "prompt, completion, field",
        [
            ([USER[0] | {"name": "Ann"}], FOUR, "`name` of a message of 'user'"),
            (USER, [FOUR[0] | {"weight": 1}], "`weight` of a message of 'assistant'"),
            (USER, [FOUR[0] | {"function_call": {"name": "add"}}], "`function_call` of a message of 'assistant'"),
            ([USER[0], FOUR[0] | {"refusal": "No."}, USER[0]], FOUR, "`refusal` of a message of 'assistant'"),
            ([{"role": "developer", "content": "Be brief."}, *USER], FOUR, "leaves out the message of 'developer'"),
        ],
    )
    def test_no_field_vanishes(self, family, prompt, completion, field):
        with pytest.raises(TeacherDataError, match=f"Row 0: the chat template .*{field}"):
            learned(family("qwen3"), prompt, completion)

    def test_empty_fields_are_none(self, family):
        empty = {"tool_calls": [], "refusal": None, "annotations": [], "name": "", "reasoning_content": ""}
        assert (
            learned(family("qwen3"), [USER[0] | empty], [FOUR[0] | empty])[:2]
            == learned(family("qwen3"), USER, FOUR)[:2]
        )

    def test_text_parts_are_joined(self, family):
        parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?"}]
        answer = [{"role": "assistant", "content": [{"type": "text", "text": "4"}]}]
        for name in ("qwen3", "gemma"):
            assert (
                learned(family(name), [{"role": "user", "content": parts}], answer)[:2]
                == learned(family(name), USER, FOUR)[:2]
            )
        assert answer_text(answer) == "4"

    @pytest.mark.parametrize(
        "content, message",
        [
            ([{"type": "image_url", "image_url": "x"}], "a content part of type 'image_url': only text"),
            ([{"type": "text", "text": "a", "cache_control": "x"}], "a content part with `cache_control`"),
            (["text"], "a `content` that holds 'text'"),
            (7, "a `content` that is 7, no text"),
            (None, "a message of 'user' without text .*null"),
        ],
    )
    def test_what_is_no_text(self, content, message):
        prompt = [{"role": "user", "content": content}]
        with pytest.raises(TeacherDataError, match=f"Row 0: `prompt` has {message}"):
            check_teacher_data(Dataset.from_list([{"prompt": prompt, "completion": FOUR}]))

    def test_answer_without_text(self):
        rows = Dataset.from_list([{"prompt": USER, "completion": [{"role": "assistant", "content": None}]}])
        with pytest.raises(TeacherDataError, match="Row 0: `completion` has a message of 'assistant' without text"):
            check_teacher_data(rows)


class TestTemplateErrors:
    def test_no_template(self):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = None
        with pytest.raises(TeacherDataError, match="tokenizer has no chat template.*`chat_template_path`"):
            learned(tokenizer, USER, FOUR)
        with pytest.raises(TeacherDataError, match="no chat template"):
            prompt_token_ids(tokenizer, [USER])

    def test_system_role_not_supported(self, family):
        with pytest.raises(TeacherDataError) as error:
            learned(family("gemma"), [{"role": "system", "content": "Be brief."}, *USER], FOUR)
        assert str(error.value).startswith(
            "Row 0: the chat template does not take it: System role not supported. Put "
        )

    def test_anything_that_a_template_raises(self, family):
        with pytest.raises(TeacherDataError, match="Row 0: .* roles must alternate.*Mend the row, or take another"):
            learned(family("gemma"), USER * 2, FOUR)
        with pytest.raises(TeacherDataError, match="Row 0: the chat template does not take it: .*tokenize"):
            learned(family("qwen3"), USER, FOUR, {"chat_template_kwargs": {"tokenize": True}})

    @pytest.mark.parametrize(
        ("name", "advice"),
        [
            ("enable_thinkng", "did you mean 'enable_thinking'[?]"),
            ("colour", "take it out, or take a template that reads it."),
        ],
    )
    def test_a_setting_that_the_template_does_not_read(self, family, name, advice):
        with pytest.raises(
            TeacherDataError, match=f"^chat_template_kwargs has '{name}', which .* does not read; {advice}$"
        ):
            ChatRenderer(family("qwen3"), {"enable_thinking": True, name: True})
        # What `apply_chat_template` itself takes is no variable of the template
        ChatRenderer(family("qwen3"), {"enable_thinking": True, "documents": None, "tools": None})

    def test_template_that_writes_no_text(self):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
        with pytest.raises(TeacherDataError, match="the chat template leaves out the message of 'user', 'What is 2"):
            learned(tokenizer, USER, FOUR)

    def test_template_that_changes_the_answer(self):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'][:28]")
        with pytest.raises(TeacherDataError, match="Row 0: the chat template leaves out a part of the answer"):
            learned(tokenizer, USER, [{"role": "assistant", "content": "Four, as two and two make four."}])


class TestEndOfTurn:
    ENDS = {
        "qwen3": "<|im_end|>",
        "llama3": "<|eot_id|>",
        "gemma": "<end_of_turn>",
        "phi3": "<|end|>",
        "cohere2": "<|END_OF_TURN_TOKEN|>",
        "gptoss": "<|return|>",
    }

    @pytest.mark.parametrize("name", ENDS)
    def test_is_the_templates_and_what_comes_before_is_what_sft_reads(self, family, name):
        tokenizer, end = family(name), self.ENDS[name]
        rows = [{"prompt": USER, "completion": FOUR}]
        data, counts = tokenize_teacher_data(Dataset.from_list(rows), tokenizer, max_completion_length=60)
        assert tokenizer.convert_ids_to_tokens(data[0]["teacher_ids"][-1]) == end
        assert end_token_id(tokenizer, USER) == data[0]["teacher_ids"][-1]
        assert end_token_id(tokenizer, "a") == tokenizer.eos_token_id
        assert counts.truncated_answers == 0
        whole = tokenizer.apply_chat_template(USER + FOUR, return_dict=True)["input_ids"]
        ours = data[0]["prompt_ids"] + data[0]["teacher_ids"]
        assert whole[: len(ours)] == ours
        assert not tokenizer.decode(whole[len(ours) :]).replace(tokenizer.eos_token, "").strip()

    def test_of_an_answer_that_is_cut(self, family):
        data = Dataset.from_list([{"prompt": USER, "completion": FOUR}])
        data, counts = tokenize_teacher_data(data, family("gemma"), max_completion_length=1)
        assert data[0]["teacher_ids"] == family("gemma")("4", add_special_tokens=False)["input_ids"]
        assert counts.truncated_answers == 1

    def test_template_without_one(self):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        assert learned(tokenizer, USER, FOUR)[1] == "assistant: 4<|im_end|>"

    @pytest.mark.parametrize("name", ["qwen3", "gemma"])
    def test_text_of_an_end_token_in_the_answer(self, family, name):
        end = self.ENDS[name]
        _, answer, counts = learned(family(name), USER, [{"role": "assistant", "content": f"It ends with {end} and"}])
        assert answer.endswith("It ends with ") and end not in answer
        assert (counts.cut_at_end_token, counts.truncated_answers) == (1, 0)

    def test_generation_stops_there(self, family, tiny_model_dir, monkeypatch):
        tokenizer = family("gemma")
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        end = end_token_id(tokenizer, USER)
        assert end not in (tokenizer.eos_token_id, model.generation_config.eos_token_id)
        stops = []

        def generate(input_ids, attention_mask, generation_config, streamer):
            stops.append(generation_config.eos_token_id)
            return torch.cat([input_ids, torch.tensor([[5, end, 6]] * len(input_ids))], dim=1)

        monkeypatch.setattr(model, "generate", generate)
        for prompts, expected in (([USER], [5, end]), (["a string"], [5, end, 6])):
            ((sample,),) = generate_completion_ids(model, tokenizer, prompts, max_new_tokens=3)
            assert sample == expected and (end in stops.pop()) is (len(expected) == 2)


class TestConsumers:
    """Everything that asks with a prompt asks with the row's own tools and settings."""

    ROWS = [
        {"prompt": USER, "completion": FOUR, "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}},
        {"prompt": USER, "completion": thought(), "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": True}},
        {"prompt": HISTORY, "completion": FOUR, "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}},
    ]

    @pytest.fixture
    def rows(self):
        return Dataset.from_list(self.ROWS)

    @pytest.fixture
    def model(self, family, tiny_model_dir):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        model.resize_token_embeddings(len(family("qwen3")))
        return model

    def test_rows_for_sft_and_soft_targets_are_those_of_sfttrainer(self, family, rows, model, tmp_path):
        tokenizer = family("qwen3")
        settings = {"report_to": "none", "use_cpu": True, "bf16": False, "max_length": None}
        trainer = SFTTrainer(
            model, SFTConfig(str(tmp_path), **settings), train_dataset=rows, processing_class=tokenizer
        )
        data, _ = tokenize_teacher_data(rows, tokenizer, max_completion_length=200)
        for made in (sft_rows(data, tokenizer), soft_target_rows(data, tokenizer)):
            for ours, theirs in zip(made, trainer.train_dataset, strict=True):
                # SFTTrainer also learns the line break after the end of the turn
                line_break = tokenizer("\n")["input_ids"]
                assert ours["input_ids"] + line_break == theirs["input_ids"]
                assert ours["labels"] + line_break == theirs["labels"]

    def test_rows_that_are_not_tokenised_yet_are_rendered_alike(self, family, rows):
        data, _ = tokenize_teacher_data(rows, family("qwen3"), max_completion_length=200)
        assert prompt_ids_of(family("qwen3"), rows[:]) == data["prompt_ids"]

    def test_samplers_and_nll_ask_with_the_rows_prompt(self, family, rows, model, monkeypatch):
        tokenizer = family("qwen3")
        data = tokenize_teacher_data(rows, tokenizer, max_completion_length=200)[0].to_list()
        asked = []

        def generate(input_ids, attention_mask, generation_config, streamer):
            asked.extend(ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True))
            return torch.cat([input_ids, torch.full((len(input_ids), 1), tokenizer.eos_token_id)], dim=1)

        monkeypatch.setattr(model, "generate", generate)
        sampler = ModelSampler(model, tokenizer, max_new_tokens=2, temperature=1.0, top_p=1.0, batch_size=1)
        sampler(data, 0)
        assert sorted(asked) == sorted(row["prompt_ids"] for row in data)
        asked.clear()
        evaluate_student(model, tokenizer, data, max_new_tokens=2, temperatures=(0.0,))
        assert sorted(asked) == sorted(row["prompt_ids"] for row in data)
        bare = [{key: row[key] for key in ("prompt", "teacher_ids")} for row in data]
        assert teacher_nll(model, tokenizer, data) != teacher_nll(model, tokenizer, bare)

    def test_judge_sees_the_teachers_reasoning_as_it_sees_a_students(self, family, rows):
        data = tokenize_teacher_data(rows, family("qwen3"), max_completion_length=200)[0].to_list()
        seen = []
        evaluate_teacher(
            data, lambda prompts, texts: {"n": [seen.append(text) or 0.0 for text in texts]}, family("qwen3")
        )
        assert seen == ["4", "<think>\n2 and 2 is 4\n</think>\n\n4", "4"]
