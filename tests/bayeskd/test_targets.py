"""The loss of three terms, targets on disk, and the estimator beside a slow one that is made of dictionaries."""

import math
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from trl_bbkd.bayeskd.config import BayesKDConfig
from trl_bbkd.bayeskd.ngram import build_ngram_model
from trl_bbkd.bayeskd.targets import ProxyDistributions, TargetEstimator
from trl_bbkd.data.teacher_data import tokenize_teacher_data
from trl_bbkd.soft_targets.kernel import soft_target_loss
from trl_bbkd.soft_targets.loss import LMHead, SparseTarget, sparse_target
from trl_bbkd.soft_targets.rows import soft_target_rows
from trl_bbkd.soft_targets.store import RowTargets, TargetStore, TargetStoreWriter

from .helpers import BOTH, ON_CPU, make_rows


N, H, V, K = 9, 6, 23, 5
SMALLEST = float(np.finfo(np.float32).tiny)
WEIGHTS = [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0), (1.0, 0.0)]


# Loss


class Inputs(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    labels: torch.Tensor
    prior: torch.Tensor
    posterior: torch.Tensor


def make_inputs():
    """Everything in float64; prior and posterior over all V tokens, K of them not 0, the label among them."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((N, H), (V, H), (V,))
    )
    labels = torch.randint(0, V, (N,), generator=generator)
    dense = []
    for _ in range(2):
        scores = torch.rand(N, V, generator=generator, dtype=torch.float64)
        scores.scatter_(1, labels[:, None], 2.0)
        kept, ids = scores.topk(K, dim=1)
        dense.append(torch.zeros(N, V, dtype=torch.float64).scatter_(1, ids, kept / kept.sum(dim=1, keepdim=True)))
    return Inputs(hidden, weight, bias, labels, *dense)


def sparse(dense, k=K, tail=None):
    probs, ids = dense.topk(k, dim=1)
    return SparseTarget(ids, probs, tail)


def kernel_loss(targets, hard, soft):
    def loss(inputs, hidden, weight, bias):
        factors = torch.tensor(soft, dtype=torch.float64)[:, None].expand(len(soft), N) / N
        hard_factor = torch.full((N,), hard / N, dtype=torch.float64)
        head = LMHead(weight, bias)
        return soft_target_loss(hidden, head, inputs.labels, targets, hard_factor, factors, chunk_elements=4 * V).loss

    return loss


def from_log_probs(formula):
    """A mean over tokens of a formula of all of the student's log-probabilities and the inputs."""

    def loss(inputs, hidden, weight, bias):
        return formula(torch.log_softmax(hidden @ weight.t() + bias, dim=1), inputs).mean()

    return loss


def nll(log_probs, inputs):
    return -log_probs.gather(1, inputs.labels[:, None]).squeeze(1)


def kl(target):
    return lambda log_probs, inputs: (torch.xlogy(target, target) - target * log_probs).sum(dim=1)


def value_and_gradients(loss, inputs):
    leaves = [value.clone().requires_grad_() for value in inputs[:3]]
    value = loss(inputs, *leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_all_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("alpha", "beta"), WEIGHTS)
def test_merged_loss_is_that_of_three_losses_one_by_one(alpha, beta):
    inputs = make_inputs()
    targets = [sparse(inputs.prior), sparse(inputs.posterior)]
    terms = [(1.0, nll), (alpha, kl(inputs.prior)), (beta, kl(inputs.posterior))]
    separate = [(weight, value_and_gradients(from_log_probs(term), inputs)) for weight, term in terms]
    expected = [sum(weight * values[i] for weight, values in separate) for i in range(4)]
    assert_all_close(value_and_gradients(kernel_loss(targets, 1.0, [alpha, beta]), inputs), expected)


@pytest.mark.parametrize(("alpha", "beta"), WEIGHTS)
def test_merged_loss_is_one_soft_cross_entropy_less_the_targets_entropies(alpha, beta):
    inputs = make_inputs()
    label = torch.nn.functional.one_hot(inputs.labels, V).double()
    target = label + alpha * inputs.prior + beta * inputs.posterior
    entropies = [-torch.xlogy(dense, dense).sum(dim=1) for dense in (inputs.prior, inputs.posterior)]
    constant = alpha * entropies[0] + beta * entropies[1]
    one_loss = from_log_probs(lambda log_probs, inputs: -(target * log_probs).sum(dim=1) - constant)
    merged = kernel_loss([sparse(inputs.prior), sparse(inputs.posterior)], 1.0, [alpha, beta])
    assert_all_close(value_and_gradients(merged, inputs), value_and_gradients(one_loss, inputs))


def test_weights_of_0_are_the_hard_loss_exactly():
    inputs = make_inputs()
    targets = [sparse(inputs.prior), sparse(inputs.posterior)]
    found = value_and_gradients(kernel_loss(targets, 1.0, [0.0, 0.0]), inputs)
    plain = value_and_gradients(kernel_loss([], 1.0, []), inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))
    assert_all_close(found, value_and_gradients(from_log_probs(nll), inputs))


