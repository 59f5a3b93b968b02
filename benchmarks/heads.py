"""Classifiers together against one at a time, features, and the BP twin: ``python benchmarks/heads.py [threads]``.

On random filters (K=10, w=4, p=2) and random images, minibatches of 1,000. Classifiers (``khnb.heads.train_heads``) against:

- cached: the features sigma(pooled)^n of one head at a time kept in memory, then ``nn.Linear``, ``cross_entropy``, ``backward`` and ``AdamW``;
- plain: the same with the whole network of fig. 6.1 run for every minibatch, filters frozen.

for 1 and 10 heads and the 60 of a grid-3 group (5 w_pool, 3 sigma, 4 n), and for 20 heads that share their features (other eta0, seed
and schedule), in float32, float16 and bfloat16. Features (convolution, normalisation, max-pooling) against the chain conv2d, division,
max_pool2d, against conv2d alone, and against the machine's product at that shape. The BP twin against plain PyTorch. Activation functions with
their powers, as a BP model meets them, against PyTorch's one after the other.
Times are medians of interleaved rounds; ratios within one run are what to quote.
"""

import itertools
import platform
import statistics
import sys
import time

from khnb import native, training  # before torch, whose threads it keeps from spinning

import torch
import torch.nn.functional as F

from khnb.heads import Features, Head, train_heads
from khnb.layer import KHConv2d, synapses
from khnb.models import ACTIVATIONS, activate, bp_network, ll_network, power
from khnb.settings import HeadSettings

IMAGES, BATCH, ROUNDS, EPOCHS, WHOLE = 3000, 1000, 3, 100, 50_000
BASE = dict(sigma="gelu", n=4, w_pool=5, head_batch=BATCH, head_epochs=1)
GRID = [dict(sigma=s, n=n, w_pool=w) for w, s, n in itertools.product((2, 5, 7, 9, 11), ("relu", "elu", "gelu"), (1, 2, 4, 8))]
SHARED = [
    dict(seed=seed, head_eta0=eta, head_scheduler=name)
    for seed, eta, name in itertools.product(range(5), (1e-3, 2e-3), ("cosine", "linear"))
]


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def rounds(ways: dict) -> dict[str, float]:
    """Median seconds of each way, after one round that is not counted."""
    found = {name: [] for name in ways}
    for i in range(ROUNDS + 1):
        for name, work in ways.items():
            found[name] += [seconds(work)] if i else (work(), [])[1]
    return {name: statistics.median(times) for name, times in found.items()}


def network(settings, weight):
    return ll_network(weight, 2.0, HeadSettings(**BASE | settings), 32, 10).eval()


