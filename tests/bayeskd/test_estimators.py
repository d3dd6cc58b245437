"""Equations (2') to (5') of our reading of Bayes-KD: worked values, and slow implementations beside the fast ones."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from trl_bbkd.bayeskd.estimators import (
    beta_log_density,
    beta_posterior,
    draw_counts,
    grid_posterior,
    merge_candidates,
    observed_token_prior,
    sampling_distribution,
    smoothed_nll,
    with_known_probs,
)


PROPERTY = settings(max_examples=60, deadline=None)
SEEDS = st.integers(0, 2**31)


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def random_rows(seed, rows, candidates, draws):
    """Random π with some zeros, `(rows, candidates)`, and counts that sum to `draws`, of random distributions."""
    generator = torch.Generator().manual_seed(seed)
    prior, proxy = torch.rand(2, rows, candidates, dtype=torch.float64, generator=generator) ** 3
    prior[:, 1:] *= torch.rand(rows, candidates - 1, generator=generator) < 0.7
    prior /= prior.sum(dim=1, keepdim=True)
    return prior, count(draw_counts(proxy, draws, generator), candidates)


def count(ids, candidates):
    return torch.zeros(len(ids), candidates, dtype=torch.float64).scatter_add_(1, ids, torch.ones_like(ids).double())


def triangular_log_density(grid, prior, concentration, width=0.1):
    return (1.0 - (grid - prior[..., None]).abs() / width).clamp(min=0.0).log()


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# Prior


@PROPERTY
@given(SEEDS, st.integers(1, 12), st.floats(1.0, 1e6))
def test_prior_is_a_distribution_between_ngram_and_one_hot(seed, candidates, gamma):
    ngram, _ = random_rows(seed, 5, candidates, 0)
    is_observed = torch.nn.functional.one_hot(torch.arange(5) % candidates, candidates).bool()
    prior = observed_token_prior(ngram, is_observed, gamma)
    assert prior.dtype == torch.float64 and (prior >= 0).all()
    close(prior.sum(dim=1), torch.ones(5, dtype=torch.float64))
    assert torch.equal(observed_token_prior(ngram, is_observed, 1.0), ngram)
    close(observed_token_prior(ngram, is_observed, 1e9), is_observed.double(), 2e-9)
    assert torch.equal(observed_token_prior(ngram, is_observed, math.inf), is_observed.double())


def test_prior_worked_values():
    """2/3 one-hot and 1/3 n-gram; the observed token is marked by booleans or by numbers."""
    ngram = doubles([[0.5, 0.25, 0.25], [0.0, 0.9, 0.1]])
    is_observed = torch.tensor([[False, True, False], [True, False, False]])
    expected = doubles([[1 / 6, 2 / 3 + 1 / 12, 1 / 12], [2 / 3, 0.3, 0.1 / 3]])
    close(observed_token_prior(ngram, is_observed, 3), expected, 1e-15)
    close(observed_token_prior(ngram, is_observed.double(), 3), expected, 1e-15)
    assert observed_token_prior(ngram.float(), is_observed, 3).dtype == torch.float32


def test_prior_of_a_context_seen_once_is_one_hot_and_its_kl_the_nll():
    one_hot = doubles([0.0, 1.0, 0.0, 0.0])
    prior = observed_token_prior(one_hot, one_hot.bool(), 3)
    close(prior, one_hot, 1e-15)
    student = torch.softmax(doubles([0.3, -1.2, 2.0, 0.1]), dim=0)
    kl = (torch.xlogy(prior, prior) - prior * student.log()).sum()
    close(kl, -student[1].log())


def test_prior_of_a_hand_counted_corpus():
    """
    "a b a c", "a b b", "a c", one preceding token: after a are b, c, b, c, after b are a, b. The first sentence's
    second and third token, b after a and a after b.
    """
    counts = doubles([[0, 2, 2], [1, 1, 0]])
    prior = observed_token_prior(counts / counts.sum(dim=1, keepdim=True), torch.tensor([[0, 1, 0], [1, 0, 0]]), 3)
    close(prior, doubles([[0.0, 5 / 6, 1 / 6], [5 / 6, 1 / 6, 0.0]]), 1e-15)


@pytest.mark.parametrize("gamma", [0.99, 0, -3, math.nan])
def test_gamma_below_1_is_an_error(gamma):
    with pytest.raises(ValueError, match="gamma must be at least 1"):
        observed_token_prior(torch.ones(2), torch.ones(2), gamma)


# Posterior in closed form


def test_posterior_worked_values():
    prior, counts = doubles([0.7, 0.2, 0.1]), torch.tensor([6, 3, 1])
    # Whole counts do not cost precision
    close(beta_posterior(prior, counts, 10, 10), doubles([0.65, 0.25, 0.10]), 1e-15)


@PROPERTY
@given(SEEDS, st.integers(1, 12), st.integers(0, 60), st.floats(0.01, 200.0))
def test_posterior_sums_to_1_and_is_a_mixture(seed, candidates, draws, concentration):
    prior, counts = random_rows(seed, 6, candidates, draws)
    posterior = beta_posterior(prior, counts, draws, concentration)
    assert posterior.dtype == torch.float64
    close(posterior.sum(dim=1), torch.ones(6, dtype=torch.float64))
    trust = draws / (draws + concentration)
    close(posterior, (1 - trust) * prior + trust * (counts / max(draws, 1)))
    shaped = beta_posterior(prior.view(2, 3, -1), counts.view(2, 3, -1), draws, concentration)
    assert torch.equal(shaped.view(6, -1), posterior)
    assert torch.equal(beta_posterior(prior[0, 0], counts[0, 0], draws, concentration), posterior[0, 0])


@PROPERTY
@given(SEEDS, st.floats(1e-3, 1e3), st.integers(1, 50))
def test_no_draws_give_the_prior_exactly_and_no_weight_the_draws(seed, concentration, draws):
    prior, counts = random_rows(seed, 3, 5, draws)
    assert torch.equal(beta_posterior(prior, torch.zeros_like(prior), 0, concentration), prior)
    assert torch.equal(beta_posterior(prior, counts, draws, 0), counts / draws)
    close(beta_posterior(prior, counts, draws, 1e-9), counts / draws, 2e-9)


def test_token_without_prior_mass_has_its_share_of_draws_and_without_draws_nothing():
    prior, counts = doubles([1.0, 0.0, 0.0]), doubles([1.0, 3.0, 0.0])
    posterior = beta_posterior(prior, counts, 4, 10)
    close(posterior, doubles([11 / 14, 3 / 14, 0.0]), 1e-15)
    assert posterior[2] == 0
    close(grid_posterior(prior, counts, 4, 10, 1000), posterior, 1e-4)


def test_expected_posterior_is_the_mean_of_drawn_ones():
    prior, proxy = doubles([0.7, 0.2, 0.1, 0.0]), doubles([0.5, 0.3, 0.15, 0.05])
    expected = beta_posterior(prior, 10 * proxy, 10, 10)
    close(expected, doubles([0.6, 0.25, 0.125, 0.025]), 1e-15)
    ids = draw_counts(proxy.expand(200_000, 4), 10, torch.Generator().manual_seed(0))
    drawn = beta_posterior(prior, count(ids, 4), 10, 10)
    # Standard error of a mean: sqrt(.25 · 10) / 20 / sqrt(200,000) = 1.8e-4
    close(drawn.mean(dim=0), expected, 7e-4)
    assert (drawn - expected).abs().max() > 0.1


def test_error_of_averaged_drawn_posteriors_falls_with_the_root_of_their_number():
    generator = torch.Generator().manual_seed(1)
    positions, candidates, most = 40, 6, 1024
    prior, proxy = torch.rand(2, positions, candidates, dtype=torch.float64, generator=generator).softmax(dim=2)
    ids = draw_counts(proxy.repeat_interleave(most, dim=0), 10, generator)
    drawn = beta_posterior(prior[:, None], count(ids, candidates).view(positions, most, candidates), 10, 10)
    expected = beta_posterior(prior, 10 * proxy, 10, 10)
    errors = [(drawn[:, :n].mean(dim=1) - expected).square().mean().sqrt() for n in (4, 64, 1024)]
    # 16 times as many: a quarter of the error
    assert 3.2 < errors[0] / errors[1] < 5.0 and 3.2 < errors[1] / errors[2] < 5.0


@pytest.mark.parametrize("posterior", [beta_posterior, lambda *args: grid_posterior(*args, 10)])
def test_impossible_draws_and_concentrations_are_errors(posterior):
    prior, counts = doubles([0.5, 0.5]), doubles([1.0, 0.0])
    for draws, concentration, message in [
        *((value, 10, "draws must be") for value in (-1, math.nan)),
        *((1, value, "concentration must be") for value in (-0.5, math.inf)),
        (0, 0, "both 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            posterior(prior, counts, draws, concentration)


# Posterior on a grid


def test_beta_log_density_is_that_of_torch_up_to_a_constant():
    """By itself: a wrong exponent of 1 - p scales all means of a position alike, and normalising undoes that."""
    grid, prior = doubles([0.1, 0.35, 0.9]), doubles([[0.2, 0.7], [0.05, 0.5]])
    reference = torch.distributions.Beta(7 * prior[..., None], 7 * (1 - prior[..., None])).log_prob(grid)
    difference = beta_log_density(grid, prior, 7) - reference
    close(difference, difference[..., :1].expand(2, 2, 3))


def draw_by_draw(prior, order, points, log_density, concentration):
    """Equations (3') and (4') as they are written, for one position: a loop over draws, with normalised densities."""
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    means = torch.zeros_like(prior)
    for w in range(len(prior)):
        if prior[w] == 0 and w not in order:
            continue
        density = log_density(grid, prior[w : w + 1], concentration)[0].exp()
        density = density / density.sum()
        for drawn in order:
            density = density * (grid if drawn == w else 1 - grid)
            density = density / density.sum()
        means[w] = (grid * density).sum()
    return means / means.sum()


@pytest.mark.parametrize("log_density", [beta_log_density, triangular_log_density])
def test_one_update_from_counts_is_any_order_of_draws(log_density):
    prior = doubles([0.55, 0.3, 0.15, 0.0, 0.0])
    order = [0, 3, 0, 1, 1, 0, 2, 3, 0, 1]
    slow = draw_by_draw(prior, order, 200, log_density, 10)
    close(draw_by_draw(prior, sorted(order, reverse=True), 200, log_density, 10), slow)
    counts = count(torch.tensor([order]), 5)
    close(grid_posterior(prior[None], counts, 10, 10, 200, log_density)[0], slow)
    assert slow[4] == 0 and slow[3] > 0.01


@pytest.mark.parametrize("points, regular, steep", [(100, 1e-3, 8e-3), (1000, 1e-4, 2.5e-3)])
def test_grid_agrees_with_closed_form_where_the_density_is_regular(points, regular, steep):
    """
    Two candidates with mirrored densities: their means sum to 1 on the grid, so that what is compared is each mean by
    itself. The errors that are asserted are those of the table in section 4.2.
    """
    worst = {"regular": 0.0, "steep": 0.0}
    one = torch.linspace(0.001, 0.999, 333, dtype=torch.float64)
    for draws in (0, 5, 10, 20):
        s = torch.arange(draws + 1, dtype=torch.float64)[:, None].expand(-1, len(one))
        prior = torch.stack([one, 1 - one], dim=-1).expand(draws + 1, -1, -1)
        counts = torch.stack([s, draws - s], dim=-1)
        for concentration in (5, 10, 20, 50):
            least = (concentration * prior + counts).amin(dim=-1)
            found = grid_posterior(prior, counts, draws, concentration, points)
            error = (found - beta_posterior(prior, counts, draws, concentration)).abs().amax(dim=-1)
            worst["regular"] = max(worst["regular"], error[least >= 1].max().item())
            worst["steep"] = max(worst["steep"], error[(least >= 0.5) & (least < 1)].max().item())
    assert worst["regular"] < regular and worst["steep"] < steep
    assert worst["regular"] > regular / 100 and worst["steep"] > steep / 100


@PROPERTY
@given(SEEDS, st.integers(2, 6), st.integers(0, 20), st.sampled_from([20.0, 50.0]))
def test_grid_agrees_with_closed_form_in_rows_of_regular_densities(seed, candidates, draws, concentration):
    prior, counts = random_rows(seed, 20, candidates, draws)
    prior = (prior + 0.5) / (1 + 0.5 * candidates)
    assert (concentration * prior + counts).min() >= 1
    expected = beta_posterior(prior, counts, draws, concentration)
    close(grid_posterior(prior, counts, draws, concentration, 100), expected, 1e-3)
    close(grid_posterior(prior, counts, draws, concentration, 1000), expected, 1e-4)


@PROPERTY
@given(SEEDS, st.integers(1, 8), st.integers(0, 20), st.sampled_from([beta_log_density, triangular_log_density]))
def test_grid_over_the_support_sums_to_1(seed, candidates, draws, log_density):
    prior, counts = random_rows(seed, 8, candidates, draws)
    posterior = grid_posterior(prior.view(2, 4, -1), counts.view(2, 4, -1), draws, 10, 100, log_density).view(8, -1)
    assert posterior.dtype == torch.float64
    close(posterior.sum(dim=1), torch.ones(8, dtype=torch.float64))
    assert torch.equal(posterior > 0, (prior > 0) | (counts > 0))


def test_support_keeps_stray_mass_out_and_normalising_mends_a_biased_density():
    """Without the restriction 400 unseen tokens would have a mean of 0.03 each: twelve times the rest."""
    prior, counts = torch.zeros(2, 404, dtype=torch.float64)
    prior[:4], counts[:4] = doubles([0.9, 0.06, 0.03, 0.01]), doubles([10, 0, 0, 0])
    wide = grid_posterior(prior, counts, 10, 10, 500, triangular_log_density)
    narrow = grid_posterior(prior[:4], counts[:4], 10, 10, 500, triangular_log_density)
    close(wide[:4], narrow)
    assert (wide[4:] == 0).all()
    grid = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    density = triangular_log_density(grid, prior[:4], 10).exp()
    means = (density * grid).sum(dim=1) / density.sum(dim=1)
    assert means.sum() > 1.02
    close(grid_posterior(prior[:4], torch.zeros(4), 0, 10, 500, triangular_log_density), means / means.sum())


@pytest.mark.parametrize("points", [1, 2, 100, 1000])
@pytest.mark.parametrize("concentration", [0.0, 0.1, 10.0, 1000.0])
def test_priors_of_exactly_0_and_1_stay_finite_on_the_grid(points, concentration):
    prior = doubles([[1.0, 0.0, 0.0]] * 4 + [[0.0, 0.0, 0.0]] * 2)
    counts = doubles([[5, 0, 0], [4, 1, 0], [0, 5, 0], [4.9, 0.1, 0], [2, 3, 0], [0, 0, 0]])
    for dtype in (torch.float64, torch.float32):
        posterior = grid_posterior(prior.to(dtype), counts.to(dtype), 5, concentration, points)
        assert posterior.dtype == dtype and bool((posterior >= 0).all()) and bool((posterior[:, 2] == 0).all())
        torch.testing.assert_close(posterior.sum(dim=1), torch.tensor([1, 1, 1, 1, 1, 0]).to(dtype))
        # Draws that agree with a certain prior leave it certain
        assert posterior[0, 0] == 1


def test_density_that_misses_the_grid_is_an_error():
    def narrow(*args):
        return triangular_log_density(*args, width=0.05)

    # Between two points; outside of the support that is no harm
    prior, counts = doubles([0.5, 0.5]), doubles([1, 0])
    with pytest.raises(ValueError, match="0 at all 4 points"):
        grid_posterior(prior, counts, 1, 10, 4, narrow)
    assert grid_posterior(doubles([0.875, 0.0]), counts, 1, 10, 4, narrow).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="points must be at least 1"):
        grid_posterior(prior, counts, 1, 10, 0)


class LargeTensors(TorchDispatchMode):
    """Keeps each tensor of `numel` elements, so that no memory is used twice."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.kept = numel, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.numel:
            self.kept.append(result)
        return result


