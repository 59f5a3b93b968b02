"""The four ways of cutting patches that section 6.1 of the thesis describes: ``python benchmarks/patch_methods.py [--record]``.

1. flat: the image as one vector; the start of every row of every patch is computed, the rows are sliced out.
2. slices: the image keeps its three axes; every patch is a slice, flattened afterwards.
3. rows: w rows at a time, columns before channels, flattened; every patch is then one contiguous slice.
4. indexer: method 3 once, on an image of numbers; afterwards the image is indexed with the result.

Beside them ``unfold``, which this project uses where it makes patches at all, as views that are copied once. Each makes the patches
of 1 image and of a minibatch of 100 of the embedded sample, (images, patches, C w w), in its own order of values. Medians of interleaved rounds.
With ``--record`` the result goes into the store of records, for chapter 6.
"""

import statistics
import sys
import time

import torch

from khnb import data, patches
from khnb.results import Store

IMAGES, ROUNDS, WIDTHS = (1, 100), 7, (4, 8, 12)


def flat(x, w):
    """x : (N, H, W, C)."""
    count, height, width, channels = x.shape
    vector = x.reshape(count, -1)
    made = []
    for y in range(height - w + 1):
        for z in range(width - w + 1):
            starts = [((y + r) * width + z) * channels for r in range(w)]
            made.append(torch.cat([vector[:, s : s + w * channels] for s in starts], dim=1))
    return torch.stack(made, dim=1)


def slices(x, w):
    _, height, width, _ = x.shape
    made = [x[:, y : y + w, z : z + w].flatten(1) for y in range(height - w + 1) for z in range(width - w + 1)]
    return torch.stack(made, dim=1)


def rows(x, w):
    _, height, width, channels = x.shape
    made = []
    for y in range(height - w + 1):
        strip = x[:, y : y + w].transpose(1, 2).flatten(1)  # columns first: a patch is contiguous
        made += [strip[:, z * w * channels : (z + w) * w * channels] for z in range(width - w + 1)]
    return torch.stack(made, dim=1)


def indexer(x, w, made={}):
    if w not in made:
        numbers = torch.arange(x[0].numel()).reshape(x[:1].shape)
        made[w] = rows(numbers, w)[0]
    return x.flatten(1)[:, made[w]]


def unfold(x, w):
    return patches.extract(x.permute(0, 3, 1, 2), w)


METHODS = dict(flat=flat, slices=slices, rows=rows, indexer=indexer, unfold=unfold)


def main():
    torch.set_num_threads(1)
    sample = data.load("cifar10-sample")
    images = (sample.train_images[: max(IMAGES)].float() / 255).permute(0, 2, 3, 1).contiguous()
    started, found = time.perf_counter(), []
    for w in WIDTHS:
        sums = {name: method(images, w).sum(2) for name, method in METHODS.items()}  # also builds the indexer
        assert all(torch.allclose(s, sums["flat"], rtol=1e-4) for s in sums.values()), "the methods disagree"
        for count in IMAGES:
            x, times = images[:count], {name: [] for name in METHODS}
            for _ in range(ROUNDS):
                for name, method in METHODS.items():
                    began = time.perf_counter()
                    method(x, w)
                    times[name].append((time.perf_counter() - began) / count * 1e6)
            us = {name: statistics.median(taken) for name, taken in times.items()}
            found.append(dict(w=w, images=count, microseconds_an_image=us))
            told = ", ".join(f"{name} {t:.0f}" for name, t in us.items())
            print(f"w={w}, {count} image(s): microseconds an image: {told}; rows/indexer {us['rows'] / us['indexer']:.1f}")
    if "--record" in sys.argv[1:]:
        asked = dict(benchmark="patch_methods", rounds=ROUNDS)
        record = Store().put("timing", asked, sample, dict(rows=found), {}, time.perf_counter() - started)
        print(f"record {record['id']}")


if __name__ == "__main__":
    main()
