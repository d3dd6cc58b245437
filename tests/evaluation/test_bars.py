"""What a bar counts while a student is sampled, and where it is shown."""

import pytest
import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.processes import on_processes
from trl_bbkd.evaluation import bars
from trl_bbkd.evaluation.student import generate_completion_ids


MOST = 12


class Recorder(bars.tqdm):
    """A bar that remembers where it was after each of its moves."""

    made: list = []

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.is_shown = not self.disable  # which closing it changes
        self.moves: list[int] = []
        Recorder.made.append(self)

    def update(self, n=1):
        super().update(n)
        self.moves.append(self.n)


def sampled(folder, batch_size, progress_bar, is_shared=False):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.generation_config.eos_token_id = list(range(3, 40))
    return generate_completion_ids(
        model,
        tokenizer,
        ["a cat", "a dog", "the bird"],
        max_new_tokens=MOST,
        num_samples=4,
        batch_size=batch_size,
        progress_bar=progress_bar,
        is_shared=is_shared,
    )


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setattr(bars, "tqdm", Recorder)
    Recorder.made = []
    return Recorder.made


def test_it_moves_with_each_token_and_changes_no_sample(tiny_model_dir, made):
    ids = sampled(tiny_model_dir, 12, "a student")
    assert ids == sampled(tiny_model_dir, 12, None)
    bar, none = made
    assert bar.is_shown and not none.is_shown and none.moves == []
    lengths = torch.tensor([len(answer) for group in ids for answer in group])
    assert lengths.min() < lengths.max()
    # An answer that has ended has no tokens to come
    expected = [int(torch.where(lengths > token, token, MOST).sum()) for token in range(1, int(lengths.max()) + 1)]
    assert bar.moves == expected and bar.total == bar.moves[-1] == 12 * MOST


def test_it_ends_where_batches_end(tiny_model_dir, made):
    sampled(tiny_model_dir, 5, "a student")
    (bar,) = made
    assert {5 * MOST, 10 * MOST, 12 * MOST} <= set(bar.moves) and bar.moves == sorted(bar.moves)
    assert bar.moves[-1] == 12 * MOST


def on_a_process(folder):
    bars.tqdm, state = Recorder, PartialState(cpu=True)
    ids = sampled(folder, 5, "a student", is_shared=True)
    bar = Recorder.made[0]
    return state.process_index, bar.is_shown, bar.moves, bar.total, ids


@pytest.mark.slow
def test_the_main_process_shows_what_all_do(tiny_model_dir):
    (_, is_shown, moves, total, ids), (rank, others_is, none, _, others) = on_processes(
        2, on_a_process, tiny_model_dir
    )
    assert is_shown and (rank, others_is, none) == (1, False, [])
    # Three batches on two processes: each of its own stands for one of the other
    assert total == moves[-1] == max(moves) == 12 * MOST and 10 * MOST in moves
    assert ids == others