@pytest.mark.parametrize("tail", [None, 0.3], ids=["renormalize", "bucket"])
def test_a_sparse_target_is_the_dense_one_with_zeros(tail):
    inputs = make_inputs()
    scale, tails = (1.0, None) if tail is None else (1.0 - tail, torch.full((N,), tail, dtype=torch.float64))
    losses = [kernel_loss([sparse(inputs.prior * scale, k, tails)], 1.0, [1.5]) for k in (K, V)]
    assert_all_close(*(value_and_gradients(loss, inputs) for loss in losses))


@pytest.mark.parametrize("tail", [None, 0.3], ids=["renormalize", "bucket"])
@pytest.mark.parametrize("real_0", [False, True], ids=["0 is padding alone", "0 is a token as well"])
def test_entries_of_probability_0_stand_for_nothing(tail, real_0):
    """Padding names token 0 several times, which is a label, a token of the target, or one of the rest."""
    inputs = make_inputs()
    inputs.labels[0] = 0
    dense = inputs.prior.clone()
    dense[:, 0] = 0.4 if real_0 else 0.0
    dense = dense / dense.sum(dim=1, keepdim=True) * (1.0 - (tail or 0.0))
    kept = sparse(dense, K + 1)
    ids, probs = (torch.nn.functional.pad(value, (2, 3)) for value in (kept.ids, kept.probs))
    target = SparseTarget(ids, probs, None if tail is None else torch.full((N,), tail, dtype=torch.float64))

    def reference(log_probs, inputs):
        loss = nll(log_probs, inputs) + 1.5 * kl(dense)(log_probs, inputs)
        if tail is None:
            return loss
        rest = log_probs.masked_fill(dense > 0, -math.inf).logsumexp(dim=1)
        return loss + 1.5 * (tail * math.log(tail) - tail * rest)

    found = value_and_gradients(kernel_loss([target], 1.0, [1.5]), inputs)
    assert_all_close(found, value_and_gradients(from_log_probs(reference), inputs))


# Store


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_padded_entries_come_back_from_disk_as_nothing(tmp_path, tail):
    probs = np.array([[0.7, 0.3, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], dtype=np.float32)
    ids = np.array([[7, 5, 0, 0], [9, 0, 0, 0]])
    with np.errstate(divide="ignore"), TargetStoreWriter(tmp_path, 4, {}) as writer:
        writer.append(0, [1], [RowTargets(ids, np.log(probs), np.log(probs[:, 0]))])
    found = TargetStore(tmp_path)[1]
    assert np.array_equal(found.ids, ids) and np.array_equal(np.isneginf(found.log_probs), probs == 0)
    target = sparse_target(torch.tensor(found.ids), torch.tensor(found.log_probs), tail)
    assert torch.equal(target.probs == 0, torch.tensor(probs == 0))
    torch.testing.assert_close(target.probs, torch.tensor(probs), atol=1e-4, rtol=0)


# Estimator


class World(NamedTuple):
    """Rows, their answers, a proxy, and counts of the answers: `ngrams` by context length."""

    rows: list[dict]
    answers: list[list[int]]
    proxy: torch.nn.Module
    vocab_size: int
    ngrams: dict
    folder: str


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer, other_model_dir):
    folder = tmp_path_factory.mktemp("estimator")
    dataset = tokenize_teacher_data(Dataset.from_list(make_rows(30)), tokenizer, max_completion_length=16)[0]
    answers = dataset["teacher_ids"][:]
    proxy = AutoModelForCausalLM.from_pretrained(other_model_dir, dtype=torch.float32).eval()
    corpus = np.concatenate(answers), np.array([len(answer) for answer in answers])
    sizes = {"num_tokens": len(corpus[0]), "vocab_size": len(tokenizer)}
    ngrams = {n: build_ngram_model(folder / str(n), lambda: [corpus], context_length=n, **sizes) for n in (1, 2)}
    rows = soft_target_rows(dataset, tokenizer).to_list()
    return World(rows, answers, proxy, len(tokenizer), ngrams, str(folder))


