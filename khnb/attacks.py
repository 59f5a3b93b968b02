"""First-order attacks and the adversarial radius (section 7.1).

Every function takes any module that maps images (B, C, H, W), float in [0, 1], to logits (B, classes), in eval mode.
The loss is the cross-entropy of the logits. Attacked images are clipped to [0, 1] after every step, as is usual; the thesis says so of
FGSM alone, and ``clip=False`` takes its eqs. 7.4 and 7.5 at their word.

``norm`` measures distances: ``linf``, the thesis's, where a step goes along the sign of the gradient, or, to compare, ``l2`` (over all
pixels and colours of an image), where it goes along the gradient itself, scaled to length 1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    logits = model(images)
    if logits.ndim != 2 or len(logits) != len(images):
        raise ValueError(f"the model gave shape {tuple(logits.shape)} for {len(images)} images; expected (images, classes)")
    return logits


def _check(model: nn.Module, images: Tensor, labels: Tensor, norm: str = "linf", **amounts) -> None:
    """``ValueError`` with one clear line for what cannot be attacked."""
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm={norm!r} is not valid: one of linf, l2")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before an attack")
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images are {tuple(images.shape)} {images.dtype}; expected (B, C, H, W), float in [0, 1]")
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels are {tuple(labels.shape)} {labels.dtype}; expected ({len(images)},), whole numbers")
    for name, value in amounts.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value} is not valid: a positive number is needed")
        if name in ("max_steps", "restarts") and value != int(value):
            raise ValueError(f"{name}={value} is not valid: a whole number is needed")
    if len(images) == 0:
        return
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):  # also catches NaN
        raise ValueError(f"images range from {low.item():g} to {high.item():g}; expected [0, 1] (divide pixels by 255)")
    with torch.no_grad():
        logits = _logits(model, images[:8])
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels range from {labels.min()} to {labels.max()}; the model has {logits.shape[1]} classes")
    if (logits >= 0).all() and torch.allclose(logits.sum(1), torch.ones_like(logits[:, 0]), atol=1e-5):
        raise ValueError("the model gives probabilities; attacks need logits (leave the softmax out)")


def gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Gradient of each image's cross-entropy with respect to that image: (B, C, H, W), dtype of the images."""
    x = images.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(_logits(model, x), labels, reduction="sum")  # summed: no image sees another
        return torch.autograd.grad(loss, x)[0]


def _lengths(x: Tensor, norm: str) -> Tensor:
    """(B, 1, 1, 1), of (B, C, H, W)."""
    return x.abs().amax((1, 2, 3), True) if norm == "linf" else x.square().sum((1, 2, 3), True).sqrt()


