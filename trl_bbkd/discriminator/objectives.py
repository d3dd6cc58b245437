"""GAD's mathematics (arXiv 2511.10643) on plain tensors: the losses of the discriminator, what is read off its scores."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class AnswerShares(NamedTuple):
    """
    Whose answers the teacher's scores are of, where a prompt may have several.

    Parameters:
        prompt_index (`torch.Tensor` of shape `(A,)`):
            For each answer, the index of its prompt.
        share (`torch.Tensor` of shape `(A,)`):
            How much it counts among the answers to its prompt: their shares sum to 1.
    """

    prompt_index: torch.Tensor
    share: torch.Tensor


def mean_over_answers(
    of_pair: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    teacher_scores: torch.Tensor,
    student_scores: torch.Tensor,
    prompt_index: torch.Tensor,
    answers: AnswerShares | None = None,
) -> torch.Tensor:
    """
    What each sample's pairs come to: the mean over the answers to its prompt, so that a prompt with many weighs as one.

    Args:
        of_pair (`Callable`):
            Of the teacher's score and the sample's of each pair, both of shape `(K,)`.
        teacher_scores (`torch.Tensor` of shape `(A,)`), student_scores (`torch.Tensor` of shape `(B,)`),
        prompt_index (`torch.Tensor` of shape `(B,)`), answers ([`AnswerShares`], *optional*):
            As in [`bradley_terry_loss`].

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    if answers is None:
        return of_pair(teacher_scores[prompt_index], student_scores)
    sample, answer = (prompt_index[:, None] == answers.prompt_index).nonzero(as_tuple=True)
    values = answers.share[answer] * of_pair(teacher_scores[answer], student_scores[sample])
    return torch.zeros_like(student_scores).index_add(0, sample, values)


def bradley_terry_loss(
    teacher_scores: torch.Tensor,
    student_scores: torch.Tensor,
    prompt_index: torch.Tensor,
    answers: AnswerShares | None = None,
) -> torch.Tensor:
    """
    Loss of the discriminator, Eq. 3 with the group form of Eq. 8: `mean_i -log sigma(D(x, y_t) - D(x, y_s^i))`.

    Every sample of a prompt is paired with the teacher's answer to it, which is scored once and broadcast; with each of
    several answers (ours): `mean_i sum_a w_a -log sigma(D(x, y_t^a) - D(x, y_s^i))`. A constant added to all scores of a
    prompt changes nothing.

    Args:
        teacher_scores (`torch.Tensor` of shape `(A,)`):
            Raw score of the teacher's answers.
        student_scores (`torch.Tensor` of shape `(B,)`):
            Raw score of each student sample.
        prompt_index (`torch.Tensor` of shape `(B,)`):
            For each student sample, the index of its prompt.
        answers ([`AnswerShares`], *optional*):
            Whose the teacher's answers are, with their shares `w`. `None`: every prompt has one, in the order of prompts.

    Returns:
        `torch.Tensor`: Scalar, in nats. `log 2` when both sides score alike.
    """
    losses = mean_over_answers(
        lambda teacher, student: F.softplus(student - teacher), teacher_scores, student_scores, prompt_index, answers
    )
    return losses.mean()


def cross_entropy_loss(
    teacher_scores: torch.Tensor,
    student_scores: torch.Tensor,
    prompt_index: torch.Tensor,
    answers: AnswerShares | None = None,
) -> torch.Tensor:
    """
    Ablated loss of the discriminator, Eq. 4: `mean_i -log sigma(D(x, y_t)) - log(1 - sigma(D(x, y_s^i)))`.

    Arguments as in [`bradley_terry_loss`]. The teacher's answer weighs as much as the samples it is paired with.

    Returns:
        `torch.Tensor`: Scalar, in nats. `2 log 2` when all scores are zero.
    """
    losses = mean_over_answers(
        lambda teacher, student: F.softplus(-teacher) + F.softplus(student),
        teacher_scores,
        student_scores,
        prompt_index,
        answers,
    )
    return losses.mean()


