"""Contrast through the decoder: of several anchors of a step, the text's own must explain it best.

A text is written from its own anchor and from those of other texts; the cross-entropy of choosing its own, by the
likelihoods of the target tokens, is at least log(choices) less what an anchor says of its text (van den Oord et al.,
2018, arXiv 1807.03748). The paper has none.

Axes: N texts, R texts times choices (own first), P positions that have a target.
"""

import torch
from torch import Tensor

CHOICES = 4  # anchors a text is written from: its own and three others


def choose_anchors(losses_P: Tensor, rows_P: Tensor, weights_N: Tensor, choices: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each text's own anchor among its choices, in nats, and its gradient, [P].

    Args:
        losses_P: of each target, in nats.
        rows_P: row of each target among R.
        weights_N: what each text's cross-entropy counts in the gradient with respect to ``losses_P``.
        choices: anchors of each text.

    Returns:
        Each text's cross-entropy, spread evenly over the targets of each of its rows, and the gradient.
    """
    none_R = losses_P.new_zeros(len(weights_N) * choices)
    sums_R = none_R.index_add(0, rows_P, losses_P)
    counts_R = none_R.index_add(0, rows_P, torch.ones_like(losses_P))
    shares_NC = (-sums_R).view(-1, choices).log_softmax(1)
    slopes_NC = -shares_NC.exp()
    slopes_NC[:, 0] += 1
    spread_NC = -shares_NC[:, :1] / counts_R.view(-1, choices)
    return spread_NC.flatten()[rows_P], (slopes_NC * weights_N[:, None]).flatten()[rows_P]
