import copy
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.processes import Moment, killed_at, on_processes
from trl_bbkd.errors import TargetStoreError
from trl_bbkd.soft_targets.caching import model_fingerprint, rows_fingerprint, store_targets, tokenizer_fingerprint
from trl_bbkd.soft_targets.store import INDEX_DTYPE, row_key

from ..conftest import build_tokenizer
from .test_store import FILES, code_error


VOCAB = 330
K = 6
BATCH = 3
# Rows are 11 different ones and 3 that are there twice
ROWS, BATCHES = 11, 4


def make_rows():
    generator = random.Random(0)
    rows = []
    for _ in range(ROWS):
        prompt, answer = generator.randint(1, 6), generator.randint(1, 12)
        ids = [generator.randrange(3, VOCAB) for _ in range(prompt + answer)]
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "row_key": row_key(ids, prompt)})
    # The same tokens with another beginning of the answer are another row
    rows[1] = {"input_ids": rows[0]["input_ids"], "labels": [-100] + rows[0]["input_ids"][1:]}
    rows[1]["row_key"] = row_key(rows[1]["input_ids"], 1)
    return Dataset.from_list([*rows, *rows[:3]])


def cache(folder, proxy, rows=None, k=K, fingerprint=None, vocab_size=VOCAB):
    fingerprint = {"proxy": "p"} if fingerprint is None else fingerprint
    rows = make_rows() if rows is None else rows
    return store_targets(folder, proxy, rows, k=k, vocab_size=vocab_size, fingerprint=fingerprint, batch_size=BATCH)


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()


def count_passes(model):
    """Shapes of the batches that go through the model from now on."""
    shapes = []
    model.base_model.register_forward_hook(
        lambda module, args, kwargs, output: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@torch.no_grad()
def slow_targets(model, row, k=K, vocab_size=VOCAB):
    """Full logits of one row at a time, without padding."""
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1, :vocab_size].double()
    labels = torch.tensor(row["labels"])[1:]
    log_probs = logits.log_softmax(-1)[labels != -100]
    values, ids = log_probs.topk(k)
    return ids, values, log_probs.gather(1, labels[labels != -100][:, None]).squeeze(1)