def loss_and_score_gradients(
    loss_fn: Callable[..., torch.Tensor],
    teacher_scores: torch.Tensor,
    student_scores: torch.Tensor,
    prompt_index: torch.Tensor,
    answers: AnswerShares | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Loss, and its gradient with respect to every score.

    With these gradients the discriminator can be run through again in chunks of any size: the chain rule makes the
    accumulated gradient of the weights equal to that of one pass over all sequences.

    Args:
        loss_fn (`Callable`):
            [`bradley_terry_loss`] or [`cross_entropy_loss`].
        teacher_scores (`torch.Tensor` of shape `(A,)`), student_scores (`torch.Tensor` of shape `(B,)`),
        prompt_index (`torch.Tensor` of shape `(B,)`), answers ([`AnswerShares`], *optional*):
            As in [`bradley_terry_loss`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Loss (scalar), gradients of shape `(A,)` and `(B,)`.
    """
    teacher_scores = teacher_scores.detach().requires_grad_()
    student_scores = student_scores.detach().requires_grad_()
    with torch.enable_grad():
        loss = loss_fn(teacher_scores, student_scores, prompt_index, answers)
    teacher_gradient, student_gradient = torch.autograd.grad(loss, (teacher_scores, student_scores))
    return loss.detach(), teacher_gradient, student_gradient


def pair_accuracy(
    teacher_scores: torch.Tensor,
    student_scores: torch.Tensor,
    prompt_index: torch.Tensor,
    answers: AnswerShares | None = None,
) -> torch.Tensor:
    """
    Share of (teacher, sample) pairs in which the teacher's answer scores higher. A tie counts one half.

    Arguments as in [`bradley_terry_loss`]. Returns a scalar in `[0, 1]`.
    """
    sides = (teacher_scores, student_scores, prompt_index, answers)
    above = mean_over_answers(lambda teacher, student: (teacher - student > 0).float(), *sides)
    equal = mean_over_answers(lambda teacher, student: (teacher - student == 0).float(), *sides)
    return above.mean() + 0.5 * equal.mean()


def group_std(student_scores: torch.Tensor, prompt_index: torch.Tensor, num_prompts: int) -> torch.Tensor:
    """
    Mean over prompts of the (biased) standard deviation of the raw scores within a prompt's group.

    This is what the group normalisation of Eq. 6 divides by: when it collapses, differences that mean nothing are
    blown up to unit variance.

    Args:
        student_scores (`torch.Tensor` of shape `(B,)`), prompt_index (`torch.Tensor` of shape `(B,)`):
            As in [`bradley_terry_loss`].
        num_prompts (`int`):
            Number of prompts, `P`.

    Returns:
        `torch.Tensor`: Scalar, in units of the score.
    """
    counts = torch.zeros(num_prompts, device=student_scores.device).index_add_(
        0, prompt_index, torch.ones_like(student_scores)
    )
    means = torch.zeros_like(counts).index_add_(0, prompt_index, student_scores) / counts
    squares = (student_scores - means[prompt_index]) ** 2
    variances = torch.zeros_like(counts).index_add_(0, prompt_index, squares) / counts
    return variances.sqrt().mean()


def scaled_log_likelihoods(
    log_probs: torch.Tensor, lengths: torch.Tensor, scale: float, reduction: str
) -> torch.Tensor:
    """
    What each token would add to the score of a likelihood head, were the student its language model.

    Args:
        log_probs (`torch.Tensor` of shape `(B, T)`):
            The student's log-probability of each token of its samples, in nats, 0 on padding.
        lengths (`torch.Tensor` of shape `(B,)`):
            Tokens of each sample.
        scale (`float`), reduction (`str`):
            The head's learned scale, and `"sum"` or `"mean"` over the tokens.

    Returns:
        `torch.Tensor` of shape `(B, T)`: in units of the score.
    """
    return scale * log_probs / (lengths[:, None] if reduction == "mean" else 1)
