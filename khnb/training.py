"""Supervised training end to end, of the BP twin, and predictions (chapters 3, 6, 8). The classifiers of LL models: khnb/heads.py."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from khnb.learning import schedule
from khnb.models import Network


def to_float(images: Tensor) -> Tensor:
    """Pixels as float32 in [0, 1]: uint8 is divided by 255, float passes."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float()


def epoch_order(count: int, order: int, epoch: int) -> Tensor:
    """The order in which an epoch takes the images: (count,) int64, drawn from (order, epoch), so that it can be drawn again."""
    generator = torch.Generator().manual_seed((order * 1_000_003 + epoch + 1) % 2**63)
    return torch.randperm(count, generator=generator)


def part_size(model: Network, images: Tensor) -> int:
    """How many images to take at a time: on a CPU, as many as have activities of 16 MiB (fresh memory is slow), else 1000."""
    if model.linear.weight.device.type != "cpu":
        return 1000
    maps = len(model.conv.weight) * images.shape[-1] * images.shape[-2]
    return max(1, 2**22 // maps)


@torch.no_grad()
def predict(model: Network, images: Tensor) -> Tensor:
    """Logits of every image, (N, classes) float32 on the CPU."""
    device = model.linear.weight.device
    parts = images.split(part_size(model, images))
    return torch.cat([model(to_float(part.to(device))).float().cpu() for part in parts])


def accuracy(model: Network, images: Tensor, labels: Tensor) -> float:
    """Share of images the model gets right, in [0, 1]."""
    return (predict(model, images).argmax(1) == labels.cpu()).double().mean().item()


def train(model: Network, images: Tensor, labels: Tensor, state: dict | None = None, after_epoch=None) -> list[dict]:
    """AdamW (betas 0.9 and 0.999, weight decay 0.01) on the mean cross-entropy (eq. 3.2), as ``model.head`` says.

    Parameters
    ----------
    model : the whole of it is trained, on the device it is on.
    images : (N, C, H, W), uint8 or float in [0, 1].
    labels : (N,) int64.
    state : what ``after_epoch`` was given last, to go on from there. Epochs draw their order from (``head_order``, epoch),
        so a resumed run equals an uninterrupted one.
    after_epoch : called with a dictionary of tensors and numbers (``history``, ``model``, ``optimizer``); the tensors are
        those that go on being trained, so save or copy them at once.

    Returns one row an epoch: epoch, learning rate, mean loss and accuracy while training, seconds.
    Raises ``FloatingPointError`` naming the epoch when the loss stops being finite.
    """
    head, device = model.head, model.linear.weight.device
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=head.head_eta0, fused=device.type == "cuda")
    history: list[dict] = []
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history = list(state["history"])
    images, labels, size = images.to(device), labels.to(device), part_size(model, images)
    for epoch in range(len(history), head.head_epochs):
        started = time.perf_counter()
        eta = schedule(head.head_scheduler, head.head_eta0, epoch, head.head_epochs, head.tau, head.gamma, head.s_step)
        for group in optimizer.param_groups:
            group["lr"] = eta
        order = epoch_order(len(images), head.head_order, epoch).to(device)
        total, right = torch.zeros(2, device=device)
        for index in order.split(head.head_batch):
            optimizer.zero_grad()
            for part in index.split(size):  # the gradient of a minibatch, summed over parts that fit the cache
                x, y = images.index_select(0, part), labels[part]
                logits = model(to_float(x))
                loss = F.cross_entropy(logits, y, reduction="sum")
                (loss / len(index)).backward()
                total += loss.detach()
                right += (logits.detach().argmax(1) == y).sum()
            optimizer.step()
        mean = total.item() / len(images)
        if mean != mean or mean == float("inf"):
            raise FloatingPointError(f"the loss stopped being finite in epoch {epoch + 1}: lower head_eta0={head.head_eta0}")
        history.append(
            dict(epoch=epoch + 1, eta=eta, loss=mean, accuracy=right.item() / len(images), seconds=time.perf_counter() - started)
        )
        if after_epoch:
            after_epoch(dict(history=history, model=model.state_dict(), optimizer=optimizer.state_dict()))
    return history
