"""Supervised training: a classifier on a KH layer's features, and the BP twin end to end (chapters 3, 6, 8)."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from khnb.learning import schedule
from khnb.models import Network, activate


def to_float(images: Tensor) -> Tensor:
    """Pixels as float32 in [0, 1]: uint8 is divided by 255, float passes."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float()


def part_size(model: Network, images: Tensor) -> int:
    """How many images to take at a time: on a CPU, as many as have activities of 16 MiB (fresh memory is slow), else 1000."""
    if model.linear.weight.device.type != "cpu":
        return 1000
    maps = len(model.conv.weight) * images.shape[-1] * images.shape[-2]
    return max(1, 2**22 // (maps if images.ndim == 4 else images.shape[-1]))


@torch.no_grad()
def features(model: Network, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the classifier sees of every image, sigma(pooled)^n: (N, features) in ``dtype``, on the model's device."""
    device, batch = model.linear.weight.device, part_size(model, images)
    out = torch.empty((len(images), model.linear.in_features), dtype=dtype, device=device)
    for i in range(0, len(images), batch):
        pooled = model.pool(to_float(images[i : i + batch].to(device)))
        out[i : i + batch] = activate(pooled, model.head.sigma, model.head.n).flatten(1)
    return out


@torch.no_grad()
def predict(model: Network, images: Tensor) -> Tensor:
    """Logits of every image, (N, classes) float32 on the CPU."""
    device = model.linear.weight.device
    parts = images.split(part_size(model, images))
    return torch.cat([model(to_float(part.to(device))).float().cpu() for part in parts])


def accuracy(model: Network, images: Tensor, labels: Tensor) -> float:
    """Share of images the model gets right, in [0, 1]."""
    return (predict(model, images).argmax(1) == labels.cpu()).double().mean().item()


def train(model: Network, inputs: Tensor, labels: Tensor, state: dict | None = None, after_epoch=None) -> list[dict]:
    """AdamW (betas 0.9 and 0.999, weight decay 0.01) on the mean cross-entropy (eq. 3.2), as ``model.head`` says.

    Parameters
    ----------
    model : its classifier is trained on features, or the whole of it on images.
    inputs : (N, features) features from :func:`features`, or (N, C, H, W) images, uint8 or float.
    labels : (N,) int64.
    state : what ``after_epoch`` was given last, to go on from there. Epochs draw their order from (seed, epoch), so
        a resumed run equals an uninterrupted one.
    after_epoch : called with a dictionary of tensors and numbers (``history``, ``model``, ``optimizer``); the tensors are
        those that go on being trained, so save or copy them at once.

    Returns one row an epoch: epoch, learning rate, mean loss and accuracy while training, seconds.
    Raises ``FloatingPointError`` naming the epoch when the loss stops being finite.
    """
    head, device = model.head, model.linear.weight.device
    module = model.linear if inputs.ndim == 2 else model
    optimizer = torch.optim.AdamW(module.parameters(), lr=head.head_eta0)
    history: list[dict] = []
    if state:
        module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history = list(state["history"])
    labels, size = labels.to(device), part_size(model, inputs)
    for epoch in range(len(history), head.head_epochs):
        started = time.perf_counter()
        eta = schedule(head.head_scheduler, head.head_eta0, epoch, head.head_epochs, head.tau, head.gamma, head.s_step)
        for group in optimizer.param_groups:
            group["lr"] = eta
        generator = torch.Generator().manual_seed((head.seed * 1_000_003 + epoch + 1) % 2**63)
        order = torch.randperm(len(inputs), generator=generator)
        total, right = torch.zeros(2, device=device)
        for index in order.split(head.head_batch):
            optimizer.zero_grad()
            for part in index.split(size):  # the gradient of a minibatch, summed over parts that fit the cache
                x = inputs.index_select(0, part.to(inputs.device)).to(device)
                y = labels[part.to(device)]
                logits = module(x.float() if x.ndim == 2 else to_float(x))
                loss = F.cross_entropy(logits, y, reduction="sum")
                (loss / len(index)).backward()
                total += loss.detach()
                right += (logits.detach().argmax(1) == y).sum()
            optimizer.step()
        mean = total.item() / len(inputs)
        if mean != mean or mean == float("inf"):
            raise FloatingPointError(f"the loss stopped being finite in epoch {epoch + 1}: lower head_eta0={head.head_eta0}")
        history.append(
            dict(epoch=epoch + 1, eta=eta, loss=mean, accuracy=right.item() / len(inputs), seconds=time.perf_counter() - started)
        )
        if after_epoch:
            after_epoch(dict(history=history, model=module.state_dict(), optimizer=optimizer.state_dict()))
    return history
