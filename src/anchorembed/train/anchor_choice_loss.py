"""Contrast through the decoder: of several anchors of a step, the text's own must explain it best.

A text is written from its own anchor and from those of other texts. Its log likelihoods are the logits of choosing its
own anchor. That cross-entropy is at least log(choices) minus the mutual information of anchor and text (van den Oord et
al., 2018, arXiv 1807.03748). The paper has no such loss.

Axes: N texts, C choices (a text's own anchor first), R = N * C, P positions that have a target.
"""

import torch
from torch import Tensor

CHOICES = 4  # anchors a text is written from: its own and three others


def choose_anchors(losses_P: Tensor, rows_P: Tensor, weights_N: Tensor, choices: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each text's own anchor among its choices, in nats, and its gradient, both [P].

    Args:
        losses_P: loss of each target, in nats.
        rows_P: row of each target among R.
        weights_N: weight of each text's cross-entropy in the gradient.
        choices: C.

    Returns:
        Each text's cross-entropy, spread evenly over the targets of each of its rows, and the gradient with respect to
        ``losses_P``.
    """
    zeros_R = losses_P.new_zeros(len(weights_N) * choices)
    sums_R = zeros_R.index_add(0, rows_P, losses_P)
    counts_R = zeros_R.index_add(0, rows_P, torch.ones_like(losses_P))
    log_shares_NC = (-sums_R).view(-1, choices).log_softmax(1)
    gradients_NC = -log_shares_NC.exp()
    gradients_NC[:, 0] += 1
    spread_NC = -log_shares_NC[:, :1] / counts_R.view(-1, choices)
    return spread_NC.flatten()[rows_P], (gradients_NC * weights_N[:, None]).flatten()[rows_P]
