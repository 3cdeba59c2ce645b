"""Feature maps of linear attention: what stands for the exponential of softmax attention.

Each takes the channels of one head.

Module names are flash-linear-attention's (see `writesae.models.common`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Hadamard(nn.Module):
    """The product of two projections."""

    def __init__(self, d: int):
        super().__init__()
        self.layer1, self.layer2 = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x: Float[Tensor, "*any d"]) -> Float[Tensor, "*any d"]:
        return self.layer1(x) * self.layer2(x)


class Hedgehog(nn.Module):
    """Softmax of a projection, doubled, and of its negative (Zhang et al. 2024, arXiv 2402.04347, eq. 6)."""

    def __init__(self, d: int):
        super().__init__()
        self.layer = nn.Linear(d, d)

    def forward(self, x: Float[Tensor, "*any d"]) -> Float[Tensor, "*any 2*d"]:
        y = 2 * self.layer(x)
        return torch.cat([y, -y], -1).softmax(-1)


class T2R(nn.Module):
    """ReLU of a projection (Kasai et al. 2021, arXiv 2103.13076, sec. 2.2)."""

    def __init__(self, d: int):
        super().__init__()
        self.layer = nn.Linear(d, d, bias=False)

    def forward(self, x: Float[Tensor, "*any d"]) -> Float[Tensor, "*any d"]:
        return self.layer(x).relu()


class EluPlusOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.elu(x) + 1


FEATURES: dict[str, tuple[Callable[[int], nn.Module], int]] = {
    "elementwise_product": (Hadamard, 1),
    "elu": (lambda _: EluPlusOne(), 1),
    "hedgehog": (Hedgehog, 2),
    "identity": (lambda _: nn.Identity(), 1),
    "relu": (lambda _: nn.ReLU(), 1),
    "t2r": (T2R, 1),
}
"""Feature maps by name: what makes one, and how many features it has for each channel."""
