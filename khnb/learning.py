"""The Krotov-Hopfield learning rule (eqs. 4.2-4.7), the schedules (6.1-6.4) and the f-score."""

from __future__ import annotations

import itertools
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from khnb import native, patches
from khnb.layer import synapses
from khnb.settings import RANKS, ConvSettings, check_geometry

COLLAPSED = 0.15  # section 8.1.2 and fig. 8.6: a layer with f below this shows the Blue Wall of Death
ALIVE = 0.9  # share of neurons with a positive weight below which one that forms is recognised
BLUE_WALL, NOT_FINITE = "blue wall of death", "not finite"
PATCH_BYTES, DEVICE_PATCH_BYTES = 2**24, 2**30  # of patches gathered at a time, on a CPU and on a GPU


def schedule(name: str, eta0: float, t: float, T: float, tau: float = 2.5, gamma: float = 0.5, s_step: int = 10) -> float:
    """Learning rate at epoch t of T: ``linear`` (6.1), ``exponential`` (6.2), ``cosine`` (6.3), ``step`` (6.4), ``constant``.

    ``tau`` is the decay rate of 6.2 (called gamma in the thesis's table 8.1); ``gamma`` and ``s_step`` are
    factor and interval of 6.4. Raises ``ValueError`` for another name or t outside [0, T].
    """
    if not 0 <= t <= T:
        raise ValueError(f"epoch t={t} is outside 0..{T}")
    if name == "constant":
        return eta0
    if name == "linear":
        return eta0 * (T - t) / T
    if name == "exponential":
        return eta0 * math.exp(-tau * t / T)
    if name == "cosine":
        return eta0 / 2 * (1 + math.cos(math.pi * t / T))
    if name == "step":
        return eta0 * gamma ** math.floor(t / s_step)
    raise ValueError(f"unknown schedule {name!r}; valid: constant, linear, exponential, cosine, step")


def rank(score: Tensor, m) -> tuple[Tensor, Tensor]:
    """Indices of the most active and of the m-th most active neuron.

    score : (..., F, N), one column a patch; m : a number, or one for each entry of the first axis. Returns two int64 tensors
    (..., N). On a tie the lower index ranks higher: ``max`` returns the first of equal values, so rounds of it are an exact
    partial sort.
    """
    most = max(m) if isinstance(m, (list, tuple)) else m
    if most > 16:
        order = score.sort(dim=-2, descending=True, stable=True).indices.movedim(-2, 0)
    else:
        order, score = [score.max(-2).indices], score.clone()
        for _ in range(most - 1):
            score.scatter_(-2, order[-1].unsqueeze(-2), -math.inf)
            order.append(score.max(-2).indices)
    last = order[m - 1] if isinstance(m, int) else torch.stack([order[rank - 1][i] for i, rank in enumerate(m)])
    return order[0], last


def kh_update(weight: Tensor, patches: Tensor, m: int, delta: float, p: float, rank: str = "activity") -> Tensor:
    """The change of the filters that one minibatch of patches asks for, eqs. 4.3-4.7 with eta left out.

    Summed over the minibatch and not scaled:
    dW_k = sum_v g_k(v) [v - <W_k, v>_k W_k], with g = 1 for the most active neuron, -delta for the
    m-th most active, 0 for all others (eq. 4.6).

    Parameters
    ----------
    weight : (F, D) float, the filters W.
    patches : (N, D) float, unit p-norm.
    m : rank of the inhibited neuron, 2 <= m <= F.
    delta : anti-Hebbian strength, >= 0.
    p : order of the norm, >= 2.
    rank : ``"activity"`` ranks by <W_k, v>_k, as public implementations of the rule do; ``"Q"`` by the
        activity over norm, <W_k, v>_k / <W_k, W_k>_k^((p-1)/p) (eq. 4.4 with its exponents set right:
        degree 0 in W).

    Returns (F, D), dtype kept. On a tie the lower index ranks higher. Raises ``ValueError`` on shapes or
    values outside these ranges.
    """
    if weight.ndim != 2 or patches.ndim != 2 or weight.shape[1] != patches.shape[1]:
        raise ValueError(f"weight {tuple(weight.shape)} and patches {tuple(patches.shape)}: expected (F, D) and (N, D)")
    if not 2 <= m <= weight.shape[0]:
        raise ValueError(f"m={m} is not valid: rank m must be from 2 to the number of filters, {weight.shape[0]}")
    if not delta >= 0 or not p >= 2:
        raise ValueError(f"delta={delta}, p={p} are not valid: delta must be >= 0 and p >= 2")
    if rank not in RANKS:
        raise ValueError(f'rank={rank!r} is not valid: "activity" or "Q"')
    return _changes(weight, patches, weight.new_ones(len(patches)), m, delta, p, rank == "Q")[0]


