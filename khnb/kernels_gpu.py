"""The kernels of a GPU, in Triton, which comes with PyTorch for CUDA: KH updates, convolution with pooling,
activation functions, classifiers. **Not run on a GPU yet.**

Their results are those of the plain PyTorch path but for rounding, and the same every time; what PyTorch does around them need not be (the gradient of
patch norms is added up in any order there). Matrix products are made of three products of TF32 terms each, which lose less than sums in single precision do; how tensor cores add
them up is not tested here.
Import this through :func:`khnb.native.gpu`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from khnb.settings import PRELU_SLOPE
from khnb.tiles_gpu import places_together, ranked, read_together, rooms

NEURONS = 512  # at most, of a layer: more do not fit into the registers
INF, SLOPE = tl.constexpr(float("inf")), tl.constexpr(PRELU_SLOPE)


@triton.jit
def _power(y, n):
    """y^n, which is no number for a negative y and a broken n."""
    size, half = tl.exp2(n * tl.log2(tl.abs(y))), n * 0.5
    signed = tl.where(half == tl.floor(half), size, tl.where(n == tl.floor(n), -size, float("nan")))
    return tl.where(y < 0, signed, size)


@triton.jit
def _whole_power(y, n):
    """y^n by repeated squaring, as in khnb/models.py: as precise as the products."""
    found = tl.full(y.shape, 1.0, tl.float32)
    while n > 0:
        if n % 2 == 1:
            found *= y
        y *= y
        n = n // 2
    return found


@triton.jit
def _raised(y, N: tl.constexpr):
    """y^N, of a whole N by repeated squaring, written out: no loop keeps what comes next from being loaded."""
    if N == N // 1:
        found = tl.full(y.shape, 1.0, tl.float32)
        for k in tl.static_range(16):
            if N // 2**k % 2 == 1:
                found *= y
            if N // 2**k >= 2:
                y *= y
    else:
        found = _power(y, N)
    return found


@triton.jit
def _terms(x):
    """x as the sum of two numbers of TF32 (10 bits), but for its last 2 bits: the nearest, and the rest, which is rounded where it is multiplied."""
    high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _product(a, a_rest, b, b_rest, total):
    """total + a times b, each in its terms, as three products of TF32."""
    total = tl.dot(a_rest, b, total, input_precision="tf32")
    total = tl.dot(a, b_rest, total, input_precision="tf32")
    return tl.dot(a, b, total, input_precision="tf32")


@triton.jit
def _away(d, H, W, w):
    """How far the d-th value of a patch is from its corner, in an image."""
    return d // (w * w) * H * W + d // w % w * W + d % w


@triton.jit
def _split(x, out, count, BN: tl.constexpr):
    """The terms of each number: all of the first, then all of the second."""
    at = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    high, low = _terms(tl.load(x + at, mask=at < count, other=0.0))
    tl.store(out + at, high, mask=at < count)
    tl.store(out + count + at, low, mask=at < count)


def _in_terms(x: Tensor) -> Tensor:
    """(2, ...): the terms of a product of x with something, see :func:`_terms`."""
    out = torch.empty(2, *x.shape, device=x.device)
    _split[triton.cdiv(x.numel(), 1024),](x, out, x.numel(), BN=1024)
    return out


@triton.jit
def _gather(images, ids, orders, rows, scales, N, C, H, W, w, BYTES: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """BN patches by number, and 1 / p-norm of each for one of the orders p; the first of them also writes the patches down."""
    n, k = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN), tl.program_id(1)
    across, D, p, total = W - w + 1, C * w * w, tl.load(orders + k), tl.zeros((BN,), tl.float32)
    id = tl.load(ids + n, mask=n < N, other=0)
    place = id % ((H - w + 1) * across)
    corner = id // ((H - w + 1) * across) * C * H * W + place // across * W + place % across
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        away, there = _away(d, H, W, w), (n[:, None] < N) & (d[None, :] < D)
        v = tl.load(images + corner[:, None] + away[None, :], mask=there, other=0).to(tl.float32)
        if BYTES:
            v /= 255
        if k == 0:
            tl.store(rows + n[:, None] * D + d[None, :], v, mask=there)
        total += tl.sum(_power(tl.abs(v), p), 1)
    tl.store(scales + k * N + n, tl.where(total > 0, tl.exp2(-tl.log2(total) / p), 0.0), mask=n < N)


def gather(images: Tensor, ids: Tensor, w: int, orders: Tensor) -> tuple[Tensor, Tensor]:
    """Patches (U, N, D) float32, as they are, and 1 / p-norm of each (orders, U, N), 0 for an all-zero one.

    images : (B, C, H, W), uint8 (divided by 255) or float32, contiguous; ids : (U, N) int64, as in :func:`khnb.patches.chosen`; orders : each p, float32.
    """
    (_, C, H, W), (updates, N) = images.shape, ids.shape
    rows = torch.empty(updates, N, C * w * w, device=images.device)
    scales = torch.empty(len(orders), updates, N, device=images.device)
    _gather[triton.cdiv(updates * N, 32), len(orders)](
        images, ids.contiguous(), orders, rows, scales, updates * N, C, H, W, w, BYTES=images.dtype == torch.uint8, BN=32, BD=64
    )
    return rows, scales


@triton.jit
def _first_largest(score, f, BF: tl.constexpr):
    """The first of the most active neurons, of each patch: in fewer instructions than argmax."""
    return tl.min(tl.where(score == tl.max(score, 0)[None, :], f[:, None], BF), 0)


@triton.jit
def _rank(synapses, size, patches, m, winner, inhibited, of_winner, of_inhibited, wins, N, F, D, BN: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr):
    """Of BN patches and one layer: the most active neuron, the m-th most active one, and their activities. All BF >= F neurons are in registers."""
    layer, n, f = tl.program_id(1), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BF)
    activity = tl.zeros((BF, BN), tl.float32)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        s = tl.load(synapses + layer * F * D + f[:, None] * D + d[None, :], mask=(f[:, None] < F) & (d[None, :] < D), other=0.0)
        v = tl.load(patches + n[None, :] * D + d[:, None], mask=(n[None, :] < N) & (d[:, None] < D), other=0.0)
        activity = _product(*_terms(s), *_terms(v), activity)
    score = tl.where(f[:, None] < F, activity / tl.load(size + layer * F + f, mask=f < F, other=1.0)[:, None], -INF)
    best = _first_largest(score, f, BF)
    last = best
    for _ in range(1, tl.load(m + layer)):
        score = tl.where(f[:, None] == last[None, :], -INF, score)
        last = _first_largest(score, f, BF)
    at = layer * N + n
    tl.store(winner + at, best, mask=n < N)
    tl.store(inhibited + at, last, mask=n < N)
    tl.store(of_winner + at, tl.sum(tl.where(f[:, None] == best[None, :], activity, 0.0), 0), mask=n < N)
    tl.store(of_inhibited + at, tl.sum(tl.where(f[:, None] == last[None, :], activity, 0.0), 0), mask=n < N)
    tl.atomic_add(wins + layer * F + best, tl.full((BN,), 1, tl.int64), mask=(n < N) & (best < F))


@triton.jit
def _change(
    patches, scales, which, apart, winner, inhibited, of_winner, of_inhibited, delta, weight, change, most, N, F, D,
    BN: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
):
    """Eq. 4.7 summed over the patches, of BF neurons and BD weights of each: the matrix g of eq. 4.6 is made where it is multiplied. And the largest of all."""
    layer, f, d = tl.program_id(2), tl.program_id(0) * BF + tl.arange(0, BF), tl.program_id(1) * BD + tl.arange(0, BD)
    towards, away = tl.zeros((BF, BD), tl.float32), tl.zeros((BF, BN), tl.float32)
    against = tl.load(delta + layer)
    scales += tl.load(which + layer).to(tl.int64) * apart
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        at = layer * N + n
        scale = tl.load(scales + n, mask=n < N, other=0.0)[None, :]
        hebb = tl.where(f[:, None] == tl.load(winner + at, mask=n < N, other=-1)[None, :], scale, 0.0)
        anti = tl.where(f[:, None] == tl.load(inhibited + at, mask=n < N, other=-1)[None, :], scale * against, 0.0)
        v = tl.load(patches + n[:, None] * D + d[None, :], mask=(n[:, None] < N) & (d[None, :] < D), other=0.0)
        towards = _product(*_terms(hebb - anti), *_terms(v), towards)
        mine = tl.load(of_winner + at, mask=n < N, other=0.0)[None, :]
        away += hebb * mine - anti * tl.load(of_inhibited + at, mask=n < N, other=0.0)[None, :]
    at, there = layer * F * D + f[:, None] * D + d[None, :], (f[:, None] < F) & (d[None, :] < D)
    found = towards - tl.sum(away, 1)[:, None] * tl.load(weight + at, mask=there, other=0.0)
    tl.store(change + at, found, mask=there)
    tl.atomic_max(most + layer, tl.max(tl.where(there, tl.abs(found), 0.0)))  # the same whoever comes first


@triton.jit
def _step(
    weight, change, most, eta, p, synapses, size, N, F, D, MOVES: tl.constexpr, BY_MAX: tl.constexpr, BY_Q: tl.constexpr, WHOLE: tl.constexpr,
    BF: tl.constexpr, BD: tl.constexpr,
):
    """Of BF neurons: the new weights, if there is a change, and what patches are to meet next: sgn(W) |W|^(p-1), and by what activities are divided to be ranked."""
    layer, f = tl.program_id(1), tl.program_id(0) * BF + tl.arange(0, BF)
    order, total = tl.load(p + layer), tl.zeros((BF,), tl.float32)
    if MOVES:
        step = tl.load(eta + layer) / (tl.maximum(tl.load(most + layer), 1e-30) if BY_MAX else N)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        at, there = layer * F * D + f[:, None] * D + d[None, :], (f[:, None] < F) & (d[None, :] < D)
        x = tl.load(weight + at, mask=there, other=0.0)
        if MOVES:
            x += tl.load(change + at, mask=there, other=0.0) * step
            tl.store(weight + at, x, mask=there)
        length = tl.abs(x)
        power = _whole_power(length, order.to(tl.int32) - 1) if WHOLE else _power(length, order - 1)
        tl.store(synapses + at, tl.where(x < 0, -power, power), mask=there)
        total += tl.sum(power * length, 1)
    if BY_Q:
        tl.store(size + layer * F + f, tl.where(total > 0, _power(total, (order - 1) / order), 1.0), mask=f < F)


def learn(weight: Tensor, wins: Tensor, rows: Tensor, scales: Tensor, which: Tensor, p: Tensor, m: Tensor, delta: Tensor, eta: Tensor, by_q: bool, by_max: bool, whole: bool) -> None:
    """One update after the other (eqs. 4.3-4.7) of G layers, whose weights and wins are changed in place.

    weight : (G, F, D), with F at most :data:`NEURONS`; wins : (G, F) int64; rows and scales as :func:`gather` gives them; which : (G,) int32, of which
    order each layer's scales are; p, delta, eta : (G,); m : (G,) int32; by_q, by_max : as in :class:`khnb.settings.ConvSettings`; whole : whether each p is.
    """
    (layers, F, D), (updates, N, _) = weight.shape, rows.shape
    winner, inhibited = (torch.empty(layers, N, dtype=torch.int32, device=weight.device) for _ in range(2))
    activities = [torch.empty(layers, N, device=weight.device) for _ in range(2)]
    change, synapses, size = torch.empty_like(weight), torch.empty_like(weight), weight.new_ones(layers, F)
    most, (some, together) = weight.new_zeros(updates, layers), ranked(F)
    neurons, values = min(64, together), 64

    def step(at, moves):
        _step[triton.cdiv(F, 4), layers](
            weight, change, most[at], eta, p, synapses, size, N, F, D, MOVES=moves, BY_MAX=by_max, BY_Q=by_q, WHOLE=whole, BF=4, BD=64
        )

    step(0, False)
    for at in range(updates):
        _rank[triton.cdiv(N, some), layers](
            synapses, size, rows[at], m, winner, inhibited, *activities, wins, N, F, D, BN=some, BF=together, BD=16, num_warps=8, num_stages=2
        )
        _change[triton.cdiv(F, neurons), triton.cdiv(D, values), layers](
            rows[at], scales[:, at], which, updates * N, winner, inhibited, *activities, delta, weight, change, most[at], N, F, D, BN=32, BF=neurons, BD=values
        )
        step(at, True)


@triton.jit
def _largest(values, at, apart, q, BF: tl.constexpr, shape: tl.constexpr):
    """Of q rows of BF numbers each, ``apart`` from the row ``at``: the largest, and which it is, the first of equals. What is no number is passed on."""
    f, best, which = tl.arange(0, BF), tl.full(shape, -INF, tl.float32), tl.zeros(shape, tl.int32)
    for i in tl.static_range(q):
        value = tl.load(values + (at + i * apart)[:, None] * BF + f[None, :])
        better = (value > best) | (value != value)
        best, which = tl.where(better, value, best), tl.where(better, i, which)
    return best, which


@triton.jit
def _conv_pool(
    images, images_rest, weight, weight_rest, bias, scale, room, columns, out, where, count, filters, programs,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, w: tl.constexpr, q: tl.constexpr, step: tl.constexpr, DEEP: tl.constexpr, BIASED: tl.constexpr,
    SCALED: tl.constexpr, PLACES: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
):
    """One image and BF filters after the other: activities go to a ``room`` small enough to stay in the cache; of each row of them the largest of each
    window, with its column there, is kept as well, and then the largest of these."""
    side: tl.constexpr = H - w + 1
    across: tl.constexpr = W - w + 1
    high: tl.constexpr = (side - q) // step + 1
    wide: tl.constexpr = (across - q) // step + 1
    places: tl.constexpr = side * across
    rows: tl.constexpr = side * wide
    D: tl.constexpr = C * w * w
    blocks, c = tl.cdiv(filters, BF), tl.arange(0, BF)
    room += tl.program_id(0) * (places + rows) * BF
    best_room = room + places * BF
    columns += tl.program_id(0) * rows * BF
    for item in range(tl.program_id(0), count * blocks, programs):
        b, f = (item // blocks).to(tl.int64), item % blocks * BF + c
        image, image_rest = images + b * C * H * W, images_rest + b * C * H * W
        for start in range(0, places, BN):
            n = start + tl.arange(0, BN)
            here = tl.minimum(n, places - 1)
            corner, activity = here // across * W + here % across, tl.zeros((BN, BF), tl.float32)
            for first in range(0, DEEP, BD):
                d = first + tl.arange(0, BD)
                away = tl.where(d < D, _away(d, H, W, w), 0)  # a pixel of the patch also where the weight is 0
                at, to, there = corner[:, None] + away[None, :], f[None, :] * DEEP + d[:, None], f[None, :] < filters
                x, k, low = tl.load(image + at), tl.load(weight + to, mask=there, other=0.0), tl.load(weight_rest + to, mask=there, other=0.0)
                activity = _product(x, tl.load(image_rest + at), k, low, activity)
            if BIASED:
                activity += tl.load(bias + f, mask=f < filters, other=0.0)[None, :]
            if SCALED:
                activity *= tl.load(scale + b * places + here)[:, None]
            tl.store(room + n[:, None] * BF + c[None, :], activity, mask=n[:, None] < places)
        tl.debug_barrier()
        for start in range(0, rows, BM):
            m = start + tl.arange(0, BM)
            here = tl.minimum(m, rows - 1)
            best, j = _largest(room, here // wide * across + here % wide * step, 1, q, BF, (BM, BF))
            tl.store(best_room + m[:, None] * BF + c[None, :], best, mask=m[:, None] < rows)
            tl.store(columns + m[:, None] * BF + c[None, :], j.to(tl.int8), mask=m[:, None] < rows)
        tl.debug_barrier()
        for start in range(0, high * wide, BM):
            o = start + tl.arange(0, BM)
            here = tl.minimum(o, high * wide - 1)
            first = here // wide * step * wide + here % wide
            best, i = _largest(best_room, first, wide, q, BF, (BM, BF))
            to, there = (b * filters + f)[:, None] * (high * wide) + o[None, :], (o[None, :] < high * wide) & (f[:, None] < filters)
            tl.store(out + to, tl.trans(best), mask=there)
            if PLACES:
                j = tl.load(columns + (first[:, None] + i * wide) * BF + c[None, :]).to(tl.int32)
                at = ((here // wide * step)[:, None] + i) * across + (here % wide * step)[:, None] + j
                tl.store(where + to, tl.trans(at).to(tl.int64), mask=there)
        tl.debug_barrier()


def conv_pool(images: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, pools: list, places: bool) -> tuple[list[Tensor], Tensor | None]:
    """max_pool2d(conv2d(images, weight, bias) * scale, w_pool, s_pool) for each of the poolings, and, if ``places``, where the largest value of the first
    was (int64, in the map of activities). All float32, contiguous: see :func:`khnb.native.conv_pool`.
    """
    count, C, H, W = images.shape
    filters, w = len(weight), weight.shape[-1]
    side, across, found, where, none = H - w + 1, W - w + 1, [], None, weight  # none: for what is not read
    flat = torch.nn.functional.pad(weight.flatten(1), (0, -C * w * w % 16))
    images_terms, weight_terms = _in_terms(images), _in_terms(flat)
    for q, step in pools:
        shape = count, filters, (side - q) // step + 1, (across - q) // step + 1
        rows = side * shape[3]
        block, programs = rooms(side * across + 1.25 * rows, count, filters, _multiprocessors(images.device))
        room = torch.empty(programs, side * across + rows, block, device=images.device)
        columns = torch.empty(programs, rows, block, dtype=torch.int8, device=images.device)
        out = torch.empty(shape, device=images.device)
        here = places and where is None
        where = torch.empty(shape, dtype=torch.int64, device=images.device) if here else where
        _conv_pool[programs,](
            *images_terms, *weight_terms, none if bias is None else bias, none if scale is None else scale, room, columns, out, where if here else none,
            count, filters, programs, C=C, H=H, W=W, w=w, q=q, step=step, DEEP=flat.shape[1], BIASED=bias is not None, SCALED=scale is not None,
            PLACES=here, BN=places_together(side * across), BM=16, BF=block, BD=16, num_warps=8,
        )
        found.append(out)
    return found, where


@triton.jit
def _spread(slope, where, out, maps, outputs, places, programs, BM: tl.constexpr, BN: tl.constexpr):
    """BM maps after the other, each in a thread of its own: what each output adds to the place that it was taken from, one after the other."""
    for block in range(tl.program_id(0), tl.cdiv(maps, BM), programs):
        first = (tl.full((), 0, tl.int64) + block) * BM
        for start in range(0, BM * places, BN):
            n = start + tl.arange(0, BN)
            tl.store(out + first * places + n, tl.zeros((BN,), tl.float32), mask=n < tl.minimum(maps - first, BM) * places)
        tl.debug_barrier()
        m = first + tl.arange(0, BM)
        for o in range(outputs):
            at = out + m * places + tl.load(where + m * outputs + o, mask=m < maps, other=0)
            tl.store(at, tl.load(at, mask=m < maps, other=0.0) + tl.load(slope + m * outputs + o, mask=m < maps, other=0.0), mask=m < maps)


def spread(slope: Tensor, where: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The slope of the activities, of this shape (B, F, H-w+1, W-w+1), from that of the pooled ones (B, F, P, P) and where these were (int64): see
    :func:`conv_pool`. Always added up in the same order. PyTorch looks at each place for all the windows it is in, about thirty.
    """
    out, maps, places = torch.empty(shape, device=slope.device), shape[0] * shape[1], shape[2] * shape[3]
    programs = min(triton.cdiv(maps, 128), max(1, 10 * 2**20 // (128 * places)))  # as many as keep their maps in the cache
    if programs:
        _spread[programs,](slope, where, out, maps, slope.shape[2] * slope.shape[3], places, programs, BM=128, BN=1024)
    return out


@triton.jit
def _filters(
    images, images_rest, slope, partial, count, filters, parts,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, w: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):
    """Of BF filters and BD weights of each: the products of the slopes of activities with the patches they are of, over every so-manieth image."""
    across: tl.constexpr = W - w + 1
    places: tl.constexpr = (H - w + 1) * across
    D: tl.constexpr = C * w * w
    f, d, part = tl.program_id(0) * BF + tl.arange(0, BF), tl.program_id(1) * BD + tl.arange(0, BD), tl.program_id(2)
    away = tl.where(d < D, _away(d, H, W, w), 0)
    total = tl.zeros((BF, BD), tl.float32)
    for b in range(part, count, parts):
        of, at = slope + (b * filters).to(tl.int64) * places, b * C * H * W
        for start in range(0, places, BN):
            n = start + tl.arange(0, BN)
            g = tl.load(of + f[:, None] * places + n[None, :], mask=(f[:, None] < filters) & (n[None, :] < places), other=0.0)
            here = tl.minimum(n, places - 1)
            x = at + away[:, None] + (here // across * W + here % across)[None, :]  # neighbours in a row of an image lie side by side
            total = _product(*_terms(g), tl.trans(tl.load(images + x)), tl.trans(tl.load(images_rest + x)), total)
    tl.store(partial + (part * filters + f)[:, None] * D + d[None, :], total, mask=(f[:, None] < filters) & (d[None, :] < D))


def filters_gradient(images: Tensor, slope: Tensor, w: int) -> Tensor:
    """The gradient (F, C, w, w) of the filters of a convolution of the images (B, C, H, W), from that of its activities (B, F, H-w+1, W-w+1)."""
    (count, C, H, W), filters = images.shape, slope.shape[1]
    blocks = triton.cdiv(filters, 64), triton.cdiv(C * w * w, 64)
    parts = max(1, min(count, 4 * _multiprocessors(images.device) // (blocks[0] * blocks[1])))
    partial = torch.empty(parts, filters, C, w, w, device=images.device)
    _filters[(*blocks, parts)](*_in_terms(images), slope, partial, count, filters, parts, C=C, H=H, W=W, w=w, BF=64, BD=64, BN=16)
    return partial.sum(0)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _expm1(x):
    """exp(x) - 1; near 0, where the difference would lose its digits, the series."""
    near = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320))))))))
    return tl.where(tl.abs(x) < 0.5, near, tl.exp(x) - 1)


