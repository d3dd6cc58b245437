import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_bbkd.soft_targets import kernel
from trl_bbkd.soft_targets.kernel import chunked_top_log_probs, soft_target_loss
from trl_bbkd.soft_targets.loss import DenseTarget, LMHead, SparseTarget, project, sparse_target

from .reference import logits_of, reference_loss


N, H, H_PROXY, V, K = 23, 12, 20, 57, 6


def make_head(generator, vocab=V, hidden=H, bias=False, dtype=torch.float64, **transform):
    weight = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocab, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    return LMHead(weight.to(dtype), bias, **transform)


def make_sparse(generator, tail=False, k=K, dtype=torch.float64):
    logits = torch.randn(N, V, generator=generator, dtype=torch.float64) * 2
    log_probs, ids = logits.log_softmax(-1).topk(k)
    target = sparse_target(ids, log_probs, "bucket" if tail else "renormalize")
    return SparseTarget(ids, target.probs.to(dtype), None if target.tail is None else target.tail.to(dtype))


def make_inputs(targets=("dense",), dtype=torch.float64, seed=0, bias=False, proxy_vocab=V, **transform):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype)
    head = make_head(generator, bias=bias, dtype=dtype, **transform)
    labels = torch.randint(0, V, (N,), generator=generator)
    made = []
    for name in targets:
        if name == "dense":
            proxy_hidden = torch.randn(N, H_PROXY, generator=generator, dtype=torch.float64).to(dtype) * 0.5
            made.append(
                DenseTarget(proxy_hidden, make_head(generator, proxy_vocab, H_PROXY, bias, dtype, **transform))
            )
        else:
            made.append(make_sparse(generator, tail=name == "tail", dtype=dtype))
    hard = torch.rand(N, generator=generator, dtype=torch.float64).to(dtype)
    soft = torch.rand(len(made), N, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, head, labels, made, hard, soft


def gradients(loss_function, hidden, head, labels, targets, hard, soft, **kwargs):
    """Loss and gradients of hidden states, weight and, if there is one, bias."""
    leaves = [
        value.detach().clone().requires_grad_() for value in (hidden, head.weight, head.bias) if value is not None
    ]
    bias = leaves[2] if head.bias is not None else None
    head = LMHead(leaves[1], bias, head.logit_scale, head.softcap)
    loss = loss_function(leaves[0], head, labels, targets, hard, soft, **kwargs)
    loss = loss[0] if isinstance(loss, tuple) else loss.loss
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def to_double(target):
    if isinstance(target, SparseTarget):
        return SparseTarget(target.ids, target.probs.double(), None if target.tail is None else target.tail.double())
    head = target.head
    bias = None if head.bias is None else head.bias.double()
    return DenseTarget(target.hidden.double(), LMHead(head.weight.double(), bias, head.logit_scale, head.softcap))


TARGETS = [(), ("dense",), ("sparse",), ("tail",), ("sparse", "tail"), ("dense", "sparse")]
TRANSFORMS = [{}, {"logit_scale": 0.3}, {"softcap": 2.5}, {"logit_scale": 1.7, "softcap": 4.0}]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_loss_and_gradients_are_those_of_full_logits(targets, transform, temperature, bias):
    inputs = make_inputs(targets, bias=bias, **transform)
    found = gradients(soft_target_loss, *inputs, temperature=temperature, chunk_elements=5 * V)
    expected = gradients(reference_loss, *inputs, temperature=temperature)
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("targets", [("dense",), ("dense", "sparse")], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("proxy_vocab", [V, V - 5, V + 9], ids=["same ids", "fewer ids", "more ids"])
def test_reverse_kl_and_its_gradients_are_those_of_full_logits(targets, transform, temperature, proxy_vocab):
    inputs = make_inputs(targets, bias=True, proxy_vocab=proxy_vocab, **transform)
    settings = {"temperature": temperature, "reverse": True}
    found = gradients(soft_target_loss, *inputs, chunk_elements=5 * V, **settings)
    for ours, reference in zip(found, gradients(reference_loss, *inputs, **settings), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_float32_is_within_1e_5_of_float64(targets, temperature):
    inputs = make_inputs(targets, dtype=torch.float32, bias=True)
    hidden, head, labels, made, hard, soft = inputs
    found = gradients(soft_target_loss, *inputs, temperature=temperature)
    double = (
        hidden.double(),
        LMHead(head.weight.double(), head.bias.double()),
        labels,
        [to_double(target) for target in made],
        hard.double(),
        soft.double(),
    )
    expected = gradients(reference_loss, *double, temperature=temperature)
    for ours, reference in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - reference).norm() <= 1e-5 * reference.norm()


def test_per_token_losses_entropy_and_accuracy():
    hidden, head, labels, targets, hard, soft = make_inputs(("dense", "tail"))
    labels[0] = logits_of(hidden, head)[0].argmax()
    found = soft_target_loss(hidden, head, labels, targets, hard, soft, chunk_elements=7 * V)
    _, nll, kl, logits = reference_loss(hidden, head, labels, targets, hard, soft)
    torch.testing.assert_close(found.nll, nll)
    torch.testing.assert_close(found.kl, kl)
    torch.testing.assert_close(found.entropy, torch.distributions.Categorical(logits=logits).entropy())
    assert found.is_top1[0] and torch.equal(found.is_top1, logits.argmax(-1) == labels)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12 * V), st.integers(0, 1000))
