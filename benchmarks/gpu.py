"""What a GPU does of the floor that ``khnb.costs_gpu`` reckons: ``python benchmarks/gpu.py [--out FILE] [--device cpu] [--small]``.

For KH layers, classifiers, BP models and attacks, at shapes of the thesis: seconds with the kernels of ``khnb/kernels_gpu.py`` and without (plain PyTorch),
in interleaved rounds, their ratio, and the share of the floor that the first reach. What is made once (first filters, features) is left out, as the difference
of a longer and a shorter run. A few minutes. On random images, as only times matter. ``--small`` is to try the script itself.
``benchmarks/gpu-h200.json`` is what came out on an NVIDIA H200; ``costs_gpu.REACHED`` has its medians.
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

from khnb import native  # before torch, whose threads it keeps from spinning

import torch

from khnb import attacks, costs_gpu, learning, models, sweeps, training
from khnb.heads import Head, train_heads
from khnb.layer import KHConv2d
from khnb.pipeline import pick_device
from khnb.settings import ConvSettings, HeadSettings

CLASSES, SIDE = 10, 32
HEAD = HeadSettings(sigma="elu", n=4, w_pool=9, head_epochs=1, head_batch=1000)


def data(count: int):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, CLASSES, (count,), generator=generator)


@functools.cache
def thesis(kind: str, K: int, w: int) -> dict:
    """A group of the thesis's grid 3."""
    of = {"layers": lambda body: body["convs"][0], "heads": lambda body: body["conv"]}[kind]
    for group in sweeps.groups("E07+E08+E09", "thesis", 80 * 2**30):
        if group.kind == kind and of(group.body)["w"] == w and (kind == "layers" or of(group.body)["K"] == K):
            return group.body
    raise ValueError(f"no {kind} with K={K}, w={w} in grid 3")


def layers(w: int, images: int, small: bool):
    convs = [ConvSettings(**{**conv, "conv_epochs": 1}) for conv in thesis("layers", 0, w)["convs"]][: 2 if small else None]
    x, _ = data(images)
    group = sweeps.Group("layers", "cifar10-sample", dict(convs=[conv.dict() for conv in convs]))
    return group, (images, 0), lambda device: lambda: learning.train_layers(x, convs, device)


def classifiers(K: int, w: int, epochs: int, images: int, small: bool):
    body = thesis("heads", K, w)
    heads = [HeadSettings(**{**head, "head_epochs": epochs}) for head in body["heads"]][: 2 if small else None]
    conv, (x, y) = ConvSettings(**body["conv"]), data(images)
    weight = torch.rand(K * K, 3, w, w, generator=torch.Generator().manual_seed(0))

    def ready(device):
        layer = KHConv2d(weight, conv.p).to(device)
        linear = [torch.nn.utils.skip_init(torch.nn.Linear, models.n_features(K * K, SIDE, w, head), CLASSES, device=device) for head in heads]
        for each in linear:
            torch.nn.init.uniform_(each.weight, -0.01, 0.01), torch.nn.init.zeros_(each.bias)
        new = [Head(models.Network(layer, each, head).eval()) for each, head in zip(linear, heads, strict=True)]
        return lambda: train_heads(new, x, y, torch.float16, 2**35)

    group = sweeps.Group("heads", "cifar10-sample", dict(conv=body["conv"], heads=[head.dict() for head in heads], feature_dtype="float16"))
    return group, (images, 0), ready


def bp(K: int, w: int, images: int, small: bool):
    x, y = data(images)
    group = sweeps.Group("bp", "cifar10-sample", dict(models=[dict(K=K, w=w, head=HEAD.dict())]))

    def ready(device):
        model = models.bp_network(K, w, HEAD, 3, SIDE, CLASSES).to(device).train()
        return lambda: training.train(model, x, y)

    return group, (images, 0), ready