def estimates(world, rows, **config):
    """What the estimator says of some rows, and what the slow one does."""
    args = BayesKDConfig(
        world.folder, **{**ON_CPU, **BOTH, "ngram_context_length": 1, "target_top_k": world.vocab_size, **config}
    )
    distributions = ProxyDistributions(world.proxy, args, world.vocab_size, 0) if args.needs_proxy else None
    found = TargetEstimator(world.ngrams[args.ngram_context_length], distributions, args)(rows)
    slow = SlowEstimator(world, args, distributions)
    return args, found, [slow.targets(row) for row in rows]


class SlowEstimator:
    """Position by position, with dictionaries."""

    def __init__(self, world, args, distributions):
        self.args, self.proxy, self.distributions = args, world.proxy, distributions
        self.counts = defaultdict(Counter)
        for answer in world.answers:
            for position, token in enumerate(answer):
                for context in self.contexts(answer, position):
                    self.counts[context][token] += 1

    def contexts(self, answer, position):
        """The longest context of a position, and those that it is backed off to."""
        n = self.args.ngram_context_length
        before = ([None] * n + answer)[position : position + n]
        return [tuple(before[n - length :]) for length in range(n, -1, -1)]

    def targets(self, row):
        """For each of `target_weights`, of each position: probabilities by token id."""
        answer = [token for token in row["labels"] if token != -100]
        first = len(row["labels"]) - len(answer)
        with torch.no_grad():
            logits = self.proxy(torch.tensor([row["input_ids"]])).logits[0, first - 1 : -1].double()
        draws = None
        if self.args.posterior_sampling == "drawn" and self.distributions is not None:
            draws = self.distributions.draws([row], self.args.posterior_draws).tolist()
        known = row.get("top_logprobs") or {"ids": [], "logprobs": []}
        found = []
        for position, token in enumerate(answer):
            prior = self.prior(answer, position)
            estimates = {"prior": prior, "posterior": prior}
            if self.distributions is not None:
                if draws is not None:
                    evidence = Counter(draws[position])
                else:
                    evidence = self.expected_draws(logits[position])
                update = self.closed_form if self.args.posterior_grid_points is None else self.on_a_grid
                estimates["posterior"] = update(prior, evidence)
            if position < len(known["ids"]) and known["ids"][position]:
                probs = [math.exp(value) for value in known["logprobs"][position]]
                api = dict(zip(known["ids"][position], probs, strict=True))
                estimates["posterior"] = self.with_known(estimates["posterior"], api)
            found.append([estimates[name] for name in self.args.target_weights] + [token])
        *targets, tokens = zip(*found, strict=True)
        return targets, tokens

    def prior(self, answer, position):
        contexts = self.contexts(answer, position)
        counts = next(
            self.counts[context]
            for context in contexts
            if sum(self.counts[context].values()) >= self.args.ngram_min_count or not context
        )
        total, gamma = sum(counts.values()), self.args.prior_gamma
        prior = {token: count / total / gamma for token, count in counts.items()}
        token = answer[position]
        prior[token] = prior.get(token, 0.0) + (gamma - 1) / gamma
        return prior

    def expected_draws(self, logits):
        probs = dict(enumerate((logits / self.args.proxy_temperature).softmax(0).tolist()))
        kept = sorted(probs, key=probs.get)[-(self.args.proxy_top_k or len(probs)) :]
        total = sum(probs[token] for token in kept)
        return {token: self.args.posterior_draws * probs[token] / total for token in kept}

    def closed_form(self, prior, evidence):
        kappa, draws = self.args.posterior_concentration, self.args.posterior_draws
        return {
            token: (kappa * prior.get(token, 0.0) + evidence.get(token, 0)) / (kappa + draws)
            for token in {*prior, *evidence}
        }

    def on_a_grid(self, prior, evidence):
        kappa, draws, m = (
            getattr(self.args, f"posterior_{name}") for name in ("concentration", "draws", "grid_points")
        )
        points = [(i + 0.5) / m for i in range(m)]
        means = {}
        for token in {*prior, *evidence}:
            a = kappa * prior.get(token, 0.0) + evidence.get(token, 0)
            b = kappa + draws - a
            density = [math.exp((a - 1) * math.log(p) + (b - 1) * math.log(1 - p)) for p in points]
            means[token] = sum(p * f for p, f in zip(points, density, strict=True)) / sum(density)
        return {token: mean / sum(means.values()) for token, mean in means.items()}

    def with_known(self, estimate, api):
        rest = {token: p for token, p in estimate.items() if token not in api}
        if not rest:
            return {token: p / sum(api.values()) for token, p in api.items()}
        left = 1.0 - sum(api.values())
        return api | {token: left * p / sum(rest.values()) for token, p in rest.items()}