def one_at_a_time(model, inputs, labels, says):
    """An epoch as anyone would write it; says(model, x) gives logits."""
    optimizer = torch.optim.AdamW(model.linear.parameters(), lr=model.head.head_eta0)
    for index in torch.randperm(len(inputs)).split(BATCH):
        loss = F.cross_entropy(says(model, inputs[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def chain(model, images):
    """Pooled activities the obvious way."""
    with torch.no_grad():
        return F.max_pool2d(model.conv(images), model.head.w_pool, model.head.s_pool)



def heads(weight, images, labels, each, dtype=torch.float32, plain=True) -> dict[str, float]:
    """Seconds a head and whole training (100 epochs, 50,000 images), features included, in each way; of one at a time two are enough."""
    pixels, some = training.to_float(images), [network(settings, weight) for settings in each[:: max(1, len(each) // 2)][:2]]
    found: dict[str, list] = {"together": [], "cached": [], "plain": []}

    def classify(model, pooled):
        return power(ACTIVATIONS[model.head.sigma](pooled), model.head.n).flatten(1)

    for _ in range(ROUNDS):
        kept, began = [Head(network(settings, weight)) for settings in each], time.perf_counter()
        train_heads(kept, images, labels, dtype)
        whole, epoch = time.perf_counter() - began, kept[0].history[0]["seconds"]
        found["together"].append((whole / len(each) - epoch + EPOCHS * epoch) * WHOLE / IMAGES)
        for model in some:
            began = time.perf_counter()
            features = torch.cat([classify(model, chain(model, part)).to(dtype) for part in pixels.split(100)])
            made = time.perf_counter() - began
            epoch = seconds(lambda: one_at_a_time(model, features, labels, lambda model, x: model.linear(x.float())))
            found["cached"].append((made + EPOCHS * epoch) * WHOLE / IMAGES)
        if plain:
            few = pixels[:BATCH], labels[:BATCH]
            epoch = seconds(lambda: one_at_a_time(some[0], *few, lambda model, x: model.linear(classify(model, chain(model, x)))))
            found["plain"].append(EPOCHS * epoch * WHOLE / BATCH)
    return {name: statistics.median(times) for name, times in found.items() if times}


def activations() -> None:
    """sigma(x)^4 of pooled activities from N(0, 1), those of 10 images with K=20, w=4, w_pool=9, forward and with the gradient of x."""
    x, slope = torch.randn(10, 400, 11, 11).requires_grad_(), torch.randn(10, 400, 11, 11)
    print("\n| σ | σ⁴: ns a value | and gradient | PyTorch: σ⁴ | and gradient | PyTorch / kernel, with gradient |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for sigma in native.SIGMAS:
        ways = {"kernel": lambda sigma=sigma: activate(x, sigma, 4), "PyTorch": lambda sigma=sigma: power(ACTIVATIONS[sigma](x), 4)}
        work = {(name, back): (lambda way=way, back=back: torch.autograd.grad(way(), x, slope) if back else way().detach()) for name, way in ways.items() for back in (False, True)}
        times = [{key: seconds(do) / x.numel() * 1e9 for key, do in work.items()} for _ in range(50)]
        found = {key: statistics.median(each[key] for each in times) for key in work}
        print(f"| {sigma} | " + " | ".join(f"{found[name, back]:.2f}" for name in ways for back in (False, True)) + f" | {found['PyTorch', True] / found['kernel', True]:.1f} |", flush=True)


def main(threads: int) -> None:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (IMAGES,), generator=generator)
    weight = torch.randn(100, 3, 4, 4, generator=generator)
    weight /= weight.flatten(1).norm(dim=1)[:, None, None, None]
    print(f"{platform.processor() or platform.machine()}, {threads} thread(s), torch {torch.__version__}, kernels {'on' if native._library() else 'off'}")
    print("| heads | kept as | together: s a head | cached, one at a time | plain, one at a time | cached / together | plain / together |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    f32 = torch.float32
    for each, dtype, text in [(GRID[5:6], f32, "1"), (GRID[:60:6], f32, "10 of the grid"), (GRID, f32, "60, the grid")] + [
        (SHARED, dtype, "20 that share") for dtype in (f32, torch.float16, torch.bfloat16)
    ]:
        found = heads(weight, images, labels, each, dtype, plain=dtype is f32)
        slow, ratio = (f"{found['plain']:.0f}", f"{found['plain'] / found['together']:.0f}") if "plain" in found else ("", "")
        print(
            f"| {text} | {str(dtype).removeprefix('torch.')} | {found['together']:.1f} | {found['cached']:.1f} | {slow} "
            f"| {found['cached'] / found['together']:.1f} | {ratio} |", flush=True,
        )

    pixels, some = training.to_float(images[:1000]), 100
    print("\n| features, K | w | kernel: Gflop/s | conv2d, norm, pool | conv2d alone | product | chain / kernel |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for K, w in ((10, 4), (20, 4), (10, 8), (10, 12)):
        filters = torch.randn(K * K, 3, w, w, generator=generator)
        layer, out = KHConv2d(filters, 2.0), 33 - w
        x, rows, matrix = pixels[:some], torch.randn(1000, 3 * w * w), synapses(filters, 2.0).flatten(1).T.contiguous()
        features, flop = Features(layer, images, [(5, 2)]), 2 * out**2 * filters.numel() * some
        kernel = rounds({
            "kernel": lambda: features.compute(x), "chain": lambda: F.max_pool2d(layer(x), 5, 2), "conv2d": lambda: F.conv2d(x, filters),
            "product": lambda: [rows @ matrix for _ in range(out**2 * some // 1000)],
        })  # fmt: skip
        rate = {name: flop / time / 1e9 for name, time in kernel.items()}
        print(
            f"| {K} | {w} | {rate['kernel']:.0f} | {rate['chain']:.0f} | {rate['conv2d']:.0f} | {rate['product']:.0f} | {kernel['chain'] / kernel['kernel']:.1f} |",
            flush=True,
        )

    print("\n| BP, K | w | images a second | plain PyTorch | ratio |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for K, w in ((10, 4), (20, 4)):
        settings = HeadSettings(sigma="elu", n=1, w_pool=9, head_batch=500, head_epochs=1)
        bp = {name: bp_network(K, w, settings, 3, 32, 10).train() for name in ("ours", "plain")}

        def plain(model=bp["plain"]):
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            activity = F.max_pool2d(model.conv(pixels[:500]), 9, 2)
            F.cross_entropy(model.linear(F.elu(activity).flatten(1)), labels[:500]).backward()
            optimizer.step()

        found = rounds({"ours": lambda: training.train(bp["ours"], images[:500], labels[:500]), "plain": plain})
        print(f"| {K} | {w} | {500 / found['ours']:.0f} | {500 / found['plain']:.0f} | {found['plain'] / found['ours']:.1f} |", flush=True)
    activations()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads())