def test_grid_works_in_one_tensor():
    prior, counts = random_rows(0, 6, 5, 10)
    with LargeTensors(6 * 5 * 50) as large:
        grid_posterior(prior, counts, 10, 10, 50)
    assert large.kept and len({tensor.untyped_storage().data_ptr() for tensor in large.kept}) == 1


# Candidates


@PROPERTY
@given(st.data(), st.integers(0, 6), st.integers(0, 9), st.integers(1, 3))
def test_merged_candidates_are_a_dictionary_of_sums(data, rows, entries, kinds):
    drawn = [data.draw(st.integers(0, 6)) for _ in range(rows * entries)]
    ids = torch.tensor(drawn, dtype=torch.int64).view(rows, entries)
    values = torch.rand(kinds, rows, entries, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.3
    before = ids.clone(), values.clone()
    merged_ids, merged = merge_candidates(ids, values)
    assert torch.equal(ids, before[0]) and torch.equal(values, before[1])
    assert merged.dtype == torch.float64 and merged_ids.dtype == torch.int64
    distinct = [len(set(row)) for row in ids.tolist()]
    assert merged_ids.shape == (rows, max(distinct, default=0)) and merged.shape == (kinds, *merged_ids.shape)
    for row in range(rows):
        sums = {}
        for entry, token in enumerate(ids[row].tolist()):
            sums[token] = sums.get(token, torch.zeros(kinds, dtype=torch.float64)) + values[:, row, entry]
        own = distinct[row]
        assert merged_ids[row, :own].tolist() == sorted(sums)
        for column, token in enumerate(sorted(sums)):
            close(merged[:, row, column], sums[token])
        assert (merged_ids[row, own:] == 0).all() and (merged[:, row, own:] == 0).all()


def test_merging_keeps_ids_without_a_value():
    ids, values = torch.tensor([[9, 4, 9, 0], [7, 7, 7, 7]]), torch.zeros(1, 2, 4)
    merged_ids, merged = merge_candidates(ids, values)
    assert merged_ids.tolist() == [[0, 4, 9], [7, 0, 0]] and merged.tolist() == [[[0.0] * 3] * 2]


def test_draws_become_counts_that_the_posterior_takes():
    """The prior names 5 and 8; of 4 draws, 2 are 8, one is 5 and one is 2."""
    ids = torch.tensor([[5, 8, 8, 2, 5, 8]])
    values = doubles([[[0.75, 0.25, 0, 0, 0, 0]], [[0, 0, 1, 1, 1, 1]]])
    merged_ids, (prior, counts) = merge_candidates(ids, values)
    assert merged_ids.tolist() == [[2, 5, 8]] and counts.tolist() == [[1, 1, 2]]
    close(beta_posterior(prior, counts, 4, 4), doubles([[0.125, 0.5, 0.375]]), 1e-15)


# Known probabilities


@pytest.mark.parametrize(
    "estimate, known, expected",
    [
        ([0.2, 0.2, 0.6], [0.6, None, None], [0.6, 0.1, 0.3]),
        ([0.2, 0.2, 0.6], [0.6, 0.4, None], [0.6, 0.4, 0.0]),
        ([0.2, 0.2, 0.6], [0.0, None, None], [0.0, 0.25, 0.75]),
        # A token without an estimate can be known
        ([0.0, 1.0], [0.3, None], [0.3, 0.7]),
        # No other candidate has an estimate: normalised
        ([0.5, 0.5, 0.0], [0.6, 0.2, None], [0.75, 0.25, 0.0]),
        ([0.4, 0.6], [0.3, 0.3], [0.5, 0.5]),
        # More than 1
        ([0.2, 0.2, 0.6], [0.9, 0.3, None], [0.75, 0.25, 0.0]),
        # Nothing known; all candidates ruled out
        ([0.2, 0.2, 0.6], [None, None, None], [0.2, 0.2, 0.6]),
        ([0.4, 0.6, 0.0], [0.0, 0.0, None], [0.4, 0.6, 0.0]),
    ],
)
def test_known_probabilities_take_the_place_of_estimates(estimate, known, expected):
    # What stands in the place of an unknown probability does not matter
    known = doubles([math.nan if value is None else value for value in known])
    close(with_known_probs(doubles(estimate), known, ~known.isnan()), doubles(expected), 1e-15)


def test_known_probabilities_are_exact_and_marked_by_numbers_as_well():
    estimate = torch.tensor([[0.1, 0.2, 0.7], [0.1, 0.2, 0.7]])
    known = torch.tensor([[0.123456, 0.0, 0.654321], [0.0, 0.0, 0.0]])
    found = with_known_probs(estimate, known, torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]]))
    assert found.dtype == torch.float32 and torch.equal(found[0, ::2], known[0, ::2])
    assert torch.equal(found[1], estimate[1])


