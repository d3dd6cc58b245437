"""How much of the teacher a proxy has learned (appendix A.2 of arXiv 2401.07013v2)."""

import math

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..evaluation.student import pad_rows
from ..soft_targets.head import last_hidden_states, lm_head, scored_positions
from ..soft_targets.kernel import soft_target_loss


@torch.no_grad()
def teacher_agreement(
    model: PreTrainedModel, rows: list[dict], accelerator: Accelerator, batch_size: int = 8, pad_id: int = 0
) -> dict[str, float]:
    """
    Measure a model on the teacher's answers, each process on its share of them. The model's mode is as before
    afterwards.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The proxy, unwrapped.
        rows (`list[dict]`):
            Held-out rows with `input_ids` and `labels`.
        accelerator ([`~accelerate.Accelerator`]):
            Of the run.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows in one forward pass.
        pad_id (`int`, *optional*, defaults to `0`):
            Padding token.

    Returns:
        `dict[str, float]`: `top1_agreement`, the share of answer tokens that are the model's likeliest ones,
        `top1_agreement_se`, its standard error, and `nll`, in nats per token.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(7, dtype=torch.float64, device=accelerator.device)
    own = rows[accelerator.process_index :: accelerator.num_processes]
    for start in range(0, len(own), batch_size):
        batch = own[start : start + batch_size]
        input_ids, attention_mask = pad_rows(
            [list(row["input_ids"]) for row in batch], pad_id, model.device, side="right"
        )
        labels, _ = pad_rows([list(row["labels"]) for row in batch], -100, model.device, side="right")
        scored = scored_positions(labels)
        with accelerator.autocast():
            hidden = last_hidden_states(model, input_ids, attention_mask)[:, :-1][scored]
            one = torch.ones(len(hidden), device=model.device)
            found = soft_target_loss(
                hidden, lm_head(model), labels[:, 1:][scored], [], one, one.new_zeros(0, len(one))
            )
        row = scored.nonzero()[:, 0]
        correct, tokens = (
            torch.zeros(len(batch), dtype=torch.float64, device=model.device).index_add_(0, row, values.double())
            for values in (found.is_top1, one)
        )
        products = torch.stack([correct * correct, correct * tokens, tokens * tokens]).sum(dim=1)
        sums = torch.stack(
            [correct.sum(), found.nll.sum().double(), tokens.sum(), one.new_tensor(len(batch)).double()]
        )
        totals += torch.cat([sums, products])
    model.train(was_training)
    correct, nll, tokens, count, *products = accelerator.reduce(totals).tolist()
    share = correct / tokens
    return {
        "top1_agreement": share,
        "top1_agreement_se": share_standard_error(share, tokens, int(count), *products),
        "nll": nll / tokens,
    }


def share_standard_error(
    share: float, tokens: float, rows: int, correct_squared: float, correct_tokens: float, tokens_squared: float
) -> float:
    """
    Standard error of a share of tokens that come in rows, by linearisation: tokens of one row are not independent.

        SE = √( R / (R - 1) · Σ_r (c_r - p n_r)² ) / N

    Of one row alone, that of independent tokens, `√(p (1 - p) / N)`.

    Args:
        share, tokens (`float`):
            p and N.
        rows (`int`):
            R.
        correct_squared, correct_tokens, tokens_squared (`float`):
            Σ c_r², Σ c_r n_r and Σ n_r².
    """
    if rows < 2:
        return math.sqrt(share * (1 - share) / tokens)
    squares = correct_squared - 2 * share * correct_tokens + share * share * tokens_squared
    return math.sqrt(max(squares, 0.0) * rows / (rows - 1)) / tokens