def probabilities(targets):
    """Of each position, the probabilities by token id."""
    pairs = zip(targets.ids.tolist(), targets.log_probs.tolist(), strict=True)
    return [
        {token: math.exp(p) for token, p in zip(ids, log_probs, strict=True) if p > -math.inf}
        for ids, log_probs in pairs
    ]


def assert_same_targets(args, found, expected, atol=1e-6):
    """Each row's targets are the likeliest tokens of what is expected, with their probabilities."""
    for row, (targets, tokens) in zip(zip(*found, strict=True), expected, strict=True):
        for stored, slow in zip(row, targets, strict=True):
            assert stored.ids.shape == (len(tokens), args.target_top_k)
            rows = zip(probabilities(stored), stored.label_log_probs, tokens, slow, strict=True)
            for kept, of_label, token, probs in rows:
                wanted = sorted((p for p in probs.values() if p > 0), reverse=True)[: args.target_top_k]
                assert list(kept.values()) == pytest.approx(wanted, abs=atol)
                assert kept == pytest.approx({i: probs[i] for i in kept}, abs=atol)
                assert of_label == pytest.approx(math.log(probs.get(token) or SMALLEST), abs=1e-4)


class TestEstimator:
    @pytest.mark.parametrize(
        "config",
        [
            {"posterior_weight": 0.0},
            {"posterior_weight": 0.0, "prior_gamma": 1.0},
            {"posterior_draws": 0},
            {},
            {"prior_weight": 0.0, "posterior_draws": 25, "posterior_concentration": 2.5},
            {"posterior_concentration": 0.0},
            {"posterior_sampling": "expected"},
            {"posterior_sampling": "expected", "proxy_temperature": 2.0, "posterior_concentration": 3.0},
            {"posterior_sampling": "expected", "proxy_top_k": 3},
            {"proxy_top_k": 2},
            {"posterior_grid_points": 50},
            {"ngram_context_length": 2},
            {"ngram_context_length": 2, "ngram_min_count": 2},
            {"ngram_context_length": 2, "ngram_min_count": 10**6, "posterior_sampling": "expected"},
        ],
        ids=str,
    )
    def test_targets_are_those_of_dictionaries(self, world, config):
        assert_same_targets(*estimates(world, world.rows[:6], **config))

    @pytest.mark.parametrize("k", [1, 3])
    def test_of_the_prior_the_likeliest_tokens_are_kept(self, world, k):
        assert_same_targets(*estimates(world, world.rows[:10], target_top_k=k, posterior_weight=0.0))

    @pytest.mark.parametrize(
        ("k", "config"),
        [
            (3, {}),
            (3, {"posterior_sampling": "expected"}),
            (10, {"posterior_grid_points": 50}),
            (10, {"posterior_sampling": "expected", "proxy_top_k": 20}),
        ],
        ids=str,
    )
    def test_of_the_posterior_the_likeliest_tokens_are_kept(self, world, k, config):
        """Also where a drawn token is in the corpus, but not among the n-gram's likeliest ones."""
        assert_same_targets(*estimates(world, world.rows[:10], target_top_k=k, **config))

    def test_beside_known_probabilities_the_likeliest_tokens_are_kept(self, world):
        assert_same_targets(*estimates(world, with_known(world.rows[:10]), target_top_k=10))

    def test_each_target_sums_to_1_where_nothing_is_cut_off(self, world):
        for row in estimates(world, world.rows[:6], target_top_k=60)[1]:
            for targets in row:
                np.testing.assert_allclose(np.exp(targets.log_probs).sum(axis=1), 1.0, atol=1e-6)

    @pytest.mark.parametrize("config", [{}, {"posterior_sampling": "expected"}, {"posterior_draws": 0}], ids=str)
    def test_the_rest_beside_known_probabilities_is_shared_out(self, world, config):
        assert_same_targets(*estimates(world, with_known(world.rows[:6]), **config), atol=1e-5)

    def test_known_probabilities_are_the_posteriors_and_leave_the_prior(self, world):
        rows = with_known(world.rows[:6])
        _, (priors, posteriors), _ = estimates(world, rows)
        without = estimates(world, world.rows[:6])[1][0]
        assert [probabilities(prior) for prior in priors] == [probabilities(prior) for prior in without]
        compared = 0
        for row, targets in zip(rows, posteriors, strict=True):
            value = row["top_logprobs"] or {"ids": [], "logprobs": []}
            for stored, ids, log_probs in zip(probabilities(targets), value["ids"], value["logprobs"], strict=False):
                assert [stored[token] for token in ids] == pytest.approx([math.exp(p) for p in log_probs], abs=1e-6)
                compared += len(ids)
        assert compared > 20

    def test_draws_do_not_depend_on_the_batch(self, world):
        distributions = proxy_distributions(world)
        together = distributions.draws(world.rows[:7], 10)
        alone = [distributions.draws([row], 10) for row in world.rows[:7]]
        assert torch.equal(together, torch.cat(alone))
        backwards = distributions.draws(world.rows[:7][::-1], 10).split([len(part) for part in alone][::-1])
        assert torch.equal(torch.cat(backwards[::-1]), together)

    def test_draws_differ_between_seeds_rows_and_positions(self, world):
        draws = proxy_distributions(world).draws(world.rows[:1], 50)
        assert not torch.equal(draws, proxy_distributions(world, seed=1).draws(world.rows[:1], 50))
        renamed = [world.rows[0] | {"row_key": 1}]
        assert not torch.equal(draws, proxy_distributions(world).draws(renamed, 50))
        assert len({tuple(position) for position in draws.tolist()}) == len(draws)

    def test_the_mean_of_drawn_posteriors_is_the_expected_one(self, world):
        """Within five standard errors of each token's share of draws."""
        expected = dense(world, posterior_sampling="expected")
        seeds = 200
        mean = sum(dense(world, seed=seed) for seed in range(seeds)) / seeds
        kappa, draws = 10, 10
        share = (expected * (kappa + draws) / draws).clip(0, 1)
        error = np.sqrt(share * (1 - share) / draws / seeds) * draws / (kappa + draws)
        assert (np.abs(mean - expected) <= 5 * error + 1e-3).all()
        assert np.abs(dense(world, seed=0) - expected).sum() > 5 * np.abs(mean - expected).sum()

    def test_targets_do_not_depend_on_the_batch(self, world):
        """Nor does the choice among tokens drawn equally often, where more are drawn than kept."""
        together = estimates(world, world.rows[:7], target_top_k=6)[1]
        for number, row in enumerate(world.rows[:7]):
            alone = estimates(world, [row], target_top_k=6)[1]
            for name in range(2):
                assert probabilities(alone[name][0]) == probabilities(together[name][number])

    def test_a_pieces_size_changes_no_target(self, world, monkeypatch):
        """A GPU's chunks of the vocabulary are larger than those of a CPU."""
        whole = estimates(world, world.rows[:4])[1]
        monkeypatch.setattr("trl_bbkd.bayeskd.targets.CHUNK_ELEMENTS", {"cpu": 2 * world.vocab_size})
        for row, expected in zip(estimates(world, world.rows[:4])[1], whole, strict=True):
            assert [probabilities(targets) for targets in row] == [probabilities(targets) for targets in expected]


