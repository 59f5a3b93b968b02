"""The attack lab: a trained model computed in the reader's browser, and attacks on it."""

from __future__ import annotations

import numpy as np
import traitlets
from torch import nn

from khnb.layer import KHConv2d, synapses
from khnb.models import Network
from khnb.widgets.base import Widget, limited, module, style


def pack(network: Network, side: int) -> tuple[dict, bytes]:
    """A network as a JSON header and bytes, as ``attack.js`` reads them.

    Filters are float32. The classifier's weights, most of a network, are int16 of the largest weight of their class and
    filter: ten times closer to the network's probabilities than float16 of the same size.

    side : width and height of the images, in pixels. Raises ``TypeError`` for anything but a
    :class:`~khnb.models.Network`, ``ValueError`` for one in training mode or with weights that are not finite.
    """
    if not isinstance(network, Network):
        raise TypeError(f"the attack lab takes khnb.models.Network, not {type(network).__name__}")
    if network.training:
        raise ValueError("the network is in training mode; call network.eval() first")
    conv, linear_layer, head = network.conv, network.linear, network.head
    local = isinstance(conv, KHConv2d)
    if not local and not isinstance(conv, nn.Conv2d):
        raise TypeError(f"the convolution is a {type(conv).__name__}; expected KHConv2d or Conv2d")
    if head.pooling != "first":
        raise ValueError("the network pools after the activation function: the attack lab computes only the other order")
    weight = conv.weight.detach().double().cpu()
    filters = (synapses(weight, conv.p) if local else weight).numpy()
    linear = linear_layer.weight.detach().double().cpu().numpy()
    if not (np.isfinite(filters).all() and np.isfinite(linear).all()):
        raise ValueError("the network holds weights that are not finite: it cannot be shown")
    blocks = linear.reshape(len(linear), len(filters), -1)
    top = np.abs(blocks).max(2, keepdims=True)
    top[top == 0] = 1
    parts = dict(filters=filters.astype("<f4"), top=top.astype("<f4"))
    parts["linear"] = np.rint(32767 * blocks / parts["top"].astype(np.float64)).clip(-32767, 32767).astype("<i2")
    header, packed = dict(shapes=dict(filters=list(filters.shape), linear=list(linear.shape)), offsets={}), b""
    for name, array in parts.items():
        header["offsets"][name] = len(packed)
        packed += array.tobytes()
    bias = None if local or conv.bias is None else conv.bias.detach().double().tolist()
    header |= dict(
        norm=conv.p if local else None, bias=bias, linear_bias=linear_layer.bias.detach().double().tolist(), side=side,
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
    radii : name -> (M,) adversarial radii of that network over many images, in units of the pixel range, as
        :func:`khnb.attacks.fgsm_radius` gives them; where given, the image's own radius is shown on their curve.

    Weights are rounded (:func:`pack`): probabilities may differ from the network's own in the fourth decimal.
    Synced traits: ``image`` (number of the image, from 0), ``model_name``, ``attack`` ("FGSM" or "PGD"), ``epsilon``
    (FGSM), ``step`` and ``radius`` (PGD's S); the last three in units of the pixel range. ``own`` has the C*side*side bytes
    of an image that was drawn or brought in and is attacked in place of ``image``, and ``own_label`` its class; empty
    for none.
    ``TypeError`` or ``ValueError`` on anything outside this.
    """

    _esm = module("attack")
    _css = style("attack")
    _known = limited("model_name", "image", "own_label")

    image = traitlets.Int(0).tag(sync=True)
    model_name = traitlets.Unicode().tag(sync=True)
    attack = traitlets.Enum(["FGSM", "PGD"], "FGSM").tag(sync=True)
    epsilon = traitlets.Float(0.02, min=0, max=1).tag(sync=True)
    step = traitlets.Float(0.002, min=1e-9, max=1).tag(sync=True)
    radius = traitlets.Float(0.03, min=1e-9, max=1).tag(sync=True)

    own = traitlets.Bytes(b"").tag(sync=True, from_json=lambda value, widget: bytes(value))  # a page sends a memoryview
    own_label = traitlets.Int(0).tag(sync=True)

    weights = traitlets.Bytes().tag(sync=True)
    pixels = traitlets.Bytes().tag(sync=True)

    def __init__(self, networks: dict[str, Network], images, labels, classes, radii=None, **kwargs):
        images, labels = np.asarray(images), np.asarray(labels)
        if not networks:
            raise ValueError("no network was given: expected a dict of name -> network")
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[2] != images.shape[3] or images.shape[1] not in (1, 3):
            raise ValueError(f"images are {images.shape} {images.dtype}; expected (N, 1 or 3, side, side) uint8")
        if len(images) == 0 or labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise ValueError(f"labels are {labels.shape} {labels.dtype} for {len(images)} images; expected one whole number each")
        if labels.min() < 0 or labels.max() >= len(classes):
            raise ValueError(f"labels range from {labels.min()} to {labels.max()}; there are {len(classes)} classes")
        radii = radii or {}
        if unknown := radii.keys() - networks.keys():
            raise ValueError(f"radii were given for {', '.join(sorted(unknown))}, but no such network")
        headers, packed = [], b""
        for name, network in networks.items():
            header, data = pack(network, images.shape[2])
            shapes = header["shapes"]
            if shapes["linear"][0] != len(classes):
                raise ValueError(f"network {name!r} has {shapes['linear'][0]} classes; {len(classes)} names were given")
            if shapes["filters"][1] != images.shape[1]:
                raise ValueError(f"network {name!r} takes {shapes['filters'][1]} channels; the images have {images.shape[1]}")
            for part in header["offsets"]:
                header["offsets"][part] += len(packed)
            headers.append(dict(name=name, curve=_curve(radii[name]) if name in radii else None, **header))
            packed += data
        kwargs.setdefault("model_name", next(iter(networks)))
        super().__init__(
            header=dict(
                models=headers, shape=list(images.shape), labels=labels.tolist(), classes=[str(c) for c in classes], max_steps=300
            ),
            limits=dict(model_name=list(networks), image=range(len(images)), own_label=range(len(classes))),
            weights=packed, pixels=np.ascontiguousarray(images).tobytes(), **kwargs,
        )

    @traitlets.validate("own")
    def _whole_image(self, proposal):
        size = int(np.prod(self.header["shape"][1:])) if self.header else 0
        if size and len(proposal["value"]) not in (0, size):
            raise traitlets.TraitError(f"own has {len(proposal['value'])} bytes; an image has {size}, and none has 0")
        return proposal["value"]


def _curve(radii) -> dict:
    """101 quantiles of the radii above zero, those that are never fooled left out as in the thesis."""
    radii = np.asarray(radii, np.float64)
    fooled = radii[np.isfinite(radii) & (radii > 0)]
    if len(fooled) < 2:
        raise ValueError(f"{len(fooled)} of {len(radii)} radii are above zero and finite: too few for a curve")
    return dict(radii=np.quantile(fooled, np.linspace(0, 1, 101)).tolist(), images=len(fooled))