@PROPERTY
@given(SEEDS, st.integers(1, 8), st.integers(0, 120), st.integers(0, 100))
def test_with_known_probabilities_an_estimate_still_sums_to_1(seed, candidates, mass, share):
    mass, share = mass / 100, share / 100
    estimate, _ = random_rows(seed, 10, candidates, 0)
    generator = torch.Generator().manual_seed(seed)
    is_known = torch.rand(10, candidates, generator=generator) < share
    known = torch.rand(10, candidates, dtype=torch.float64, generator=generator) * is_known
    known *= mass / known.sum(dim=1, keepdim=True).clamp(min=1e-9)
    found = with_known_probs(estimate, known, is_known)
    assert bool((found >= 0).all())
    close(found.sum(dim=1), torch.ones(10, dtype=torch.float64))
    others = estimate.masked_fill(is_known, 0.0)
    is_exact = is_known.any(dim=1) & (known.sum(dim=1) <= 1) & (others.sum(dim=1) > 0)
    is_exact_entry = is_exact[:, None] & is_known
    assert torch.equal(found[is_exact_entry], known[is_exact_entry])
    assert torch.equal(found[~is_known.any(dim=1)], estimate[~is_known.any(dim=1)])
    # The others stand to each other as before
    left, weights = found.masked_fill(is_known, 0.0)[is_exact], others[is_exact]
    close(left * weights.sum(dim=1, keepdim=True), weights * left.sum(dim=1, keepdim=True))


