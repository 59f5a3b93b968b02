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
    library.khnb_patches.argtypes = [ctypes.c_void_p] + [ctypes.c_int64] * 4 + [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p]
    library.khnb_patches.restype = None
    library.khnb_conv_pool.argtypes = [ctypes.c_void_p] + [ctypes.c_int64] * 5 + [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 5 + [ctypes.c_void_p] * 3
    library.khnb_conv_pool.restype = None
    library.khnb_conv_pool_back.argtypes = [ctypes.c_void_p] + [ctypes.c_int64] * 5 + [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2 + [ctypes.c_void_p] * 2
    library.khnb_conv_pool_back.restype = None
    library.khnb_rank.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int] + [ctypes.c_void_p] * 2
    return library


def rank(activity: Tensor, m: int) -> tuple[Tensor, Tensor] | None:
    """Winner and m-th of each column of a float32 CPU tensor (F, N), or ``None`` where this is not served."""
    if activity.device.type != "cpu" or activity.dtype != torch.float32 or not activity.is_contiguous():
        return None
    library = _library()
    if library is None:
        return None
    neurons, count = activity.shape
    winner, inhibited = torch.empty((2, count), dtype=torch.int64)
    done = library.khnb_rank(activity.data_ptr(), neurons, count, m, winner.data_ptr(), inhibited.data_ptr())
    return (winner, inhibited) if done == 0 else None


def unit_patches(images: Tensor, ids: Tensor, w: int, p: float) -> Tensor | None:
    """What :func:`khnb.patches.unit` gives, for uint8 images on the CPU and a whole p; else ``None``."""
    if images.device.type != "cpu" or images.dtype != torch.uint8 or not images.is_contiguous() or p != int(p):
        return None
    library = _library()
    if library is None:
        return None
    _, channels, height, width = images.shape
    ids = ids.contiguous()
    out = torch.empty((len(ids), channels * w * w))
    library.khnb_patches(
        images.data_ptr(), channels, height, width, w, ids.data_ptr(), len(ids), int(p), out.data_ptr()
    )
    return out


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
