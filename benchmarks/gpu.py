"""What a GPU does of what ``khnb.costs_gpu`` expects of it: ``python benchmarks/gpu.py [--device cpu] [--small]``. **Not run on a GPU yet.**

For KH layers, classifiers, BP models and attacks, at shapes of the thesis: seconds with the kernels of ``khnb/kernels_gpu.py`` and without (plain PyTorch),
in interleaved rounds, their ratio, and how the first compares with the estimate. A few minutes. On random images, as only times matter. ``--small``
is to try the script itself. The estimate is of an H100-class GPU whatever this one is; so is its share of the peaks, 60%, which is what is to be learned here.
"""

import argparse
import statistics
import time

from khnb import native  # before torch, whose threads it keeps from spinning

import torch

from khnb import attacks, costs_gpu, learning, models, sweeps, training
from khnb.heads import Head, train_heads
from khnb.pipeline import pick_device
from khnb.settings import ConvSettings, HeadSettings

CLASSES, SHAPE, SIDE = 10, (3, 32, 32), 32


def groups(small: bool):
    """(what, images, group, ready) for each kind: ``ready(device, images, labels)`` makes the models, and gives what does once what the group asks for on so many images."""
    few = 2 if small else 1000
    for K, w in [(3, 8)] if small else [(10, 4), (20, 4), (20, 12)]:
        convs = [ConvSettings(K=K, w=w, m=m, p=p, conv_epochs=1, conv_batch=100 if small else 1000) for p in (2.0, 3.0, 4.0) for m in (2, 3, 5)]
        group = sweeps.Group("layers", "cifar10-sample", dict(convs=[conv.dict() for conv in convs]))
        yield f"9 KH layers, K={K} w={w}", few, group, lambda device, images, labels, convs=convs: lambda: learning.train_layers(images, convs, device)

        weight = torch.rand(K * K, 3, w, w, generator=torch.Generator().manual_seed(0))
        heads = [HeadSettings(sigma="relu", n=n, w_pool=9, head_epochs=1, head_batch=1000) for n in (1, 2, 4, 8)]
        group = sweeps.Group("heads", "cifar10-sample", dict(conv=convs[0].dict(), heads=[head.dict() for head in heads], feature_dtype="float16"))

        def classifiers(device, images, labels, weight=weight, heads=heads):
            new = [Head(models.ll_network(weight, 2.0, head, SIDE, CLASSES).to(device).eval()) for head in heads]
            return lambda: train_heads(new, images, labels, torch.float16, 2**33)

        yield f"4 classifiers, K={K} w={w}", few, group, classifiers

        head = HeadSettings(sigma="elu", n=4, w_pool=9, head_epochs=1, head_batch=1000)
        group = sweeps.Group("bp", "cifar10-sample", dict(models=[dict(K=K, w=w, head=head.dict())]))

        def bp(device, images, labels, K=K, w=w, head=head):
            model = models.bp_network(K, w, head, 3, SIDE, CLASSES).to(device).train()
            return lambda: training.train(model, images, labels)

        yield f"BP model, K={K} w={w}", few, group, bp

        described = dict(models=[dict(conv=convs[0].dict(), head=head.dict())], attacks=[[]], audited=0)
        for what, forwards, gradients in (("forward", 1, 0), ("gradient", 0, 1)):

            def look(device, images, labels, weight=weight, head=head, gradients=gradients):
                model = models.ll_network(weight, 2.0, head, SIDE, CLASSES).to(device).eval().requires_grad_(False)
                x, y = training.to_float(images.to(device)), labels.to(device)
                return (lambda: attacks.gradient(model, x, y)) if gradients else torch.no_grad()(lambda: model(x))

            yield f"LL {what}, K={K} w={w}", few, (sweeps.Group("attacks", "cifar10-sample", described), forwards, gradients), look


def expected(group, images: int) -> float:
    """Seconds by the estimate."""
    sweeps.IMAGES["cifar10-sample"] = dict(train=images, test=0)
    if isinstance(group, tuple):
        group, *found = group
        sweeps.IMAGES["cifar10-sample"] = dict(train=0, test=images)
        costs_gpu.looks = lambda *given: found
    return costs_gpu.seconds(group)


def seconds(work, device) -> float:
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
    given = parser.parse_args()
    device, kernels, found = pick_device(given.device), native.gpu, []
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU: no GPU here"
    print(f"{name}; PyTorch {torch.__version__}\n\n| what | with kernels, ms | plain, ms | plain / kernels | estimate, ms | kernels / estimate |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for what, count, group, ready in groups(given.small):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (count, *SHAPE), generator=generator, dtype=torch.uint8)
        labels, times = torch.randint(0, CLASSES, (count,), generator=generator), {"kernels": [], "plain": []}
        for i in range(2 if given.small else 6):
            for way in times:
                native.gpu = kernels if way == "kernels" else lambda tensor: None
                taken = seconds(ready(device, images, labels), device)
                times[way] += [taken] if i else []  # the first compiles
        native.gpu = kernels
        mine, plain, told = (1e3 * x for x in (*map(statistics.median, times.values()), expected(group, count)))
        found.append(mine / told)
        print(f"| {what} | {mine:.2f} | {plain:.2f} | {plain / mine:.2f} | {told:.2f} | {found[-1]:.2f} |", flush=True)
    print(f"\nmedian of kernels / estimate: {statistics.median(found):.2f}")


if __name__ == "__main__":
    main()
