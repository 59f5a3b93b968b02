"""What a group of a sweep costs: floating-point operations, bytes, and seconds at rates measured on this machine. For a GPU see khnb.costs_gpu.

Seconds come from short runs of the very engines on real images of the embedded sample, made once and kept with their provenance in the cache
(``rates.json``); operations and bytes from the shapes alone.
"""

from __future__ import annotations

import functools
import heapq
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from khnb import data as datasets
from khnb import learning, models, runner, sweeps, training
from khnb.attacks import gradient
from khnb.heads import Head, train_heads
from khnb.models import n_features
from khnb.native import cache_dir
from khnb.results import Store, atomic_write, default_root, pack, provenance
from khnb.settings import MEMORY, ConvSettings, HeadSettings

#: what is not known before a model is there and no record of one like it: which share of the test images is attacked (the thesis's best model: 4523 of
#: 10,000), and how far they move until it is wrong, in units of the pixel range
ATTACKED, MOVED = 0.45, 0.03
LOOKS = 250  # about how many gradients an audit takes for each of its images
BYTES = dict(layer=2200, probe=6000, model=15_000, attack=2000)  # of a record, the text
PACKED = 0.93  # share of its size that an array of float32 keeps when it is compressed


@dataclass
class Cost:
    """Operations, ``disk`` bytes, and ``gib`` of memory."""

    flop: float = 0.0
    disk: float = 0.0
    gib: float = 1.0


def patches(group, conv: ConvSettings) -> float:
    """That a layer is trained on in all."""
    epochs = min(conv.conv_epochs, group.body.get("until") or conv.conv_epochs)
    return max(1, round(conv.conv_share * sweeps.IMAGES[group.data]["train"])) * side(conv.w) ** 2 * epochs


def side(w: int) -> int:
    return datasets.SHAPE[-1] - w + 1


def features(K: int, w: int, head: HeadSettings) -> int:
    return n_features(K**2, datasets.SHAPE[-1], w, head)


def _kept(group, memory: float) -> float:
    """Share of the images whose pooled activities fit into so many GiB."""
    need = _activities(group)
    return min(1.0, memory * 2**30 / need)


def convolved(group, memory: float) -> float:
    """Images that the layer of a group of heads convolves in all: those that fit into so many GiB once, others in each epoch."""
    images, kept = sweeps.IMAGES[group.data], _kept(group, memory)
    return images["train"] * (kept + (1 - kept) * max(HeadSettings(**head).head_epochs for head in group.body["heads"])) + images["test"]


def _activities(group) -> float:
    """Bytes of all pooled activities of a group of heads."""
    conv, size = ConvSettings(**group.body["conv"]), getattr(torch, group.body["feature_dtype"]).itemsize
    pools = {(head["w_pool"], head["s_pool"]): HeadSettings(**head) for head in group.body["heads"]}
    return sum(features(conv.K, conv.w, head) for head in pools.values()) * size * sweeps.IMAGES[group.data]["train"]


@functools.cache
def _outcomes(root: str) -> list[tuple]:
    """Kind, K and w of a model, least confidence, share of the images that were attacked and R, of each attack on full CIFAR-10 that this store holds."""
    records = [record for record in Store(root).light("attack").values() if record["data"]["name"] == "cifar10" and record["results"]["fit"]["status"] == "ok"]
    asked = ((record["asked"], record["results"]["fit"]) for record in records)
    return [(one["model"], one["K"], one["w"], one["confidence"], fit["n"] / sweeps.IMAGES["cifar10"]["test"], fit["R"]) for one, fit in asked]


def outcome(model: dict, confidence: float) -> tuple[float, float]:
    """Share of the test images that an attack will be made on, and how far they will move: the means of the attacks on the most similar models in the store."""
    one = model.get("conv", model)
    return _outcome(str(default_root()), "LL" if "conv" in model else "BP", one["K"], one["w"], confidence)


@functools.cache
def _outcome(root: str, kind: str, K: int, w: int, confidence: float) -> tuple[float, float]:
    found = _outcomes(root)
    alike = (lambda one: one[:4] == (kind, K, w, confidence), lambda one: one[0] == kind and one[2:4] == (w, confidence), lambda one: (one[0], one[3]) == (kind, confidence))
    for similar in alike:
        if some := [one[4:] for one in found if similar(one)]:
            return tuple(np.mean(some, axis=0).tolist())
    return ATTACKED, MOVED