def _changes(weight, patches, scales, m, delta, p, by_q):
    """kh_update without checks, and the winners; patches (N, D) as they are, scales (..., N) their 1 / p-norm.

    Of one layer, or of several at once: weight (G, F, D), scales (G, N), m a list of G, delta and p (G, 1, 1). The sums
    over patches are products with the matrix g of eq. 4.6, so their order, and so the result, is the same every time.
    """
    activity = torch.matmul(synapses(weight, p), patches.T)  # ..., F, N
    score = activity / _sizes(weight, p) if by_q else activity
    winner, inhibited = rank(score, m)
    scales = scales.unsqueeze(-2)
    g = torch.zeros_like(activity).scatter_(-2, winner.unsqueeze(-2), scales)
    g.scatter_(-2, inhibited.unsqueeze(-2), -delta * scales)
    return torch.matmul(g, patches) - (g * activity).sum(-1, keepdim=True) * weight, winner


def _sizes(weight, p):
    """By what activities are divided to be ranked by Q (eq. 4.4): (..., F, 1), from weight (..., F, D)."""
    size = weight.abs().pow(p).sum(-1, keepdim=True)  # <W, W> = sum |W|^p
    return torch.where(size > 0, size, 1).pow((p - 1) / p)


def is_feature(weight: Tensor, p: float, tol: float = 1e-6) -> Tensor:
    """Which filters are features: all weights positive and | ||W_k||_p - 1 | < tol (section 8.1.1).

    weight : (F, ...) float. Returns (F,) bool. The norm is computed in float64.
    """
    flat = weight.detach().flatten(1).double()
    size = torch.linalg.vector_norm(flat, ord=p, dim=1)
    return (flat > 0).all(1) & ((size - 1).abs() < tol)


def f_score(weight: Tensor, p: float, tol: float = 1e-6) -> float:
    """Share of filters that are features, in [0, 1] (section 8.1.1). weight : (F, ...) float."""
    return is_feature(weight, p, tol).double().mean().item()


@dataclass
class Layer:
    """A trained KH layer: filters (F, C, w, w) float32, and what happened on the way.

    ``history`` holds one row an epoch: epoch, learning rate, mean norm, winners (neurons that won a patch), alive (neurons with
    any positive weight), f at two tolerances, seconds (this layer's part of the time its group took). ``wins`` (F,) is each
    neuron's share of the last epoch's patches; ``snapshots`` maps epoch -> filters. ``stopped`` says why training ended
    early: ``""``, ``"blue wall of death"`` or ``"not finite"``.
    """

    settings: ConvSettings
    weight: Tensor
    history: list[dict] = field(default_factory=list)
    wins: Tensor | None = None  # before the first epoch
    snapshots: dict[int, Tensor] = field(default_factory=dict)
    stopped: str = ""

    @property
    def collapsed(self) -> bool:
        """The Blue Wall of Death: fewer than 15% features, and neurons that no patch can excite any more.

        Patches have no negative values, so a neuron without a positive weight is never among the winners for good; at least a
        tenth of them like that was never seen in a layer that came to something (425 runs), and nearly always, long before
        the end, in those that did not (:func:`fates` has the other signs).
        """
        return _wall(f_score(self.weight, self.settings.p, 1e-4), (self.weight.flatten(1) > 0).any(1).double().mean().item())


def _wall(f: float, alive: float) -> bool:
    return f < COLLAPSED and alive < ALIVE


