"""Does an attack fail because the model is robust, or because its gradient leads nowhere (Athalye et al. 2018)?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from khnb import attacks, native
from khnb.layer import KHConv2d
from khnb.models import Network

NOISES = 20  # random directions tried for each image


class Around(nn.Module):
    """An LL model with the same logits whose gradient goes around the patch normalisation: the norms count as constants."""

    def __init__(self, network: Network):
        super().__init__()
        self.network = network
        self.train(network.training)

    def forward(self, images: Tensor) -> Tensor:
        conv, head = self.network.conv, self.network.head
        if head.pooling == "last":
            raise ValueError('pooling="last" has no path around the patch normalisation here; use a model with pooling="first"')
        kernel, norms = conv.parts(images.detach())
        return self.network.classify(native.conv_pool(images, kernel, None, head.w_pool, head.s_pool, scale=1 / norms))


def audit(model: Network, images: Tensor, labels: Tensor, epsilon: float, seed: int = 0, restarts: int = 5, steps: int = 40) -> dict[str, float]:
    """How many of some images several attacks fool within the l-infinity distance ``epsilon``.

    model, images, labels : as in :mod:`khnb.attacks`, all images right; epsilon : in units of the pixel range, best about R, where FGSM
    fools about half. Returns shares of the images, in [0, 1]:

    - ``zero_gradients``: images of which no pixel has a gradient, and ``zero_pixels``: pixels without, on average;
    - ``noise``: fooled by the worst of 20 random signs of every pixel; ``fgsm``: by FGSM at any strength up to epsilon;
      ``log_odds``: the same along the gradient of :func:`khnb.attacks.log_odds`; ``around``: with the gradient of :class:`Around` (LL models only);
    - ``pgd``: by PGD from the image (``steps`` of epsilon / 10), ``restarts``: or from ``restarts`` random points; ``apgd``: by the APGD
      of torchattacks with the same number of steps, on the cross-entropy or on the difference of logits ratio;
    - ``unbounded``: by PGD in a ball of radius 0.5, in ``5 * steps`` steps: anything below 1 needs an explanation.

    Draws from torch's global generator, seeded with ``seed``; its state is put back. ``ModuleNotFoundError`` without torchattacks.
    """
    try:
        import torchattacks
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("an audit needs torchattacks: pip install --no-deps torchattacks") from error

    def fooled(attacked: Tensor) -> Tensor:
        return ~attacks._right(model, attacked, labels)

    def share(which: Tensor) -> float:
        return which.double().mean().item()

    flat = attacks.gradient(model, images, labels).flatten(1) == 0
    found = dict(zero_gradients=share(flat.all(1)), zero_pixels=share(flat))
    with torch.random.fork_rng(devices=[images.device] if images.device.type == "cuda" else []):
        torch.manual_seed(seed)
        signs = (torch.randint(0, 2, images.shape, device=images.device) * 2.0 - 1 for _ in range(NOISES))
        found["noise"] = share(torch.stack([fooled((images + epsilon * sign).clamp(0, 1)) for sign in signs]).any(0))
        found["fgsm"] = share(attacks.fgsm_radius(model, images, labels, epsilon, scan=min(1e-3, epsilon)) <= epsilon)
        found["log_odds"] = share(attacks.fgsm_radius(model, images, labels, epsilon, scan=min(1e-3, epsilon), loss="log-odds") <= epsilon)
        if isinstance(model.conv, KHConv2d) and model.head.pooling == "first":
            found["around"] = share(attacks.fgsm_radius(Around(model), images, labels, epsilon, scan=min(1e-3, epsilon)) <= epsilon)
        amounts = dict(step=epsilon / 10, radius=epsilon, max_steps=steps)
        plain = fooled(attacks.pgd(model, images, labels, **amounts))
        found["pgd"], left = share(plain), ~plain
        again = plain.clone()
        if left.any():
            x, y = images[left], labels[left]
            again[left] = ~attacks._right(model, attacks.pgd(model, x, y, **amounts, random_start=True, restarts=restarts), y)
        found["restarts"] = share(again)
        stronger = torch.zeros_like(plain)
        for loss in ("ce", "dlr"):
            stronger |= fooled(torchattacks.APGD(model, eps=epsilon, steps=steps, seed=seed, loss=loss)(images, labels).to(images))
        found["apgd"] = share(stronger)
        found["unbounded"] = share(fooled(attacks.pgd(model, images, labels, 0.01, 0.5, 5 * steps)))
    return found


def verdict(found: dict[str, float], images: int) -> str:
    """What an :func:`audit` of so many images says, in words: "no sign of masking", or what speaks for it.

    Differences count where they are more than two standard errors of a share, and two points at least.
    """
    margin = max(0.02, 2 * (0.25 / images) ** 0.5)
    signs = {
        f"{found['zero_gradients']:.0%} of the images have no gradient": found["zero_gradients"] > 0.01,
        "iterating does not help": found["pgd"] < found["fgsm"] - margin,
        "noise is as good as the gradient": found["noise"] > found["fgsm"] - margin,
        "the gradient around the normalisation is better": found.get("around", 0.0) > found["fgsm"] + margin,
        "confidence beyond the precision hides the gradient": found.get("log_odds", 0.0) > found["fgsm"] + margin,
        "restarts find much more": found["restarts"] > found["pgd"] + 2 * margin,
        "APGD finds much more": found["apgd"] > found["restarts"] + 2 * margin,
        "a large ball does not suffice": found["unbounded"] < 0.99,
    }
    return "; ".join(name for name, holds in signs.items() if holds) or "no sign of masking"
