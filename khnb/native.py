"""The little C there is, compiled on first use where a C compiler is at hand.

``kernels.c`` is compiled once a machine (about a second) into the user's cache. Where that cannot be done, or
``KHNB_NATIVE=0`` is set, the functions give ``None`` and their callers take a plain PyTorch path, with equal results.
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
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.c")
BLOCK = 112  # filters of the fused convolution done together
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
    library.khnb_conv_pool.argtypes = [place] + [number] * 5 + [place] * 2 + [number] * 5 + [place] * 3
    library.khnb_conv_pool_back.argtypes = [place] + [number] * 5 + [place] * 2 + [number] * 2 + [place] * 2
    for name in ("sizes", "gather", "scales", "conv_pool", "conv_pool_back"):
        getattr(library, f"khnb_{name}").restype = None
    return library


@functools.cache
def _sizes() -> tuple[int, int, int]:
    found = torch.empty(3, dtype=torch.int64)
    _library().khnb_sizes(found.data_ptr())
    return tuple(found.tolist())


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


def _in_parts(count: int, work) -> list:
    """work(start, stop) on as many threads as PyTorch uses (the kernels let go of the interpreter lock)."""
    threads = max(1, min(torch.get_num_threads(), count))
    edges = [count * i // threads for i in range(threads + 1)]
    if threads == 1:
        return [work(0, count)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, edges[:-1], edges[1:]))


class _ConvPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, weight, bias, w_pool, s_pool):
        count, channels, height, width = images.shape
        filters, w = len(weight), weight.shape[-1]
        side, across, size = height - w + 1, width - w + 1, channels * w * w
        down, right = (side - w_pool) // s_pool + 1, (across - w_pool) // s_pool + 1
        out = images.new_empty((count, filters, down, right))
        where = torch.empty(out.shape, dtype=torch.int32)
        # as many filters at a time as keep the rows of one image in the processor's cache
        blocks = []
        for first in range(0, filters, BLOCK):
            here = min(BLOCK, filters - first)
            padded = -(-here // 16) * 16
            flat, offset = weight.new_zeros((size, padded)), weight.new_zeros(padded)
            flat[:, :here] = weight[first : first + here].flatten(1).T
            offset[:here] = bias[first : first + here]
            blocks.append((first, here, padded, flat, offset))

        def work(start, stop):
            for first, here, padded, flat, offset in blocks:
                scratch = torch.empty(padded * (across + 2 * side * right) + size)
                _library().khnb_conv_pool(
                    images[start:].data_ptr(), stop - start, channels, height, width, w, flat.data_ptr(), offset.data_ptr(),
                    padded, here, filters, w_pool, s_pool, scratch.data_ptr(),
                    out[start:, first:].data_ptr(), where[start:, first:].data_ptr(),
                )

        _in_parts(count, work)
        ctx.save_for_backward(images, where)
        ctx.shape = weight.shape
        return out

    @staticmethod
    def backward(ctx, grad):
        (images, where), grad = ctx.saved_tensors, grad.contiguous()
        count, channels, height, width = images.shape
        filters, w = ctx.shape[0], ctx.shape[-1]

        def work(start, stop):
            weight, bias = torch.zeros(ctx.shape), torch.zeros(filters)
            _library().khnb_conv_pool_back(
                images[start:].data_ptr(), stop - start, channels, height, width, w, grad[start:].data_ptr(), where[start:].data_ptr(),
                filters, where[0, 0].numel(), weight.data_ptr(), bias.data_ptr(),
            )
            return weight, bias

        parts = _in_parts(count, work)
        return None, sum(p[0] for p in parts), sum(p[1] for p in parts), None, None


def conv_pool(images: Tensor, weight: Tensor, bias: Tensor, w_pool: int, s_pool: int) -> Tensor | None:
    """max_pool2d(conv2d(images, weight, bias), w_pool, s_pool), differentiable in weight and bias; ``None`` where not served.

    Served: float32 on the CPU, images that need no gradient, a convolution at least 6 positions wide and high.
    """
    fits = min(images.shape[2:]) - weight.shape[-1] + 1 >= 6 and len(images) > 0
    tensors = (images, weight, bias)
    if images.requires_grad or not fits or any(t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors):
        return None
    if _library() is None:
        return None
    return _ConvPool.apply(images.contiguous(), weight, bias, w_pool, s_pool)
