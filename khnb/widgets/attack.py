"""The attack lab: a trained model computed in the reader's browser, and attacks on it."""

from __future__ import annotations

import numpy as np
import traitlets
from torch import nn

from khnb.layer import KHConv2d, synapses
from khnb.models import Network
from khnb.widgets.base import Widget, as_half, limited, module, style


def pack(network: Network, side: int) -> tuple[dict, bytes]:
    """A network as a JSON header and float16 bytes, as ``attack.js`` reads them.

    side : width and height of the images, in pixels. Raises ``TypeError`` for anything but a
    :class:`~khnb.models.Network`, ``ValueError`` for one in training mode or with weights that are not finite.
    """
    if not isinstance(network, Network):
        raise TypeError(f"the attack lab takes khnb.models.Network, not {type(network).__name__}")
    if network.training:
        raise ValueError("the network is in training mode; call network.eval() first")
    conv, linear, head = network.conv, network.linear, network.head
    local = isinstance(conv, KHConv2d)
    if not local and not isinstance(conv, nn.Conv2d):
        raise TypeError(f"the convolution is a {type(conv).__name__}; expected KHConv2d or Conv2d")
    if head.pooling != "first":
        raise ValueError("the network pools after the activation function: the attack lab computes only the other order")
    weight = conv.weight.detach().double().cpu()
    arrays = dict(
        filters=(synapses(weight, conv.p) if local else weight).numpy(),
        linear=linear.weight.detach().double().cpu().numpy(),
    )
    header, packed = {}, b""
    for name, array in arrays.items():
        scale, data = as_half(array)
        header[name] = dict(offset=len(packed), scale=scale, shape=list(array.shape))
        packed += data
    bias = None if local or conv.bias is None else conv.bias.detach().double().tolist()
    header |= dict(
        norm=conv.p if local else None, bias=bias, linear_bias=linear.bias.detach().double().tolist(), side=side,
        sigma=head.sigma, n=head.n, w_pool=head.w_pool, s_pool=head.s_pool,
    )
    return header, packed


class AttackLab(Widget):
    """Attack trained models in the browser: FGSM and PGD, image by image.

    Parameters
    ----------
    networks : name -> :class:`~khnb.models.Network` in eval mode.
    images : (N, C, side, side) uint8 array, C 1 or 3.
    labels : (N,) whole numbers, the true classes.
    classes : the names of the classes.

    The weights travel as float16: probabilities may differ from the network's own in the fourth decimal, and so may radii.
    Synced traits: ``image`` (number of the image, from 0), ``model_name``, ``attack`` ("FGSM" or "PGD"), ``epsilon``
    (FGSM), ``step`` and ``radius`` (PGD); the last three in units of the pixel range.
    ``TypeError`` or ``ValueError`` on anything outside this.
    """

    _esm = module("attack")
    _css = style("attack")
    _known = limited("model_name", "image")

    image = traitlets.Int(0).tag(sync=True)
    model_name = traitlets.Unicode().tag(sync=True)
    attack = traitlets.Enum(["FGSM", "PGD"], "FGSM").tag(sync=True)
    epsilon = traitlets.Float(0.02, min=0, max=1).tag(sync=True)
    step = traitlets.Float(0.002, min=1e-9, max=1).tag(sync=True)
    radius = traitlets.Float(0.03, min=1e-9, max=1).tag(sync=True)

    weights = traitlets.Bytes().tag(sync=True)
    pixels = traitlets.Bytes().tag(sync=True)

    def __init__(self, networks: dict[str, Network], images, labels, classes, **kwargs):
        images, labels = np.asarray(images), np.asarray(labels)
        if not networks:
            raise ValueError("no network was given: expected a dict of name -> network")
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[2] != images.shape[3] or images.shape[1] not in (1, 3):
            raise ValueError(f"images are {images.shape} {images.dtype}; expected (N, 1 or 3, side, side) uint8")
        if len(images) == 0 or labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise ValueError(f"labels are {labels.shape} {labels.dtype} for {len(images)} images; expected one whole number each")
        if labels.min() < 0 or labels.max() >= len(classes):
            raise ValueError(f"labels range from {labels.min()} to {labels.max()}; there are {len(classes)} classes")
        headers, packed = [], b""
        for name, network in networks.items():
            header, data = pack(network, images.shape[2])
            if header["linear"]["shape"][0] != len(classes):
                raise ValueError(f"network {name!r} has {header['linear']['shape'][0]} classes; {len(classes)} names were given")
            if header["filters"]["shape"][1] != images.shape[1]:
                raise ValueError(f"network {name!r} takes {header['filters']['shape'][1]} channels; the images have {images.shape[1]}")
            for part in ("filters", "linear"):
                header[part]["offset"] += len(packed)
            headers.append(dict(name=name, **header))
            packed += data
        kwargs.setdefault("model_name", next(iter(networks)))
        super().__init__(
            header=dict(
                models=headers, shape=list(images.shape), labels=labels.tolist(), classes=[str(c) for c in classes], max_steps=300
            ),
            limits=dict(model_name=list(networks), image=range(len(images))),
            weights=packed, pixels=np.ascontiguousarray(images).tobytes(), **kwargs,
        )
