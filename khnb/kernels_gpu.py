"""The kernels of a GPU, in Triton, which comes with PyTorch for CUDA: KH updates, convolution with pooling, classifiers. **Not run on a GPU yet.**

Their results are those of the plain PyTorch path but for rounding, and the same every time; what PyTorch does around them need not be (the gradient of
patch norms is added up in any order there). Matrix products are made of three products of TF32 terms each, which are as precise as single precision.
Import this through :func:`khnb.native.gpu`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NEURONS = 512  # at most, of a layer: more do not fit into the registers
INF, NAN = tl.constexpr(float("inf")), tl.constexpr(float("nan"))


@triton.jit
def _rank(synapses, size, patches, m, winner, inhibited, of_winner, of_inhibited, N, F, D, BN: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr):
    """Of BN patches and one layer: the most active neuron, the m-th most active one, and their activities. All BF >= F neurons are in registers."""
    layer, n, f = tl.program_id(1), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BF)
    activity = tl.zeros((BF, BN), tl.float32)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        s = tl.load(synapses + layer * F * D + f[:, None] * D + d[None, :], mask=(f[:, None] < F) & (d[None, :] < D), other=0.0)
        v = tl.load(patches + n[None, :] * D + d[:, None], mask=(n[None, :] < N) & (d[:, None] < D), other=0.0)
        activity = tl.dot(s, v, activity, input_precision="tf32x3")
    score = tl.where(f[:, None] < F, activity / tl.load(size + layer * F + f, mask=f < F, other=1.0)[:, None], -INF)
    best = tl.argmax(score, 0, tie_break_left=True)
    last = best
    for _ in range(1, tl.load(m + layer)):
        score = tl.where(f[:, None] == last[None, :], -INF, score)
        last = tl.argmax(score, 0, tie_break_left=True)
    at = layer * N + n
    tl.store(winner + at, best, mask=n < N)
    tl.store(inhibited + at, last, mask=n < N)
    tl.store(of_winner + at, tl.sum(tl.where(f[:, None] == best[None, :], activity, 0.0), 0), mask=n < N)
    tl.store(of_inhibited + at, tl.sum(tl.where(f[:, None] == last[None, :], activity, 0.0), 0), mask=n < N)


@triton.jit
def _change(patches, scales, winner, inhibited, of_winner, of_inhibited, delta, weight, change, N, F, D, BN: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr):
    """Eq. 4.7 summed over the patches, of BF neurons and BD weights of each: the matrix g of eq. 4.6 is made where it is multiplied."""
    layer, f, d = tl.program_id(2), tl.program_id(0) * BF + tl.arange(0, BF), tl.program_id(1) * BD + tl.arange(0, BD)
    towards, away = tl.zeros((BF, BD), tl.float32), tl.zeros((BF,), tl.float32)
    against = tl.load(delta + layer)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        at = layer * N + n
        scale = tl.load(scales + at, mask=n < N, other=0.0)[None, :]
        hebb = tl.where(f[:, None] == tl.load(winner + at, mask=n < N, other=-1)[None, :], scale, 0.0)
        anti = tl.where(f[:, None] == tl.load(inhibited + at, mask=n < N, other=-1)[None, :], scale * against, 0.0)
        v = tl.load(patches + n[:, None] * D + d[None, :], mask=(n[:, None] < N) & (d[None, :] < D), other=0.0)
        towards = tl.dot(hebb - anti, v, towards, input_precision="tf32x3")
        mine = tl.load(of_winner + at, mask=n < N, other=0.0)[None, :]
        away += tl.sum(hebb * mine - anti * tl.load(of_inhibited + at, mask=n < N, other=0.0)[None, :], 1)
    at, there = layer * F * D + f[:, None] * D + d[None, :], (f[:, None] < F) & (d[None, :] < D)
    tl.store(change + at, towards - away[:, None] * tl.load(weight + at, mask=there, other=0.0), mask=there)


def changes(weight: Tensor, synapses: Tensor, size: Tensor, patches: Tensor, scales: Tensor, m: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`khnb.learning.kh_update` gives, of G layers, and the winners (G, N) int64.

    weight, synapses : (G, F, D); size : (G, F), by which activities are divided to be ranked; patches : (N, D) as they are; scales : (G, N), their
    1 / p-norm; m : (G,) int32; delta : (G,). All float32 but m, contiguous; at most :data:`NEURONS` of a layer.
    """
    (layers, F, D), N = weight.shape, len(patches)
    winner, inhibited = (torch.empty(layers, N, dtype=torch.int32, device=weight.device) for _ in range(2))
    activities = [torch.empty(layers, N, device=weight.device) for _ in range(2)]
    change, together = torch.empty_like(weight), max(16, triton.next_power_of_2(F))
    some = min(64, 2**14 // together)  # as many patches as keep the activities in registers
    _rank[triton.cdiv(N, some), layers](
        synapses, size, patches, m, winner, inhibited, *activities, N, F, D, BN=some, BF=together, BD=16, num_warps=8, num_stages=2
    )
    neurons, values = min(64, together), 64
    grid = triton.cdiv(F, neurons), triton.cdiv(D, values), layers
    _change[grid](patches, scales, winner, inhibited, *activities, delta, weight, change, N, F, D, BN=32, BF=neurons, BD=values)
    return change, winner.long()


@triton.jit
def _conv_pool(
    images, weight, bias, scale, room, out, where, count, filters, C, H, W, w, side, across, q, step, high, wide,
    BIASED: tl.constexpr, SCALED: tl.constexpr, PLACES: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
):
    """One image and BF filters after the other: activities go to a ``room`` small enough to stay in the cache, and are pooled from there."""
    blocks, places, outputs, D = tl.cdiv(filters, BF), side * across, high * wide, C * w * w
    room += tl.program_id(0) * places * BF
    for item in range(tl.program_id(0), count * blocks, tl.num_programs(0)):
        b = (item // blocks).to(tl.int64)
        f = item % blocks * BF + tl.arange(0, BF)
        for start in range(0, places, BN):
            n = start + tl.arange(0, BN)
            corner = b * C * H * W + n // across * W + n % across
            activity = tl.zeros((BN, BF), tl.float32)
            for first in range(0, D, BD):
                d = first + tl.arange(0, BD)
                away = d // (w * w) * H * W + d // w % w * W + d % w
                x = tl.load(images + corner[:, None] + away[None, :], mask=(n[:, None] < places) & (d[None, :] < D), other=0.0)
                k = tl.load(weight + f[None, :] * D + d[:, None], mask=(f[None, :] < filters) & (d[:, None] < D), other=0.0)
                activity = tl.dot(x, k, activity, input_precision="tf32x3")
            if BIASED:
                activity += tl.load(bias + f, mask=f < filters, other=0.0)[None, :]
            if SCALED:
                activity *= tl.load(scale + b * places + n, mask=n < places, other=0.0)[:, None]
            tl.store(room + n[:, None] * BF + tl.arange(0, BF)[None, :], activity, mask=n[:, None] < places)
        tl.debug_barrier()
        for start in range(0, outputs, BN):
            o = start + tl.arange(0, BN)
            corner = o // wide * step * across + o % wide * step
            best, at = tl.full((BN, BF), -INF, tl.float32), tl.zeros((BN, BF), tl.int32) + corner[:, None]
            for offset in range(0, q * q):
                n = corner + offset // q * across + offset % q
                value = tl.load(room + n[:, None] * BF + tl.arange(0, BF)[None, :], mask=o[:, None] < outputs, other=0.0)
                better = (value > best) | (value != value)  # the first of equals; what is no number is passed on
                best, at = tl.where(better, value, best), tl.where(better, n[:, None], at)
            to, there = (b * filters + f)[None, :] * outputs + o[:, None], (o[:, None] < outputs) & (f[None, :] < filters)
            tl.store(out + to, best, mask=there)
            if PLACES:
                tl.store(where + to, at.to(tl.int64), mask=there)
        tl.debug_barrier()


def conv_pool(images: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, pools: list, places: bool) -> tuple[list[Tensor], Tensor | None]:
    """max_pool2d(conv2d(images, weight, bias) * scale, w_pool, s_pool) for each of the poolings, and, if ``places``, where the largest value of the first
    was (int64, in the map of activities). All float32, contiguous: see :func:`khnb.native.conv_pool`.
    """
    count, C, H, W = images.shape
    filters, w = len(weight), weight.shape[-1]
    side, across, block, found, where = H - w + 1, W - w + 1, 16, [], None
    programs = min(count * triton.cdiv(filters, block), 4 * _multiprocessors(images.device))
    room = torch.empty(programs, side * across, block, device=images.device)
    for q, step in pools:
        shape = count, filters, (side - q) // step + 1, (across - q) // step + 1
        out = torch.empty(shape, device=images.device)
        here = places and where is None
        where = torch.empty(shape, dtype=torch.int64, device=images.device) if here else where
        none = images  # for what is not read
        _conv_pool[programs,](
            images, weight, none if bias is None else bias, none if scale is None else scale, room, out, where if here else none, count, filters, C, H, W, w,
            side, across, q, step, *shape[2:], BIASED=bias is not None, SCALED=scale is not None, PLACES=here, BN=64, BF=block, BD=16,
        )
        found.append(out)
    return found, where


@triton.jit
def _filters(images, slope, partial, count, filters, C, H, W, w, side, across, BF: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    """Of BF filters and BD weights of each: the products of the slopes of activities with the patches they are of, over every so-manieth image."""
    f, d, part = tl.program_id(0) * BF + tl.arange(0, BF), tl.program_id(1) * BD + tl.arange(0, BD), tl.program_id(2)
    places, D = side * across, C * w * w
    away = d // (w * w) * H * W + d // w % w * W + d % w
    total = tl.zeros((BF, BD), tl.float32)
    for b in range(part, count, tl.num_programs(2)):
        of, at = slope + (b * filters + f).to(tl.int64)[:, None] * places, images + b * C * H * W
        for start in range(0, places, BN):
            n = start + tl.arange(0, BN)
            g = tl.load(of + n[None, :], mask=(f[:, None] < filters) & (n[None, :] < places), other=0.0)
            corner = n // across * W + n % across
            x = tl.load(at + corner[:, None] + away[None, :], mask=(n[:, None] < places) & (d[None, :] < D), other=0.0)
            total = tl.dot(g, x, total, input_precision="tf32x3")
    tl.store(partial + (part * filters + f)[:, None] * D + d[None, :], total, mask=(f[:, None] < filters) & (d[None, :] < D))


def filters_gradient(images: Tensor, slope: Tensor, w: int) -> Tensor:
    """The gradient (F, C, w, w) of the filters of a convolution of the images (B, C, H, W), from that of its activities (B, F, H-w+1, W-w+1)."""
    (count, C, H, W), (_, filters, side, across) = images.shape, slope.shape
    blocks = triton.cdiv(filters, 64), triton.cdiv(C * w * w, 64)
    parts = max(1, min(count, 2 * _multiprocessors(images.device) // (blocks[0] * blocks[1])))
    partial = torch.empty(parts, filters, C, w, w, device=images.device)
    _filters[(*blocks, parts)](images, slope, partial, count, filters, C, H, W, w, side, across, BF=64, BD=64, BN=16)
    return partial.sum(0)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _power(y, n):
    """y^n, which is no number for a negative y and a broken n."""
    size, half = tl.exp2(n * tl.log2(tl.abs(y))), n * 0.5
    signed = tl.where(half == tl.floor(half), size, tl.where(n == tl.floor(n), -size, NAN))
    return tl.where(y < 0, signed, size)


@triton.jit
def _logits(features, powers, weight, partial, count, heads, D, classes, each, BB: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr):
    """Of BB images and one head: features^n times its weights, over ``each`` of the features."""
    head, b, part, c = tl.program_id(0), tl.program_id(1) * BB + tl.arange(0, BB), tl.program_id(2), tl.arange(0, BC)
    n = tl.load(powers + head)
    total = tl.zeros((BB, BC), tl.float32)
    for first in range(part * each, tl.minimum((part + 1) * each, D), BD):
        d = first + tl.arange(0, BD)
        y = tl.load(features + b.to(tl.int64)[:, None] * D + d[None, :], mask=(b[:, None] < count) & (d[None, :] < D), other=0.0)
        w = tl.load(weight + (head * classes + c).to(tl.int64)[None, :] * D + d[:, None], mask=(c[None, :] < classes) & (d[:, None] < D), other=0.0)
        total = tl.dot(_power(y, n), w, total, input_precision="tf32x3")
    at = ((part * count + b) * heads + head)[:, None] * classes + c[None, :]
    tl.store(partial + at, total, mask=(b[:, None] < count) & (c[None, :] < classes))


@triton.jit
def _gradient(features, powers, slope, to, count, heads, D, classes, BB: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr):
    """Of BD features and one head: what the slopes of its logits add to the gradients of its weights."""
    head, d, c = tl.program_id(0), tl.program_id(1) * BD + tl.arange(0, BD), tl.arange(0, BC)
    n = tl.load(powers + head)
    total = tl.zeros((BD, BC), tl.float32)
    for first in range(0, count, BB):
        b = first + tl.arange(0, BB)
        y = tl.load(features + b.to(tl.int64)[None, :] * D + d[:, None], mask=(b[None, :] < count) & (d[:, None] < D), other=0.0)
        g = tl.load(slope + (b * heads + head)[:, None] * classes + c[None, :], mask=(b[:, None] < count) & (c[None, :] < classes), other=0.0)
        total = tl.dot(_power(y, n), g, total, input_precision="tf32x3")
    at, there = (head * classes + c).to(tl.int64)[None, :] * D + d[:, None], (c[None, :] < classes) & (d[:, None] < D)
    tl.store(to + at, tl.load(to + at, mask=there, other=0.0) + total, mask=there)


def logits(y: Tensor, powers: Tensor, weight: Tensor) -> Tensor:
    """(B, heads, classes) of classifiers without bias on y^n, each head with its n.

    y : (B, D); powers : (heads,), at least 1; weight : (heads, classes, D). All float32, contiguous.
    """
    (count, D), (heads, classes, _) = y.shape, weight.shape
    parts = max(1, min(8, D // 2048))  # enough programs for a GPU, with few heads as well
    each = triton.cdiv(triton.cdiv(D, parts), 32) * 32
    partial = torch.empty(parts, count, heads, classes, device=y.device)
    grid = heads, triton.cdiv(count, 64), parts  # heads first: those of the same images run side by side, and read them from the cache
    _logits[grid](y, powers, weight, partial, count, heads, D, classes, each, BB=64, BD=32, BC=max(16, triton.next_power_of_2(classes)))
    return partial.sum(0)


def gradients(y: Tensor, powers: Tensor, slope: Tensor, to: Tensor) -> None:
    """Add to ``to`` (heads, classes, D) the products of the slopes of the logits, (B, heads, classes), with y^n; see :func:`logits`."""
    (count, D), (_, heads, classes) = y.shape, slope.shape
    grid = heads, triton.cdiv(D, 64)
    _gradient[grid](y, powers, slope.contiguous(), to, count, heads, D, classes, BB=32, BD=64, BC=max(16, triton.next_power_of_2(classes)))
