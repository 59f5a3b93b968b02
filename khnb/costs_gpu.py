"""What a group of a sweep costs on a GPU: the floor, by the shapes of what is computed, and what share of it was reached on one that was measured.

Bytes of memory and launches are those that the code asks for; tests/test_gpu.py counts them. ``benchmarks/gpu.py`` measures the shares.
``python -m khnb.costs_gpu`` prints the table of the whole thesis.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch

from khnb import data as datasets
from khnb import sweeps
from khnb.costs import convolved, features, looks, patches, shape, side
from khnb.costs import of as needed
from khnb.settings import MEMORY, ConvSettings, HeadSettings

#: by kind of group, what share of the floor was reached: medians of benchmarks/gpu-h200.json
REACHED = dict(layers=0.10, heads=0.07, bp=0.16, attacks=0.24)


@dataclass
class Card:
    """A GPU: its peaks, here those of an H200 by its data sheet."""

    half: float = 989e12 / 6  # products in a second on tensor cores, each made of three in half precision
    tensor: float = 495e12 / 6  # the same, of three in TF32
    single: float = 67e12 / 2  # products in a second in single precision
    bandwidth: float = 4.8e12  # bytes in a second
    launch: float = 40e-6  # seconds that the processor takes for one, in Python, as measured there
    gib: float = 80.0  # for groups that fit an H100 as well


@dataclass
class Use:
    """Of a GPU: products of each kind, bytes to and from memory, launches by the processor (those of a CUDA graph count a tenth)."""

    half: float = 0.0
    tensor: float = 0.0
    single: float = 0.0
    moved: float = 0.0
    launches: float = 0.0

    def floor(self, card: Card) -> float:
        """Seconds: the units for products work one after the other, all else side by side."""
        return max(self.half / card.half + self.tensor / card.tensor + self.single / card.single, self.moved / card.bandwidth)


def of(group, memory: float = MEMORY) -> Use:
    """What the kernels for a GPU do for a group, and PyTorch's operations around them, each of which reads and writes what it works on."""
    images, body, use = sweeps.IMAGES[group.data], group.body, Use()
    channels, classes, pixels = datasets.SHAPE[0], len(datasets.CLASSES), math.prod(datasets.SHAPE)
    if group.kind in ("layers", "probes"):
        seeds, convs = body.get("seeds", 1), [ConvSettings(**conv) for conv in body["convs"]]
        for conv in convs:
            F, D, count = conv.K**2, channels * conv.w**2, patches(group, conv) * seeds
            use.tensor += 2 * F * D * count
            use.moved += (28 * F * D / conv.conv_batch + 32) * count
        orders, count = len({conv.p for conv in convs}), max(patches(group, conv) for conv in convs)
        stacks = len({(conv.K, conv.conv_rank, conv.conv_scale) for conv in convs})
        use.moved += ((4 + 8 * stacks) * channels * convs[0].w ** 2 + 8 * orders * stacks) * count  # gathered, and read by the layers of each K
        use.launches = 0.3 * stacks * max(patches(group, conv) / conv.conv_batch for conv in convs)
    elif group.kind == "heads":
        conv, heads, kept = ConvSettings(**body["conv"]), [HeadSettings(**head) for head in body["heads"]], getattr(torch, body["feature_dtype"]).itemsize
        count, epochs = convolved(group, memory), max(head.head_epochs for head in heads)
        pools = {(head.w_pool, head.s_pool): head for head in heads}.values()
        _conv_pool(use, conv.K, conv.w, list(pools), count)
        use.moved += sum((4 + kept) * features(conv.K, conv.w, head) * count for head in pools)
        same: dict[tuple, Counter] = {}
        for head in heads:
            seen, size = images["train"] * head.head_epochs, features(conv.K, conv.w, head)
            same.setdefault((head.w_pool, head.s_pool, head.sigma, size, seen, head.head_batch), Counter())[head.n] += 1
            use.tensor += 2 * classes * size * seen
            use.moved += (60 * size / head.head_batch + 24) * classes * seen  # gradients, AdamW, and in terms; logits and their slopes
        for (*_, size, seen, batch), counts in same.items():
            for _ in set(counts.values()):  # classifiers of each of so many powers: features are read as they are kept, for both products
                use.moved += 2 * kept * size * seen
                use.launches += (7 + 6 * batch / images["train"]) * seen / batch  # the last of them once an epoch
        use.launches += (5 + len(heads) / 15) * images["train"] * epochs / min(head.head_batch for head in heads)  # numbers of images, labels, AdamW
    elif group.kind == "bp":
        for _, K, w, head in map(shape, body["models"]):
            F, D, places, size, seen = K**2, channels * w**2, side(w) ** 2, features(K, w, head), images["train"] * head.head_epochs
            _conv_pool(use, K, w, [head], seen)
            use.half += F * D * places * seen
            use.single += 3 * classes * size * seen
            use.moved += (8 * F * places + 60 * size + 39 * pixels + 28 * (classes * size + F * D) / head.head_batch) * seen
            use.launches += 40 * seen / head.head_batch
    else:
        for model, attacks in zip(body["models"], body["attacks"], strict=True):
            kind, K, w, head = shape(model)
            F, D, places, size = K**2, channels * w**2, side(w) ** 2, features(K, w, head)
            forwards, gradients = (images["test"] * count for count in looks(model, attacks, body["audited"]))
            _conv_pool(use, K, w, [head], forwards + gradients)
            use.single += classes * size * (forwards + 2 * gradients) + F * D * places * gradients
            use.moved += 16 * size * forwards + (8 * F * places + (112 if kind == "LL" else 52) * size) * gradients
            use.moved += 12 * pixels * (forwards + gradients)  # packed
            if kind == "LL":  # norms of patches
                use.moved += 32 * pixels * (forwards + 3.5 * gradients)
            use.launches += (47 * forwards + 67 * gradients) / 1000  # of a thousand images at a time
    return use


