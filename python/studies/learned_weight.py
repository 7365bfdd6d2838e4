"""Frequency weights learned with the model; positive and of mean 1 in each plane like the JPEG weights."""

import torch
from torch import nn

from deco_kernels import flow

RULES = ("loss", "likelihood")


class LearnedWeightObjective(flow.Objective):
    """`flow.Objective` whose frequency_weight is weight = 64·softmax(logits) over the coefficients of each plane.

    Rules:
        "loss": the logits minimize the loss itself.
        "likelihood": they minimize total - mean(log weight), the negative log-likelihood of errors of variance
            1/weight. With the mean fixed, the minimum is at weight = 1/(error + constant of the plane).

    `losses` reports the loss without the logarithm as "weighted" and adds it to "total".

    Args:
        rule: see above. The other arguments are those of `flow.Objective`, without frequency_weight.
    """

    def __init__(self, rule: str, **options):
        if rule not in RULES:
            raise ValueError(f"rule: expected one of {RULES}, got {rule!r}")
        super().__init__(torch.ones(3, 8, 8), **options)
        self.rule = rule
        self.logits = nn.Parameter(torch.zeros(3, 8, 8))

    def weight(self) -> torch.Tensor:
        """[3, 8, 8] for Y, Cb, Cr; row = vertical frequency."""
        return 64 * self.logits.flatten(1).softmax(dim=1).view(3, 8, 8)

    def losses(self, model, x, y, t, noise):
        self.frequency_weight = self.weight()
        found = super().losses(model, x, y, t, noise)
        found["weighted"] = found["total"].detach()
        if self.rule == "likelihood":
            found["total"] = found["total"] - self.logits.flatten(1).log_softmax(dim=1).mean()
        return found
