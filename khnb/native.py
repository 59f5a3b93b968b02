"""The little C there is, compiled on first use where a C compiler is at hand, and the way to the kernels of a GPU (``kernels_gpu.py``).

``kernels.c`` is compiled once a machine (about a second) into the user's cache. Where that cannot be done, on a GPU, or where
``KHNB_NATIVE=0`` is set, a plain PyTorch path is taken, with equal results: here, or by the caller where a function says whether it serves.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight

from khnb.settings import PRELU_SLOPE

SOURCE = Path(__file__).with_name("kernels.c")
BLOCK = 112  # filters of the fused convolution done together
SIGMAS = ("sigmoid", "tanh", "relu", "prelu", "elu", "rexp")  # by their numbers in kernels.c
# sums may be reordered, to be vectorised; -ffast-math would also make the whole process flush denormals to zero
REORDER = ("-fno-math-errno", "-fno-signed-zeros", "-fno-trapping-math", "-fassociative-math")
FLAGS = ("-O3", "-march=native", *REORDER, "-shared", "-fPIC")


def cache_dir() -> Path:
    """Where khnb keeps what can be made again: ``$XDG_CACHE_HOME/khnb`` or ``~/.cache/khnb``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "khnb"


def _cpu() -> str:
    try:  # -march=native: a library made on one processor may not run on another that shares the cache
        return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor()


@functools.cache
def _library():
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if os.environ.get("KHNB_NATIVE") == "0" or compiler is None:
        return None
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), compiler.encode(), _cpu().encode(), *map(str.encode, FLAGS)]))
    target = cache_dir() / f"kernels-{key.hexdigest()[:16]}.so"
    try:
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                made = Path(folder) / target.name
                subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(made), "-lm"], check=True, capture_output=True)
                os.replace(made, target)
        library = ctypes.CDLL(str(target))
    except (OSError, subprocess.CalledProcessError):
        return None
    number, place = ctypes.c_int64, ctypes.c_void_p
    library.khnb_sizes.argtypes = [place]
    library.khnb_gather.argtypes = [place] + [number] * 4 + [place, number, place, place]
    library.khnb_scales.argtypes = [place, number, number, ctypes.c_int, place]
    library.khnb_learn.argtypes = (
        [place] * 3 + [number] * 3 + [place, number] + [ctypes.c_int] * 2 + [ctypes.c_float] * 2 + [ctypes.c_int] * 2 + [place] * 2
    )
    library.khnb_learn.restype = number
    library.khnb_conv_pool.argtypes = [place] + [number] * 5 + [place] * 3 + [number] * 3 + [place, number] + [place] * 3
    library.khnb_conv_pool_back.argtypes = [place] + [number] * 5 + [place] * 2 + [number] * 2 + [place] * 3
    library.khnb_conv_pool_images.argtypes = [place] * 2 + [number] * 5 + [place] * 3 + [number] * 2 + [place] * 3
    library.khnb_heads.argtypes = [place] * 2 + [number] * 3 + [ctypes.c_float] + [number] * 2 + [place] * 7
    library.khnb_activated.argtypes = [place] * 2 + [number, ctypes.c_int, number, ctypes.c_float, place]
    for name in ("sizes", "gather", "scales", "conv_pool", "conv_pool_back", "conv_pool_images", "heads", "activated"):
        getattr(library, f"khnb_{name}").restype = None
    return library


@functools.cache
def _sizes() -> tuple[int, int, int]:
    found = torch.empty(3, dtype=torch.int64)
    _library().khnb_sizes(found.data_ptr())
    return tuple(found.tolist())


@functools.cache
def _gpu():
    try:
        from khnb import kernels_gpu
    except ImportError:  # Triton comes with PyTorch for CUDA, not with others
        return None
    return None if os.environ.get("KHNB_NATIVE") == "0" else kernels_gpu


def gpu(tensor: Tensor):
    """The module :mod:`khnb.kernels_gpu` where it serves this tensor, float32 on a GPU, else ``None``."""
    return _gpu() if tensor.device.type == "cuda" and tensor.dtype == torch.float32 else None


def learns(images: Tensor, m: int, p: float) -> bool:
    """Whether :func:`gather` and :func:`learn` serve these images (uint8 on the CPU), this rank (at most 8) and order (whole)."""
    fits = images.device.type == "cpu" and images.dtype == torch.uint8 and images.is_contiguous() and p == int(p)
    return fits and _library() is not None and m <= _sizes()[2]


