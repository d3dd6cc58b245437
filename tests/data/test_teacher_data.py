import gzip
import json
import os
import re
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import DatasetMixtureConfig, ScriptArguments

from trl_bbkd.data.teacher_data import INTERNAL_COLUMNS, check_teacher_data, load_teacher_data, tokenize_teacher_data
from trl_bbkd.data.teacher_tokens import prompt_and_answer_ids
from trl_bbkd.errors import TeacherDataError


SHARED = Path(os.environ.get("TRL_BBKD_SHARED", Path(__file__).parents[3] / "shared"))
LLAMA_TOKENIZERS = [SHARED / "models" / name for name in ("stories260K", "stories15M-fp16")]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if brief %}(brief) {% endif %}{% endif %}"
)
SENTENCES = [
    "Once upon a time there was a fox. ",
    "What is the colour of the sky? It is blue.\n",
    "user assistant brief",
]


@pytest.fixture(scope="module")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    bpe.train_from_iterator(SENTENCES * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


def rows(*pairs):
    return Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])


def ids_without_end(tokenizer, prompt, answer, chat_template_kwargs=None):
    """Ids of the prompt, and of the answer without the token that ends it."""
    batch = {"prompt": [prompt], "completion": [answer]}
    (prompt_ids,), (answer_ids,), _ = prompt_and_answer_ids(tokenizer, batch, chat_template_kwargs or {}, "keep", [0])
    assert answer_ids[-1] == tokenizer.eos_token_id
    return prompt_ids, answer_ids[:-1]


def write_jsonl(path, *pairs):
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs]
    path.write_text("\n".join(lines) + "\n")
    return path


def load(name=None, mixture=None, **kwargs):
    return load_teacher_data(
        ScriptArguments(dataset_name=name and str(name), **kwargs), mixture or DatasetMixtureConfig()
    )


USER = [{"role": "user", "content": "What is the colour of the sky?"}]
ASSISTANT = [{"role": "assistant", "content": "It is blue."}]


