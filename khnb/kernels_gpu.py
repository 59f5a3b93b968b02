"""The kernels of a GPU, in Triton, which comes with PyTorch for CUDA: KH updates, convolution with pooling,
activation functions, classifiers.

Their results are those of the plain PyTorch path but for rounding, and the same every time; what PyTorch does around them need not be (the gradient of
patch norms is added up in any order there). Matrix products are made of three products of terms with 11 bits each, in half precision or TF32. Tensor cores add
them up with a little less care than single precision has: on an H200 a convolution with 432 weights a filter is off by 1.5e-6 of its size, four times as much
as one in single precision, with 48 weights by as much as that.

How work is cut up was tried out on an H200, with Triton 3.8; neighbouring sizes can take several times as long.
Import this through :func:`khnb.native.gpu`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from khnb.settings import PRELU_SLOPE

NEURONS = 512  # at most, of a layer: more do not fit into the registers
ACTIVITIES, LARGEST = 2**28, 2**31 - 1  # of a convolution, at a time; that a kernel counts to
RANK = {256: dict(BN=64, BD=16, num_warps=4, num_stages=2), 512: dict(BN=32, BD=16, num_warps=8, num_stages=2)}  # by the neurons in registers, at most
CONVOLVE = {True: dict(BN=128, BF=64, BD=64, num_warps=4, num_stages=2), False: dict(BN=256, BF=64, BD=16, num_warps=4)}  # by whether 64 weights are enough
POOL, FILTERS = dict(BO=16, BF=32, num_warps=4), dict(BF=64, BD=64, BN=64)
INF, SLOPE = tl.constexpr(float("inf")), tl.constexpr(PRELU_SLOPE)
TOP = tl.constexpr(14)  # numbers in half precision are brought below 2 to the power of this, or to one below it


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
    """total + a times b, each in its terms or halves, as three products of TF32 or half precision, added up in single."""
    total = tl.dot(a_rest, b, total, input_precision="tf32")
    total = tl.dot(a, b_rest, total, input_precision="tf32")
    return tl.dot(a, b, total, input_precision="tf32")


@triton.jit
def _away(d, H, W, w):
    """How far the d-th value of a patch is from its corner, in an image."""
    return d // (w * w) * H * W + d // w % w * W + d % w


@triton.jit
def _corner(n, C, H, W, w):
    """Where the corner of the n-th patch is, counted image by image and row by row."""
    across = W - w + 1
    place = n % ((H - w + 1) * across)
    return n // ((H - w + 1) * across) * C * H * W + place // across * W + place % across


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
    D, p, total = C * w * w, tl.load(orders + k), tl.zeros((BN,), tl.float32)
    corner = _corner(tl.load(ids + n, mask=n < N, other=0), C, H, W, w)
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
    return tl.min(tl.where(score == tl.max(score, 1)[:, None], f[None, :], BF), 1)


@triton.jit
def _rank(synapses, size, patches, m, winner, inhibited, of_winner, of_inhibited, wins, most, N, F, D, BN: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr):
    """Of BN patches and one layer: the most active neuron, the m-th most active one, and their activities. All BF >= F neurons of a patch are in registers."""
    layer, n, f = tl.program_id(1), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BF)
    activity = tl.zeros((BN, BF), tl.float32)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        v = tl.load(patches + n[:, None] * D + d[None, :], mask=(n[:, None] < N) & (d[None, :] < D), other=0.0)
        s = tl.load(synapses + layer * F * D + f[None, :] * D + d[:, None], mask=(f[None, :] < F) & (d[:, None] < D), other=0.0)
        activity = _product(*_terms(v), *_terms(s), activity)
    score = tl.where(f[None, :] < F, activity / tl.load(size + layer * F + f, mask=f < F, other=1.0)[None, :], -INF)
    best = _first_largest(score, f, BF)
    last = best
    for _ in range(1, tl.load(m + layer)):
        score = tl.where(f[None, :] == last[:, None], -INF, score)
        last = _first_largest(score, f, BF)
    at = layer * N + n
    tl.store(most + layer, 0.0)  # of the change that is to come
    tl.store(winner + at, best, mask=n < N)
    tl.store(inhibited + at, last, mask=n < N)
    tl.store(of_winner + at, tl.sum(tl.where(f[None, :] == best[:, None], activity, 0.0), 1), mask=n < N)
    tl.store(of_inhibited + at, tl.sum(tl.where(f[None, :] == last[:, None], activity, 0.0), 1), mask=n < N)
    tl.atomic_add(wins + layer * F + best, tl.full((BN,), 1, tl.int64), mask=(n < N) & (best < F))


@triton.jit
def _change(
    patches, scales, which, apart, winner, inhibited, of_winner, of_inhibited, delta, weight, change, most, layers, N, F, D, each,
    PARTS: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
):
    """Eq. 4.7 summed over ``each`` of the patches, of BF neurons and BD weights of each: the matrix g of eq. 4.6 is made where it is multiplied. And, of all
    patches, the largest of all."""
    layer, part, f, d = tl.program_id(2) // PARTS, tl.program_id(2) % PARTS, tl.program_id(0) * BF + tl.arange(0, BF), tl.program_id(1) * BD + tl.arange(0, BD)
    towards, away = tl.zeros((BF, BD), tl.float32), tl.zeros((BF, BN), tl.float32)
    against = tl.load(delta + layer)
    scales += tl.load(which + layer).to(tl.int64) * apart
    for first in range(part * each, tl.minimum(N, (part + 1) * each), BN):
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
    tl.store(change + part * layers * F * D + at, found, mask=there)
    if PARTS == 1:
        tl.atomic_max(most + layer, tl.max(tl.where(there, tl.abs(found), 0.0)))  # the same whoever comes first


@triton.jit
def _total(change, most, layers, size, PARTS: tl.constexpr, BN: tl.constexpr):
    """The sum of the parts of a change, in place of the first, and the largest of all."""
    layer, n, total = tl.program_id(1), tl.program_id(0) * BN + tl.arange(0, BN), tl.zeros((BN,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(change + (part * layers + layer) * size + n, mask=n < size, other=0.0)
    tl.store(change + layer * size + n, total, mask=n < size)
    tl.atomic_max(most + layer, tl.max(tl.abs(total)))


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
    (layers, F, D), (_, N, _) = weight.shape, rows.shape
    device, together = weight.device, max(16, triton.next_power_of_2(F))
    rank = RANK[256 if together <= 256 else 512]
    winner, inhibited = (torch.empty(layers, N, dtype=torch.int32, device=device) for _ in range(2))
    activities = [torch.empty(layers, N, device=device) for _ in range(2)]
    blocks = triton.cdiv(F, min(64, together)), triton.cdiv(D, 64)
    parts = max(1, min(8, N // 64, 16 // (blocks[0] * blocks[1])))  # not by how many layers there are: each learns as it would alone
    each = triton.cdiv(triton.cdiv(N, parts), 32) * 32
    change, synapses, size = weight.new_empty(parts, *weight.shape), torch.empty_like(weight), weight.new_ones(layers, F)
    most = weight.new_zeros(layers)

    def step(moves):
        _step[triton.cdiv(F, 4), layers](
            weight, change, most, eta, p, synapses, size, N, F, D, MOVES=moves, BY_MAX=by_max, BY_Q=by_q, WHOLE=whole, BF=4, BD=64
        )

    def update(rows, scales):
        _rank[triton.cdiv(N, rank["BN"]), layers](synapses, size, rows, m, winner, inhibited, *activities, wins, most, N, F, D, BF=together, **rank)
        _change[(*blocks, layers * parts)](
            rows, scales, which, N, winner, inhibited, *activities, delta, weight, change, most, layers, N, F, D, each,
            PARTS=parts, BN=32, BF=min(64, together), BD=64,
        )
        if parts > 1:
            _total[triton.cdiv(F * D, 1024), layers](change, most, layers, F * D, PARTS=parts, BN=1024)
        step(True)

    step(False)
    _repeat(update, rows, scales.transpose(0, 1).contiguous())


def _repeat(do, *over: Tensor) -> None:
    """do(a[0], b[0]), do(a[1], b[1]) and so on, of what makes no tensors. On a GPU as a CUDA graph of a few, again and again: a launch takes the processor
    longer than the GPU."""
    count, few, done = len(over[0]), 16, 0
    if over[0].device.type == "cuda" and count > 2 * few:
        do(*(each[0] for each in over))  # compiles what is not yet compiled
        done, graph, stream = 1, torch.cuda.CUDAGraph(), torch.cuda.Stream(over[0].device)
        given = [torch.empty_like(each[:few]) for each in over]
        stream.wait_stream(torch.cuda.current_stream(over[0].device))
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            for i in range(few):
                do(*(each[i] for each in given))
            graph.capture_end()
        torch.cuda.current_stream(over[0].device).wait_stream(stream)
        for done in range(1, count - few + 1, few):
            for to, each in zip(given, over, strict=True):
                to.copy_(each[done : done + few])
            graph.replay()
        done += few
    for i in range(done, count):
        do(*(each[i] for each in over))


@triton.jit
def _size(x, out, count, BN: tl.constexpr):
    """The largest size among numbers, as the bits of a float32: those of what is no number are larger than all others."""
    at = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    value = tl.load(x + at, mask=at < count, other=0.0)
    tl.atomic_max(out, tl.max(tl.where(value != value, 0x7FFFFFFF, tl.abs(value).to(tl.int32, bitcast=True))))


@triton.jit
def _scaling(size, TO: tl.constexpr):
    """The power of two that brings the largest size just below 2^TO: 1 where it is 0, or no number, or too small or large to be brought there."""
    exponent = tl.load(size) >> 23
    return tl.where((exponent > 15) & (exponent < 250), (253 + TO - exponent) << 23, 127 << 23).to(tl.float32, bitcast=True)


@triton.jit
def _halves(x):
    """x as the sum of two half-precision numbers: 22 bits, but for what is less than 2^-17 of the largest that it is scaled with."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _pack(x, size, out, rest, count, PACKED: tl.constexpr, BN: tl.constexpr):
    """The halves of numbers, scaled: side by side in 32 bits, or all of the first and all of the second."""
    at = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    high, low = _halves(tl.load(x + at, mask=at < count, other=0.0) * _scaling(size, TOP))
    if PACKED:
        bits = high.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        tl.store(out + at, bits | low.to(tl.int16, bitcast=True).to(tl.int32) << 16, mask=at < count)
    else:
        tl.store(out + at, high, mask=at < count)
        tl.store(rest + at, low, mask=at < count)