@triton.jit
def _normal(x):
    """The distribution function of the normal distribution, to 2e-7 of it: Press et al., Numerical Recipes (1992), section 6.2, erfcc."""
    z = tl.abs(x) * 0.7071067811865476
    t = 1 / (1 + 0.5 * z)
    size = 1.00002368 + t * (0.37409196 + t * (0.09678418 + t * (-0.18628806 + t * (0.27886807 + t * (-1.13520398 + t * (1.48851587 + t * (-0.82215223 + t * 0.17087277)))))))
    half = 0.5 * t * tl.exp(-z * z - 1.26551223 + t * size)
    return tl.where(x < 0, half, 1 - half)


@triton.jit
def _sigma(x, NAME: tl.constexpr):
    """The activation function of this name, "" for none, and its slope (eqs. 2.4-2.10), as PyTorch has them where there is none."""
    if NAME == "":
        value, slope = x, x * 0 + 1
    elif NAME == "sigmoid":
        e = tl.exp(-tl.abs(x))
        value, slope = tl.where(x < 0, e, 1.0) / (1 + e), e / ((1 + e) * (1 + e))
    elif NAME == "tanh":
        e = _expm1(-2 * tl.abs(x))
        size = -e / (e + 2)
        value, slope = tl.where(x < 0, -size, size), 1 - size * size
    elif NAME == "relu":
        value, slope = tl.where(x > 0, x, x * 0), tl.where(x > 0, 1.0, 0.0)
    elif NAME == "prelu":
        value, slope = tl.where(x > 0, x, x * SLOPE), tl.where(x > 0, 1.0, SLOPE)
    elif NAME == "elu":
        value, slope = tl.where(x > 0, x, _expm1(tl.minimum(x, 0))), tl.exp(tl.minimum(x, 0))
    elif NAME == "gelu":
        below = _normal(x)
        value, slope = x * below, below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        tl.static_assert(NAME == "rexp")
        value, slope = _expm1(tl.maximum(x, 0)), tl.where(x > 0, tl.exp(x), 0.0)
    return value, slope