# Drawing


def test_draws_repeat_with_the_generator_and_follow_the_distribution():
    probs = doubles([[0.5, 0.3, 0.2, 0.0], [0.0, 0.01, 0.0, 0.99]])
    draws = [draw_counts(probs, 50_000, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert draws[0].shape == (2, 50_000) and draws[0].dtype == torch.int64
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    frequencies = count(draws[0], 4) / 50_000
    close(frequencies, probs, 0.01)
    assert (frequencies[probs == 0] == 0).all()


def test_drawing_nothing():
    generator = torch.Generator().manual_seed(0)
    assert draw_counts(torch.ones(3, 4), 0, generator).shape == (3, 0)
    assert draw_counts(torch.ones(0, 4), 5, generator).shape == (0, 5)
    # More draws than tokens
    assert draw_counts(torch.ones(1, 1), 5, generator).tolist() == [[0] * 5]
    with pytest.raises(ValueError, match="draws must be at least 0"):
        draw_counts(torch.ones(3, 4), -1, generator)


def test_sampling_distribution_is_tempered_and_truncated():
    logits = doubles([[1.0, 3.0, 2.0, -1.0], [0.0, 0.0, 0.0, 5.0]])
    close(sampling_distribution(logits, 1.0, None), logits.softmax(dim=1), 1e-15)
    close(sampling_distribution(logits, 0.5, None), (2 * logits).softmax(dim=1), 1e-15)
    two = sampling_distribution(logits, 2.0, 2)
    ratio = math.exp(0.5)
    close(two[0], doubles([0.0, ratio / (1 + ratio), 1 / (1 + ratio), 0.0]))
    # Of equals, just as many as asked for
    assert (two > 0).sum(dim=1).tolist() == [2, 2] and two[1, 3] == two[1].max()
    assert torch.equal(sampling_distribution(logits, 0.7, 1), torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1]]).double())
    for top_k in (4, 100):
        assert torch.equal(sampling_distribution(logits, 0.7, top_k), sampling_distribution(logits, 0.7, None))


