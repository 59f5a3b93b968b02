"""Classifiers on one KH layer, all of them together: what they share is computed once (chapters 3, 6, 8)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from khnb import native, patches
from khnb.layer import synapses
from khnb.learning import schedule
from khnb.models import ACTIVATIONS, Network, activate, power
from khnb.training import epoch_order, to_float

PART = 2**23  # bytes of features done together on a CPU: they stay in its last cache
CHUNK = 2**19  # of them at a time in an activation function
DEVICE_PART = 2**30  # the same on a GPU


class Features:
    """What :meth:`khnb.models.Network.pool` gives for images, in several ways, before the activation function or after it.

    Parameters
    ----------
    layer : a :class:`~khnb.layer.KHConv2d`, on the device that is to compute.
    images : (N, C, H, W), uint8 or float in [0, 1].
    pools : (w_pool, s_pool) of each pooling; with (w_pool, s_pool, sigma) sigma is applied after it, with (w_pool, s_pool, sigma, n)
        sigma(.)^n before it.
    dtype : how they are kept.
    memory : bytes. As many images as fit have their features kept, on the layer's device; those of the others are computed
        again whenever they are needed, with the same result.
    """

    def __init__(self, layer, images: Tensor, pools: list[tuple], dtype: torch.dtype = torch.float32, memory: float = 0):
        self.layer, self.images, self.pools, self.dtype = layer, images, pools, dtype
        self.kernel, self.device = synapses(layer.weight, layer.p), layer.weight.device
        side = images.shape[-1] - layer.w + 1
        self.sizes = {pool: len(layer.weight) * ((side - pool[0]) // pool[1] + 1) ** 2 for pool in pools}
        largest = max(self.sizes.values()) * 4
        maps = len(layer.weight) * side**2 * 4  # activities, where there is no kernel that pools them at once
        self.part = max(1, min((PART if self.device.type == "cpu" else DEVICE_PART) // largest, 2**30 // maps))
        # fresh memory is slow on a CPU: each part goes to the same place
        self.room = torch.empty(self.part * largest // 4, device=self.device)
        self.rough = torch.empty(0 if dtype == torch.float32 else len(self.room), dtype=dtype, device=self.device)
        count = min(len(images), int(memory // (sum(self.sizes.values()) * dtype.itemsize)))
        self.kept = {pool: torch.empty(count, size, dtype=dtype, device=self.device) for pool, size in self.sizes.items()}
        for first in range(0, count, self.part):
            to = slice(first, min(first + self.part, count))
            for pool, found in zip(pools, self.compute(images[to]), strict=True):
                self.kept[pool][to] = found

    def compute(self, images: Tensor) -> list[Tensor]:
        """Of these images, for each pooling: (B, features) float32, in the order in which a classifier sees them."""
        images = to_float(images.to(self.device))
        scale = 1 / patches.norms(images, self.layer.w, self.layer.p)
        before = [tuple(rest) if len(rest) == 2 else () for _, _, *rest in self.pools]
        if not any(before):
            found = native.conv_pools(images, self.kernel, scale, [pool[:2] for pool in self.pools])
        else:
            activity = F.conv2d(images, self.kernel) * scale
            found = [F.max_pool2d(activate(activity, *of) if of else activity, *pool[:2]) for of, pool in zip(before, self.pools, strict=True)]
        return [ACTIVATIONS[pool[2]](x.flatten(1)) if len(pool) == 3 else x.flatten(1) for pool, x in zip(self.pools, found, strict=True)]

    def of(self, index: Tensor) -> Iterator[tuple[tuple, Tensor]]:
        """Of images by number, for each pooling: its entry in ``pools`` and (B, features) float32, rounded to ``dtype`` and back.

        At most ``part`` images. What was given is overwritten by what comes next.
        """
        stored = index < len(self.kept[self.pools[0]])
        fresh = None if stored.all() else self.compute(self.images[index[~stored]])
        index, stored = index.to(self.device), stored.to(self.device)
        for i, pool in enumerate(self.pools):
            shape = len(index), self.sizes[pool]
            x = self.room[: math.prod(shape)].view(shape)
            if fresh is not None:
                x[~stored] = fresh[i].to(self.dtype).float()
                x[stored] = self.kept[pool][index[stored]].float()
            elif self.dtype == torch.float32:
                torch.index_select(self.kept[pool], 0, index, out=x)
            else:
                rough = self.rough[: math.prod(shape)].view(shape)
                x.copy_(torch.index_select(self.kept[pool], 0, index, out=rough))
            yield pool, x

    def holds(self, index: Tensor) -> bool:
        """Whether the features of all these images, by number, are kept."""
        return bool((index < len(self.kept[self.pools[0]])).all())

    def rows(self, index: Tensor) -> Iterator[tuple[tuple, Tensor, Tensor]]:
        """The same, not copied where it :meth:`holds` them: for each pooling its entry, features (as they are kept, or float32) and which rows of them, (B,) int64.

        Then it can be more than ``part`` images.
        """
        if self.holds(index):
            index = index.to(self.device)
            yield from ((pool, self.kept[pool], index) for pool in self.pools)
        else:
            yield from ((pool, x, torch.arange(len(x), device=self.device)) for pool, x in self.of(index))


@dataclass
class _Sums:
    """What is added up for heads with the same features: gradients over a minibatch, loss and hits over an epoch."""

    weight: Tensor  # (heads, classes, features)
    bias: Tensor  # (heads, classes)
    loss: Tensor  # (heads,) float64
    right: Tensor  # (heads,) int64

    @classmethod
    def zero(cls, like: Tensor) -> _Sums:
        counts = torch.zeros(len(like), dtype=torch.int64, device=like.device)
        return cls(torch.zeros_like(like), torch.zeros_like(like[:, :, 0]), counts.double(), counts)

    def add(self, y: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, n: float, share: float) -> None:
        """The plain way: gradients of share * (sum of the cross-entropies) of the classifiers on y^n."""
        a, (heads, classes) = power(y, n), bias.shape
        slope = self.judge((a @ weight.flatten(0, 1).T).view(-1, heads, classes) + bias, labels, share)
        self.weight.flatten(0, 1).addmm_(slope.flatten(1).T, a)

    def judge(self, logits: Tensor, labels: Tensor, share: float) -> Tensor:
        """Add loss, hits and the gradient of the bias; return that of the logits (B, heads, classes)."""
        log_p, rows = logits.log_softmax(2), torch.arange(len(labels), device=labels.device)
        self.loss -= log_p[rows, :, labels].double().sum(0)
        self.right += (logits.argmax(2) == labels[:, None]).sum(0)
        slope = log_p.exp()
        slope[rows, :, labels] -= 1
        slope *= share
        self.bias += slope.sum(0)
        return slope


class _Together:
    """Heads with the same pooling, activation function and power; on a GPU, with several powers, as many of each. Their weights lie side by side, in one tensor."""

    def __init__(self, by_n: dict[float, list[Head]]):
        self.powers, self.heads = list(by_n), [head for heads in by_n.values() for head in heads]
        self.weight = torch.stack([head.network.linear.weight.data for head in self.heads])
        self.bias = torch.stack([head.network.linear.bias.data for head in self.heads])
        self.served = native.classifies(self.weight)
        self.sums = [_Sums.zero(self.weight) for _ in range(torch.get_num_threads() if self.served else 1)]
        for head, *each in zip(self.heads, self.weight, self.bias, self.sums[0].weight, self.sums[0].bias, strict=True):
            linear = head.network.linear
            linear.weight.data, linear.bias.data, linear.weight.grad, linear.bias.grad = each

    def add(self, y: Tensor, labels: Tensor, share: float) -> None:
        """Of minibatches, or parts of one, activated features and labels; ``share`` as in :meth:`_Sums.add`."""
        (n,) = self.powers
        if not self.served:
            self.sums[0].add(y, labels, self.weight, self.bias, n, share)
        elif n == int(n):
            native.classify(y, labels, int(n), share, self.weight, self.bias, self.sums)
        else:
            native.classify(y.pow(n), labels, 1, share, self.weight, self.bias, self.sums)

    def add_up(self) -> None:
        """The gradients of all threads, where the heads have theirs."""
        first, *others = self.sums
        for other in others:
            for to, more in ((first.weight, other.weight), (first.bias, other.bias)):
                to.add_(more)
                more.zero_()

    def clear(self) -> None:
        """Before the next minibatch."""
        self.sums[0].weight.zero_(), self.sums[0].bias.zero_()


@dataclass(eq=False)
class Head:
    """An LL model whose classifier is being trained. ``stopped`` names why it did not get to the end, if so."""

    network: Network
    history: list[dict] = field(default_factory=list)
    stopped: str = ""

    def __post_init__(self):
        learned = [each for each in self.network.linear.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(learned, lr=self.network.head.head_eta0, fused=True)

    @property
    def done(self) -> bool:
        """Whether there is nothing left to train."""
        return bool(self.stopped) or len(self.history) >= self.network.head.head_epochs

    def state(self) -> dict:
        """What :meth:`resume` needs to go on from here; its tensors go on being trained, so save or copy them at once."""
        model, optimizer = self.network.linear.state_dict(), self.optimizer.state_dict()
        # views into a larger tensor would be saved with all of it
        return dict(history=self.history, stopped=self.stopped, model={k: v.clone() for k, v in model.items()}, optimizer=optimizer)

    def resume(self, state: dict) -> None:
        """Go on from a :meth:`state`."""
        self.network.linear.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history, self.stopped = list(state["history"]), state["stopped"]


def train_heads(heads: list[Head], images: Tensor, labels: Tensor, dtype=torch.float32, memory: float = 2**32, after_epoch=None) -> None:
    """Train the classifiers of LL models with the same KH layer: AdamW on the mean cross-entropy (eq. 3.2), see :func:`khnb.training.train`.

    Each head ends as it would alone, but for rounding. Those with the same ``head_batch`` and ``head_order`` see the same minibatches,
    whose features are made once for each pooling and activation function; other heads are trained one group after the other.

    Parameters
    ----------
    heads : trained in place, on from where they are, on the device they are on. A loss that stops being finite stops its head only.
    images : (N, C, H, W), uint8 or float in [0, 1]; labels : (N,) int64.
    dtype : how pooled activities are kept, see :class:`Features`.
    memory : bytes for them. The images, the heads themselves (16 bytes a weight, and 4 for each thread) and about 100 MB come on top.
    after_epoch : called with the heads that were trained in the epoch, after each.

    Raises ``ValueError`` where the layers of the heads are not equal.
    """
    layer = heads[0].network.conv
    for head in heads:
        if head.network.conv.p != layer.p or not torch.equal(head.network.conv.weight, layer.weight):
            raise ValueError("these heads have different KH layers; train_heads wants heads of one layer")
    ways = _ways([head for head in heads if not head.done], exact=dtype == torch.float32)
    if not ways:
        return
    features = Features(layer, images, list(dict.fromkeys(pool for pool, _, _ in ways.values())), dtype, memory)
    labels = labels.to(features.device)
    groups: dict[tuple, list[Head]] = {}
    for head in heads:
        groups.setdefault((head.network.head.head_batch, head.network.head.head_order), []).append(head)
    for group in groups.values():
        together: list = []
        while any(not head.done for head in group):
            epoch = min(len(head.history) for head in group if not head.done)
            active = [head for head in group if not head.done and len(head.history) == epoch]
            if {id(head) for one in _each(together) for head in one.heads} != {id(head) for head in active}:
                together = _arrange(active, ways)
            _train_epoch(features, labels, together, active, epoch)
            if after_epoch:
                after_epoch(active)


def _ways(heads: list[Head], exact: bool) -> dict[Head, tuple[tuple, str, float]]:
    """Of each head, what :class:`Features` are to be kept for it, and the activation function ("" for none) and power left to apply.

    ``exact``: they are kept without rounding. Then an activation function that all heads of a pooling have is applied once and for all.
    """
    first = [s for s in (head.network.head for head in heads) if s.pooling == "first"]
    sigmas = {pool: {s.sigma for s in first if (s.w_pool, s.s_pool) == pool} for pool in {(s.w_pool, s.s_pool) for s in first}}

    def way(s) -> tuple[tuple, str, float]:
        pool = s.w_pool, s.s_pool
        if s.pooling == "last":
            return (*pool, s.sigma, s.n), "", 1
        return ((*pool, s.sigma), "", s.n) if exact and len(sigmas[pool]) == 1 else (pool, s.sigma, s.n)

    return {head: way(head.network.head) for head in heads}


def _each(together) -> list[_Together]:
    return [one for _, by_sigma in together for each in by_sigma.values() for one in each]


def _arrange(heads: list[Head], ways: dict) -> list[tuple[tuple, dict[str, list[_Together]]]]:
    """Of each entry of :class:`Features`, of each activation function: the heads of each power; on a GPU those of all powers that as many heads have."""
    keys: dict = {}
    for head in heads:
        pool, sigma, n = ways[head]
        keys.setdefault(pool, {}).setdefault(sigma, {}).setdefault(n, []).append(head)

    def together(by_n: dict[float, list[Head]]) -> list[_Together]:
        if not native.gpu(heads[0].network.linear.weight):
            return [_Together({n: of}) for n, of in by_n.items()]
        return [_Together({n: of for n, of in by_n.items() if len(of) == count}) for count in dict.fromkeys(map(len, by_n.values()))]

    return [(pool, {sigma: together(by_n) for sigma, by_n in by_sigma.items()}) for pool, by_sigma in keys.items()]


def _joined(heads: list[Head]) -> torch.optim.AdamW:
    """What takes the step of all their optimizers, which have the same settings, at once: on a GPU a launch for about fifteen in place of one each. It works on their states."""
    learned = {parameter: head.optimizer for head in heads for parameter in head.optimizer.param_groups[0]["params"]}
    joined = torch.optim.AdamW(list(learned), lr=heads[0].optimizer.param_groups[0]["lr"], fused=True)
    for parameter, optimizer in learned.items():
        joined.state[parameter] = optimizer.state[parameter]
    return joined


def _activated(x: Tensor, sigma: str, room: Tensor) -> Tensor:
    """sigma(x) in ``room``; where there is no kernel for it, a few rows at a time on a CPU."""
    y = room[: x.numel()].view_as(x)
    if activator := native.activator(x, sigma, 1):
        return activator(x, sigma, 1, out=y)
    rows = max(1, CHUNK // x.shape[1]) if x.device.type == "cpu" else len(x)
    for some, to in zip(x.split(rows), y.split(rows), strict=True):
        to.copy_(ACTIVATIONS[sigma](some))
    return y


@torch.no_grad()
def _train_epoch(features: Features, labels: Tensor, together: list, active: list[Head], epoch: int) -> None:
    started, settings = time.perf_counter(), active[0].network.head
    every, by_eta = _each(together), {}
    for one in every:
        for sums in one.sums:
            sums.loss.zero_(), sums.right.zero_()
    for head in active:
        s = head.network.head
        eta = head.optimizer.param_groups[0]["lr"] = schedule(s.head_scheduler, s.head_eta0, epoch, s.head_epochs, s.tau, s.gamma, s.s_step)
        by_eta.setdefault(eta, []).append(head)
    by_pool, optimizers, kernels = dict(together), [_joined(heads) for heads in by_eta.values()], native.gpu(features.kernel)
    room = torch.empty_like(features.room[: 0 if kernels else None])
    order = epoch_order(len(features.images), settings.head_order, epoch)
    for index in order.split(settings.head_batch):
        for part in index.split(len(index) if kernels and features.holds(index) else features.part):
            target, share = labels[part.to(labels.device)], 1 / len(index)
            for pool, x, *rows in features.rows(part) if kernels else features.of(part):
                for sigma, ones in by_pool.get(pool, {}).items():
                    y = _activated(x, sigma, room) if sigma and not kernels else x
                    for one in ones:
                        if kernels:
                            kernels.classify(y, *rows, sigma, one.powers, target, share, one.weight, one.bias, one.sums[0])
                        else:
                            one.add(y, target, share)
        for one in every:
            one.add_up()
        for optimizer in optimizers:
            optimizer.step()
        for one in every:
            one.clear()
    found = []  # once a GPU is done
    for one in every:
        sums = (sum(getattr(each, name) for each in one.sums).tolist() for name in ("loss", "right"))
        largest = torch.linalg.vector_norm(one.weight, float("inf"), (1, 2)).tolist()  # no number if one of them is none
        found.append(zip(one.heads, *sums, largest, strict=True))
    seconds, count = (time.perf_counter() - started) / len(active), len(labels)
    for one in found:
        for head, loss, right, size in one:
            eta = head.optimizer.param_groups[0]["lr"]
            head.history.append(dict(epoch=epoch + 1, eta=eta, loss=loss / count, accuracy=right / count, seconds=seconds))
            if not (math.isfinite(loss) and math.isfinite(size)):
                head.stopped = f"the loss stopped being finite in epoch {epoch + 1}: lower head_eta0={head.network.head.head_eta0:g}"


@torch.no_grad()
def logits(heads: list[Head], images: Tensor) -> list[Tensor]:
    """Of every head of one KH layer, what it says of every image: (N, classes) float32 on the CPU each."""
    ways = _ways(heads, exact=False)
    features, found = Features(heads[0].network.conv, images, list(dict.fromkeys(pool for pool, _, _ in ways.values()))), [[] for _ in heads]
    for part in torch.arange(len(images)).split(features.part):
        for pool, x in features.of(part):
            for to, head in zip(found, heads, strict=True):
                if ways[head][0] == pool:
                    to.append(head.network.classify(x).cpu())
    return [torch.cat(parts) for parts in found]