@triton.jit(do_not_specialize=["n"])
def _activated(x, slope, out, n, count, NAME: tl.constexpr, WHOLE: tl.constexpr, BACK: tl.constexpr, BN: tl.constexpr):
    """sigma(x)^n or, if BACK, what it makes of the slope of its value."""
    at = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    value, steep = _sigma(tl.load(x + at, mask=at < count, other=0.0), NAME)
    found = _whole_power(value, n - BACK) if WHOLE else _power(value, n - BACK)
    if BACK:
        found *= n * steep * tl.load(slope + at, mask=at < count, other=0.0)
    tl.store(out + at, found, mask=at < count)


def activated(x: Tensor, sigma: str, n: float, slope: Tensor | None = None) -> Tensor:
    """sigma(x)^n, element by element, or, with the slope of that, the slope of x: in one pass. All float32, contiguous, of one shape."""
    out, whole, block = torch.empty_like(x), n == int(n), 1024
    grid = triton.cdiv(x.numel(), block),
    if x.numel():
        _activated[grid](x, x if slope is None else slope, out, int(n) if whole else n, x.numel(), NAME=sigma, WHOLE=whole, BACK=slope is not None, BN=block)
    return out


@triton.jit
def _features(features, id, d, there, D, NAME: tl.constexpr):
    """sigma of some features of some rows, as they are kept."""
    y = tl.load(features + id * D + d, mask=there, other=0.0).to(tl.float32)
    if D > 0:  # always; the compiler would make two of it, for each arrangement of y in registers that is needed
        y, _ = _sigma(y, NAME)
    return y