def proxy_distributions(world, **config):
    args = BayesKDConfig(world.folder, **{**ON_CPU, **BOTH, **config})
    return ProxyDistributions(world.proxy, args, world.vocab_size, 0)


def dense(world, **config):
    """The posterior of a row, over the whole vocabulary."""
    settings = {**ON_CPU, "ngram_context_length": 1, "target_top_k": world.vocab_size, "prior_weight": 0.0, **config}
    args = BayesKDConfig(world.folder, **settings)
    ((targets,),) = TargetEstimator(world.ngrams[1], proxy_distributions(world, **settings), args)(world.rows[:1])
    probs = np.zeros((len(targets.ids), world.vocab_size))
    np.add.at(probs, (np.arange(len(probs))[:, None], targets.ids), np.exp(targets.log_probs.astype(np.float64)))
    return probs


def with_known(rows):
    """Log-probabilities for the first row whole, for the second none, for others in part or without their end."""
    found = []
    for number, row in enumerate(rows):
        answer = [token for token in row["labels"] if token != -100]
        ids = [[token, (token + 50) % 330, 7] if (place + number) % 3 else [] for place, token in enumerate(answer)]
        if number == 0:
            ids = [[(token + 1) % 330] for token in answer]
        if number % 2:
            ids = ids[:-1]
        logprobs = [[math.log(0.5), math.log(0.2), math.log(0.01)][: len(tokens)] for tokens in ids]
        found.append(row | {"top_logprobs": None if number == 1 else {"ids": ids, "logprobs": logprobs}})
    return found