@triton.jit
def _unpack(bits):
    return bits.to(tl.int16).to(tl.float16, bitcast=True), (bits >> 16).to(tl.int16).to(tl.float16, bitcast=True)


def _size_of(x: Tensor) -> Tensor:
    found = torch.zeros(1, dtype=torch.int32, device=x.device)
    _size[triton.cdiv(x.numel(), 4096),](x, found, x.numel(), BN=4096)
    return found


def _packed(x: Tensor) -> tuple[Tensor, Tensor]:
    """int32, of the shape of x, for :func:`_unpack`, and the largest size."""
    out, size = torch.empty(x.shape, dtype=torch.int32, device=x.device), _size_of(x)
    _pack[triton.cdiv(x.numel(), 1024),](x, size, out, out, x.numel(), PACKED=True, BN=1024)
    return out, size


@triton.jit
def _convolve(
    images, of_images, high, low, of_weight, bias, scale, out, total, filters, DEEP: tl.constexpr, WIDE: tl.constexpr,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, w: tl.constexpr, BIASED: tl.constexpr, SCALED: tl.constexpr,
    BN: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
):
    """Activities of BF filters at BN places, counted over all images: a product of matrices, of which one is gathered from the images."""
    D: tl.constexpr = C * w * w
    n, f, activity = tl.program_id(1) * BN + tl.arange(0, BN), tl.program_id(0) * BF + tl.arange(0, BF), tl.zeros((BN, BF), tl.float32)
    here = tl.minimum(n, total - 1)
    corner = _corner(here, C, H, W, w)
    for first in range(0, DEEP, BD):
        d = first + tl.arange(0, BD)
        away = tl.where(d < D, _away(d, H, W, w), 0)  # a pixel of the patch also where the weight is 0
        x, x_low = _unpack(tl.load(images + away[:, None] + corner[None, :]))  # neighbours in a row of an image lie side by side
        at = f[None, :] * DEEP + d[:, None]
        activity = _product(tl.trans(x), tl.trans(x_low), tl.load(high + at), tl.load(low + at), activity)
    activity *= 1 / _scaling(of_images, TOP)
    activity *= 1 / _scaling(of_weight, TOP)
    if BIASED:
        activity += tl.load(bias + f, mask=f < filters, other=0.0)[None, :]
    if SCALED:
        activity *= tl.load(scale + here)[:, None]
    tl.store(out + n[:, None] * WIDE + f[None, :], activity, mask=(n[:, None] < total) & (f[None, :] < WIDE))


