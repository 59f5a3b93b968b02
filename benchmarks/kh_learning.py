"""The KH engine against other ways to do the same work: ``python benchmarks/kh_learning.py [threads] [K,w ...]``.

Every way makes the same updates, on the same minibatches of 1,000 patches of random images, with p=2, m=3, delta=0.1:

- engine: ``khnb.learning.train_layers``, all of it, with 1, 10 and 50 layers in lockstep;
- obvious: unfold, matmul, topk, scatter, matmul, in PyTorch, one layer at a time;
- biopytorch: ``BioLinear.delta_weights`` of that package (``pip install --no-deps biopytorch``), left out where it is not installed;
- product: the matrix product of filters and patches alone, in float32 and in bfloat16: what any way must do at least.

Times are milliseconds an update of one layer, medians of interleaved rounds; ratios within one run are what to quote.
"""

import importlib.util
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from khnb import native, patches
from khnb.layer import synapses
from khnb.learning import minibatches, train_layers
from khnb.settings import ConvSettings

BATCH, ROUNDS = 1000, 5
LAYERS = (1, 10, 50)
MACS = 4e9  # multiplications a round and way, about; at least 5 updates


def biolinear():
    """The module of the package, without the rest of it (which asks for pytorch-lightning and wandb); None where it is not there."""
    spec = importlib.util.find_spec("biopytorch")
    if spec is None:
        return None
    found = importlib.util.spec_from_file_location("biolinear", Path(spec.submodule_search_locations[0]) / "biolinear.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.BioLinear


def one_at_a_time(images, s, change):
    """An epoch of one layer with ``change(weight, patches)``; all patches are made first."""
    each = (images.shape[-1] - s.w + 1) ** 2
    v = patches.normalise(patches.extract(images.float() / 255, s.w).flatten(0, 1), s.p)
    weight = torch.randn(s.K**2, v.shape[1])
    updates = 0
    for ids in minibatches(len(images), each, s.conv_batch, torch.Generator().manual_seed(1)):
        delta = change(weight, v[ids])
        weight.add_(delta, alpha=s.conv_eta0 / delta.abs().max().item())
        updates += 1
    return updates


def obvious(s):
    """Eqs. 4.3-4.7 with topk and scatter."""

    def change(weight, v):
        h = v @ synapses(weight, s.p).T
        top = h.topk(s.m, dim=1).indices
        g = torch.zeros_like(h).scatter_(1, top[:, :1], 1.0).scatter_(1, top[:, -1:], -s.delta)
        return g.T @ v - (g * h).sum(0)[:, None] * weight

    return change


def timed(work) -> float:
    started = time.perf_counter()
    updates = work()
    return (time.perf_counter() - started) / updates * 1e3


def engine(images, settings):
    """Updates times layers of one epoch in lockstep."""
    count = []
    train_layers(images, settings, tell=lambda layers, updates: count.append(layers * updates))
    return sum(count)


def product(weight, v, updates):
    for _ in range(updates):
        weight @ v.T
    return updates


def main():
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    torch.manual_seed(0)
    shapes = [tuple(map(int, word.split(","))) for word in sys.argv[2:]] or [(10, 4), (10, 8), (10, 12), (20, 4), (20, 8), (20, 12)]
    BioLinear = biolinear()
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s), native kernel: {native._library() is not None}")
    print("ms an update of 1,000 patches and one layer; engine with 1, 10 and 50 layers in lockstep")
    names = [*(f"engine {n}" for n in LAYERS), "obvious", "biopytorch", "product", "bf16"]
    print(f"{'K':>3} {'w':>3} " + " ".join(f"{name:>10}" for name in names) + f" {'obvious/50':>11} {'bio/50':>8} {'of product':>11} {'Gpatch*F/s':>11}")
    for K, w in shapes:
        s = ConvSettings(K=K, w=w, conv_epochs=1, conv_batch=BATCH)
        D, F = 3 * w * w, K * K
        updates = max(5, int(MACS / (F * D * BATCH)))
        count = -(-updates * BATCH // (33 - w) ** 2)
        images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
        few = images[: max(2, -(-count // 10))]
        weight, v = torch.randn(F, D), torch.rand(BATCH, D)
        ways = {f"engine {n}": lambda n=n: engine(images if n == 1 else few, [ConvSettings(**s.dict() | dict(seed=i)) for i in range(n)]) for n in LAYERS}
        ways["obvious"] = lambda: one_at_a_time(images, s, obvious(s))
        if BioLinear:
            layer = BioLinear(D, F, delta=s.delta, ranking_param=s.m, lebesgue_p=s.p)
            ways["biopytorch"] = lambda: one_at_a_time(images, s, lambda weight, v: layer.delta_weights(v, weight))
        ways["product"] = lambda: product(weight, v, updates)
        ways["bf16"] = lambda: product(weight.bfloat16(), v.bfloat16(), updates)
        times = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, work in ways.items():
                times[name].append(timed(work))
        ms = {name: statistics.median(taken) for name, taken in times.items()}
        print(
            f"{K:>3} {w:>3} " + " ".join(f"{ms.get(name, float('nan')):>10.3f}" for name in names)
            + f" {ms['obvious'] / ms['engine 50']:>11.1f} {ms.get('biopytorch', float('nan')) / ms['engine 50']:>8.1f}"
            + f" {ms['product'] / ms['engine 50']:>11.0%} {BATCH * F / ms['engine 50'] / 1e6:>11.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
