"""The filter explorer: the grid of filters, its history, and one neuron enlarged."""

from __future__ import annotations

import numpy as np
import traitlets

from khnb.widgets.base import Widget, limited, module, style

TOLERANCE = 1e-4  # of the norm, for a filter to count as a feature; as in the book's f-score


class FilterExplorer(Widget):
    """Look through the filters of one or several models.

    Parameters
    ----------
    models : name -> dict of ``weight`` (F, C, w, w) float array, C 1 or 3; ``p``, the order of the norm; and, where
        they exist, ``epochs`` (E numbers) with ``snapshots`` (E, F, C, w, w), and ``wins`` (F,), each neuron's share
        of the last epoch's patches.

    Norms, smallest weights and win rates are computed here in float64; only the pictures are float16.
    Synced traits: ``model_name``, ``epoch`` (place in ``epochs``, from 0; -1 is the last) and ``neuron`` (from 0).
    ``ValueError`` on anything outside this.
    """

    _esm = module("filters")
    _css = style("filters")
    _known = limited("model_name")

    model_name = traitlets.Unicode().tag(sync=True)
    epoch = traitlets.Int(-1).tag(sync=True)
    neuron = traitlets.Int(0).tag(sync=True)

    weights = traitlets.Bytes().tag(sync=True)

    def __init__(self, models: dict[str, dict], **kwargs):
        if not models:
            raise ValueError("no model was given: expected a dict of name -> dict(weight=..., p=...)")
        headers, packed = [], b""
        for name, model in models.items():
            header, data = _pack(name, **model)
            headers.append(header | dict(offset=len(packed)))
            packed += data
        kwargs.setdefault("model_name", next(iter(models)))
        super().__init__(header=dict(models=headers, tolerance=TOLERANCE), limits=dict(model_name=list(models)), weights=packed, **kwargs)


def _pack(name, weight, p, epochs=None, snapshots=None, wins=None) -> tuple[dict, bytes]:
    weight = np.asarray(weight, np.float64)
    if weight.ndim != 4 or weight.shape[1] not in (1, 3) or weight.shape[2] != weight.shape[3] or len(weight) == 0:
        raise ValueError(f"the filters of {name!r} have shape {weight.shape}; expected (F, 1 or 3, w, w)")
    if (epochs is None) != (snapshots is None):
        raise ValueError(f"{name!r} has only one of epochs and snapshots; give both or neither")
    if epochs is not None and len(epochs) == 0:
        epochs = snapshots = None
    stack = weight[None] if snapshots is None else np.asarray(snapshots, np.float64)
    if stack.shape[1:] != weight.shape or (epochs is not None and len(epochs) != len(stack)):
        raise ValueError(f"the snapshots of {name!r} have shape {stack.shape}; expected ({len(epochs)}, {', '.join(map(str, weight.shape))})")
    if not np.isfinite(stack).all():
        raise ValueError(f"the filters of {name!r} are not all finite: they cannot be shown")
    if wins is not None and np.shape(wins) != weight.shape[:1]:
        raise ValueError(f"the win rates of {name!r} have shape {np.shape(wins)}; expected ({len(weight)},)")
    flat = stack.reshape(*stack.shape[:2], -1)
    top = np.abs(flat).max(2, keepdims=True)
    scale = 2.0 ** np.floor(np.log2(32768 / np.where(top > 0, top, 1)))  # a power of two each: float16 at its finest
    header = dict(
        name=name, p=float(p), shape=list(stack.shape),
        epochs=None if epochs is None else [int(e) for e in epochs],
        wins=None if wins is None else [float(x) for x in np.asarray(wins)],
        norms=np.linalg.norm(flat, ord=p, axis=2).tolist(), smallest=flat.min(2).tolist(), scale=scale[..., 0].tolist(),
    )
    return header, (flat * scale).astype("<f2").tobytes()