def looks(model: dict, attacks: list[dict], audited: int = 0) -> tuple[float, float]:
    """Forward passes and gradients that attacks on a model take for each test image, about, and the audit that follows."""
    forwards = gradients = 0.0
    for one in attacks:
        share, moved = outcome(model, one["confidence"])
        if one["kind"] == "fgsm":
            forwards += share * (12 + 1.5 * min(moved, one["eps_max"]) / 1e-3)  # the scan, which some images need longer, and 10 halvings
            gradients += share
        else:
            gradients += share * min(one["max_steps"], 1.3 * moved / one["step"])
    return forwards, gradients + LOOKS * audited / sweeps.IMAGES["cifar10"]["test"]


def of(group, memory: float = MEMORY) -> Cost:
    """What a group costs.

    Operations are: of a KH update the products of filters with patches and of their changes; of classifiers both products; of convolutions 2
    for each weight and place, and as many again for each gradient; not what is proportional to fewer.
    """
    images, body, cost = sweeps.IMAGES[group.data], group.body, Cost()
    channels, classes = datasets.SHAPE[0], len(datasets.CLASSES)
    if group.kind in ("layers", "probes"):
        seeds, convs = body.get("seeds", 1), [ConvSettings(**conv) for conv in body["convs"]]
        for conv in convs:
            size = conv.K**2 * channels * conv.w**2
            cost.flop += 4 * size * patches(group, conv) * seeds
            cost.disk += BYTES["layer"] + size * (4 + 2 * len(body.get("snapshots", []))) * PACKED + 230 * conv.conv_epochs
    elif group.kind == "heads":
        conv, heads = ConvSettings(**body["conv"]), [HeadSettings(**head) for head in body["heads"]]
        filters = conv.K**2 * channels * conv.w**2
        cost.flop += 2 * filters * side(conv.w) ** 2 * convolved(group, memory)
        for head in heads:
            size = classes * features(conv.K, conv.w, head)
            cost.flop += 4 * size * images["train"] * head.head_epochs
            cost.disk += BYTES["model"] + (size + filters) * 4 * PACKED
        held = sum(sweeps._head_bytes(conv, head) for head in heads)
        cost.gib = 0.8 + held / 2**30 + min(memory, _activities(group) / 2**30)
    elif group.kind == "bp":
        for _, K, w, head in map(shape, body["models"]):
            filters, size, seen = K**2 * channels * w**2, classes * features(K, w, head), images["train"] * head.head_epochs
            cost.flop += (4 * filters * side(w) ** 2 + 6 * size) * seen
            cost.disk += BYTES["model"] + (size + filters) * 4 * PACKED
    else:
        for model, attacks in zip(body["models"], body["attacks"], strict=True):
            _, K, w, head = shape(model)
            forwards, gradients = (images["test"] * count for count in looks(model, attacks, body["audited"]))
            cost.flop += (2 * K**2 * channels * w**2 * side(w) ** 2 + 2 * classes * features(K, w, head)) * (forwards + 2 * gradients)
            cost.disk += sum(BYTES["attack"] + 8 * images["test"] * outcome(model, one["confidence"])[0] for one in attacks)
    return cost


def shape(model: dict) -> tuple[str, int, int, HeadSettings]:
    one = model.get("conv", model)
    return "LL" if "conv" in model else "BP", one["K"], one["w"], HeadSettings(**model["head"])


# seconds


class Rates:
    """Rates of this machine and this code, measured when they are first asked for and kept in a file of the cache."""

    def __init__(self, threads: int = 1, place: Path | None = None):
        self.threads, self.place = threads, place or cache_dir() / "rates.json"
        origin = provenance()
        self.machine = " / ".join(map(str, (origin["hardware"]["name"], threads, origin["code"]["source"], origin["libraries"]["torch"])))
        try:
            self.all = json.loads(self.place.read_text())
        except (OSError, ValueError):
            self.all = {}
        self.known = self.all.setdefault(self.machine, dict(measured=time.strftime("%Y-%m-%d"), provenance=origin, rates={}))["rates"]

    def get(self, name: str, measure: Callable[[], list[float]]) -> list[float]:
        """What was measured under this name, else what ``measure`` finds now."""
        if name not in self.known:
            threads = torch.get_num_threads()
            torch.set_num_threads(self.threads)
            try:
                self.known[name] = [float(f"{value:.4g}") for value in measure()]
            finally:
                torch.set_num_threads(threads)
            atomic_write(self.place, json.dumps(self.all, indent=1).encode())
        return self.known[name]