@dataclass
class Patches:
    """Minibatches of patches as the kernels read them: raw values twice over, and 1 / p-norm for each p that was asked for."""

    rows: Tensor  # (updates, batch, D)
    columns: Tensor  # (updates, blocks, D, patches side by side)
    scales: dict[float, Tensor]  # p -> (updates, batch)


def gather(images: Tensor, ids: Tensor, w: int, orders, room: Patches | None = None) -> Patches:
    """Patches number ids (updates, batch), counted image by image and row by row; ``orders``: each p that is needed.

    ``room`` is one that is not needed any more: fresh memory costs as much as filling it.
    """
    _, channels, height, width = images.shape
    updates, batch = ids.shape
    size, lanes = channels * w * w, _sizes()[0]
    if room is not None and room.rows.shape[1] == batch and len(room.rows) >= updates:
        rows, columns = room.rows[:updates], room.columns[:updates]
    else:
        rows, columns = torch.empty(updates, batch, size), torch.empty(updates, -(-batch // lanes), size, lanes)
    ids, scales = ids.contiguous(), {p: torch.empty(updates, batch) for p in set(orders)}
    for u in range(updates):
        _library().khnb_gather(
            images.data_ptr(), channels, height, width, w, ids[u].data_ptr(), batch, rows[u].data_ptr(), columns[u].data_ptr()
        )
    for p, scale in scales.items():
        _library().khnb_scales(rows.data_ptr(), updates * batch, size, int(p), scale.data_ptr())
    return Patches(rows, columns, scales)


def learn(patches: Patches, weight: Tensor, wins: Tensor, p, m, delta, eta, by_q: bool, by_max: bool) -> int:
    """One update after the other of one layer, weight (F, D) float32 and wins (F,) int64 changed in place; how many were done."""
    updates, batch, size = patches.rows.shape
    lanes, together, _ = _sizes()
    neurons = len(weight)
    padded = -(-neurons // together) * together
    scratch = torch.empty(padded * (size + lanes) + neurons * (size + 2))
    return _library().khnb_learn(
        patches.rows.data_ptr(), patches.columns.data_ptr(), patches.scales[p].data_ptr(), batch, updates, size,
        weight.data_ptr(), neurons, int(p), m, delta, eta, by_q, by_max, wins.data_ptr(), scratch.data_ptr(),
    )


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _in_parts(count: int, work) -> list:
    """work(start, stop) on as many threads as PyTorch uses (the kernels let go of the interpreter lock)."""
    threads = max(1, min(torch.get_num_threads(), count))
    edges = [count * i // threads for i in range(threads + 1)]
    if threads == 1:
        return [work(0, count)]
    return list(_pool(threads).map(work, edges[:-1], edges[1:]))


def _pointers(tensors) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _convolver(images: Tensor, weight: Tensor):
    """What makes convolution and pooling of these: (images, weight, bias, scale, pools, places) -> pooled activities of each pooling, and where those
    of the first were, if ``places``."""
    if convolves(images, weight):
        return _conv_pool
    kernels = gpu(images) if len(images) and weight.dtype == torch.float32 else None
    return kernels.conv_pool if kernels else _plain


def _conv_pool(images, weight, bias, scale, pools, places: bool):
    """The kernel for all filters, as many at a time as keep the rows of one image in the processor's cache."""
    count, channels, height, width = images.shape
    filters, w = len(weight), weight.shape[-1]
    side, across, size = height - w + 1, width - w + 1, channels * w * w
    out = [images.new_empty((count, filters, (side - q) // s + 1, (across - q) // s + 1)) for q, s in pools]
    where = torch.empty(out[0].shape, dtype=torch.int32) if places else None
    step, blocks = max(16, BLOCK // len(pools) // 16 * 16), []
    for first in range(0, filters, step):
        here = min(step, filters - first)
        padded = -(-here // 16) * 16
        flat, offset = weight.new_zeros((size, padded)), weight.new_zeros(padded)
        flat[:, :here] = weight[first : first + here].flatten(1).T
        offset[:here] = 0 if bias is None else bias[first : first + here]
        blocks.append((first, here, padded, flat, offset))
    windows = torch.tensor(pools, dtype=torch.int64)

    def work(start, stop):
        for first, here, padded, flat, offset in blocks:
            scratch = torch.empty(padded * across * (1 + side * (len(pools) + places)) + size)
            _library().khnb_conv_pool(
                images[start:].data_ptr(), stop - start, channels, height, width, w, flat.data_ptr(), offset.data_ptr(),
                None if scale is None else scale[start:].data_ptr(), padded, here, filters, windows.data_ptr(), len(pools),
                scratch.data_ptr(), _pointers([each[start:, first:] for each in out]), where[start:, first:].data_ptr() if places else None,
            )

    _in_parts(count, work)
    return out, where


def _plain(images, weight, bias, scale, pools, places: bool):
    """The same as :func:`_conv_pool` in PyTorch, on any device."""
    activity = F.conv2d(images, weight, bias)
    if scale is not None:
        activity *= scale
    if places:
        found = [F.max_pool2d(activity, *pool, return_indices=True) for pool in pools]
        return [out for out, _ in found], found[0][1]
    return [F.max_pool2d(activity, *pool) for pool in pools], None


class _ConvPool(torch.autograd.Function):
    """Keeps for the backward pass what was pooled and where it was, not the activities: they are most of the memory, and of the traffic on a GPU."""

    @staticmethod
    def forward(ctx, images, weight, bias, scale, w_pool, s_pool):
        convolver = _convolver(images, weight)
        ctx.served, ctx.pool = convolver is _conv_pool, (w_pool, s_pool)
        (out,), where = convolver(images, weight, bias, scale, [ctx.pool], any(ctx.needs_input_grad))
        ctx.save_for_backward(images, weight, scale, where, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = (*ctx.saved_tensors, grad.contiguous(), ctx.pool, *ctx.needs_input_grad[:4])
        return *(_ConvPool._native if ctx.served else _ConvPool._plain)(*saved), None, None

    @staticmethod
    def _plain(images, weight, scale, where, out, grad, pool, of_images, of_weight, of_bias, of_scale):
        w, slope, flat, kernels = weight.shape[-1], None, where.flatten(1), gpu(images)
        dbias = grad.sum((0, 2, 3)) if of_bias else None
        if scale is not None:
            if of_scale:
                slope = torch.zeros_like(scale).flatten(1).scatter_add_(1, flat, (grad * out).flatten(1)).view_as(scale) / scale
            grad = grad * scale.flatten(1).gather(1, flat).view_as(grad)
        side, grad = (images.shape[2] - w + 1, images.shape[3] - w + 1), grad.contiguous()
        if kernels:
            found = kernels.images_gradient(weight, kernels.spread(grad, where, side, pool, False), images.shape) if of_images else None
            dweight = kernels.filters_gradient(images, kernels.spread(grad, where, side, pool, True), w, grad, pool) if of_weight else None
            return found, dweight, dbias, slope
        sides = [[each, each] for each in (*pool, 0, 1)]  # window, stride, padding, dilation
        # the activities are asked for, and not looked at
        dense = torch.ops.aten.max_pool2d_with_indices_backward(grad, grad.new_empty(len(images), len(weight), *side), *sides, False, where)
        found = conv2d_input(images.shape, weight, dense) if of_images else None
        dweight = conv2d_weight(images, weight.shape, dense) if of_weight else None
        return found, dweight, dbias, slope

    @staticmethod
    def _native(images, weight, scale, where, out, grad, pool, of_images, of_weight, of_bias, of_scale):
        count, channels, height, width = images.shape
        filters, w = len(weight), weight.shape[-1]
        found = torch.zeros_like(images) if of_images or of_scale else None
        slope = None if found is None or scale is None else torch.zeros_like(scale)

        def work(start, stop):
            size, pixels, outputs = channels * w * w, height * width, where[0, 0].numel()
            scratch = torch.empty(max(pixels * (size + 2) + 2 * outputs, size + 3 * pixels + (4 * outputs + 1) * filters))
            if found is not None:
                _library().khnb_conv_pool_images(
                    images[start:].data_ptr(), weight.data_ptr(), stop - start, channels, height, width, w, grad[start:].data_ptr(),
                    where[start:].data_ptr(), None if scale is None else scale[start:].data_ptr(), filters, outputs,
                    found[start:].data_ptr(), None if slope is None else slope[start:].data_ptr(), scratch.data_ptr(),
                )
            if not of_weight and not of_bias:
                return None
            dweight, dbias = torch.zeros(weight.shape), torch.zeros(filters)
            _library().khnb_conv_pool_back(
                images[start:].data_ptr(), stop - start, channels, height, width, w, grad[start:].data_ptr(), where[start:].data_ptr(),
                filters, outputs, dweight.data_ptr(), dbias.data_ptr(), scratch.data_ptr(),
            )
            return dweight, dbias

        parts = _in_parts(count, work)
        dweight, dbias = (sum(p[0] for p in parts), sum(p[1] for p in parts)) if of_weight or of_bias else (None, None)
        return found if of_images else None, dweight, dbias if of_bias else None, slope if of_scale else None


def convolves(images: Tensor, weight: Tensor) -> bool:
    """Whether there is a compiled :func:`conv_pool` for these images (B, C, H, W) and filters (F, C, w, w): float32 on the CPU, at least 6 positions either way."""
    plain = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in (images, weight))
    fits = images.ndim == 4 and len(images) > 0 and images.shape[1] == weight.shape[1] and min(images.shape[2:]) - weight.shape[-1] + 1 >= 6
    return plain and fits and _library() is not None


def conv_pool(images: Tensor, weight: Tensor, bias: Tensor | None, w_pool: int, s_pool: int, scale: Tensor | None = None) -> Tensor:
    """max_pool2d(conv2d(images, weight, bias) * scale, w_pool, s_pool), differentiable once.

    images : (B, C, H, W) float, on any device; weight : (F, C, w, w); bias : (F,) or ``None``; scale : (B, 1, H-w+1, W-w+1), or ``None`` for 1;
    ``ValueError`` where the gradient of scaled filters would be needed.
    """
    if scale is not None and any(each is not None and each.requires_grad for each in (weight, bias)):
        raise ValueError("weight or bias needs a gradient, which is not to be had where activities are scaled")
    return _ConvPool.apply(images.contiguous(), weight.contiguous(), bias, None if scale is None else scale.contiguous(), w_pool, s_pool)


def conv_pools(images: Tensor, weight: Tensor, scale: Tensor, pools: list[tuple[int, int]]) -> list[Tensor]:
    """:func:`conv_pool` for each (w_pool, s_pool), without gradients."""
    return _convolver(images, weight)(images.contiguous(), weight.contiguous(), None, scale.contiguous(), pools, False)[0]


def activator(x: Tensor, sigma: str, n: float):
    """What makes sigma(x)^n in one pass, and its gradient in another, or ``None``: (x, sigma, n, slope of the result or None) -> result, or slope of x.

    float32 and contiguous all of them; on the CPU all activation functions but GeLU, and whole n.
    """
    if kernels := gpu(x):
        return kernels.activated
    plain = x.device.type == "cpu" and x.dtype == torch.float32
    return _activated if plain and sigma in SIGMAS and n == int(n) and _library() is not None else None


def _activated(x: Tensor, sigma: str, n: float, slope: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    out = torch.empty_like(x) if out is None else out
    x, slope, to = (each if each is None else each.view(-1) for each in (x, slope, out))

    def work(start, stop):
        _library().khnb_activated(
            x[start:].data_ptr(), None if slope is None else slope[start:].data_ptr(), stop - start, SIGMAS.index(sigma), int(n), PRELU_SLOPE, to[start:].data_ptr()
        )

    _in_parts(len(x), work)
    return out


def classifies(weight: Tensor) -> bool:
    """Whether :func:`classify` serves classifiers with these weights: float32 on the CPU."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and _library() is not None


def classify(y: Tensor, labels: Tensor, n: int, share: float, weight: Tensor, bias: Tensor, to: list) -> None:
    """Softmax classifiers on y^n: gradients of share * (sum of the cross-entropies), loss and hits are added to ``to``.

    y : (B, D) float32, contiguous; labels : (B,) int64; weight : (heads, classes, D); bias : (heads, classes); n : whole, >= 1;
    to : for each thread something with weight, bias, loss (float64) and right (int64), as :class:`khnb.heads._Sums`.
    """
    heads, classes, features = weight.shape
    lanes = _sizes()[0]
    room = 512 // lanes * 65 * lanes + 5 * 512 + 64 * heads * classes  # DEEP, IMAGES and OUTS in kernels.c

    def work(start, stop, sums):
        scratch = torch.empty(room)
        _library().khnb_heads(
            y[start:].data_ptr(), labels[start:].data_ptr(), stop - start, features, n, share, heads, classes, weight.data_ptr(),
            bias.data_ptr(), sums.weight.data_ptr(), sums.bias.data_ptr(), sums.loss.data_ptr(), sums.right.data_ptr(), scratch.data_ptr(),
        )

    threads = min(len(to), len(y))
    edges = [len(y) * i // threads for i in range(threads + 1)]
    if threads == 1:
        work(0, len(y), to[0])
    else:
        list(_pool(threads).map(work, edges[:-1], edges[1:], to))