def fates(probe: dict, neurons: int) -> list[str]:
    """What has become of each layer of a probe: ``"collapsed"``, ``"formed"``, or ``""`` where it is not settled.

    probe : the results of its record, with ``f_1e4``, ``alive`` and ``winners`` (the latter two as numbers of neurons), each a list of
    layers with one value an epoch. A layer has formed with at least 15% features. With fewer it has collapsed where it is
    :attr:`Layer.collapsed`, or where f or the number of winners fell to less than half of what it was, f without a gain in the last
    three epochs, the winners to fewer than three tenths of the neurons.
    """

    def fate(f, alive, winners):
        if f[-1] >= COLLAPSED:
            return "formed"
        falling = max(f) >= COLLAPSED and f[-1] < max(f) / 2 and len(f) > 3 and f[-4] >= f[-3] >= f[-2] >= f[-1]
        few = winners[-1] < max(winners) / 2 and winners[-1] < 0.3 * neurons
        return "collapsed" if falling or few or _wall(f[-1], alive[-1] / neurons) else ""

    return [fate(*rows) for rows in zip(probe["f_1e4"], probe["alive"], probe["winners"], strict=True)]


def initial_filters(settings: ConvSettings, channels: int) -> Tensor:
    """Filters drawn from N(init_mean, init_std): (K^2, channels, w, w) float32, from the seed alone.

    Those that will not be trained (``conv_epochs=0``) are scaled to unit p-norm, which training would have given them.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.K**2, channels, settings.w, settings.w)
    weight = torch.randn(shape, generator=generator) * settings.init_std + settings.init_mean
    if settings.conv_epochs:
        return weight
    return weight / torch.linalg.vector_norm(weight.flatten(1), ord=settings.p, dim=1).clamp_min(1e-30)[:, None, None, None]


def minibatches(images: int, each: int, size: int, generator: torch.Generator, chunk: int = 1000, share: float = 1.0):
    """One epoch of patch numbers, ``size`` at a time, every patch at most once, in random order.

    images, each : how many images, and patches in each. Images are shuffled, and a ``share`` of them taken, ``chunk`` at a time;
    the patches of a chunk are shuffled together, and what does not fill a minibatch waits for the next chunk. The few left
    over at the end are dropped, unless there is no full minibatch at all. Yields (size,) int64.
    """
    rest, full = torch.empty(0, dtype=torch.int64), False
    taken = torch.randperm(images, generator=generator)[: max(1, round(share * images))]
    for part in taken.split(chunk):
        pool = torch.cat([rest, (part[:, None] * each + torch.arange(each)).flatten()])
        pool = pool[torch.randperm(len(pool), generator=generator)]
        whole = len(pool) // size * size
        yield from pool[:whole].split(size) if whole else ()
        rest, full = pool[whole:], full or whole > 0
    if not full:
        yield rest


@dataclass
class _Run:
    """A layer while it learns: the filters flat (F, D), where it is computed."""

    layer: Layer
    weight: Tensor
    wins: Tensor
    eta: float = 0.0
    stopped: str = ""


def _learn_native(images, runs, ids, pool):
    """The compiled kernels: one layer a task, while the patches of the next minibatches are gathered."""
    w, orders = runs[0].layer.settings.w, {run.layer.settings.p for run in runs}

    def prepare(room=None):
        chunk = next(ids, None)
        return chunk if chunk is None else native.gather(images, chunk, w, orders, room)

    def learn(run, found):
        s = run.layer.settings
        by = s.conv_rank == "Q", s.conv_scale == "max"
        return native.learn(found, run.weight, run.wins, s.p, s.m, s.delta, run.eta, *by) == len(found.rows)

    coming, used = pool.submit(prepare), None
    while (found := coming.result()) is not None:
        coming = pool.submit(prepare, used)
        active = [run for run in runs if not run.stopped]
        for run, finite in zip(active, pool.map(learn, active, [found] * len(active)), strict=True):
            run.stopped = "" if finite else NOT_FINITE
        used = found
        yield len(found.rows)


def _learn_torch(images, runs, ids):
    """Plain PyTorch on any device: layers of equal K and equal conventions in one product."""
    groups = {}
    for run in runs:
        s = run.layer.settings
        groups.setdefault((s.K, s.conv_rank, s.conv_scale), []).append(run)
    w, orders = runs[0].layer.settings.w, sorted({run.layer.settings.p for run in runs})
    for chunk in ids:
        chunk = chunk.to(images.device)
        if kernels := native.gpu(runs[0].weight):
            rows, scales = kernels.gather(images, chunk, w, runs[0].weight.new_tensor(orders))
        else:
            rows = patches.chosen(images, chunk.flatten(), w).view(*chunk.shape, -1)
            scales = torch.stack([patches.scales(rows, p) for p in orders])
        for group in groups.values():
            if active := [run for run in group if not run.stopped]:
                finite = _Stack(active, orders).learn(rows, scales)
                for run, well in zip(active, finite, strict=True):
                    run.stopped = "" if well else NOT_FINITE
        yield len(chunk)


class _Stack:
    """Layers of equal K and equal conventions while they learn: their filters and wins side by side, those of each run a view of them."""

    def __init__(self, runs: list[_Run], orders: list[float]):
        self.settings = [run.layer.settings for run in runs]
        self.weight, self.wins = torch.stack([run.weight for run in runs]), torch.stack([run.wins for run in runs])
        for run, weight, wins in zip(runs, self.weight, self.wins, strict=True):
            run.weight, run.wins = weight, wins
        self.m, self.order = [s.m for s in self.settings], [orders.index(s.p) for s in self.settings]
        columns = [s.p for s in self.settings], [s.delta for s in self.settings], [run.eta for run in runs]
        self.p, self.delta, self.eta = map(self.weight.new_tensor, columns)

    def learn(self, rows: Tensor, scales: Tensor) -> list[bool]:
        """One minibatch after the other: patches (updates, N, D), and 1 / p-norm of each, (orders, updates, N). Returns which layers are still finite."""
        s, kernels = self.settings[0], native.gpu(self.weight)
        by_q, by_max = s.conv_rank == "Q", s.conv_scale == "max"
        if kernels and self.weight.shape[1] <= kernels.NEURONS:
            m, order = (torch.tensor(values, dtype=torch.int32, device=self.weight.device) for values in (self.m, self.order))
            kernels.learn(self.weight, self.wins, rows, scales, order, self.p, m, self.delta, self.eta, by_q, by_max, all(s.p == int(s.p) for s in self.settings))
        else:
            p, delta, eta = (values[:, None, None] for values in (self.p, self.delta, self.eta))
            for v, scale in zip(rows, scales[self.order].unbind(1), strict=True):
                change, winner = _changes(self.weight, v, scale, self.m, delta, p, by_q)
                most = change.abs().amax((1, 2), keepdim=True).clamp_min(1e-30) if by_max else float(len(v))
                self.weight += change * (eta / most)
                self.wins.scatter_add_(1, winner, torch.ones_like(winner))
        return self.weight.isfinite().flatten(1).all(1).tolist()


def _close_epoch(run: _Run, channels: int, snapshots, seconds: float) -> None:
    """What is known at the end of an epoch goes into the layer."""
    layer, s = run.layer, run.layer.settings
    layer.weight = run.weight.reshape(-1, channels, s.w, s.w).cpu().clone()
    layer.wins = (run.wins / run.wins.sum().clamp_min(1)).float().cpu()
    layer.stopped = run.stopped
    flat = layer.weight.flatten(1).double()
    layer.history.append(
        dict(
            epoch=len(layer.history) + 1, eta=run.eta, norm=torch.linalg.vector_norm(flat, ord=s.p, dim=1).mean().item(),
            winners=int((run.wins > 0).sum()), alive=int((flat > 0).any(1).sum()),
            f_1e6=f_score(layer.weight, s.p), f_1e4=f_score(layer.weight, s.p, 1e-4), seconds=seconds,
        )
    )
    if len(layer.history) in snapshots:
        layer.snapshots[len(layer.history)] = layer.weight.clone()


def train_layers(
    images: Tensor, settings: list[ConvSettings], device: torch.device | str = "cpu", layers: list[Layer] | None = None,
    snapshots=(), after_epoch=None, stop_collapsed: bool = False, until: int | None = None, tell=None,
) -> list[Layer]:
    """Train KH layers on the patches of the images, all layers on the same ones (chapter 4; section 8.1).

    A minibatch is ``conv_batch`` patches. A layer's summed update (:func:`kh_update`) is divided by its largest absolute
    entry and multiplied by the learning rate of the epoch: the thesis leaves the scale open, and this is the
    convention, that of the published Krotov-Hopfield script, that reproduces its numbers.

    Layers with equal w, conv_batch, conv_order, conv_chunk and conv_share go together: each patch is gathered once for all of
    them. Each learns as it would alone. On the CPU a compiled kernel (:mod:`khnb.native`) serves uint8 images, m up to 8 and
    whole p; all else runs in PyTorch.

    Parameters
    ----------
    images : (N, C, H, W) uint8 (values 0..255) or float in [0, 1].
    settings : one for each layer.
    layers : layers to go on from, in the same order (their histories tell the epoch). Epochs draw their order from
        (conv_order, epoch), so a resumed run equals an uninterrupted one.
    snapshots : epochs after which the filters are kept; 0 is the start.
    after_epoch : called with the list of all layers after every epoch of a group (checkpoints).
    stop_collapsed : a layer that has met the Blue Wall of Death is given up at the end of the epoch.
    until : stop after this epoch, on the way of the schedule over all ``conv_epochs``.
    tell : called with (layers, updates) whenever some are done (progress).

    Memory beyond the images: about 100 MB for the patches at hand, and a few times the filters. A layer whose filters stop
    being finite is given up, the others go on; :attr:`Layer.stopped` says so. Raises ``ValueError`` for images that do not fit.
    """
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (images, channels, height, width)")
    for s in settings:
        check_geometry(min(images.shape[2:]), s.w, 1)
    if layers is None:
        layers = [Layer(s, initial_filters(s, images.shape[1])) for s in settings]
        for layer in layers if 0 in snapshots else ():
            layer.snapshots[0] = layer.weight.clone()
    if [layer.settings for layer in layers] != list(settings):
        raise ValueError("the layers to go on from were made with other settings")
    images = images.to(device).contiguous()

    def last(layer):
        return min(layer.settings.conv_epochs, until or layer.settings.conv_epochs)

    groups = {}
    for layer in layers:
        s = layer.settings
        key = native.learns(images, s.m, s.p), s.w, s.conv_batch, s.conv_order, s.conv_chunk, s.conv_share
        groups.setdefault(key, []).append(layer)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for key, group in groups.items():
            while unfinished := [layer for layer in group if not layer.stopped and len(layer.history) < last(layer)]:
                epoch = min(len(layer.history) for layer in unfinished)
                now = [layer for layer in unfinished if len(layer.history) == epoch]
                _epoch(images, now, epoch, *key, snapshots, pool, tell)
                for layer in now if stop_collapsed else ():
                    layer.stopped = layer.stopped or (BLUE_WALL if layer.collapsed else "")
                if after_epoch:
                    after_epoch(layers)
    return layers


def _epoch(images, layers, epoch, served, w, batch, order, chunk, share, snapshots, pool, tell):
    """One epoch of layers that share their patches."""
    started = time.perf_counter()
    each = (images.shape[2] - w + 1) * (images.shape[3] - w + 1)
    generator = torch.Generator().manual_seed(order * 1_000_003 + epoch + 1)
    parts = minibatches(len(images), each, batch, generator, chunk, share)
    room = PATCH_BYTES if images.device.type == "cpu" else DEVICE_PATCH_BYTES
    together = max(1, room // (8 * batch * images.shape[1] * w * w))
    ids = (torch.stack(part) for part in iter(lambda: list(itertools.islice(parts, together)), []))
    runs = []
    for layer in layers:
        s = layer.settings
        flat = layer.weight.to(images.device).flatten(1).clone()
        wins = torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
        runs.append(_Run(layer, flat, wins, schedule(s.conv_scheduler, s.conv_eta0, epoch, s.conv_epochs, s.tau, s.gamma, s.s_step)))
    for updates in _learn_native(images, runs, ids, pool) if served else _learn_torch(images, runs, ids):
        if tell:
            tell(len(layers), updates)
        if all(run.stopped for run in runs):
            break
    taken, filters = time.perf_counter() - started, sum(len(run.weight) for run in runs)
    for run in runs:
        _close_epoch(run, images.shape[1], snapshots, taken * len(run.weight) / filters)


def train_layer(images: Tensor, settings: ConvSettings, device="cpu", layer: Layer | None = None, snapshots=(), after_epoch=None) -> Layer:
    """One layer by :func:`train_layers`; ``FloatingPointError`` naming the epoch when its filters stop being finite."""
    tell = after_epoch and (lambda layers: after_epoch(layers[0]))
    (layer,) = train_layers(images, [settings], device, layer and [layer], snapshots, tell)
    if layer.stopped == NOT_FINITE:
        raise FloatingPointError(f"the filters stopped being finite in epoch {len(layer.history)}: lower conv_eta0={settings.conv_eta0}")
    return layer
