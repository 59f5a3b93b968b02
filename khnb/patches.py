"""Patches of an image, and their p-norms (section 6.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def extract(images: Tensor, w: int) -> Tensor:
    """All patches of a batch, stride 1, no padding (eq. 6.5).

    images : (B, C, H, W), any dtype.
    Returns (B, (H-w+1)(W-w+1), C*w*w) in the same dtype: positions row by row, each patch
    flattened in the order channel, row, column, as a filter of shape (C, w, w) is.
    """
    b, c = images.shape[:2]
    windows = images.unfold(2, w, 1).unfold(3, w, 1)  # B, C, H', W', w, w
    return windows.permute(0, 2, 3, 1, 4, 5).reshape(b, -1, c * w * w)


def normalise(patches: Tensor, p: float) -> Tensor:
    """Patches (..., D), float, scaled to unit p-norm along the last axis; an all-zero patch stays zero."""
    return patches * scales(patches, p)[..., None]


def chosen(images: Tensor, ids: Tensor, w: int) -> Tensor:
    """Chosen patches.

    images : (N, C, H, W) uint8 (divided by 255) or float; ids : (B,) int64, patches counted image by image and, in each, row by
    row. Returns (B, C*w*w) float32, in the order of :func:`extract`.
    """
    across = images.shape[3] - w + 1
    each = (images.shape[2] - w + 1) * across
    windows = images.unfold(2, w, 1).unfold(3, w, 1).permute(0, 2, 3, 1, 4, 5)
    image, place = ids // each, ids % each
    found = windows[image, place // across, place % across].flatten(1).float()
    return found / 255 if images.dtype == torch.uint8 else found


def scales(patches: Tensor, p: float) -> Tensor:
    """1 / p-norm of patches (..., D), float; 0 for an all-zero patch. Returns (...)."""
    norm = torch.linalg.vector_norm(patches, ord=p, dim=-1)
    return torch.where(norm > 0, 1 / torch.where(norm > 0, norm, 1), 0)


def norms(images: Tensor, w: int, p: float) -> Tensor:
    """The p-norm of every patch, without making the patches: a box filter over |x|^p.

    images : (B, C, H, W), float. Returns (B, 1, H-w+1, W-w+1), with 1 in place of the norm
    of an all-zero patch, so that dividing by it gives 0 and its gradient stays finite.
    """
    powers = images.square() if p == 2 else images.abs().pow(p)
    total = F.avg_pool2d(powers.sum(1, keepdim=True), w, 1, divisor_override=1)
    return torch.where(total > 0, total, 1).pow(1 / p)