def test_chunks_change_nothing(chunk_elements, seed):
    inputs = make_inputs(("dense", "tail"), seed=seed)
    whole = gradients(soft_target_loss, *inputs)
    for ours, reference in zip(
        gradients(soft_target_loss, *inputs, chunk_elements=chunk_elements), whole, strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def test_merged_targets_are_the_sum_of_single_ones():
    """The gradient of hard + α KL₁ + β KL₂ is that of the three, each by itself."""
    hidden, head, labels, targets, hard, soft = make_inputs(("sparse", "tail"))
    none = torch.zeros_like(soft)
    parts = [
        gradients(soft_target_loss, hidden, head, labels, targets, hard, none),
        gradients(soft_target_loss, hidden, head, labels, targets[:1], hard * 0, soft[:1]),
        gradients(soft_target_loss, hidden, head, labels, targets[1:], hard * 0, soft[1:]),
    ]
    merged = gradients(soft_target_loss, hidden, head, labels, targets, hard, soft)
    for value, *terms in zip(merged, *parts, strict=True):
        torch.testing.assert_close(value, sum(terms), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_sparse_target_of_the_whole_vocabulary_is_the_dense_one(temperature):
    hidden, head, labels, (dense,), hard, soft = make_inputs(("dense",))
    log_probs, ids = logits_of(dense.hidden, dense.head).log_softmax(-1).topk(V)
    sparse = sparse_target(ids, log_probs, temperature=temperature)
    expected = gradients(soft_target_loss, hidden, head, labels, [dense], hard, soft, temperature=temperature)
    found = gradients(soft_target_loss, hidden, head, labels, [sparse], hard, soft, temperature=temperature)
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_the_own_distribution_has_no_divergence_and_no_gradient(reverse):
    hidden, head, labels, _, hard, soft = make_inputs(("dense",))
    own = DenseTarget(hidden, head)
    loss, *grads = gradients(soft_target_loss, hidden, head, labels, [own], hard * 0, soft, reverse=reverse)
    assert loss.abs() < 1e-12 and all(grad.abs().max() < 1e-12 for grad in grads)


@pytest.mark.parametrize("targets", [("dense",), ("tail",)])
def test_a_shift_of_all_logits_changes_nothing(targets):
    hidden, head, labels, made, hard, soft = make_inputs(targets, bias=True)
    shifted = LMHead(head.weight, head.bias + 300.0)
    found = gradients(soft_target_loss, hidden, shifted, labels, made, hard, soft)
    for ours, reference in zip(
        found, gradients(soft_target_loss, hidden, head, labels, made, hard, soft), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("proxy_vocab", [V - 5, V + 9], ids=["fewer ids", "more ids"])
def test_a_padded_vocabulary_of_the_target(proxy_vocab):
    """Ids that the student does not have are left out; those that the target does not have get probability 0."""
    inputs = make_inputs(("dense",), bias=True, proxy_vocab=proxy_vocab)
    found = gradients(soft_target_loss, *inputs, chunk_elements=4 * V)
    for ours, reference in zip(found, gradients(reference_loss, *inputs), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-11)


def test_tied_embeddings_add_their_gradients():
    hidden, head, labels, targets, hard, soft = make_inputs(("sparse",))
    ids = torch.arange(N) % V

    def loss_of(function, weight):
        loss = function(torch.tanh(weight[ids]), LMHead(weight), labels, targets, hard, soft)
        return loss[0] if isinstance(loss, tuple) else loss.loss

    grads = []
    for function in (soft_target_loss, reference_loss):
        weight = head.weight.clone().requires_grad_()
        loss_of(function, weight).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


def test_a_frozen_head_gets_no_gradient_and_costs_none(monkeypatch):
    hidden, head, labels, targets, hard, soft = make_inputs(("sparse",), bias=True)
    hidden.requires_grad_()

    def refuse(*_):
        raise AssertionError("the gradient of a frozen weight was computed")

    monkeypatch.setattr(kernel, "_accumulate_product", refuse)
    soft_target_loss(hidden, head, labels, targets, hard, soft).loss.backward()
    assert hidden.grad.abs().max() > 0 and head.weight.grad is None


def test_without_gradient_none_is_computed(monkeypatch):
    inputs = make_inputs(("dense",))
    with torch.no_grad():
        found = soft_target_loss(*inputs)
    torch.testing.assert_close(found.loss, reference_loss(*inputs)[0])
    assert not found.loss.requires_grad


def test_the_gradient_is_scaled_by_what_comes_from_above():
    inputs = make_inputs(("tail",))
    hidden = inputs[0].clone().requires_grad_()
    (3.0 * soft_target_loss(hidden, *inputs[1:]).loss).backward()
    expected = gradients(soft_target_loss, *inputs)[1]
    torch.testing.assert_close(hidden.grad, 3.0 * expected)


def test_a_second_backward_pass_is_refused():
    inputs = make_inputs(("tail",))
    loss = soft_target_loss(inputs[0].clone().requires_grad_(), *inputs[1:]).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_no_tokens():
    hidden, head, labels, targets, hard, soft = make_inputs(("sparse", "dense"))
    hidden = hidden[:0].requires_grad_()
    empty = [
        SparseTarget(targets[0].ids[:0], targets[0].probs[:0]),
        DenseTarget(targets[1].hidden[:0], targets[1].head),
    ]
    found = soft_target_loss(hidden, head, labels[:0], empty, hard[:0], soft[:, :0])
    found.loss.backward()
    assert found.loss == 0 and hidden.grad.shape == (0, H) and found.kl.shape == (2, 0)


def test_bfloat16_accumulates_in_float32():
    inputs = make_inputs(("dense",), dtype=torch.bfloat16, bias=True)
    found = gradients(soft_target_loss, *inputs, chunk_elements=4 * V)
    hidden, head, labels, targets, hard, soft = inputs
    double = (
        hidden.double(),
        LMHead(head.weight.double(), head.bias.double()),
        labels,
        [to_double(target) for target in targets],
        hard.double(),
        soft.double(),
    )
    expected = gradients(reference_loss, *double)
    assert found[0].dtype == torch.float32 and found[1].dtype == torch.bfloat16
    for ours, reference in zip(found, expected, strict=True):
        assert (ours.double() - reference).norm() <= 0.03 * reference.norm()


def test_autocast_computes_in_its_dtype_and_keeps_master_gradients():
    inputs = make_inputs(("dense",), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(soft_target_loss, *inputs)
    assert found[1].dtype == found[2].dtype == torch.float32
    expected = gradients(soft_target_loss, *inputs)
    assert not torch.equal(found[1], expected[1])
    assert (found[2] - expected[2]).norm() <= 0.05 * expected[2].norm()


def test_memory_is_that_of_a_chunk(monkeypatch):
    """No tensor with a row for every token and a column for every id is made."""
    sizes = []
    original = kernel.project

    def record(hidden, head):
        logits = original(hidden, head)
        sizes.append(logits.numel())
        return logits

    monkeypatch.setattr(kernel, "project", record)
    gradients(soft_target_loss, *make_inputs(("dense",)), chunk_elements=4 * V)
    assert max(sizes) == 4 * V and len(sizes) == 2 * math.ceil(N / 4)


def test_a_large_vocabulary_costs_no_digits():
    """Sums over 150,000 ids: those of a CPU's matrix product are off by 0.002 nats."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator) for size in ((8, 32), (151936, 32), (8, 32), (151936, 32))]
    labels, ones = torch.arange(8), torch.ones(8)

    def losses(dtype):
        hidden, weight, proxy_hidden, proxy_weight = (value.to(dtype) / 2 for value in tensors)
        target = DenseTarget(proxy_hidden, LMHead(proxy_weight))
        return soft_target_loss(hidden, LMHead(weight), labels, [target], ones.to(dtype), ones[None].to(dtype))

    found, expected = losses(torch.float32), losses(torch.float64)
    for name in ("nll", "kl", "entropy"):
        assert (getattr(found, name) - getattr(expected, name)).abs().max() <= 2e-5


class TestSparseTarget:
    def test_renormalized_sums_to_one(self):
        log_probs = torch.tensor([[-0.5, -1.5, -3.0]])
        target = sparse_target(torch.tensor([[4, 2, 9]]), log_probs)
        torch.testing.assert_close(target.probs, log_probs.exp() / log_probs.exp().sum())
        assert target.tail is None and target.probs.sum() == pytest.approx(1.0)

    def test_bucket_keeps_the_rest(self):
        log_probs = torch.tensor([[0.5, 0.2, 0.1]]).log()
        target = sparse_target(torch.tensor([[4, 2, 9]]), log_probs, "bucket")
        torch.testing.assert_close(target.tail, torch.tensor([0.2]))

    def test_a_bucket_is_never_negative(self):
        log_probs = torch.tensor([[0.7, 0.3001]]).log()
        target = sparse_target(torch.tensor([[4, 2]]), log_probs, "bucket")
        assert target.tail.item() == pytest.approx(0.0, abs=1e-7) and target.probs.sum().item() <= 1 + 1e-6


@pytest.mark.parametrize(("k", "rows"), list(itertools.product([1, K, V + 3], [1, 5, N])))
def test_top_log_probs(k, rows):
    hidden, head, labels, *_ = make_inputs(bias=True, softcap=3.0)
    ids, log_probs, label_log_probs = chunked_top_log_probs(hidden, head, labels, k, chunk_elements=rows * V)
    expected = project(hidden, head).log_softmax(-1)
    torch.testing.assert_close(log_probs, expected.topk(min(k, V)).values)
    torch.testing.assert_close(expected.gather(1, ids), log_probs)
    torch.testing.assert_close(label_log_probs, expected.gather(1, labels[:, None]).squeeze(1))