def test_half_precision_logits_give_single_precision_probabilities():
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    for top_k in (None, 50):
        probs = sampling_distribution(logits, 1.0, top_k)
        assert probs.dtype == torch.float32
        close(probs.sum(dim=1), torch.ones(3), 1e-6)


def test_impossible_sampling_is_an_error():
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            sampling_distribution(torch.zeros(1, 4), temperature, 5)
    for top_k in (0, -2):
        with pytest.raises(ValueError, match="top_k must be at least 1"):
            sampling_distribution(torch.zeros(1, 4), 1.0, top_k)


# Held-out text


def test_smoothed_nll_is_the_mean_of_mixtures_with_a_uniform_distribution():
    found = smoothed_nll(doubles([0.5, 0.0]), 0.1, 50)
    assert found.shape == () and found.dtype == torch.float64
    assert found.item() == pytest.approx(-(math.log(0.9 * 0.5 + 0.1 / 50) + math.log(0.1 / 50)) / 2, rel=1e-14)
    assert smoothed_nll(doubles([0.5, 0.25]), 0.0, 50).item() == pytest.approx(1.5 * math.log(2), rel=1e-14)
    assert smoothed_nll(doubles([0.5, 0.25]), 1.0, 50).item() == pytest.approx(math.log(50), rel=1e-14)
    assert smoothed_nll(doubles([0.5, 0.0]), 0.0, 50).item() == math.inf


def test_held_out_nll_falls_with_the_trust_in_a_proxy_that_knows_the_teacher_better():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(400, 30, dtype=torch.float64, generator=generator)
    noise = torch.randn(2, 400, 30, dtype=torch.float64, generator=generator) * doubles([3.0, 0.3])[:, None, None]
    token = draw_counts(logits.softmax(dim=1), 1, generator)
    ngram, proxy = ((logits + one).softmax(dim=1).gather(1, token).squeeze(1) for one in noise)
    nlls = [smoothed_nll(beta_posterior(ngram, 10 * proxy, 10, kappa), 1e-3, 30) for kappa in (1000, 30, 3, 0)]
    assert nlls == sorted(nlls, reverse=True) and nlls[0] > nlls[-1] + 0.2
    close(nlls[-1], smoothed_nll(proxy, 1e-3, 30))


def test_impossible_floors_are_errors():
    for floor, vocab_size, message in [*((floor, 5, "floor") for floor in (-0.1, 1.1, math.nan)), (0.1, 0, "vocab")]:
        with pytest.raises(ValueError, match=message):
            smoothed_nll(torch.ones(2), floor, vocab_size)
