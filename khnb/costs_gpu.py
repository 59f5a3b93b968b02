"""What a group of a sweep costs on a GPU, by the shapes of what is computed: an estimate. **Not run on a GPU.**

Bytes of memory and launches are those that the code asks for, instructions those of the loops of the compiled kernels; tests/test_gpu.py counts these.
Bytes of the cache are reckoned alone. Of PyTorch's operations the bytes count, and the instructions of convolutions and products of matrices. ``python -m khnb.costs_gpu`` prints the table of the whole thesis.
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
from khnb.tiles_gpu import places_together, ranked, read_together, rooms


@dataclass
class Card:
    """A GPU, and what share of its peaks is thought to be reached."""

    name: str = "H100-class"
    tensor: float = 495e12 / 6  # products in a second on tensor cores, each made of three in TF32
    issued: float = 67e12 / 64  # instructions in a second, of 32 numbers each: the peak in float32, where each is a product and a sum
    bandwidth: float = 3.35e12  # bytes in a second
    cache: float = 5.5e12  # the same, of the cache that all processors share
    launch: float = 5e-6  # seconds between two small operations
    processors: int = 132
    reached: float = 0.6
    gib: float = 80.0


@dataclass
class Use:
    """Of a GPU: products on tensor cores (with those for nothing, where kernels fill up their blocks), instructions that warps issue, bytes to and from
    memory and the cache that all processors share, and launches."""

    tensor: float = 0.0
    issued: float = 0.0
    moved: float = 0.0
    cached: float = 0.0
    launches: float = 0.0

    def seconds(self, card: Card) -> float:
        """The largest of the times that each of these takes: the units for them work side by side."""
        peaks = self.tensor / card.tensor, self.issued / card.issued, self.moved / card.bandwidth, self.cached / card.cache
        return max(max(peaks) / card.reached, self.launches * card.launch)


#: instructions that the warps issue, compiled for compute capability 9.0: in the kernels of khnb/kernels_gpu.py for a product (by the neurons in
#: registers; convolutions by the places and filters that go together) ...
PRODUCT = dict(
    _rank={128: 0.0113, 256: 0.0091, 512: 0.0154}, _change=0.0165, _filters=0.0148,
    _conv_pool={(128, 32): 0.0164, (128, 64): 0.0085, (256, 32): 0.0129, (256, 64): 0.0062},
)
RANK = {128: 73, 256: 95, 512: 141}  # ... for a patch, each neuron until the m-th most active one
ACTIVITY, COMPARED = 0.45, 0.2  # ... for an activity besides, and each that it is compared with
SPREAD = 0.5  # ... for an output of the pooling, of which the slope is added
FEATURE, POWER = 1.85, 0.35  # ... and of classifiers, of GeLU, for a feature each time it is read, and each power of it


def of(group, memory: float = MEMORY, card: Card | None = None) -> Use:
    """What the kernels for a GPU do for a group, and PyTorch's operations around them, each of which reads and writes what it works on."""
    images, body, use, card = sweeps.IMAGES[group.data], group.body, Use(), card or Card()
    channels, classes, pixels = datasets.SHAPE[0], len(datasets.CLASSES), math.prod(datasets.SHAPE)
    if group.kind in ("layers", "probes"):
        seeds, convs = body.get("seeds", 1), [ConvSettings(**conv) for conv in body["convs"]]
        for conv in convs:
            F, D, count = conv.K**2, channels * conv.w**2, patches(group, conv) * seeds
            (block, together), wide = ranked(F), _up(F, 64)
            most = max(128, together)
            use.tensor += (together * _up(D, 16) + wide * _up(D, 64)) * count
            use.issued += (PRODUCT["_rank"][most] * together * _up(D, 16) + PRODUCT["_change"] * wide * _up(D, 64) + RANK[most] * conv.m) * count
            use.cached += 4 * D * (F / block + 1 + wide / 64) * count
            use.moved += (28 * F * D / conv.conv_batch + 32) * count
        orders, count = len({conv.p for conv in convs}), max(patches(group, conv) for conv in convs)
        stacks = len({(conv.K, conv.conv_rank, conv.conv_scale) for conv in convs})
        use.moved += ((4 + 8 * stacks) * channels * convs[0].w ** 2 + 8 * orders * stacks) * count  # gathered, and read by the layers of each K
        use.launches = 3 * stacks * max(patches(group, conv) / conv.conv_batch for conv in convs)
    elif group.kind == "heads":
        conv, heads, kept = ConvSettings(**body["conv"]), [HeadSettings(**head) for head in body["heads"]], getattr(torch, body["feature_dtype"]).itemsize
        count, epochs = convolved(group, memory), max(head.head_epochs for head in heads)
        for head in {(head.w_pool, head.s_pool): head for head in heads}.values():  # each pooling has a convolution of its own
            _conv_pool(use, conv.K, conv.w, head, count, card)
            use.moved += (8 + kept) * features(conv.K, conv.w, head) * count
        same: dict[tuple, Counter] = {}
        for head in heads:
            seen, size = images["train"] * head.head_epochs, features(conv.K, conv.w, head)
            same.setdefault((head.w_pool, head.s_pool, head.sigma, size, seen, head.head_batch), Counter())[head.n] += 1
            use.cached += 16 * classes / 128 * size * seen  # its weights, by blocks of images, and the slopes of its logits, by blocks of features
            use.moved += (60 * size / head.head_batch + 16 + 8 * read_together(classes, size)[2]) * classes * seen  # gradients, AdamW, and in terms; slopes, and logits in parts
        for (*_, size, seen, batch), counts in same.items():
            for each in set(counts.values()):  # classifiers of each of so many powers: features are read as they are kept, for both products
                powers, (some, wide, _) = sum(count == each for count in counts.values()), read_together(each * classes, size)
                blocks, times = -(-each * classes // wide), -(-powers // some)
                use.moved += 2 * kept * times * size * seen
                use.cached += 2 * kept * times * blocks * size * seen
                use.tensor += 2 * powers * blocks * wide * size * seen
                use.issued += 2 * blocks * (FEATURE * times + POWER * powers) * size * seen
                use.launches += (2 * times + 4 + 6 * batch / images["train"]) * seen / batch  # the last of them once an epoch
        use.launches += (5 + len(heads) / 15) * images["train"] * epochs / min(head.head_batch for head in heads)  # numbers of images, labels, AdamW
    elif group.kind == "bp":
        for _, K, w, head in map(shape, body["models"]):
            F, D, places, size, seen = K**2, channels * w**2, side(w) ** 2, features(K, w, head), images["train"] * head.head_epochs
            _conv_pool(use, K, w, head, seen, card)
            products = _up(F, 64) * _up(D, 64) * _up(places, 16) * seen  # of kernels_gpu.filters_gradient
            use.tensor += products
            use.issued += PRODUCT["_filters"] * products + 6 * classes * size * seen / 64
            use.cached += 4 * F * places * _up(D, 64) / 64 * seen
            _spread(use, F, places, size, seen)
            use.moved += (8 * F * places + 60 * size + 39 * pixels + 28 * (classes * size + F * D) / head.head_batch) * seen
            use.launches += 32 * seen / head.head_batch
    else:
        for model, attacks in zip(body["models"], body["attacks"], strict=True):
            kind, K, w, head = shape(model)
            F, D, places, size = K**2, channels * w**2, side(w) ** 2, features(K, w, head)
            forwards, gradients = (images["test"] * count for count in looks(model, attacks, body["audited"]))
            _conv_pool(use, K, w, head, forwards + gradients, card)
            use.issued += (2 * classes * size * (forwards + 2 * gradients) + 2 * F * D * places * gradients) / 64
            _spread(use, F, places, size, gradients)
            use.moved += 16 * size * forwards + (8 * F * places + (112 if kind == "LL" else 52) * size) * gradients
            use.moved += 12 * pixels * (forwards + gradients)  # in terms
            if kind == "LL":  # norms of patches
                use.moved += 32 * pixels * (forwards + 3.5 * gradients)
            use.launches += (42 * forwards + 62 * gradients) / 1000  # of a thousand images at a time
    return use


def _conv_pool(use: Use, K: int, w: int, head: HeadSettings, images: float, card: Card) -> None:
    """What kernels_gpu.conv_pool does."""
    F, D, places, wide, near = K**2, _up(datasets.SHAPE[0] * w**2, 16), side(w) ** 2, (side(w) - head.w_pool) // head.s_pool + 1, 5
    rows, tile = side(w) * wide, places_together(places)
    block, _ = rooms(places + 1.25 * rows, 10**9, F, card.processors)
    filters, compared = _up(F, block), head.w_pool * (rows + wide**2)
    products = filters * D * _up(places, tile) * images
    use.tensor += products
    use.issued += PRODUCT["_conv_pool"][tile, block] * products + (ACTIVITY * _up(places, tile) + COMPARED * compared) * filters * images
    # weights, for so many places; activities, and the largest of their rows, written and read, and read again from a processor's own cache, about so many times faster
    use.cached += 8 / tile * products + (8 * places + 10 * rows + 4 * compared / near) * filters * images


def _spread(use: Use, F: int, places: int, size: int, images: float) -> None:
    """What kernels_gpu.spread does in the cache: zeros, and 32 bytes read and written for each output, as others are between."""
    use.cached += (4 * F * places + 64 * size) * images
    use.issued += SPREAD * size * images


def _up(count: int, block: int) -> int:
    return -(-count // block) * block


#: what the thesis's experiments ask for, in parts that share layers and models, with the share of layers that go on to have classifiers there
#: (section 8.1.2, tables A.1 and A.3, section 9.3), and of layers that are trained to the end (those that collapse are given up)
PARTS = (
    ("first layers", "E01+E02+E03", 1.0, 1.0), ("grid 1", "E04", 1.0, 379 / 960), ("grid 2", "E05+E06", 56 / 100, 69 / 100),
    ("grid 3 with FGSM and PGD", "E07+E08+E09+E11+E12+E13+E14+E15+E16+E17", 88 / 150, 1.0), ("BP grid with attacks", "E10+E18", 1.0, 1.0),
    ("LL ensembles with attacks", "E19", 119 / 160, 1.0), ("BP ensembles with attacks", "E20", 1.0, 1.0),
)


def seconds(group, card: Card | None = None) -> float:
    """On a GPU: see :meth:`Use.seconds`."""
    card = card or Card()
    return of(group, 0.8 * card.gib, card).seconds(card)


FORMATS = {"Pflop": ",.0f", "TB moved": ",.0f", "TB of cache": ",.0f", "trillion instructions": ",.0f", "million launches": ",.1f", "hours": ".2f"}


def thesis(card: Card | None = None) -> list[dict]:
    """A row for each part of the thesis: layers, models, attacks, operations, bytes, launches, and hours on one GPU."""
    rows, card = [], card or Card()
    for name, grid, passing, whole in PARTS:
        row = {"part": name, "layers": 0, "models": 0, "attacks": 0, "Pflop": 0.0, "TB moved": 0.0, "TB of cache": 0.0, "trillion instructions": 0.0, "million launches": 0.0, "hours": 0.0}
        grids = grid + {"E19": "+E21+E22", "E20": "+E21+E22"}.get(grid, "")
        for group in sweeps.groups(grids, "thesis", card.gib * 2**30):
            if grid in ("E19", "E20") and group.bp != (grid == "E20"):
                continue  # E21 and E22 attack both
            share = whole if group.kind == "layers" else passing
            use = of(group, 0.8 * card.gib, card)
            row[dict(layers="layers", heads="models", bp="models", attacks="attacks")[group.kind]] += round(group.count * (1 if group.kind == "layers" else share))
            row["Pflop"] += share * needed(group, 0.8 * card.gib).flop / 1e15
            row["TB moved"] += share * use.moved / 1e12
            row["TB of cache"] += share * use.cached / 1e12
            row["trillion instructions"] += share * use.issued / 1e12
            row["million launches"] += share * use.launches / 1e6
            row["hours"] += share * use.seconds(card) / 3600
        rows.append(row)
    rows.append({"part": "all"} | {key: sum(row[key] for row in rows) for key in list(rows[0])[1:]})
    return rows


if __name__ == "__main__":
    from khnb import tables

    print(tables.markdown(thesis(), formats=FORMATS))
