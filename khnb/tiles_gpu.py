"""How the kernels for a GPU (khnb/kernels_gpu.py) cut up their work, which is also what khnb/costs_gpu.py counts."""

from __future__ import annotations


def ranked(neurons: int) -> tuple[int, int]:
    """How many patches meet how many neurons of a KH layer, all of it, at once: as many as keep their activities in registers."""
    together = max(16, 1 << (neurons - 1).bit_length())
    return min(64, 2**14 // together), together


def rooms(numbers: float, count: int, filters: int, processors: int) -> tuple[int, int]:
    """How many filters a program on a GPU convolves together, and how many programs there are, one or two for each processor: as many as keep what they
    need in the cache, ``numbers`` of each filter; 40 MB are taken."""
    most = int(10 * 2**20 // numbers)
    block = 64 if most >= 64 * processors else 32
    return block, min(count * -(-filters // block), processors * max(1, min(2, most // block // processors)))


def places_together(places: int) -> int:
    """How many places of an image a program convolves together: as many as possible, as weights are read for each time, but for the places beyond the last."""
    return 256 if -(-places // 256) * 2 == -(-places // 128) else 128


def read_together(columns: int, features: int) -> tuple[int, int, int]:
    """For how many powers at most, and how many columns of weights of each, a GPU reads features at once: as many as its registers hold; and in how
    many parts, done side by side: enough for all of it with few classifiers as well."""
    wide = min(64, max(16, 1 << (columns - 1).bit_length()))
    return 128 // wide, wide, max(1, min(16, features // 512))
