"""The eager contender: the same DeCo model and losses in plain PyTorch, in the published formulation.

Its decoder unfolds the image, concatenates pixels and positions, runs the unfolded input linears and evaluates
SiLU(cond) in every block; its loss transforms prediction and target separately.
"""

import copy
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.eager_decoder import eager_view  # noqa: E402
from benchmarks.flow_matching_loss import PROBLEM as LOSS  # noqa: E402
from deco_kernels import flow  # noqa: E402
from deco_kernels.model import DeCo  # noqa: E402


def eager_twin(model: DeCo) -> DeCo:
    """A copy of the model, values included, whose decoder is an `EagerDecoder`."""
    twin = copy.deepcopy(model)
    twin.decoder = eager_view(twin.decoder)
    return twin


class EagerObjective(flow.Objective):
    """`flow.Objective` without label dropping and REPA, its losses in plain PyTorch.

    Noise and times are drawn in the same order and precision, then cast to the dtype of the model's parameters.
    """

    def forward(self, model, x, y, generator=None):
        drawn = flow.sample_time(
            len(x), distribution=self.distribution, shift=self.shift, generator=generator, device=x.device
        )
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        dtype = next(model.parameters()).dtype
        x_t, target = (tensor.to(dtype) for tensor in flow.interpolate(x, noise, drawn))
        pred = model(x_t, drawn, y)
        weight = self.frequency_weight.to(dtype)
        tensors = {"pred": pred, "target": target, "frequency_weight": weight}
        total, pixel, frequency = LOSS.published(tensors, None)
        return {"total": total, "pixel": pixel, "frequency": frequency, "repa": None, "t": drawn}