@triton.jit
def _logits(
    features, rows, weight, rest, partial, count, D, columns, width, each, NAME: tl.constexpr, POWERS: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr
):
    """Of BB images and, for each of the powers n, BC of its columns of weights: sigma(features)^n times the weights, over ``each`` of the features."""
    c, b, part, total = tl.program_id(0) * BC + tl.arange(0, BC), tl.program_id(1) * BB + tl.arange(0, BB), tl.program_id(2), ()
    id = tl.load(rows + b, mask=b < count, other=0)[:, None]
    for _ in tl.static_range(len(POWERS)):
        total += (tl.zeros((BB, BC), tl.float32),)
    for first in range(part * each, tl.minimum((part + 1) * each, D), BD):
        d, sums = first + tl.arange(0, BD), ()
        y = _features(features, id, d[None, :], (b[:, None] < count) & (d[None, :] < D), D, NAME)
        for i in tl.static_range(len(POWERS)):
            at, there = (i * columns + c).to(tl.int64)[None, :] * D + d[:, None], (c[None, :] < columns) & (d[:, None] < D)
            w, low = tl.load(weight + at, mask=there, other=0.0), tl.load(rest + at, mask=there, other=0.0)
            sums += (_product(*_terms(_raised(y, POWERS[i])), w, low, total[i]),)
        total = sums
    for i in tl.static_range(len(POWERS)):
        to = (part * count + b)[:, None] * width + (i * columns + c)[None, :]
        tl.store(partial + to, total[i], mask=(b[:, None] < count) & (c[None, :] < columns))


