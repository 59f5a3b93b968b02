"""The filter explorer: grids of filters, their history, one neuron enlarged, and the patches that excite it."""

from __future__ import annotations

import numpy as np
import torch
import traitlets
from torch import nn

from khnb.data import Dataset
from khnb.layer import KHConv2d, Responses, responses
from khnb.widgets.base import Widget, limited, module, style

TOLERANCES = (1e-4, 1e-6)  # of the norm, for a filter to count as a feature: the book's and the thesis's
HALF = (1e-3,)  # the same for filters kept in half precision, whose norms are known no better
PATCHES, ROOM = 8, 800  # patches shown of a neuron: so many, or as many as these bytes hold
KINDS = ("LL", "BP")


class FilterExplorer(Widget):
    """Look through the filters of one or several models, one alone or two side by side.

    Parameters
    ----------
    models : name -> dict of ``weight`` (F, C, w, w) float array, C 1 or 3; ``p``, the order of the norm; and, where they exist,
        ``epochs`` (E numbers, growing) with ``snapshots`` (E, F, C, w, w), the last of them those of ``weight`` (but for rounding);
        ``wins`` (F,), each neuron's share of the patches of its last epoch of training; ``kind``: ``"LL"`` (as if not named), whose
        activities are those of :class:`~khnb.layer.KHConv2d`, or ``"BP"``, a plain convolution, with its ``bias`` (F,).
    data : a data set whose test images, at least 8 of them, show what excites the filters; ``None`` for no such part.

    Norms, weights' ranges, win rates and activities are computed here; only the pictures are float16. What the neurons answer to the test
    images is that of ``weight``, so the page shows it at the last epoch. It is kept in ``responses``, name ->
    :class:`~khnb.layer.Responses`. Snapshots in half precision (a float16 array) know the norm to a thousandth, and their features are
    counted at that tolerance.

    Synced traits: ``model_name``; ``beside``, the model next to it, or ``""``; ``epoch`` (place in ``epochs``, from 0; -1 is the last);
    ``neuron`` and ``neuron_beside`` (from 0); ``linked``, whether two layers of equally many neurons show the same one, ``neuron``; ``emphasis``:
    ``"all"``, ``"features"`` or ``"others"``. ``ValueError`` or ``TraitError`` on anything outside this. A place in ``epochs`` or a
    neuron that the model shown does not have counts as its last.
    """

    _esm = module("filters")
    _css = style("filters")
    _known = limited("model_name", "beside", "epoch", "neuron", "neuron_beside")

    model_name = traitlets.Unicode().tag(sync=True)
    beside = traitlets.Unicode("").tag(sync=True)
    epoch = traitlets.Int(-1).tag(sync=True)
    neuron = traitlets.Int(0).tag(sync=True)
    neuron_beside = traitlets.Int(0).tag(sync=True)
    linked = traitlets.Bool(True).tag(sync=True)
    emphasis = traitlets.Enum(["all", "features", "others"], "all").tag(sync=True)

    numbers = traitlets.Bytes().tag(sync=True)

    def __init__(self, models: dict[str, dict], data: Dataset | None = None, **kwargs):
        if not models:
            raise ValueError("no model was given: expected a dict of name -> dict(weight=..., p=...)")
        packed, headers, self.responses = _Packed(), [], {}
        for name, model in models.items():
            header, answers = _pack(packed, name, data, **model)
            headers.append(header)
            if answers is not None:
                self.responses[name] = answers
        seen = data and dict(classes=list(data.classes), images=len(data.test_images), side=data.test_images.shape[-1], name=data.name)
        epochs, filters = (max(header["shape"][axis] for header in headers) for axis in (0, 1))
        limits = dict(
            model_name=list(models), beside=["", *models], epoch=range(-1, epochs), neuron=range(filters), neuron_beside=range(filters)
        )
        kwargs.setdefault("model_name", next(iter(models)))
        super().__init__(header=dict(models=headers, data=seen), limits=limits, numbers=bytes(packed.content), **kwargs)


class _Packed:
    """Arrays one after the other, as ``filters.js`` reads them."""

    def __init__(self):
        self.content = bytearray()

    def add(self, array, kind: str) -> dict:
        array = np.asarray(array)
        place = dict(kind=kind, offset=len(self.content), length=array.size)
        self.content += array.astype(f"<{kind}").tobytes()
        return place


