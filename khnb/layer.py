"""The Krotov-Hopfield convolution layer (eqs. 4.2-4.4, 6.5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from khnb import patches


def synapses(weight: Tensor, p: float | Tensor) -> Tensor:
    """sgn(W)|W|^(p-1): the inner product of eq. 4.3, <W_k, v>_k, is a plain product with these.

    weight : (..., C*w*w) or (..., C, w, w), float; p : a number, or a tensor that can be broadcast to it.
    """
    return weight if isinstance(p, (int, float)) and p == 2 else weight.sign() * weight.abs().pow(p - 1)


class KHConv2d(nn.Module):
    """Activities of KH neurons on unit-p-norm patches.

    Every w x w patch v of the image is scaled to unit p-norm and meets every filter W_k in the
    inner product of eq. 4.3, h_k = sum_i sgn(W_ki) |W_ki|^(p-1) v_i. As h is linear in v, this
    is a plain convolution divided by a map of patch norms: no patch is ever copied out.

    Parameters
    ----------
    weight : (F, C, w, w) float tensor, F any number of filters (K^2 in the thesis).
    p : order of the norm, at least 2.

    Shapes: images (B, C, H, W), float in [0, 1] -> activities (B, F, H-w+1, W-w+1). An all-zero
    patch gives 0; the gradient there is that of the plain inner product (its norm counts as 1). Elsewhere the gradient with
    respect to the image goes through the normalisation.

    Raises ``ValueError`` for a weight that is not (F, C, w, w), p < 2, or images that do not fit.
    """

    def __init__(self, weight: Tensor, p: float):
        super().__init__()
        if weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
            raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (filters, channels, w, w)")
        if not p >= 2:
            raise ValueError(f"p={p} is not valid: the order of the norm must be at least 2")
        self.p = float(p)
        self.register_buffer("weight", weight.detach().clone())

    @property
    def w(self) -> int:
        """Width of a filter, in pixels."""
        return self.weight.shape[-1]

    def parts(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """A plain kernel (F, C, w, w), and the norms (B, 1, H-w+1, W-w+1) by which the activities it gives are to be divided."""
        _, channels, w, _ = self.weight.shape
        if images.ndim != 4 or images.shape[1] != channels or min(images.shape[2:]) < w:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; expected (batch, {channels}, height >= {w}, width >= {w})"
            )
        return synapses(self.weight, self.p), patches.norms(images, w, self.p)

    def forward(self, images: Tensor) -> Tensor:
        kernel, norms = self.parts(images)
        return F.conv2d(images, kernel) / norms


@dataclass(frozen=True)
class Responses:
    """What F neurons answer to all patches of some images (:func:`responses`).

    ``mean`` (F,) float64: mean activity; ``wins`` (F,) float64: share of the patches at which the neuron is the most active one (on a
    tie the one of lower index), adding up to 1. The ``count`` patches that excite each neuron most, each from another image, strongest
    first: ``activity`` (F, count) float32; ``image`` (F, count) int64, the number of the image; ``row`` and ``column``
    (F, count) int64, the place of the patch's upper left pixel. On a tie the earlier image, and in it the earlier place.
    """

    mean: Tensor
    wins: Tensor
    activity: Tensor
    image: Tensor
    row: Tensor
    column: Tensor


@torch.no_grad()
def responses(conv: nn.Module, images: Tensor, count: int = 8) -> Responses:
    """Let neurons meet every patch of some images.

    conv : a layer of F neurons, images (B, C, H, W) -> activities (B, F, H', W'), such as :class:`KHConv2d` or ``nn.Conv2d`` of stride 1.
    images : (N, C, H, W), uint8 (divided by 255) or float. count : patches to keep of each neuron, 1 to N.

    Raises ``ValueError`` for another count or images without four axes.
    """
    if images.ndim != 4:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (N, C, H, W)")
    if not 1 <= count <= len(images):
        raise ValueError(f"count={count} is not valid: from 1 to the number of images, {len(images)}")
    best, place, total, won, patches_seen = [], [], 0, 0, 0
    for batch in images.split(4):  # few enough that the activities stay in the processor's cache
        activity = conv(batch.float() / 255 if batch.dtype == torch.uint8 else batch)
        across, activity = activity.shape[3], activity.flatten(2)
        strongest = activity.max(2)
        best.append(strongest.values)
        place.append(strongest.indices)
        total = total + activity.sum(2).sum(0, dtype=torch.float64)
        # max rather than argmax, which is slow along this axis
        won = won + torch.bincount(activity.max(1).indices.flatten(), minlength=activity.shape[1])
        patches_seen += len(activity) * activity.shape[2]
    ranked = torch.cat(best).sort(stable=True, dim=0, descending=True)
    image = ranked.indices[:count].T
    place = torch.cat(place).gather(0, ranked.indices[:count]).T
    return Responses(
        mean=total / patches_seen, wins=won.double() / patches_seen,
        activity=ranked.values[:count].T, image=image, row=place // across, column=place % across,
    )
