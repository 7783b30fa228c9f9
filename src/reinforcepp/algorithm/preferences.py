"""The loss of a reward model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def preference_loss(differences_BC: Tensor, sides_BC: Tensor, margins_BC: Tensor, weights_B1: Tensor) -> Tensor:
    """Return the pairwise logistic loss of preferences by several criteria (Bradley & Terry 1952). -> ()

    With d the score of the chosen response minus that of the rejected one, s = 1 if the criterion prefers the chosen response
    and -1 if it prefers the other, m the margin, and w the weight of the pair::

        loss_bc = -log sigmoid(s·d - m)                           for a preference
                  -(log sigmoid(d) + log sigmoid(-d)) / 2         for a tie, s = 0
                  0                                               without a judgment, s = nan
        loss = sum_bc w_b·loss_bc / (B·C)

    The divisor counts missing judgments, too, and isn't the sum of the weights. So a judgment has the same weight in every
    batch, and the loss of a batch is the mean of its parts, however they are split over micro-batches and ranks.
    """
    known_BC = ~sides_BC.isnan()
    sides_BC = sides_BC.nan_to_num()
    # -log sigmoid(x) is softplus(-x); the mean of softplus(d) and softplus(-d) is softplus(-d) + d / 2.
    tied_BC = softplus(-differences_BC) + differences_BC / 2
    decided_BC = softplus(margins_BC - sides_BC * differences_BC)
    losses_BC = torch.where(known_BC, torch.where(sides_BC == 0, tied_BC, decided_BC), 0.0)
    return (weights_B1 * losses_BC).mean()
