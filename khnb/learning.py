"""The Krotov-Hopfield learning rule (eqs. 4.2-4.7), the schedules (6.1-6.4) and the f-score."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from khnb import native, patches
from khnb.layer import synapses
from khnb.settings import ConvSettings, check_geometry

COLLAPSED = 0.15  # section 8.1.2 and fig. 8.6: a layer with f below this shows the Blue Wall of Death
CHUNK = 1000  # images whose patches are in memory, and shuffled, together


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


def rank(activity: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Indices of the most active and of the m-th most active neuron.

    activity : (F, N), one column a patch. Returns two (N,) int64 tensors. On a tie the lower index ranks
    higher: ``max`` returns the first of equal values, so ``m`` rounds of it are an exact partial sort. A
    compiled kernel does the same several times faster where it can (:mod:`khnb.native`).
    """
    ranked = native.rank(activity, m)
    if ranked is not None:
        return ranked
    activity = activity.clone()
    winner = index = activity.max(0).indices
    for _ in range(m - 1):
        activity.scatter_(0, index[None], -math.inf)
        index = activity.max(0).indices
    return winner, index


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
    if rank not in ("activity", "Q"):
        raise ValueError(f'rank={rank!r} is not valid: "activity" or "Q"')
    return _update(weight, patches, m, delta, p, rank)[0]


def _update(weight, patches, m, delta, p, by="activity"):
    """kh_update without checks; also returns the winners."""
    activity = synapses(weight, p) @ patches.T  # F, N
    ranked = activity
    if by == "Q":
        size = weight.abs().pow(p).sum(1, keepdim=True)  # <W, W> = sum |W|^p
        ranked = activity / torch.where(size > 0, size, 1).pow((p - 1) / p)
    winner, inhibited = rank(ranked, m)

    def gather(index):  # sums of v and of <W_k, v> over the patches of each neuron
        sums = torch.zeros_like(weight).index_add_(0, index, patches)
        return sums, weight.new_zeros(len(weight)).index_add_(0, index, activity.gather(0, index[None])[0])

    (hebb, h), (anti, h_anti) = gather(winner), gather(inhibited)
    hebb.sub_(anti, alpha=delta)
    h.sub_(h_anti, alpha=delta)
    return hebb.addcmul_(h[:, None], weight, value=-1), winner


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

    ``history`` holds one row an epoch (epoch, learning rate, mean norm, winners, f at two tolerances, seconds);
    ``wins`` (F,) is each neuron's share of the last epoch's patches; ``snapshots`` maps epoch -> filters.
    """

    settings: ConvSettings
    weight: Tensor
    history: list[dict] = field(default_factory=list)
    wins: Tensor | None = None
    snapshots: dict[int, Tensor] = field(default_factory=dict)

    @property
    def collapsed(self) -> bool:
        """The Blue Wall of Death: fewer than 15% features, and almost all patches won by fewer than m neurons."""
        few = self.wins is not None and self.wins.sort(descending=True).values[: self.settings.m - 1].sum() > 0.99
        return bool(few) and f_score(self.weight, self.settings.p, 1e-4) < COLLAPSED


def initial_filters(settings: ConvSettings, channels: int) -> Tensor:
    """Filters drawn from N(init_mean, init_std): (K^2, channels, w, w) float32, from the seed alone."""
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.K**2, channels, settings.w, settings.w)
    return torch.randn(shape, generator=generator) * settings.init_std + settings.init_mean


def minibatches(images: int, each: int, size: int, generator: torch.Generator):
    """One epoch of patch numbers, ``size`` at a time, every patch at most once, in random order.

    images, each : how many images, and patches in each. Images are shuffled, then taken CHUNK at a time; the patches of
    a chunk are shuffled together, and what does not fill a minibatch waits for the next chunk. The few left over at
    the end are dropped, unless there is no full minibatch at all. Yields (size,) int64.
    """
    rest, full = torch.empty(0, dtype=torch.int64), False
    for chunk in torch.randperm(images, generator=generator).split(CHUNK):
        pool = torch.cat([rest, (chunk[:, None] * each + torch.arange(each)).flatten()])
        pool = pool[torch.randperm(len(pool), generator=generator)]
        whole = len(pool) // size * size
        yield from pool[:whole].split(size) if whole else ()
        rest, full = pool[whole:], full or whole > 0
    if not full:
        yield rest


def train_layer(
    images: Tensor,
    settings: ConvSettings,
    device: torch.device | str = "cpu",
    layer: Layer | None = None,
    snapshots=(),
    after_epoch=None,
    rank: str = "activity",
) -> Layer:
    """Train one KH layer on all patches of the images (chapter 4; section 8.1).

    A minibatch is ``conv_batch`` patches. Its summed update (:func:`kh_update`) is divided by its largest
    absolute entry and multiplied by the learning rate of the epoch: the thesis leaves the scale open, and
    this is the convention, that of the published Krotov-Hopfield script, that reproduces its numbers.

    Parameters
    ----------
    images : (N, C, H, W) uint8 (values 0..255) or float in [0, 1].
    layer : a layer to go on from (its history tells the epoch). Epochs draw their order from (seed, epoch),
        so a resumed run equals an uninterrupted one.
    snapshots : epochs after which the filters are kept; 0 is the start.
    after_epoch : called with the layer after every epoch (progress, checkpoints).

    Raises ``ValueError`` for images that do not fit, ``FloatingPointError`` naming the epoch when filters stop
    being finite.
    """
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (images, channels, height, width)")
    check_geometry(min(images.shape[2:]), settings.w, 1)
    s, channels = settings, images.shape[1]
    each = (images.shape[2] - s.w + 1) * (images.shape[3] - s.w + 1)
    if layer is None:
        layer = Layer(s, initial_filters(s, channels))
        if 0 in snapshots:
            layer.snapshots[0] = layer.weight.clone()
    images = images.to(device).contiguous()
    weight = layer.weight.to(device).flatten(1)
    for epoch in range(len(layer.history), s.conv_epochs):
        started = time.perf_counter()
        eta = schedule(s.conv_scheduler, s.conv_eta0, epoch, s.conv_epochs, s.tau, s.gamma, s.s_step)
        generator = torch.Generator().manual_seed((s.seed * 1_000_003 + epoch + 1) % 2**63)
        wins = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
        for ids in minibatches(len(images), each, s.conv_batch, generator):
            v = patches.unit(images, ids.to(device), s.w, s.p)
            change, winner = _update(weight, v, s.m, s.delta, s.p, rank)
            weight += change * (eta / change.abs().max().clamp_min(1e-30))
            wins += torch.bincount(winner, minlength=len(weight))
        if not weight.isfinite().all():
            raise FloatingPointError(f"the filters stopped being finite in epoch {epoch + 1}: lower conv_eta0={s.conv_eta0}")
        layer.weight = weight.reshape(-1, channels, s.w, s.w).cpu().clone()
        layer.wins = (wins / wins.sum()).float().cpu()
        size = torch.linalg.vector_norm(layer.weight.flatten(1).double(), ord=s.p, dim=1)
        layer.history.append(
            dict(
                epoch=epoch + 1, eta=eta, norm=size.mean().item(), winners=int((wins > 0).sum()),
                f_1e6=f_score(layer.weight, s.p), f_1e4=f_score(layer.weight, s.p, 1e-4),
                seconds=time.perf_counter() - started,
            )
        )
        if epoch + 1 in snapshots:
            layer.snapshots[epoch + 1] = layer.weight.clone()
        if after_epoch:
            after_epoch(layer)
    return layer
