"""The loss as slowly and plainly as possible: all logits, torch's own gradient."""

import torch

from trl_bbkd.soft_targets.loss import DenseTarget, SparseTarget


def logits_of(hidden, head):
    logits = hidden @ head.weight.t()
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def target_kl(target, log_probs, temperature, reverse=False):
    if isinstance(target, DenseTarget):
        vocab = log_probs.size(1)
        target_logits = logits_of(target.hidden, target.head)[:, :vocab] / temperature
        if reverse:
            own = log_probs[:, : target_logits.size(1)].log_softmax(dim=-1)
            return (own.exp() * (own - target_logits.log_softmax(dim=-1))).sum(dim=-1)
        probs = torch.zeros_like(log_probs)
        probs[:, : target_logits.size(1)] = target_logits.softmax(dim=-1)
        return (torch.xlogy(probs, probs) - probs * log_probs).sum(dim=-1)
    assert isinstance(target, SparseTarget)
    rows = []
    for row in range(len(log_probs)):
        ids, probs = target.ids[row], target.probs[row]
        kl = (torch.xlogy(probs, probs) - probs * log_probs[row, ids]).sum()
        if target.tail is not None:
            others = torch.ones(log_probs.size(1), dtype=torch.bool)
            others[ids] = False
            tail = target.tail[row]
            kl = kl + torch.xlogy(tail, tail) - tail * torch.logsumexp(log_probs[row, others], dim=0)
        rows.append(kl)
    return torch.stack(rows)


def reference_loss(hidden, head, labels, targets, hard, soft, temperature=1.0, reverse=False):
    logits = logits_of(hidden, head)
    nll = -logits.log_softmax(dim=-1).gather(1, labels[:, None]).squeeze(1)
    log_probs = (logits / temperature).log_softmax(dim=-1)
    kl = [target_kl(target, log_probs, temperature, reverse) for target in targets]
    kl = torch.stack(kl) if kl else hidden.new_zeros(0, len(labels))
    return (hard * nll).sum() + (soft * kl).sum(), nll, kl, logits