def _conv_pool(use: Use, K: int, w: int, heads: list[HeadSettings], images: float) -> None:
    """What kernels_gpu.conv_pool does: one convolution, whose activities are written, and read for each pooling."""
    use.half += K**2 * datasets.SHAPE[0] * w**2 * side(w) ** 2 * images
    use.moved += (4 + 4 * len(heads)) * K**2 * side(w) ** 2 * images


#: what the thesis's experiments ask for, in parts that share layers and models, with the share of layers that go on to have classifiers there
#: (section 8.1.2, tables A.1 and A.3, section 9.3), and of layers that are trained to the end (those that collapse are given up)
PARTS = (
    ("first layers", "E01+E02+E03", 1.0, 1.0), ("grid 1", "E04", 1.0, 379 / 960), ("grid 2", "E05+E06", 56 / 100, 69 / 100),
    ("grid 3 with FGSM and PGD", "E07+E08+E09+E11+E12+E13+E14+E15+E16+E17", 88 / 150, 1.0), ("BP grid with attacks", "E10+E18", 1.0, 1.0),
    ("LL ensembles with attacks", "E19", 119 / 160, 1.0), ("BP ensembles with attacks", "E20", 1.0, 1.0),
)


def seconds(group, card: Card | None = None) -> float:
    """On a GPU like the one that was measured, as far as its peaks are the same: the floor over the share of it that is :data:`REACHED`."""
    card = card or Card()
    use = of(group, 0.8 * card.gib)
    return max(use.floor(card) / REACHED[dict(probes="layers").get(group.kind, group.kind)], use.launches * card.launch)


FORMATS = {"Pflop": ",.0f", "TB moved": ",.0f", "million launches": ",.1f", "floor, hours": ".2f", "hours": ".1f"}


def thesis(card: Card | None = None) -> list[dict]:
    """A row for each part of the thesis: layers, models, attacks, operations, bytes, launches, and hours on one GPU."""
    rows, card = [], card or Card()
    for name, grid, passing, whole in PARTS:
        row = {"part": name, "layers": 0, "models": 0, "attacks": 0, "Pflop": 0.0, "TB moved": 0.0, "million launches": 0.0, "floor, hours": 0.0, "hours": 0.0}
        grids = grid + {"E19": "+E21+E22", "E20": "+E21+E22"}.get(grid, "")
        for group in sweeps.groups(grids, "thesis", card.gib * 2**30):
            if grid in ("E19", "E20") and group.bp != (grid == "E20"):
                continue  # E21 and E22 attack both
            share = whole if group.kind == "layers" else passing
            use = of(group, 0.8 * card.gib)
            row[dict(layers="layers", heads="models", bp="models", attacks="attacks")[group.kind]] += round(group.count * (1 if group.kind == "layers" else share))
            row["Pflop"] += share * needed(group, 0.8 * card.gib).flop / 1e15
            row["TB moved"] += share * use.moved / 1e12
            row["million launches"] += share * use.launches / 1e6
            row["floor, hours"] += share * use.floor(card) / 3600
            row["hours"] += share * seconds(group, card) / 3600
        rows.append(row)
    rows.append({"part": "all"} | {key: sum(row[key] for row in rows) for key in list(rows[0])[1:]})
    return rows


if __name__ == "__main__":
    from khnb import tables

    print(tables.markdown(thesis(), formats=FORMATS))