def look(kind: str, K: int, w: int, what: str, times: int, small: bool):
    images = 2 if small else 1000
    x, y = data(images)
    conv, told = ConvSettings(K=K, w=w, p=3.0), dict(head=HEAD.dict())
    told |= dict(K=K, w=w) if kind == "BP" else dict(conv=conv.dict())

    def ready(device):
        weight = torch.rand(K * K, 3, w, w, generator=torch.Generator().manual_seed(0))
        model = models.bp_network(K, w, HEAD, 3, SIDE, CLASSES) if kind == "BP" else models.ll_network(weight, conv.p, HEAD, SIDE, CLASSES)
        model, here, labels = model.to(device).eval().requires_grad_(False), training.to_float(x.to(device)), y.to(device)

        def go():
            for _ in range(times):
                attacks.gradient(model, here, labels) if what == "gradient" else torch.no_grad()(model)(here)

        return go

    costs_gpu.looks = lambda *given: (times, 0) if what == "forward" else (0, times)
    return sweeps.Group("attacks", "cifar10-sample", dict(models=[told], attacks=[[]], audited=0)), (0, images), ready


def cases(small: bool):
    """(kind, what, longer run, shorter run), each a function that gives (group, images, ready)."""
    big, batch = (4, 2) if small else (6000, 2000)
    for K, w in [(10, 4), (20, 4), (20, 8), (20, 12)][: 1 if small else None]:
        yield "bp", f"BP model, K={K}, w={w}", lambda K=K, w=w: bp(K, w, big, small), lambda K=K, w=w: bp(K, w, batch, small)
    for K, w in [(10, 4), (20, 4), (20, 12)][: 1 if small else None]:
        for kind in ("LL", "BP"):
            for what in ("forward", "gradient"):
                yield "attacks", f"{kind} {what}, K={K}, w={w}", *(lambda *_, a=(kind, K, w, what, times): look(*a, small) for times in ((2, 1) if small else (12, 2)))
    for w in [4, 8, 12][: 1 if small else None]:
        yield "layers", f"50 layers, K=10 and 20, w={w}", lambda w=w: layers(w, 2 if small else 1000, small), lambda w=w: layers(w, 1 if small else 200, small)
    for K, w in [(10, 4), (20, 4), (20, 12)][: 1 if small else None]:
        yield "heads", f"126 classifiers, K={K}, w={w}", lambda K=K, w=w: classifiers(K, w, 3, 2 * batch, small), lambda K=K, w=w: classifiers(K, w, 1, 2 * batch, small)


def timed(work, device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try this script")
    parser.add_argument("--only", default="", help="cases with this in their kind or name")
    parser.add_argument("--rounds", type=int, default=3, help="0 only compiles")
    parser.add_argument("--out", type=Path, help="a JSON file for what is found")
    given = parser.parse_args()
    device, kernels, found, card = pick_device(given.device), native.gpu, [], costs_gpu.Card()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU: no GPU here"
    print(f"{name}; PyTorch {torch.__version__}\n\n| what | with kernels, ms | plain, ms | plain / kernels | floor, ms | floor / kernels |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for kind, what, *sizes in cases(given.small):
        if given.only not in (kind, what, ""):
            continue
        times: dict[str, list] = {"kernels": [], "plain": []}
        for i in range(given.rounds + 1):
            for way in times:
                native.gpu = kernels if way == "kernels" else lambda tensor: None
                more, less = (timed(make()[2](device), device) for make in sizes)
                times[way] += [more - less] if i else []  # the first compiles
        if not given.rounds:
            continue
        native.gpu, floor = kernels, []
        for make in sizes:
            group, (train, test), _ = make()
            sweeps.IMAGES["cifar10-sample"] = dict(train=train, test=test)
            floor.append(costs_gpu.of(group, 2**5).floor(card))
        mine, plain, least = (1e3 * x for x in (*map(statistics.median, times.values()), floor[0] - floor[1]))
        found.append(dict(kind=kind, what=what, kernels_ms=mine, plain_ms=plain, floor_ms=least))
        if given.out:
            versions = {module: __import__(module).__version__ for module in ("torch", "triton")}
            given.out.write_text(json.dumps(dict(device=name, date=time.strftime("%Y-%m-%d"), versions=versions, rounds=given.rounds, cases=found), indent=1) + "\n")
        print(f"| {what} | {mine:.2f} | {plain:.2f} | {plain / mine:.2f} | {least:.2f} | {least / mine:.2f} |", flush=True)
    if not found:
        return
    reached = {kind: statistics.median(one["floor_ms"] / one["kernels_ms"] for one in found if one["kind"] == kind) for kind in {one["kind"] for one in found}}
    print("\nshare of the floor:", ", ".join(f"{kind} {share:.2f}" for kind, share in sorted(reached.items())))


if __name__ == "__main__":
    main()