def seconds(group, rates: Rates, memory: float = MEMORY) -> float:
    """How long a group takes on one thread of this machine, about, without the start of its notebook."""
    (packing,) = rates.get("packing", lambda: [_best(lambda: pack(dict(a=np.random.default_rng(0).standard_normal(10**6, np.float32)))) / 4e6])
    return _compute(group, rates, memory) + of(group, memory).disk / PACKED * packing


def _compute(group, rates: Rates, memory: float) -> float:
    images, body = sweeps.IMAGES[group.data], group.body
    if group.kind in ("layers", "probes"):
        convs = [ConvSettings(**conv) for conv in body["convs"]]
        seeds = body.get("seeds", 1)
        neurons, most = sum(conv.K**2 for conv in convs) * seeds, max(convs, key=lambda conv: conv.K)
        name = f"layers w={most.w} batch={most.conv_batch} layers={len(convs) * seeds} neurons={neurons} p={max(c.p for c in convs):g} m={max(c.m for c in convs)}"
        (each,) = rates.get(name, lambda: [_time_layers([replace(conv, seed=seed) for conv in convs for seed in range(seeds)])])
        return each * max(patches(group, conv) for conv in convs)
    if group.kind == "heads":
        conv, heads = ConvSettings(**body["conv"]), [HeadSettings(**head) for head in body["heads"]]
        chosen = heads[:: -(-len(heads) // 12)]
        size, part = (sum(features(conv.K, conv.w, head) for head in some) for some in (heads, chosen))
        kinds = len({(head.w_pool, head.sigma, head.n) for head in chosen})
        name = f"heads K={conv.K} w={conv.w} {body['feature_dtype']} batch={heads[0].head_batch} heads={len(chosen)} kinds={kinds} size={part}"
        once, epoch = rates.get(name, lambda: _time_heads(conv, chosen, body["feature_dtype"]))
        epochs = max(head.head_epochs for head in heads)
        each = epoch * size / part
        return once * convolved(group, memory) + each * (images["train"] * epochs + images["test"] / 2)
    if group.kind == "bp":
        total = 0.0
        for _, K, w, head in map(shape, body["models"]):
            name = f"bp K={K} w={w} w_pool={head.w_pool} batch={min(100, head.head_batch)}"
            (each,) = rates.get(name, lambda K=K, w=w, head=head: [_time_bp(K, w, head)])
            total += each * (images["train"] * head.head_epochs + images["test"] / 3)
        return total
    total = 0.0
    for model, attacks in zip(body["models"], body["attacks"], strict=True):
        kind, K, w, head = shape(model)
        name = f"attack {kind} K={K} w={w} w_pool={head.w_pool}"
        forward, gradient = rates.get(name, lambda model=model: _time_attack(model))
        forwards, gradients = looks(model, attacks, body["audited"])
        total += images["test"] * ((1 + forwards) * forward + gradients * gradient)
    return total


def start(rates: Rates) -> float:
    """Seconds to start a notebook, as it is done in a sweep."""
    return rates.get("start", lambda: [_time_start()])[0]


def _best(do: Callable[[], object], times: int = 2) -> float:
    """Seconds that the cores work at it, divided by the number of threads: the time it takes where nothing else runs, whatever runs now."""
    found = []
    for _ in range(times):
        started = time.process_time()
        do()
        found.append(time.process_time() - started)
    return min(found) / torch.get_num_threads()


def _sample():
    return datasets.load("cifar10-sample")


def _time_layers(convs: list[ConvSettings]) -> float:
    """Seconds a patch of all these layers together."""
    conv = convs[0]
    work = sum(conv.K**2 for conv in convs) * conv.w**2 * conv.conv_batch
    updates = max(3, min(40, round(4e8 / work)))
    images = _sample().train_images[: max(1, -(-updates * conv.conv_batch // side(conv.w) ** 2))]
    quick = [replace(one, conv_epochs=1, conv_share=1.0) for one in convs]
    learning.train_layers(images[:2], [replace(one, conv_batch=100) for one in quick])  # compiles, warms
    patches = max(conv.conv_batch, len(images) * side(conv.w) ** 2 // conv.conv_batch * conv.conv_batch)
    return _best(lambda: learning.train_layers(images, quick)) / min(patches, len(images) * side(conv.w) ** 2)


def _time_heads(conv: ConvSettings, heads: list[HeadSettings], dtype: str) -> list[float]:
    """Seconds an image for features, and an epoch."""
    weight = learning.initial_filters(replace(conv, conv_epochs=0), datasets.SHAPE[0])
    count = max(300, min(heads[0].head_batch, 1000))
    images, labels = _sample().train_images[:count], _sample().train_labels[:count]

    def train(epochs):
        ready = [Head(models.ll_network(weight, conv.p, replace(head, head_epochs=epochs), datasets.SHAPE[-1], 10).eval()) for head in heads]
        return _best(lambda: train_heads(ready, images, labels, getattr(torch, dtype), 2**33), 1)

    train(1)
    one, three = min(train(1), train(1)), min(train(3), train(3))
    epoch = max(0.0, three - one) / 2
    return [max(one - epoch, 0.05 * epoch) / count, epoch / count]


def _time_bp(K: int, w: int, head: HeadSettings) -> float:
    """Seconds an image and epoch."""
    batch = min(100, head.head_batch)
    images, labels = _sample().train_images[: 2 * batch], _sample().train_labels[: 2 * batch]
    quick = replace(head, head_epochs=1, head_batch=batch, held_out=0)

    def train():
        training.train(models.bp_network(K, w, quick, *datasets.SHAPE[::2], 10).train(), images, labels)

    return _best(train) / len(images)


def _time_attack(model: dict) -> list[float]:
    """Seconds an image for a forward pass and for a gradient."""
    _, K, w, head = shape(model)
    if "conv" in model:
        conv = ConvSettings(**model["conv"])
        network = models.ll_network(learning.initial_filters(replace(conv, conv_epochs=0), datasets.SHAPE[0]), conv.p, head, datasets.SHAPE[-1], 10).eval()
    else:
        network = models.bp_network(K, w, head, *datasets.SHAPE[::2], 10).eval()
    network.requires_grad_(False)
    size = training.part_size(network, _sample().test_images)
    images, labels = training.to_float(_sample().test_images[:size]), _sample().test_labels[:size]
    with torch.no_grad():
        forward = _best(lambda: network(images), 3)
    return [forward / size, _best(lambda: gradient(network, images, labels), 3) / size]


def _time_start() -> float:
    """Seconds of a run of a notebook over a group that has next to nothing to do: those that the cores work, and one for what waits for another."""
    with tempfile.TemporaryDirectory() as folder:
        conv = ConvSettings(K=2, m=2, conv_epochs=0)
        group = sweeps.Group("layers", "cifar10-sample", dict(convs=[conv.dict()], snapshots=[], stop_collapsed=False))
        place = sweeps.write_plan(Path(folder), "start", "smoke", [group], "cpu", 1, {})
        before = os.environ.copy()
        try:
            runner.do(place, group.id, quiet=True, env=dict(KHNB_RESULTS=folder))
        finally:
            os.environ.clear(), os.environ.update(before)
        return 1.0 + json.loads((place.parent / "times.jsonl").read_text())["cpu"]


def schedule(groups: list, times: dict[str, float], workers: int, done: set[str] = frozenset()) -> float:
    """Seconds until so many workers have done these groups, each as soon as those it needs are done, longest first."""
    left = {group.id: {need for need in group.needs if need not in done} for group in groups if group.id not in done}
    ids = set(left)
    left = {id: needs & ids for id, needs in left.items()}
    users: dict[str, list[str]] = {}
    for id, needs in left.items():
        for need in needs:
            users.setdefault(need, []).append(id)
    ready = [(-times[id], id) for id, needs in left.items() if not needs]
    heapq.heapify(ready)
    busy, now = [], 0.0
    while ready or busy:
        while ready and len(busy) < workers:
            cost, id = heapq.heappop(ready)
            heapq.heappush(busy, (now - cost, id))
        now, id = heapq.heappop(busy)
        for user in users.get(id, []):
            left[user].discard(id)
            if not left[user]:
                heapq.heappush(ready, (-times[user], user))
    return now