def assert_is_the_slow_computation(store, model, k=K, vocab_size=VOCAB):
    for row in make_rows():
        found, (ids, values, label_log_probs) = store[row["row_key"]], slow_targets(model, row, k, vocab_size)
        assert np.array_equal(found.ids, ids.numpy())
        assert (np.abs(found.log_probs - values.numpy()) <= code_error(values.numpy()) + 2e-5).all()
        np.testing.assert_allclose(found.label_log_probs, label_log_probs.numpy(), atol=2e-5)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def straight(other_model_dir, tmp_path_factory):
    """Files of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    cache(folder, load(other_model_dir))
    return contents(folder)


def test_targets_are_those_of_full_logits(tiny_model_dir, other_model_dir, tmp_path):
    for path in (tiny_model_dir, other_model_dir):
        proxy = load(path)
        assert_is_the_slow_computation(cache(tmp_path / Path(path).name, proxy), proxy)


def test_only_the_likelihood_is_kept_with_k_0(tiny_model_dir, tmp_path):
    proxy = load(tiny_model_dir)
    store = cache(tmp_path, proxy, k=0)
    for row in make_rows():
        found = store[row["row_key"]]
        assert found.ids.shape == (len(found.label_log_probs), 0)
        np.testing.assert_allclose(found.label_log_probs, slow_targets(proxy, row)[2].numpy(), atol=2e-5)


def test_rows_with_the_same_tokens_are_stored_once(tiny_model_dir, tmp_path):
    proxy, rows = load(tiny_model_dir), make_rows()
    shapes = count_passes(proxy)
    store = cache(tmp_path, proxy, rows)
    assert len(rows) == ROWS + 3 and len(store) == ROWS
    assert sum(batch for batch, _ in shapes) == ROWS and len(shapes) == BATCHES
    assert store.num_tokens == sum(len(row["labels"]) - row["labels"].count(-100) for row in rows.select(range(ROWS)))
    # Batches are of like length
    widths = [width for _, width in shapes]
    assert widths == sorted(widths)


def test_a_proxy_with_more_ids_than_the_student(tiny_model_dir, tmp_path):
    """Its further ids are left out, and its probabilities are those of the rest."""
    proxy = load(tiny_model_dir)
    proxy.resize_token_embeddings(VOCAB + 22, mean_resizing=False)
    with torch.no_grad():
        # Without the restriction these would be likely
        proxy.lm_head.weight[VOCAB:] = 3 * proxy.lm_head.weight[:22]
    row = make_rows()[0]
    assert (slow_targets(proxy, row, vocab_size=VOCAB + 22)[0] >= VOCAB).any()
    store = cache(tmp_path / "some", proxy)
    assert_is_the_slow_computation(store, proxy)
    whole = cache(tmp_path / "all", proxy, k=VOCAB)
    for row in make_rows():
        found = whole[row["row_key"]]
        assert found.ids.max() < VOCAB
        np.testing.assert_allclose(np.exp(found.log_probs.astype(np.float64)).sum(axis=1), 1.0, atol=3e-4)


def test_dropout_is_off_and_the_mode_is_left_as_it_was(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=VOCAB, num_key_value_heads=2, attention_dropout=0.5, **sizes)
    proxy = Qwen2ForCausalLM(config).train()
    store = cache(tmp_path, proxy)
    assert proxy.training
    assert_is_the_slow_computation(store, proxy.eval())
    cache(tmp_path / "eval", proxy)
    assert not proxy.training


def test_a_finished_store_needs_no_pass(other_model_dir, tmp_path, straight):
    proxy = load(other_model_dir)
    cache(tmp_path, proxy)
    shapes = count_passes(proxy)
    cache(tmp_path, proxy)
    assert shapes == [] and contents(tmp_path) == straight


@pytest.mark.parametrize("rows_left", [0, 1, 2, 3, 5, 9, 10])
@pytest.mark.parametrize("torn", [0, 13])
def test_what_was_cut_off_is_computed_again(other_model_dir, tmp_path, straight, rows_left, torn):
    """Whole batches stay; the files end as those of an uninterrupted run."""
    for name, data in straight.items():
        (tmp_path / name).write_bytes(data)
    os.truncate(tmp_path / FILES[0], rows_left * INDEX_DTYPE.itemsize + torn)
    proxy = load(other_model_dir)
    shapes = count_passes(proxy)
    cache(tmp_path, proxy)
    assert contents(tmp_path) == straight
    assert len(shapes) == BATCHES - rows_left // BATCH


def test_rows_are_computed_again_in_their_batches(other_model_dir, tmp_path):
    """A store that holds some rows gets the others, whatever the batches were."""
    proxy, rows = load(other_model_dir), make_rows()
    cache(tmp_path, proxy, rows.select([0, 4, 5, 8]))
    shapes = count_passes(proxy)
    store = cache(tmp_path, proxy, rows)
    assert sum(batch for batch, _ in shapes) == ROWS - 4 and len(store) == ROWS
    assert_is_the_slow_computation(store, proxy)


def test_a_stale_store_is_refused_before_the_first_pass(tiny_model_dir, tmp_path):
    proxy = load(tiny_model_dir)
    cache(tmp_path, proxy)
    shapes, before = count_passes(proxy), contents(tmp_path)
    with pytest.raises(TargetStoreError, match="stale .proxy: p there, q here"):
        cache(tmp_path, proxy, fingerprint={"proxy": "q"})
    with pytest.raises(TargetStoreError, match="stale .k: 6 there, 3 here"):
        cache(tmp_path, proxy, k=3)
    assert shapes == [] and contents(tmp_path) == before


def test_more_tokens_than_the_vocabulary_has(tiny_model_dir, tmp_path):
    with pytest.raises(TargetStoreError, match="k may be at most the size of the vocabulary"):
        cache(tmp_path, load(tiny_model_dir), k=VOCAB + 1)


def cache_alone(folder, path):
    cache(folder, load(path))


def test_a_killed_process_loses_only_its_last_batch(other_model_dir, tmp_path, straight):
    """It is killed in the third of four forward passes."""
    in_the_third_pass = Moment("transformers.Qwen2Model.forward", call=3, after=True)
    killed_at(in_the_third_pass, cache_alone, tmp_path, other_model_dir)
    left = contents(tmp_path)
    assert len(left[FILES[0]]) == 2 * BATCH * INDEX_DTYPE.itemsize
    assert all(straight[name].startswith(left[name]) for name in FILES)
    proxy = load(other_model_dir)
    shapes = count_passes(proxy)
    cache(tmp_path, proxy)
    assert len(shapes) == 2 and contents(tmp_path) == straight


def cache_and_go_on(folder, path):
    """On each of two processes."""
    state = PartialState(cpu=True)
    proxy = load(path)
    shapes = count_passes(proxy)
    cache(folder, proxy)
    assert sum(batch for batch, _ in shapes) == (6, 5)[state.process_index], shapes
    state.wait_for_everyone()
    before = contents(folder)
    state.wait_for_everyone()
    # Of each part the second batch is torn
    if state.is_main_process:
        for part in range(2):
            os.truncate(os.path.join(folder, f"part-0000{part}.index"), 4 * 32 + 5)
    state.wait_for_everyone()
    del shapes[:]
    cache(folder, proxy)
    assert len(shapes) == 1, shapes
    state.wait_for_everyone()
    assert contents(folder) == before


def test_two_processes_share_the_rows_and_go_on_as_they_began(other_model_dir, tmp_path, straight):
    on_processes(2, cache_and_go_on, tmp_path / "store", other_model_dir)
    # One process goes on with what two have written: nothing is missing, and all is as one would have computed it
    proxy = load(other_model_dir)
    shapes = count_passes(proxy)
    store = cache(tmp_path / "store", proxy)
    assert shapes == [] and len(store) == ROWS
    assert_is_the_slow_computation(store, proxy)
    found = contents(tmp_path / "store")
    assert len(found["part-00000.targets"]) + len(found["part-00001.targets"]) == len(straight[FILES[1]])


def test_the_fingerprint_of_a_model_is_that_of_its_weights(tiny_model_dir, other_model_dir, tmp_path):
    model = load(tiny_model_dir)
    original = model_fingerprint(model)
    assert model_fingerprint(load(tiny_model_dir)) == model_fingerprint(copy.deepcopy(model).train()) == original
    model.save_pretrained(tmp_path)
    assert model_fingerprint(load(tmp_path)) == original
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert model_fingerprint(model) == original
    found = {original, model_fingerprint(load(other_model_dir)), model_fingerprint(load(tiny_model_dir).bfloat16())}
    assert len(found) == 3
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            before = parameter.clone()
            parameter.mul_(1.001).add_(1e-5)
            changed = model_fingerprint(model)
            assert changed not in found, name
            found.add(changed)
            parameter.copy_(before)
    assert model_fingerprint(model) == original


def test_a_large_tensor_is_sampled_over_its_whole_length():
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(1000, 500))
    original = model_fingerprint(model)
    for rows in (slice(0, 1), slice(500, 501), slice(999, 1000)):
        with torch.no_grad():
            model.weight[rows] += 1
            assert model_fingerprint(model) != original
            model.weight[rows] -= 1
    assert model_fingerprint(model) == original


def test_the_fingerprint_of_a_tokenizer(tokenizer):
    other = build_tokenizer()
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(other)
    other.add_tokens(["<think>"])
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(other)


def test_the_fingerprint_of_rows_is_that_of_a_set():
    assert rows_fingerprint([3, 1, 2]) == rows_fingerprint([1, 2, 3])
    assert len({rows_fingerprint(keys) for keys in ([1, 2, 3], [1, 2], [1, 2, 4], [12, 3], [1, 2, 3, 3])}) == 5