@triton.jit
def _judge(partial, bias, labels, slope, dbias, loss, right, share, parts, count, deep, heads, classes, BB: tl.constexpr, BC: tl.constexpr):
    """Of one head: the slope of share * (sum of the cross-entropies) by each logit, in terms, 0 for images beyond the last; that by the bias, loss and
    hits are added up."""
    head, c, total, lost, hits = tl.program_id(0), tl.arange(0, BC), tl.zeros((BC,), tl.float32), tl.full((), 0.0, tl.float64), tl.full((), 0, tl.int64)
    offset = tl.load(bias + head * classes + c, mask=c < classes, other=-INF)
    for first in range(0, count, BB):
        b = first + tl.arange(0, BB)
        at, there, x = (b * heads + head)[:, None] * classes + c[None, :], (b[:, None] < count) & (c[None, :] < classes), tl.zeros((BB, BC), tl.float32)
        for part in range(parts):
            x += tl.load(partial + part * count * heads * classes + at, mask=there, other=0.0)
        x += offset[None, :]
        label = tl.load(labels + b, mask=b < count, other=0)
        own, guess = c[None, :] == label[:, None], tl.argmax(x, 1, tie_break_left=True)
        x -= tl.max(x, 1)[:, None]
        size = tl.sum(tl.exp(x), 1)
        found = tl.where(there, (tl.exp(x) / size[:, None] - tl.where(own, 1.0, 0.0)) * share, 0.0)
        high, low = _terms(found)
        to, there = (head * classes + c)[None, :] * deep + b[:, None], (b[:, None] < deep) & (c[None, :] < classes)
        tl.store(slope + to, high, mask=there)
        tl.store(slope + heads * classes * deep + to, low, mask=there)
        total += tl.sum(found, 0)
        missed = tl.log(size) - tl.sum(tl.where(own, x, 0.0), 1)
        lost += tl.sum(tl.where(b < count, missed, 0.0).to(tl.float64))
        hits += tl.sum(tl.where((b < count) & (guess == label), 1, 0).to(tl.int64))
    to = dbias + head * classes + c
    tl.store(to, tl.load(to, mask=c < classes, other=0.0) + total, mask=c < classes)
    tl.store(loss + head, tl.load(loss + head) + lost)
    tl.store(right + head, tl.load(right + head) + hits)