class TestLoading:
    @pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_local_file(self, tmp_path, suffix, streaming):
        data = rows(("a", "b"), ("c", "d"))
        path = tmp_path / f"answers.{suffix}"
        write = {"json": data.to_json, "jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}[suffix]
        write(str(path))
        train, test = load(path, dataset_streaming=streaming)
        assert test is None
        assert isinstance(train, IterableDataset) is streaming
        assert [row["completion"] for row in train] == ["b", "d"]

    def test_folder_gives_both_splits_and_ignores_other_files(self, tmp_path):
        write_jsonl(tmp_path / "teacher_train.jsonl", ("a", "b"))
        write_jsonl(tmp_path / "teacher_test.jsonl", ("c", "d"))
        (tmp_path / "untrained.json").write_text("{}")
        train, test = load(tmp_path)
        assert train["prompt"] == ["a"] and test["prompt"] == ["c"]

    def test_sharded_folder(self, tmp_path):
        write_jsonl(tmp_path / "train-00000-of-00002.jsonl", ("a", "b"))
        write_jsonl(tmp_path / "train-00001-of-00002.jsonl", ("c", "d"))
        assert load(tmp_path)[0]["prompt"] == ["a", "c"]

    def test_held_out_share_is_always_the_same(self, tmp_path):
        path = write_jsonl(tmp_path / "all.jsonl", *((f"p{i}", "a") for i in range(20)))
        first, second = (load(path, DatasetMixtureConfig(test_split_size=0.25)) for _ in range(2))
        assert len(first[0]) == 15 and len(first[1]) == 5
        assert first[1]["prompt"] == second[1]["prompt"]

    def test_mixture(self, tmp_path):
        paths = [write_jsonl(tmp_path / f"{name}.jsonl", (name, "x")) for name in ("one", "two")]
        mixture = DatasetMixtureConfig(datasets=[{"path": "json", "data_files": str(path)} for path in paths])
        train, test = load(mixture=mixture)
        assert train["prompt"] == ["one", "two"] and test is None

    def test_missing_file_names_the_place_looked_at(self, tmp_path):
        with pytest.raises(TeacherDataError, match=str(tmp_path / "nothing.jsonl")):
            load(tmp_path / "nothing.jsonl")

    def test_missing_split_lists_the_files(self, tmp_path):
        write_jsonl(tmp_path / "validation.jsonl", ("a", "b"))
        with pytest.raises(TeacherDataError, match="`train` split; data files found: validation.jsonl"):
            load(tmp_path)

    @pytest.mark.parametrize("split", ["trian", "test"])
    def test_the_name_of_a_split_of_one_file_means_nothing(self, tmp_path, split):
        path = write_jsonl(tmp_path / "teacher_validation.jsonl", ("a", "b"))
        with pytest.raises(
            TeacherDataError, match=f"^`dataset_train_split: {split}` means nothing for one file, teacher_val"
        ):
            load(path, dataset_train_split=split)
        assert len(load(path, dataset_train_split="validation")[0]) == 1

    def test_nor_of_a_mixture(self, tmp_path):
        mixture = DatasetMixtureConfig(datasets=[{"path": "json", "data_files": "a.jsonl"}])
        with pytest.raises(TeacherDataError, match="^`dataset_train_split: trian` means nothing for a mixture"):
            load(mixture=mixture, dataset_train_split="trian")

    def test_missing_test_split_lists_the_splits(self, tmp_path):
        path = write_jsonl(tmp_path / "train.jsonl", ("a", "b"))
        with pytest.raises(TeacherDataError, match="`dataset_test_split: held_out` does not exist.*splits: train"):
            load(path, dataset_test_split="held_out")

    def test_broken_file_is_named(self, tmp_path):
        (tmp_path / "train.jsonl").write_text('{"prompt": "a"\n')
        with pytest.raises(TeacherDataError, match="Could not read .*train.jsonl"):
            load(tmp_path)

    @pytest.mark.parametrize(
        "name, content, message",
        [
            ("a.jsonl", json.dumps({"prompt": "é"}, ensure_ascii=False).encode("latin-1"), "line 1 is not UTF-8"),
            ("a.json", json.dumps([{"prompt": "é"}], ensure_ascii=False).encode("utf-16"), "line 1 is not UTF-8"),
            ("a.csv", "prompt,completion\na,b\né,x\n".encode("latin-1"), "line 3 is not UTF-8"),
            ("a.jsonl", b"", "is empty"),
            ("a.csv", b"", "is empty"),
            ("a.parquet", b"", "is empty"),
            ("a.jsonl", b"\n\n", "it has no rows"),
            ("a.jsonl.gz", gzip.compress(b"", mtime=0), "it has no rows"),
            ("a.csv", b"prompt,completion\n", "it has no rows"),
            ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2 is no JSON"),
            ("a.jsonl.gz", b'{"prompt": "a"}', "Not a gzipped file"),
            ("a.parquet", b"text", "Parquet"),
            ("a.csv", b"prompt,completion\na,b,c,d\ne,f,g,h\n", "more cells than the header has names"),
        ],
    )
    @pytest.mark.parametrize("streaming", [False, True])
    def test_what_is_wrong_with_a_file_is_one_line(self, tmp_path, name, content, message, streaming):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TeacherDataError, match=f"{tmp_path / name}.*{message}") as error:
            load(tmp_path / name, dataset_streaming=streaming)
        assert "\n" not in str(error.value) and not str(error.value).endswith(": ")

    @pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_compressed_file(self, tmp_path, suffix, streaming):
        data = rows(("a", "b"), ("c", "d"))
        plain = tmp_path / f"plain.{suffix}"
        (data.to_csv if suffix == "csv" else data.to_json)(str(plain))
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / f"train.{suffix}.gz").write_bytes(gzip.compress(plain.read_bytes()))
        for name in (folder, folder / f"train.{suffix}.gz"):
            train, _ = load(name, dataset_streaming=streaming)
            assert [row["completion"] for row in train] == ["b", "d"]

    def test_parquet_is_not_compressed_again(self, tmp_path):
        (tmp_path / "a.parquet.gz").write_bytes(b"x")
        with pytest.raises(TeacherDataError, match=r"ends in none of .json, .jsonl, .parquet, .csv \(.gz after them"):
            load(tmp_path / "a.parquet.gz")

    def test_file_that_is_a_folder(self, tmp_path):
        (tmp_path / "train.jsonl").mkdir()
        for name in (tmp_path, tmp_path / "train.jsonl"):
            with pytest.raises(TeacherDataError, match="has no file for the `train` split; data files found: none"):
                load(name)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_in_csv_only_an_empty_cell_is_missing(self, tmp_path, streaming):
        path = tmp_path / "a.csv"
        words = ["None", "NA", "null", "nan", "N/A", "7", "007", "True", '"a\nb"']
        path.write_text("prompt,completion,note\n" + "".join(f"q,{word},{word}\n" for word in words) + "q,a,\n")
        train = list(load(path, dataset_streaming=streaming)[0])
        assert [row["completion"] for row in train] == [*words[:-1], "a\nb", "a"]
        assert train[0]["note"] == "None" and train[-1]["note"] is None
        check_teacher_data(load(path, dataset_streaming=streaming)[0])
        path.write_text("prompt,completion\n1,7\n2,007\n")
        assert [row["completion"] for row in load(path, dataset_streaming=streaming)[0]] == ["7", "007"]
        path.write_text("prompt,completion\nq,a\nq,\n")
        with pytest.raises(TeacherDataError, match="Row 1: `completion` is null"):
            check_teacher_data(load(path, dataset_streaming=streaming)[0])

    def test_labels_in_csv_too(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_text("text,label,gold\n5,None,\nb,NA,NA\n")
        train, _ = load(path)
        assert (train["text"][:], train["label"][:], train["gold"][:]) == (["5", "b"], ["None", "NA"], [None, "NA"])

    def test_streaming_set_cannot_be_divided(self, tmp_path):
        path = write_jsonl(tmp_path / "train.jsonl", ("a", "b"))
        with pytest.raises(TeacherDataError, match="`test_split_size` cannot divide a streaming set"):
            load(path, DatasetMixtureConfig(test_split_size=0.5), dataset_streaming=True)

    def test_unreachable_hub_id(self, monkeypatch):
        with pytest.raises(TeacherDataError, match="nobody/nothing` is neither a local file"):
            load("nobody/nothing")

    def test_no_source(self):
        with pytest.raises(TeacherDataError, match="set `dataset_name`"):
            load()


class TestChecks:
    @pytest.mark.parametrize(
        "data, message",
        [
            ([("a", "b"), ("", "b")], "Row 1: `prompt` is empty"),
            ([("a", "b"), ("c", " \n")], r"Row 1: `completion` is empty \(' \\n'\)"),
            ([("a", "b"), ("c", None)], "Row 1: `completion` is null"),
            ([(3, "b")], "Row 0: `prompt` is 3, an int"),
            ([("a", ASSISTANT)], "Row 0: `prompt` is a string but `completion` is a list"),
            ([(USER, "b")], "Row 0: `completion` is a string but `prompt` is a list"),
            ([(USER, ASSISTANT + ASSISTANT)], "Row 0: .*exactly one assistant message"),
            ([(USER, USER)], "Row 0: .*exactly one assistant message"),
            ([(USER, [{"role": "assistant", "content": " "}])], "Row 0: `completion` is empty"),
            ([([], ASSISTANT)], "Row 0: `prompt` is empty"),
            ([([{"role": "user", "content": ""}], ASSISTANT)], "Row 0: `prompt` is empty"),
            (
                [(USER + ASSISTANT + USER, ASSISTANT), (USER + ASSISTANT, ASSISTANT)],
                "Row 1: `prompt` ends with a message of the assistant, .*, and the completion would be a second turn",
            ),
            ([([{"content": "a"}], ASSISTANT)], "Row 0: `prompt` holds .*'role'"),
            (
                [(["text"], ASSISTANT)],
                r"Row 0: `prompt` is \['text'\], a list of str; it must be a string, or a list of",
            ),
            ([("a", ["text"])], r"Row 0: `completion` is \['text'\], a list of str"),
        ],
    )
    def test_one_clear_error(self, data, message):
        with pytest.raises(TeacherDataError, match=message):
            check_teacher_data(rows(*data))

    @pytest.mark.parametrize("write", [json.dumps, str])
    def test_messages_in_the_cells_of_a_csv_file(self, tmp_path, write):
        path = tmp_path / "a.csv"
        rows(("a", "b"), (write(USER), write(ASSISTANT))).to_csv(str(path))
        with pytest.raises(TeacherDataError, match="Row 1: `prompt` and `completion` are messages written as text"):
            check_teacher_data(load(path)[0])
        # One of both may be a question about such text, or an answer to it
        check_teacher_data(rows((write(USER), "b"), ("a", write(ASSISTANT))))

    def test_the_columns_of_alpaca_as_the_error_says(self):
        data = Dataset.from_dict({"instruction": ["a", "c"], "input": ["b", ""], "output": ["d", "e"]})
        with pytest.raises(TeacherDataError) as error:
            check_teacher_data(data)
        (example,) = re.findall(r"dataset\.map\(.*\)(?=\.$)", str(error.value))
        data = eval(example, {"dataset": data})
        assert (data["prompt"][:], data["completion"][:]) == (["a\n\nb", "c"], ["d", "e"])

    def test_formats_mixed_between_rows(self, tmp_path):
        path = write_jsonl(tmp_path / "train.jsonl", ("a", "b"), (USER, ASSISTANT))
        with pytest.raises(TeacherDataError, match="Row 1: .*lists of messages, in earlier rows they are strings"):
            check_teacher_data(load(path)[0])

    @pytest.mark.parametrize(
        "columns, message",
        [
            (("instruction", "completion"), "no column `prompt`.*rename that column to `prompt`"),
            (("prompt", "output"), "columns found: prompt, output. If `output` holds it"),
            (("prompt", "completions"), "If `completions` holds it, rename that column to `completion`"),
            (("messages", "id"), r"Split each conversation: .*row\[\"messages\"\]\[:-1\]"),
            (("messages", "content"), "Split each conversation"),
            (("conversations",), r"row\[\"conversations\"\]\[-1:\]"),
            (("prompt", "chosen", "rejected"), "If `chosen` holds it, rename that column to `completion`"),
            (
                ("instruction", "input", "output"),
                r"`instruction` and `input` together, `completion` is `output`. .*row\[\"output\"\]",
            ),
            (("text", "row_in_file"), "columns found: text[.]"),
        ],
    )
    def test_missing_column_names_the_likely_one(self, columns, message):
        with pytest.raises(TeacherDataError, match=message):
            check_teacher_data(Dataset.from_dict({column: ["x"] for column in columns}))

    def test_empty_dataset(self):
        with pytest.raises(TeacherDataError, match="no rows"):
            check_teacher_data(Dataset.from_dict({"prompt": [], "completion": []}))

    def test_counts_duplicate_prompts(self):
        assert check_teacher_data(rows(("a", "b"), ("a", "c"), ("d", "e"))).duplicate_prompts == 1
        assert check_teacher_data(rows((USER, ASSISTANT), (USER, ASSISTANT))).duplicate_prompts == 1

    def test_streaming_checks_the_head_at_once(self):
        stream = rows(("a", "b"), ("c", "")).to_iterable_dataset()
        with pytest.raises(TeacherDataError, match="Row 1: `completion` is empty"):
            check_teacher_data(stream)


class TestTokenization:
    def test_ids_are_the_answer_and_one_end_token(self, tokenizer):
        data, counts = tokenize_teacher_data(
            rows(("What is the colour?", " It is blue.")), tokenizer, max_completion_length=40
        )
        ids = data[0]["teacher_ids"]
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == " It is blue."
        assert counts.truncated_answers == 0 and counts.kept == counts.rows == 1

    @pytest.mark.parametrize("answer", ["It is blue.", " It is blue.", "\nIt is blue.", "ly blue", "\n"])
    @pytest.mark.parametrize("prompt", ["What is the colour?", "What is the ", "Once upon a time\n", "the colour of"])
    def test_prompt_and_answer_ids_spell_the_text(self, tokenizer, prompt, answer):
        prompt_ids, answer_ids = ids_without_end(tokenizer, prompt, answer)
        assert prompt_ids == tokenizer(text=prompt)["input_ids"]
        assert tokenizer.decode(prompt_ids + answer_ids) == prompt + answer

    @pytest.mark.parametrize("length", range(1, 9))
    def test_ends_in_eos_if_and_only_if_not_truncated(self, tokenizer, length):
        answer = " a time a"
        whole = tokenizer(text=answer)["input_ids"]
        data, counts = tokenize_teacher_data(rows(("Once", answer)), tokenizer, max_completion_length=length)
        ids = data[0]["teacher_ids"]
        fits = len(whole) + 1 <= length
        assert ids == (whole + [tokenizer.eos_token_id])[:length]
        assert (ids[-1] == tokenizer.eos_token_id) is fits
        assert counts.truncated_answers == int(not fits)

    def test_conversational_prompt_ids_are_those_of_grpo(self, tokenizer):
        prompt_ids, answer_ids = ids_without_end(tokenizer, USER, ASSISTANT, {"brief": True})
        assert tokenizer.decode(prompt_ids).endswith("<|im_start|>assistant\n(brief) ")
        assert tokenizer.decode(answer_ids) == "It is blue."

    def test_chat_and_plain_text_of_the_same_prompt_agree(self, tokenizer):
        rendered = tokenizer.apply_chat_template(USER, add_generation_prompt=True, tokenize=False)
        chat, _ = tokenize_teacher_data(rows((USER, ASSISTANT)), tokenizer, max_completion_length=40)
        plain, _ = tokenize_teacher_data(rows((rendered, "It is blue.")), tokenizer, max_completion_length=40)
        assert chat[0]["teacher_ids"] == plain[0]["teacher_ids"]

    def test_text_after_an_end_token_is_cut_where_generation_stops(self, tokenizer):
        data, _ = tokenize_teacher_data(
            rows(("Once", " a time<|im_end|>\n"), ("Once", " a time")), tokenizer, max_completion_length=40
        )
        assert data[0]["teacher_ids"] == data[1]["teacher_ids"]

    def test_an_answer_cut_there_is_not_finished_and_counted(self, tokenizer, caplog):
        data, counts = tokenize_teacher_data(
            rows(("Once", " a time"), ("Once", " a time<|im_end|> ago"), ("Once", " a time<|im_end|><|im_end|>")),
            tokenizer,
            max_completion_length=40,
        )
        whole, cut, ended = data["teacher_ids"]
        assert cut == whole[:-1] and ended == whole
        assert (counts.cut_at_end_token, counts.truncated_answers, counts.kept) == (1, 0, 3)
        assert "answers cut at the text of an end token: 1" in str(counts)
        assert "1 answer of the training rows holds the text of an end token, the first in row 1" in caplog.text
        assert set(data.column_names) == {"prompt", "completion", *INTERNAL_COLUMNS}

    @pytest.mark.parametrize("prompt", ["Once", USER])
    def test_an_answer_of_which_that_leaves_nothing_is_refused(self, tokenizer, prompt):
        answers = ["<|im_end|> a time", " a time"]
        if prompt is USER:
            answers = [[{"role": "assistant", "content": answer}] for answer in answers]
        data = rows((prompt, answers[1]), (prompt, answers[0]))
        with pytest.raises(TeacherDataError, match="^Row 1: `completion` begins with the text of an end token"):
            tokenize_teacher_data(data, tokenizer, max_completion_length=40)

    def test_tokenizer_that_appends_its_own_eos(self, tokenizer):
        class AppendsEos:
            eos_token_id = tokenizer.eos_token_id
            decode = tokenizer.decode

            def __call__(self, text, add_special_tokens=True):
                encode = lambda one: tokenizer(text=one)["input_ids"] + [self.eos_token_id] * add_special_tokens  # noqa: E731
                return {"input_ids": encode(text) if isinstance(text, str) else [encode(one) for one in text]}

        data, _ = tokenize_teacher_data(rows(("Once", " a time")), AppendsEos(), max_completion_length=40)
        expected = tokenizer(text=" a time")["input_ids"] + [tokenizer.eos_token_id]
        assert data[0]["teacher_ids"] == expected

    def test_long_prompts_are_dropped_and_counted_and_columns_kept(self, tokenizer):
        data = rows(("Once", "a"), ("Once upon a time there was a fox. " * 5, "b"), ("Once", "c")).add_column(
            "id", [5, 6, 7]
        )
        kept, counts = tokenize_teacher_data(data, tokenizer, max_completion_length=8, max_prompt_length=10)
        assert kept["id"] == [5, 7] and kept["completion"] == ["a", "c"]
        assert kept.features["id"] == data.features["id"]
        assert (counts.rows, counts.dropped_prompts, counts.kept, counts.duplicate_prompts) == (3, 1, 2, 1)
        assert "dropped, prompt too long: 1" in str(counts)

    def test_no_room_for_an_answer(self, tokenizer):
        prompt = "Once upon a time there was a fox. " * 5
        length = len(tokenizer(text=prompt)["input_ids"])
        with pytest.raises(TeacherDataError, match=f"No room for an answer: row 0 has a prompt of {length} tokens"):
            tokenize_teacher_data(rows((prompt, "a")), tokenizer, max_completion_length=8, max_length=length + 7)
        tokenize_teacher_data(rows((prompt, "a")), tokenizer, max_completion_length=8, max_length=length + 8)
        with pytest.raises(TeacherDataError, match="drop such rows with `max_prompt_length: 7`"):
            tokenize_teacher_data(rows((prompt, "a")), tokenizer, max_completion_length=8, max_length=15)
        for length in (8, 9):  # no prompt at all would fit
            with pytest.raises(TeacherDataError, match="Lower `max_completion_length`: it alone fills the context.$"):
                tokenize_teacher_data(rows((prompt, "a")), tokenizer, max_completion_length=length, max_length=8)
        with pytest.raises(TeacherDataError, match="all 1 prompts are longer than `max_prompt_length: 4`"):
            tokenize_teacher_data(rows((prompt, "a")), tokenizer, max_completion_length=8, max_prompt_length=4)

    def test_streaming_gives_the_same_ids_lazily(self, tokenizer):
        data = rows(("Once", " a time"), ("Once upon a time there was a fox. ", "x"), ("What is", " the sky"))
        settings = {"max_completion_length": 4, "max_prompt_length": 8}
        whole, _ = tokenize_teacher_data(data, tokenizer, **settings)
        stream, counts = tokenize_teacher_data(data.to_iterable_dataset(), tokenizer, **settings)
        assert [row["teacher_ids"] for row in stream] == whole["teacher_ids"]
        assert counts.kept is None and "unknown" in str(counts)

    def test_streaming_rows_beyond_the_head_are_checked_when_read(self, tokenizer, monkeypatch):
        monkeypatch.setattr("trl_bbkd.data.teacher_data.STREAMING_CHECK_ROWS", 1)
        stream, _ = tokenize_teacher_data(
            rows(("Once", "a"), ("Once", "")).to_iterable_dataset(), tokenizer, max_completion_length=4
        )
        with pytest.raises(TeacherDataError, match="Row 1: `completion` is empty"):
            list(stream)

    @pytest.mark.skipif(not all(path.exists() for path in LLAMA_TOKENIZERS), reason="needs the small Llama tokenizers")
    @pytest.mark.parametrize("path", LLAMA_TOKENIZERS, ids=lambda path: path.name)
    @pytest.mark.parametrize(
        "prompt", ["Once upon a time", "Once upon a time ", "Once upon a time, there was a", "A fox\n"]
    )
    @pytest.mark.parametrize("answer", ["there was a fox.", " there was a fox.", "ly fox", "\nThe end."])
    def test_no_space_appears_between_prompt_and_answer(self, path, prompt, answer):
        llama = AutoTokenizer.from_pretrained(path)
        prompt_ids, answer_ids = ids_without_end(llama, prompt, answer)
        assert prompt_ids == llama(text=prompt)["input_ids"]
        assert llama.decode(prompt_ids + answer_ids, skip_special_tokens=True) == prompt + answer
        assert llama.bos_token_id not in answer_ids