@triton.jit
def _pool(activity, out, where, blocks, filters, WIDE: tl.constexpr, side: tl.constexpr, across: tl.constexpr, q: tl.constexpr, step: tl.constexpr,
          PLACES: tl.constexpr, BO: tl.constexpr, BF: tl.constexpr):
    """Of one image and BF filters, BO windows after the other: the largest activity, and the place of the first one of it. What is no number is passed on."""
    wide: tl.constexpr = (across - q) // step + 1
    outputs: tl.constexpr = ((side - q) // step + 1) * wide
    b, f = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BF + tl.arange(0, BF)
    activity += b * side * across * WIDE
    for start in range(0, outputs, BO):
        o = start + tl.arange(0, BO)
        here = tl.minimum(o, outputs - 1)
        first = here // wide * step * across + here % wide * step
        best, which = tl.full((BO, BF), -INF, tl.float32), tl.zeros((BO, BF), tl.int32)
        for i in range(q):
            row = (first + i * across) * WIDE
            for j in tl.static_range(q):
                value = tl.load(activity + row[:, None] + (f + j * WIDE)[None, :])
                if PLACES:
                    which = tl.where(value <= best, which, i * across + j)
                best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
        to, there = (b * filters + f)[:, None] * outputs + o[None, :], (o[None, :] < outputs) & (f[:, None] < filters)
        tl.store(out + to, tl.trans(best), mask=there)
        if PLACES:
            tl.store(where + to, tl.trans(which + first[:, None]).to(tl.int64), mask=there)


def conv_pool(images: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, pools: list, places: bool) -> tuple[list[Tensor], Tensor | None]:
    """max_pool2d(conv2d(images, weight, bias) * scale, w_pool, s_pool) for each of the poolings, and, if ``places``, where the largest value of the first
    was (int64, in the map of activities). All float32, contiguous: see :func:`khnb.native.conv_pool`.
    """
    (count, C, H, W), filters, w, device = images.shape, len(weight), weight.shape[-1], images.device
    side, across, D, none = H - w + 1, W - w + 1, C * w * w, weight  # none: for what is not read
    how = CONVOLVE[D <= 64]
    deep, padded, wide = (triton.cdiv(size, block) * block for size, block in ((D, how["BD"]), (filters, how["BF"]), (filters, 32)))
    flat = torch.nn.functional.pad(weight.flatten(1), (0, deep - D, 0, padded - filters))
    (x, of_images), of_weight, halves = _packed(images), _size_of(flat), torch.empty(2, padded, deep, dtype=torch.float16, device=device)
    _pack[triton.cdiv(flat.numel(), 1024),](flat, of_weight, *halves, flat.numel(), PACKED=False, BN=1024)
    shapes = [(count, filters, (side - q) // step + 1, (across - q) // step + 1) for q, step in pools]
    found, where = [torch.empty(shape, device=device) for shape in shapes], torch.empty(shapes[0], dtype=torch.int64, device=device) if places else None
    part = min(count, max(1, ACTIVITIES // (side * across * wide)))
    activity = torch.empty(part, side * across, wide, device=device)
    for first in range(0, count, part):
        some = min(part, count - first)
        total = some * side * across
        _convolve[padded // how["BF"], triton.cdiv(total, how["BN"])](
            x[first:], of_images, *halves, of_weight, none if bias is None else bias, none if scale is None else scale[first:], activity, total, filters,
            DEEP=deep, WIDE=wide, C=C, H=H, W=W, w=w, BIASED=bias is not None, SCALED=scale is not None, **how,
        )
        for i, ((q, step), out) in enumerate(zip(pools, found, strict=True)):
            here, blocks = places and i == 0, triton.cdiv(wide, POOL["BF"])
            _pool[some * blocks,](
                activity, out[first:], where[first:] if here else none, blocks, filters, WIDE=wide, side=side, across=across, q=q, step=step, PLACES=here, **POOL
            )
    return found, where


@triton.jit
def _spread(
    slope, where, out, blocks, filters, maps, programs, items, place_apart, filter_apart, PLACES: tl.constexpr,
    HIGH: tl.constexpr, WIDE: tl.constexpr, APART: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BN: tl.constexpr,
):
    """Maps of one image and BM filters after the other: what each output adds to the place that it was taken from. Windows that are APART from each other
    have no place in common, so those are done side by side, and the others one after the other."""
    high: tl.constexpr = (HIGH + APART - 1) // APART
    wide: tl.constexpr = (WIDE + APART - 1) // APART
    o = tl.arange(0, BO)
    for item in range(tl.program_id(0), items, programs):
        b, f = (item // blocks).to(tl.int64), item % blocks * BM + tl.arange(0, BM)
        to = out + b * PLACES * maps
        for start in range(0, PLACES, BN):
            n = start + tl.arange(0, BN)
            there = (n[:, None] < PLACES) & (f[None, :] < maps)
            tl.store(to + n[:, None] * place_apart + (f * filter_apart)[None, :], tl.zeros((BN, BM), tl.float32), mask=there)
        tl.debug_barrier()
        for each in range(APART * APART):
            y, x = each // APART + o // wide * APART, each % APART + o % wide * APART
            there = ((o < high * wide) & (y < HIGH) & (x < WIDE))[:, None] & (f[None, :] < filters)
            at = (b * filters + f)[None, :] * (HIGH * WIDE) + (y * WIDE + x)[:, None]
            place = to + tl.load(where + at, mask=there, other=0) * place_apart + (f * filter_apart)[None, :]
            tl.store(place, tl.load(place, mask=there, other=0.0) + tl.load(slope + at, mask=there, other=0.0), mask=there)
            tl.debug_barrier()


def spread(slope: Tensor, where: Tensor, side: tuple[int, int], pool: tuple[int, int], by_place: bool) -> Tensor:
    """The slope of the activities, of maps of this side, from that of the pooled ones (B, F, P, P) and where these were (int64): see
    :func:`conv_pool`. Always added up in the same order. PyTorch looks at each place for all the windows it is in, about thirty.

    (B, F, side, side), or, if ``by_place``, (B, side * side, F or a little more, where it is 0), as :func:`filters_gradient` wants it.
    """
    (count, filters, high, wide), places, (q, step) = slope.shape, side[0] * side[1], pool
    padded, apart = triton.cdiv(filters, 32) * 32, triton.cdiv(q, step)
    out = torch.empty((count, places, padded) if by_place else (count, filters, *side), device=slope.device)
    together, blocks = triton.next_power_of_2(triton.cdiv(high, apart) * triton.cdiv(wide, apart)), triton.cdiv(filters, 32)
    programs = min(count * blocks, 4 * _multiprocessors(slope.device))
    if programs:
        _spread[programs,](
            slope, where, out, blocks, filters, padded if by_place else filters, programs, count * blocks, padded if by_place else 1, 1 if by_place else places,
            PLACES=places, HIGH=high, WIDE=wide, APART=apart, BM=32, BO=together, BN=32, num_warps=8,
        )
    return out


@triton.jit
def _filters(
    images, of_images, slope, of_slope, partial, total, filters, each, WIDE: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, w: tl.constexpr,
    TO: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):
    """Of BF filters and BD weights of each: the products of the slopes of activities with the patches they are of, over ``each`` of all the places."""
    D: tl.constexpr = C * w * w
    f, d, part = tl.program_id(0) * BF + tl.arange(0, BF), tl.program_id(1) * BD + tl.arange(0, BD), tl.program_id(2)
    away, found, scaling = tl.where(d < D, _away(d, H, W, w), 0), tl.zeros((BF, BD), tl.float32), _scaling(of_slope, TO)
    for start in range(part * each, tl.minimum(total, (part + 1) * each), BN):
        n = start + tl.arange(0, BN)
        here = tl.minimum(n, total - 1)
        corner = _corner(here, C, H, W, w)
        g = tl.load(slope + here[:, None] * WIDE + f[None, :], mask=(n[:, None] < total) & (f[None, :] < WIDE), other=0.0)
        g, g_low = _halves(g * scaling)
        x, x_low = _unpack(tl.load(images + away[:, None] + corner[None, :]))
        found = _product(tl.trans(g), tl.trans(g_low), tl.trans(x), tl.trans(x_low), found)
    found *= 1 / _scaling(of_images, TOP)
    found *= 1 / scaling
    tl.store(partial + (part * filters + f)[:, None] * D + d[None, :], found, mask=(f[:, None] < filters) & (d[None, :] < D))


def filters_gradient(images: Tensor, slope: Tensor, w: int, grad: Tensor, pool: tuple[int, int]) -> Tensor:
    """The gradient (F, C, w, w) of the filters of a convolution of the images (B, C, H, W), from that of its activities, by place as :func:`spread`
    gives it, and that of the pooled ones, ``grad`` (B, F, P, P), which says how large numbers are: as many of those come together at a place as there are
    windows over it.
    """
    (count, C, H, W), filters, total = images.shape, grad.shape[1], slope.shape[0] * slope.shape[1]
    if count > (most := max(1, LARGEST // slope[0].numel())):
        return torch.stack([filters_gradient(*some, w, of, pool) for *some, of in zip(*(each.split(most) for each in (images, slope, grad)), strict=True)]).sum(0)
    (x, of_images), blocks = _packed(images), (triton.cdiv(filters, FILTERS["BF"]), triton.cdiv(C * w * w, FILTERS["BD"]))
    parts = max(1, min(count, 4 * _multiprocessors(images.device) // (blocks[0] * blocks[1])))
    each = triton.cdiv(triton.cdiv(total, parts), FILTERS["BN"]) * FILTERS["BN"]
    to = TOP.value - (triton.cdiv(*pool) ** 2 - 1).bit_length()
    partial = torch.empty(triton.cdiv(total, each), filters, C, w, w, device=images.device)
    _filters[(*blocks, len(partial))](x, of_images, slope, _size_of(grad), partial, total, filters, each, WIDE=slope.shape[2], C=C, H=H, W=W, w=w, TO=to, **FILTERS)
    return partial.sum(0)


def images_gradient(weight: Tensor, slope: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The gradient of the images, of this shape, of their convolution with the filters (F, C, w, w), from that of its activities (B, F, H-w+1, W-w+1).

    For small filters, many of them, as a product of matrices and :func:`torch.nn.functional.fold`: a quarter of the time that cuDNN takes for it (K=20, w=4, on an H200).
    """
    if weight.shape[-1] < 6 and len(weight) > 128:
        return torch.nn.functional.fold(torch.matmul(weight.flatten(1).T, slope.flatten(2)), shape[2:], weight.shape[-1])
    return torch.nn.grad.conv2d_input(shape, weight, slope)


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
def _judge(logits, bias, labels, slope, dbias, loss, right, share, count, deep, heads, classes, BB: tl.constexpr, BC: tl.constexpr):
    """Of one head: the slope of share * (sum of the cross-entropies) by each logit, in terms, 0 for images beyond the last; that by the bias, loss and
    hits are added up."""
    head, c, total, lost, hits = tl.program_id(0), tl.arange(0, BC), tl.zeros((BC,), tl.float32), tl.full((), 0.0, tl.float64), tl.full((), 0, tl.int64)
    offset = tl.load(bias + head * classes + c, mask=c < classes, other=-INF)
    for first in range(0, count, BB):
        b = first + tl.arange(0, BB)
        there = (b[:, None] < count) & (c[None, :] < classes)
        x = tl.load(logits + (b * heads + head)[:, None] * classes + c[None, :], mask=there, other=0.0) + offset[None, :]
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
    wide = min(64, max(16, triton.next_power_of_2(columns)))
    some, parts = 128 // wide, max(1, min(32, D // 512))  # as many powers at a time as registers hold; features in so many parts, side by side
    deep, depth, terms = triton.cdiv(count, 16) * 16, triton.cdiv(triton.cdiv(D, parts), 16) * 16, _in_terms(weight)
    partial, slope = torch.empty(parts, count, heads, classes, device=weight.device), torch.empty(2, heads, classes, deep, device=weight.device)
    together = [(tuple(powers[i : i + some]), slice(i * each, (i + some) * each)) for i in range(0, len(powers), some)]
    blocks = triton.cdiv(columns, wide)
    for n, of in together:
        _logits[blocks, triton.cdiv(count, 128), parts](
            features, rows, *terms[:, of], partial[:, :, of], count, D, columns, heads * classes, depth, NAME=sigma, POWERS=n, BB=128, BD=16, BC=wide, num_warps=8
        )
    _judge[heads,](
        partial.sum(0), bias, labels, slope, to.bias, to.loss, to.right, share, count, deep, heads, classes,
        BB=512, BC=max(16, triton.next_power_of_2(classes)), num_warps=16,
    )
    for n, of in together:
        _gradient[blocks, triton.cdiv(D, 64)](features, rows, *slope[:, of], to.weight[of], count, deep, D, columns, NAME=sigma, POWERS=n, BB=32, BD=64, BC=wide)