@triton.jit
def _gradient(
    features, rows, slope, rest, to, count, deep, D, columns, NAME: tl.constexpr, POWERS: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr
):
    """Of BD features and, for each of the powers, BC of its columns of weights: what the slopes of their logits add to the gradients of the weights."""
    c, d, total = tl.program_id(0) * BC + tl.arange(0, BC), tl.program_id(1) * BD + tl.arange(0, BD), ()
    for _ in tl.static_range(len(POWERS)):
        total += (tl.zeros((BD, BC), tl.float32),)
    for first in range(0, count, BB):
        b, sums = first + tl.arange(0, BB), ()
        id = tl.load(rows + b, mask=b < count, other=0)[None, :]
        y = _features(features, id, d[:, None], (b[None, :] < count) & (d[:, None] < D), D, NAME)
        for i in tl.static_range(len(POWERS)):
            at, there = (i * columns + c)[None, :] * deep + b[:, None], (c[None, :] < columns) & (b[:, None] < deep)
            g, low = tl.load(slope + at, mask=there, other=0.0), tl.load(rest + at, mask=there, other=0.0)
            sums += (_product(*_terms(_raised(y, POWERS[i])), g, low, total[i]),)
        total = sums
    for i in tl.static_range(len(POWERS)):
        place, there = (i * columns + c).to(tl.int64)[None, :] * D + d[:, None], (c[None, :] < columns) & (d[:, None] < D)
        tl.store(to + place, tl.load(to + place, mask=there, other=0.0) + total[i], mask=there)


