"""The update of the KH rule against the obvious way in PyTorch: ``python benchmarks/kh_update.py [threads]``.

Both take the same minibatches of 1,000 patches out of 1,000 images and change the same filters: gather unit-norm patches, one
product, winner and m-th, eq. 4.7, scale by the largest entry. "obvious" is unfold, topk, and one-hot products; "product" is the
one matrix product alone, the least any way needs. Medians of interleaved rounds; ratios are what to quote.
"""

import platform
import statistics
import sys
import time

import torch

from khnb import patches
from khnb.learning import _update
from khnb.layer import synapses

IMAGES, BATCH, ROUNDS, UPDATES = 1000, 1000, 15, 20
M, DELTA, P, ETA = 3, 0.1, 2.0, 1e-3


def obvious(images, w, weight):
    """All patches of the images once an epoch, as a tensor; then topk and one-hot products."""
    unit = patches.normalise(patches.extract(images.float() / 255, w).flatten(0, 1), P)
    order = torch.randperm(len(unit))

    def update(i):
        v = unit[order[i * BATCH : (i + 1) * BATCH]]
        h = v @ synapses(weight, P).T
        top = h.topk(M, dim=1).indices
        g = torch.zeros_like(h).scatter_(1, top[:, :1], 1.0).scatter_(1, top[:, -1:], -DELTA)
        change = g.T @ v - (g * h).sum(0)[:, None] * weight
        weight.add_(change, alpha=ETA / change.abs().max().item())

    return update


def engine(images, w, weight):
    """As khnb.learning.train_layer does it: patches are made when they are needed."""
    order = torch.randperm(len(images) * (images.shape[-1] - w + 1) ** 2)

    def update(i):
        v = patches.unit(images, order[i * BATCH : (i + 1) * BATCH], w, P)
        change, _ = _update(weight, v, M, DELTA, P)
        weight.add_(change * (ETA / change.abs().max()))

    return update


def product(images, w, weight):
    """The product alone, on one minibatch."""
    v = torch.rand(BATCH, weight.shape[1])
    return lambda i: weight @ v.T


def main():
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8)
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s); ms an update of {BATCH} patches")
    print(f"{'K':>3} {'w':>3} {'obvious':>9} {'engine':>9} {'product':>9} {'obvious/engine':>15} {'product/engine':>15}")
    for K, w in [(10, 4), (10, 8), (20, 4), (20, 8)]:
        weight = torch.rand(K * K, 3 * w * w)
        ways = [make(images, w, weight / weight.norm(dim=1, keepdim=True)) for make in (obvious, engine, product)]
        times = [[] for _ in ways]
        for round in range(ROUNDS):
            for way, taken in zip(ways, times, strict=True):
                started = time.perf_counter()
                for i in range(round * UPDATES, (round + 1) * UPDATES):
                    way(i)
                taken.append((time.perf_counter() - started) / UPDATES * 1e3)
        a, b, c = (statistics.median(t) for t in times)
        print(f"{K:>3} {w:>3} {a:>9.3f} {b:>9.3f} {c:>9.3f} {a / b:>15.2f} {c / b:>15.2f}", flush=True)


if __name__ == "__main__":
    main()