def _slope(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """A positive multiple of :func:`gradient`, one for each image, in which no confidence is too high for the precision.

    The cross-entropy is log(1 + e^u) with u = log(sum over the other classes of e^z) - z_label, so both rise the same way. But its own
    gradient holds p - 1, which rounds to 0 from a confidence of 1 - 6e-8 in float32, and then points elsewhere.
    """
    x = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = _logits(model, x)
        label = F.one_hot(labels, logits.shape[1]).bool()
        u = logits.masked_fill(label, torch.finfo(logits.dtype).min).logsumexp(1) - logits[label]
        return torch.autograd.grad(u.sum(), x)[0]


def _ascent(model: nn.Module, images: Tensor, labels: Tensor, norm: str) -> Tensor:
    """The step of length 1 along which the loss rises fastest; 0 where its gradient is 0."""
    found = _slope(model, images, labels)
    if norm == "linf":
        return found.sign()
    least = torch.finfo(found.dtype).tiny
    found = found / _lengths(found, "linf").clamp_min(least)  # the squares of small numbers would vanish
    return found / _lengths(found, norm).clamp_min(least)


def _project(x: Tensor, images: Tensor, radius: float, norm: str, clip: bool) -> Tensor:
    """Into the ball around the images, then to [0, 1], which does not leave it."""
    if norm == "linf":
        x = torch.minimum(torch.maximum(x, images - radius), images + radius)
    else:
        away = x - images
        x = images + away * (radius / _lengths(away, norm).clamp_min(radius))
    return x.clamp_(0, 1) if clip else x


def _move(images: Tensor, direction: Tensor, epsilon: Tensor, clip: bool) -> Tensor:
    moved = images + epsilon.to(images.dtype)[:, None, None, None] * direction
    return moved.clamp_(0, 1) if clip else moved


@torch.no_grad()
def _right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return _logits(model, images).argmax(1) == labels


def fgsm(model: nn.Module, images: Tensor, labels: Tensor, epsilon, norm: str = "linf", clip: bool = True) -> Tensor:
    """Fast gradient sign method, eq. 7.3 (with ``norm="l2"`` the fast gradient method).

    images (B, C, H, W) float in [0, 1]; labels (B,) int64; epsilon >= 0 in units of the pixel range, a number or (B,).
    Returns the attacked images, same shape and dtype. ``ValueError`` on anything outside this.
    """
    epsilon = torch.as_tensor(epsilon, dtype=torch.float64, device=images.device)
    if epsilon.shape not in ((), (len(images),)) or not (epsilon.isfinite() & (epsilon >= 0)).all():
        raise ValueError(f"epsilon is not valid: a finite number >= 0 is needed, or one for each of {len(images)} images")
    epsilon = epsilon.expand(len(images))
    _check(model, images, labels, norm)
    if len(images) == 0:
        return images.clone()
    return _move(images, _ascent(model, images, labels, norm), epsilon, clip)


def _iterate(model, images, labels, step, radius, max_steps, stop_when_fooled, start, norm, clip):
    """The loop of eqs. 7.4 and 7.5; returns the last iterates and the step of the first wrong one (-1: none)."""
    x = start.clone()
    steps = torch.full((len(images),), -1, dtype=torch.int64, device=images.device)
    active = torch.arange(len(images), device=images.device)
    for i in range(int(max_steps) + 1):
        wrong = ~_right(model, x[active], labels[active])
        first = active[wrong]
        steps[first] = torch.where(steps[first] < 0, i, steps[first])
        if stop_when_fooled:
            active = active[~wrong]
        if i == max_steps or len(active) == 0:
            return x, steps
        moved = x[active] + step * _ascent(model, x[active], labels[active], norm)
        x[active] = _project(moved, images[active], radius, norm, clip)


def _somewhere(images: Tensor, radius: float, norm: str, clip: bool) -> Tensor:
    """A point of the ball around each image, from torch's global generator: uniform, or for l2 of uniform direction and length."""
    if norm == "linf":
        away = 2 * torch.rand_like(images) - 1
    else:
        away = torch.randn_like(images)
        away = away / _lengths(away, norm) * torch.rand_like(away[:, :1, :1, :1])
    return _project(images + radius * away, images, radius, norm, clip)


def pgd(
    model: nn.Module, images: Tensor, labels: Tensor, step: float, radius: float, max_steps: int,
    stop_when_fooled: bool = True, random_start: bool = False, restarts: int = 1, norm: str = "linf", clip: bool = True,
) -> Tensor:
    """Projected gradient descent in a ball around the image, eq. 7.5.

    step, radius : in units of the pixel range; max_steps : number of steps at most. With ``stop_when_fooled`` an image
    stays at its first wrong iterate. ``random_start`` begins at a random point of the ball (torch's global
    generator) instead of the image; with ``restarts`` > 1 images that are still right begin again elsewhere, so many times in all.
    Returns the attacked images, same shape and dtype. ``ValueError`` on bad input.
    """
    _check(model, images, labels, norm, step=step, radius=radius, max_steps=max_steps, restarts=restarts)
    if restarts > 1 and not random_start:
        raise ValueError(f"restarts={restarts} is not valid without random_start=True: all of them would be the same")
    found, left = images.clone(), torch.arange(len(images), device=images.device)
    for _ in range(int(restarts)):
        if len(left) == 0:
            break
        x, y = images[left], labels[left]
        start = _somewhere(x, radius, norm, clip) if random_start else x
        found[left] = _iterate(model, x, y, step, radius, max_steps, stop_when_fooled, start, norm, clip)[0]
        left = left[_right(model, found[left], y)] if restarts > 1 else left
    return found


def ifgsm(
    model: nn.Module, images: Tensor, labels: Tensor, step: float, max_steps: int, stop_when_fooled: bool = True,
    norm: str = "linf", clip: bool = True,
) -> Tensor:
    """Iterative FGSM, eq. 7.4: :func:`pgd` in a ball that no step leads out of."""
    return pgd(model, images, labels, step, 1.01 * step * max_steps, max_steps, stop_when_fooled, norm=norm, clip=clip)


def pgd_radius(
    model: nn.Module, images: Tensor, labels: Tensor, step: float, radius: float, max_steps: int, norm: str = "linf", clip: bool = True
) -> tuple[Tensor, Tensor]:
    """Distance and number of steps at PGD's first wrong iterate, starting at the image.

    Returns ``(radii, steps)``, (B,) float64 and (B,) int64: 0 and 0 where the image itself is wrong, ``inf`` and -1 where no
    iterate up to ``max_steps`` is. Arguments as in :func:`pgd`.
    """
    _check(model, images, labels, norm, step=step, radius=radius, max_steps=max_steps)
    if len(images) == 0:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    x, steps = _iterate(model, images, labels, step, radius, max_steps, True, images, norm, clip)
    distance = _lengths(x.double() - images.double(), norm).flatten()
    return torch.where(steps < 0, math.inf, distance), steps


def fgsm_radius(
    model: nn.Module, images: Tensor, labels: Tensor, eps_max: float = 1.0, scan: float = 1e-3, tol: float = 1e-6,
    norm: str = "linf", clip: bool = True,
) -> Tensor:
    """The adversarial radius along the ray of :func:`fgsm`: the smallest strength that fools the model.

    One gradient gives the ray. Whether the model is fooled need not be monotone along it, so it is scanned from 0
    in steps of ``scan``; the interval of the first crossing is halved until its ends are ``tol`` apart. All
    strengths tried are whole multiples of ``tol``: the model is wrong at the radius and right one ``tol`` before.
    An image leaves the batch once it is fooled.

    Returns (B,) float64: 0 where the image itself is wrong, ``inf`` where it is right at every scanned strength up to
    ``eps_max``. A crossing and return within one scan interval goes unseen. ``ValueError`` on bad input.
    """
    _check(model, images, labels, norm, eps_max=eps_max, scan=scan, tol=tol)
    out = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    if len(images) == 0:
        return out
    grain = max(1, round(scan / tol))
    last = int(eps_max / tol + 0.5)
    active = torch.nonzero(_right(model, images, labels))[:, 0]
    if len(active) == 0:
        return out
    direction = torch.zeros_like(images)
    direction[active] = _ascent(model, images[active], labels[active], norm)
    wrong_at = torch.full((len(images),), -1, dtype=torch.int64, device=images.device)
    right_at = torch.zeros_like(wrong_at)
    at = 0
    while len(active) and at < last:
        # few images left: try several strengths of each in one go
        count = max(1, len(images) // len(active))
        places = torch.arange(1, count + 1, device=images.device) * grain + at
        places = places.clamp_max(last).unique()
        who = active.repeat_interleave(len(places))
        right = _right(model, _move(images[who], direction[who], places.repeat(len(active)).double() * tol, clip), labels[who])
        right = right.reshape(len(active), len(places))
        fooled = ~right.all(1)
        first = right.int().argmin(1)[fooled]
        wrong_at[active[fooled]] = places[first]
        right_at[active[fooled]] = torch.where(first > 0, places[(first - 1).clamp_min(0)], at)
        active, at = active[~fooled], int(places[-1])
    out[active] = math.inf
    todo = torch.nonzero(wrong_at > 0)[:, 0]
    while len(todo):
        todo = todo[wrong_at[todo] - right_at[todo] > 1]
        if len(todo) == 0:
            break
        middle = (wrong_at[todo] + right_at[todo]) // 2
        right = _right(model, _move(images[todo], direction[todo], middle.double() * tol, clip), labels[todo])
        right_at[todo] = torch.where(right, middle, right_at[todo])
        wrong_at[todo] = torch.where(right, wrong_at[todo], middle)
    return torch.where(wrong_at > 0, wrong_at.double() * tol, out)