def _pack(packed, name, data, weight, p, epochs=None, snapshots=None, wins=None, kind="LL", bias=None) -> tuple[dict, Responses | None]:
    weight = np.asarray(weight)
    if weight.ndim != 4 or weight.shape[1] not in (1, 3) or weight.shape[2] != weight.shape[3] or len(weight) == 0:
        raise ValueError(f"the filters of {name!r} have shape {weight.shape}; expected (F, 1 or 3, w, w)")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} of {name!r} is not valid: one of {', '.join(KINDS)}")
    if (epochs is None) != (snapshots is None):
        raise ValueError(f"{name!r} has only one of epochs and snapshots; give both or neither")
    if epochs is not None and len(epochs) == 0:
        epochs = snapshots = None
    kept = weight[None] if snapshots is None else np.asarray(snapshots)
    if kept.shape[1:] != weight.shape or (epochs is not None and len(epochs) != len(kept)):
        raise ValueError(f"the snapshots of {name!r} have shape {kept.shape}; expected ({len(epochs)}, {', '.join(map(str, weight.shape))})")
    if not np.isfinite(kept).all() or not np.isfinite(weight).all():
        raise ValueError(f"the filters of {name!r} are not all finite: they cannot be shown")
    if not np.allclose(kept[-1].astype(float), weight, rtol=1e-3, atol=1e-6):
        raise ValueError(f"the last of the snapshots of {name!r} is not its weight")
    for what, values in {"win rates": wins, "biases": bias}.items():
        if values is not None and np.shape(values) != weight.shape[:1]:
            raise ValueError(f"the {what} of {name!r} have shape {np.shape(values)}; expected ({len(weight)},)")
    flat = kept.reshape(*kept.shape[:2], -1).astype(np.float64)
    flat[-1] = weight.reshape(len(weight), -1)  # the last epoch as it is, where its snapshot is rounded
    top = np.abs(flat).max(2, keepdims=True)
    scale = 2.0 ** np.floor(np.log2(32768 / np.where(top > 0, top, 1)))  # a power of two each: float16 at its finest
    parts = dict(
        weights=packed.add(flat * scale, "f2"), scale=packed.add(scale, "f8"), norms=packed.add(np.linalg.norm(flat, ord=p, axis=2), "f8"),
        smallest=packed.add(flat.min(2), "f8"), largest=packed.add(flat.max(2), "f8"),
    )
    if wins is not None:
        parts["wins"] = packed.add(wins, "f4")
    answers, count = None, 0
    if data is not None:
        images = data.test_images
        if images.shape[1] != weight.shape[1] or min(images.shape[2:]) < weight.shape[2]:
            raise ValueError(f"the filters of {name!r} have shape {weight.shape}, which does not fit images of shape {tuple(images.shape[1:])}")
        count = min(PATCHES, max(1, ROOM // weight[0].size))
        answers = responses(_conv(weight, p, kind, bias), images, count)
        parts |= _pack_answers(packed, answers, data, weight.shape[2])
    tolerances = [list(HALF if kept.dtype == np.float16 and i < len(kept) - 1 else TOLERANCES) for i in range(len(kept))]
    header = dict(
        name=name, kind=kind, p=float(p), shape=list(kept.shape), epochs=None if epochs is None else [int(e) for e in epochs],
        tolerances=tolerances, patches=count, parts=parts,
    )
    return header, answers


def _conv(weight, p, kind, bias) -> nn.Module:
    weight = torch.from_numpy(weight.astype(np.float32))
    if kind == "LL":
        return KHConv2d(weight, p)
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2])
    conv.weight.data = weight
    conv.bias.data = torch.zeros(len(weight)) if bias is None else torch.as_tensor(np.asarray(bias, np.float32))
    return conv


def _pack_answers(packed, answers: Responses, data: Dataset, w: int) -> dict:
    image, row, column = (values.numpy() for values in (answers.image, answers.row, answers.column))
    every = np.lib.stride_tricks.sliding_window_view(data.test_images.numpy(), (w, w), axis=(2, 3))
    return dict(
        mean=packed.add(answers.mean, "f8"), seen_wins=packed.add(answers.wins, "f8"), activity=packed.add(answers.activity, "f4"),
        image=packed.add(data.test_index.numpy()[image], "u4"), label=packed.add(data.test_labels.numpy()[image], "u1"),
        corner=packed.add(np.stack([row, column], -1), "u1"), pixels=packed.add(every[image, :, row, column], "u1"),
    )
