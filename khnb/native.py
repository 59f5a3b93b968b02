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
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-shared", "-fPIC")


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