def classify(features: Tensor, rows: Tensor, sigma: str, powers: list[float], labels: Tensor, share: float, weight: Tensor, bias: Tensor, to) -> None:
    """Softmax classifiers on sigma(features)^n of some rows: gradients of share * (sum of the cross-entropies), loss and hits are added to ``to``.

    features : (N, D), of any floating-point type, contiguous; rows, labels : (B,) int64; sigma : "" for none; powers : each n, at least 1;
    weight : (heads, classes, D) and bias : (heads, classes), as many heads for each power, one power after the other; to : as in
    :func:`khnb.native.classify`, of one thread.
    """
    (count,), (heads, classes, D), each = rows.shape, weight.shape, len(weight) // len(powers)
    columns = each * classes
    some, wide, parts = read_together(columns, D)
    deep, depth, terms = triton.cdiv(count, 16) * 16, triton.cdiv(triton.cdiv(D, parts), 16) * 16, _in_terms(weight)
    partial, slope = torch.empty(parts, count, heads, classes, device=weight.device), torch.empty(2, heads, classes, deep, device=weight.device)
    together = [(tuple(powers[i : i + some]), slice(i * each, (i + some) * each)) for i in range(0, len(powers), some)]
    blocks, how = triton.cdiv(columns, wide), dict(BC=wide, num_warps=8)
    for n, of in together:
        _logits[blocks, triton.cdiv(count, 128), parts](
            features, rows, *terms[:, of], partial[:, :, of], count, D, columns, heads * classes, depth, NAME=sigma, POWERS=n, BB=128, BD=16, **how
        )
    _judge[heads,](
        partial, bias, labels, slope, to.bias, to.loss, to.right, share, parts, count, deep, heads, classes, BB=64, BC=max(16, triton.next_power_of_2(classes))
    )
    for n, of in together:
        _gradient[blocks, triton.cdiv(D, 128)](features, rows, *slope[:, of], to.weight[of], count, deep, D, columns, NAME=sigma, POWERS=n, BB=16, BD=128, **how)
