import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_bbkd.discriminator.stabilizers import ReplayBuffer, std_floor_factor, without_length_effect


def test_std_floor_factor_divides_by_the_floor_instead():
    scores = torch.tensor([[1.00, 1.02], [1.0, 3.0]], dtype=torch.float64)
    std = scores.std(dim=1, keepdim=True)
    centred = scores - scores.mean(dim=1, keepdim=True)
    advantages = centred / (std + 1e-4)
    factor = std_floor_factor(std.expand_as(scores).flatten(), floor=0.5).view_as(scores)
    torch.testing.assert_close(advantages * factor, centred / (std.clamp(min=0.5) + 1e-4))
    # Scores that agree are no longer blown up; those that differ are left alone
    assert (advantages * factor)[0].abs().max() < 0.05 < advantages[0].abs().max()
    assert factor[1].tolist() == [1.0, 1.0]
    assert ((factor > 0) & (factor <= 1)).all()


@settings(deadline=None, max_examples=40)
@given(
    prompts=st.integers(1, 4),
    group=st.integers(2, 6),
    slope=st.floats(-3, 3, allow_subnormal=False),
    seed=st.integers(0, 1000),
)
def test_without_length_effect_leaves_no_covariance_with_length(prompts, group, slope, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (prompts * group,), generator=generator)
    level = torch.randn(prompts, generator=generator, dtype=torch.float64).repeat_interleave(group) * 10
    scores = level + slope * lengths + torch.randn(prompts * group, generator=generator, dtype=torch.float64)
    found = without_length_effect(scores, lengths, group)

    def within(values):
        groups = values.double().view(prompts, group)
        return groups - groups.mean(dim=1, keepdim=True)

    assert (within(found) * within(lengths)).sum().item() == pytest.approx(0, abs=1e-7)
    means = scores.view(prompts, group).mean(dim=1)
    torch.testing.assert_close(found.view(prompts, group).mean(dim=1), means, atol=1e-9, rtol=1e-9)
    # What is taken away is a multiple of the length
    taken = within(scores) - within(found)
    ratios = (taken / within(lengths))[within(lengths).abs() > 0.5]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), atol=1e-7, rtol=1e-7)


def test_scores_that_only_tell_length_vanish_and_equal_lengths_change_nothing():
    lengths = torch.tensor([3, 9, 4, 20, 2, 5])
    scores = 0.5 * lengths + torch.tensor([1.0, 1.0, 1.0, -7.0, -7.0, -7.0])
    groups = without_length_effect(scores, lengths, 3).view(2, 3)
    torch.testing.assert_close(groups, groups.mean(dim=1, keepdim=True).expand(2, 3), atol=1e-5, rtol=1e-5)
    scores = torch.tensor([0.3, -1.0, 2.0, 5.0])
    assert torch.equal(without_length_effect(scores, torch.tensor([4, 4, 7, 7]), 2), scores)


def pair(number):
    return [number], [number, number + 1], [number] * (number % 4)


def test_replay_is_bounded_and_thins_out_the_past():
    kept_of_the_old_half = []
    for seed in range(20):
        replay = ReplayBuffer(50, seed)
        for number in range(0, 100, 10):
            replay.add([pair(n) for n in range(number, number + 10)])
            assert len(replay) == min(50, number + 10)
        numbers = [prompt[0] for prompt, _, _ in replay.pairs]
        assert len(set(numbers)) == 50
        kept_of_the_old_half.append(sum(number < 50 for number in numbers))
    # Each of 50 new pairs takes the place of any of 50: (1 - 1/50)^50 = 36 % of the old ones are left, 18 of 50
    assert sum(kept_of_the_old_half) / 20 == pytest.approx(18.2, abs=2)


def test_replay_samples_without_repetition_and_everything_alike():
    replay = ReplayBuffer(10, seed=0)
    assert replay.sample(4) == []
    replay.add([pair(n) for n in range(10)])
    counts = torch.zeros(10)
    for _ in range(400):
        drawn = [prompt[0] for prompt, _, _ in replay.sample(4)]
        assert len(set(drawn)) == 4
        counts[drawn] += 1
    assert 120 < counts.min() <= counts.max() < 200  # 160 expected
    assert len(replay.sample(99)) == 10


@pytest.mark.parametrize("filled", [0, 3, 20])
def test_replay_goes_on_where_it_was_saved(tmp_path, filled):
    replay = ReplayBuffer(8, seed=1)
    replay.add([pair(n) for n in range(filled)])
    replay.sample(2)
    replay.save(tmp_path / "replay.safetensors")
    restored = ReplayBuffer(8, seed=99)
    restored.add([pair(50)])
    restored.load(tmp_path / "replay.safetensors")
    assert restored.pairs == replay.pairs
    for buffer in (replay, restored):
        buffer.add([pair(n) for n in range(100, 115)])
    assert restored.pairs == replay.pairs
    assert [restored.sample(3) for _ in range(4)] == [replay.sample(3) for _ in range(4)]


def test_replay_is_dealt_out_to_other_processes(tmp_path):
    paths = [tmp_path / str(process) for process in range(2)]
    for process, path in enumerate(paths):
        buffer = ReplayBuffer(size=6, seed=process)
        buffer.add([pair(10 * process + number) for number in range(6)])
        buffer.save(path)
    shares = []
    for process in range(4):
        buffer = ReplayBuffer(size=6, seed=process)
        buffer.load_share(paths, process, 4)
        assert len(buffer) == 3
        shares += buffer.pairs
    everything = [pair(10 * process + number) for process in range(2) for number in range(6)]
    assert sorted(shares) == sorted(everything)
    alone = ReplayBuffer(size=6, seed=0)
    alone.load_share(paths, 0, 1)
    # Twelve pairs, and room for half of them: of both buffers, none twice
    assert len(alone) == 6 and len({str(each) for each in alone.pairs}) == 6
    assert {each in everything[:6] for each in alone.pairs} == {True, False}


def test_replay_has_random_numbers_of_its_own():
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        replay = ReplayBuffer(5, seed=3)
        state = torch.get_rng_state()
        replay.add([pair(n) for n in range(30)])
        drawn.append(replay.sample(3))
        assert torch.equal(state, torch.get_rng_state())
    assert drawn[0] == drawn[1]
