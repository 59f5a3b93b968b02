"""The small widgets of chapters 2, 4 and 7: five things to move rather than to read about."""

from __future__ import annotations

import traitlets

from khnb import schematics
from khnb.widgets.base import Widget, limited, module, style

STYLE = style("small")
ALL_ROUND, CORNER = "all round", "in one corner"

#: angles of the clumps of inputs, in radians: as in the figure of chapter 4
CLUMPS = {ALL_ROUND: (0.8, 2.4, 3.9, 5.5), CORNER: (0.15, 0.45, 0.75, 1.05, 1.35)}

#: 3 x 3 kernels, row by row; the first is that of fig. 2.3
KERNELS = {
    "Sobel-y": schematics.SOBEL_Y.ravel().tolist(),
    "Sobel-x": schematics.SOBEL_Y.T.ravel().tolist(),
    "blur (sum)": [1] * 9,
    "sharpen": [0, -1, 0, -1, 5, -1, 0, -1, 0],
    "identity": [0, 0, 0, 0, 1, 0, 0, 0, 0],
}

#: 8 x 8 letters. A network of 64 neurons keeps the first seven exactly, and no longer all of the first eight.
LETTERS = {
    "A": "..####.. .######. ##....## ##....## ######## ######## ##....## ##....##",
    "J": "....#### .....##. .....##. .....##. .....##. ##...##. ##..###. .#####..",
    "S": ".####### ######## ##...... #######. .####### ......## ######## #######.",
    "V": "##....## ##....## ##....## ##....## .##..##. .##..##. ..####.. ...##...",
    "X": "##....## ###..### .######. ..####.. ..####.. .######. ###..### ##....##",
    "T": "######## ######## ...##... ...##... ...##... ...##... ...##... ...##...",
    "C": ".####### ######## ##...... ##...... ##...... ##...... ######## .#######",
    "K": "##...### ##..###. ##.###.. #####... #####... ##.###.. ##..###. ##...###",
    "Z": "######## ######## .....##. ....##.. ...##... ..##.... ######## ########",
    "H": "##....## ##....## ##....## ######## ######## ##....## ##....## ##....##",
}
LETTERS = {name: rows.replace(" ", "") for name, rows in LETTERS.items()}


class _Number(traitlets.Float):
    """A float within its limits; nan, which is within any, is not."""

    def validate(self, obj, value):
        value = super().validate(obj, value)
        return value if value == value else self.error(obj, value)


def _real(default, low, high, step):
    return _Number(default, min=low, max=high).tag(sync=True, step=step)


def _whole(default, low, high):
    return traitlets.Int(default, min=low, max=high).tag(sync=True, step=1)


class _Small(Widget):
    """A widget that tells its page the limits and steps of its numbers, for the sliders."""

    _css = STYLE

    def __init__(self, header: dict | None = None, limits: dict | None = None, **kwargs):
        numbers = self.class_traits(step=lambda step: step is not None)
        ranges = {name: dict(min=trait.min, max=trait.max, step=trait.metadata["step"]) for name, trait in numbers.items()}
        super().__init__(header=ranges | (header or {}), limits=limits, **kwargs)


def _curves() -> list[dict]:
    """Names, labels, colours and dashes of fig. 2.4, as a page draws them."""
    dashes = {"-": (), "--": (3.7, 1.6), "-.": (6.4, 1.6, 1, 1.6), ":": (1, 1.65)}  # matplotlib's, in widths of a line

    def curve(name, label, style, colour):
        pattern = dashes[style] if isinstance(style, str) else style[1]
        return dict(name=name, label=label, colour="currentColor" if colour == "black" else colour, dash=" ".join(f"{2 * d:g}" for d in pattern))

    return [curve(name, *rest) for name, rest in schematics.CURVES.items()]


class Activations(_Small):
    """Activation functions (eqs. 2.4-2.10), their powers sigma(x)^n and slopes n sigma(x)^(n-1) sigma'(x); figs. 2.4, 3.1.

    Synced traits: ``functions``, a list of names of :data:`khnb.models.ACTIVATIONS`, at least one; ``n``, the power, 1 to 10 (a broken one
    is undefined where sigma is negative); ``x``, -4 to 4, where value and slope are read. ``TraitError`` outside this.
    """

    _esm = module("activations")

    functions = traitlets.List(traitlets.Enum(list(schematics.CURVES)), ["sigmoid", "relu", "gelu"], minlen=1).tag(sync=True)
    n = _real(1.0, 1, 10, 0.5)
    x = _real(1.0, -4, 4, 0.05)

    def __init__(self, **kwargs):
        super().__init__(dict(curves=_curves()), **kwargs)


class LogisticCurve(_Small):
    """The generalised logistic curve of eq. 7.6, f(eps) = 1 - (1 + nu exp(-k (eps - R)))^(-1/nu), with its inflection point; fig. 7.1.

    Synced traits: ``k``, steepness per unit of eps, 20 to 1000; ``R``, the inflection point (eq. 7.7) in units of the pixel range, -0.02 to
    0.06 (not above 0: no inflection under attack); ``nu``, asymmetry, 0.05 to 5. ``TraitError`` outside this.
    """

    _esm = module("logistic")

    k = _real(250.0, 20, 1000, 10)
    R = _real(0.02, -0.02, 0.06, 0.001)
    nu = _real(1.0, 0.05, 5, 0.05)


class Convolution(_Small):
    """The numbers of a convolution, one output value at a time, on the image of fig. 2.3; 3 x 3 kernels, no padding.

    Synced traits: ``kernel``, a name in :data:`KERNELS` or "own"; ``own``, its 9 whole numbers row by row, -99 to 99; ``flip``, whether the
    kernel is turned by half a turn (a convolution) or not (a correlation); ``stride``, 1 or 2; ``position``, number of the output value row by
    row, from 0 (one beyond the last is the last). ``TraitError`` outside this.
    """

    _esm = module("convolution")
    _known = limited("kernel")

    kernel = traitlets.Unicode("Sobel-y").tag(sync=True)
    own = traitlets.List(traitlets.Int(min=-99, max=99), KERNELS["identity"], minlen=9, maxlen=9).tag(sync=True)
    flip = traitlets.Bool(True).tag(sync=True)
    stride = _whole(1, 1, 2)
    position = traitlets.Int(2, min=0, max=(schematics.IMAGE.shape[0] - 2) * (schematics.IMAGE.shape[1] - 2) - 1).tag(sync=True)

    def __init__(self, **kwargs):
        super().__init__(dict(image=schematics.IMAGE.tolist(), kernels=KERNELS), dict(kernel=[*KERNELS, "own"]), **kwargs)


class WinnerTakesAll(_Small):
    """The Krotov-Hopfield rule (eqs. 4.3, 4.6, 4.7) in the plane: filters as arrows, inputs on the unit circle of the p-norm.

    Everything shown follows from the traits, so a page is the same every time. A step is :func:`khnb.learning.kh_update` of ``batch`` inputs,
    divided by its largest entry and multiplied by the learning rate, which falls from ``eta`` to 0 along the 400 steps.

    Synced traits: ``inputs``, "all round" or "in one corner"; ``filters``, 2 to 8; ``m``, rank of the filter that is pushed away, 2 to
    ``filters``; ``delta``, anti-Hebbian strength, 0 to 1; ``p``, order of the norm, 2 to 6; ``eta``, 0.005 to 0.1; ``batch``, inputs a step, 1
    to 60; ``seed``, 0 to 20; ``steps`` done, 0 to 400. ``TraitError`` outside this.
    """

    _esm = module("winner")
    _known = limited("inputs")

    inputs = traitlets.Unicode(ALL_ROUND).tag(sync=True)
    filters = _whole(8, 2, 8)
    m = _whole(2, 2, 8)
    delta = _real(0.1, 0, 1, 0.05)
    p = _real(2.0, 2, 6, 0.5)
    eta = _real(0.03, 0.005, 0.1, 0.005)
    batch = _whole(60, 1, 60)
    seed = _whole(15, 0, 20)
    steps = _whole(0, 0, 400)

    def __init__(self, **kwargs):
        super().__init__(dict(clumps=CLUMPS), dict(inputs=list(CLUMPS)), **kwargs)

    @traitlets.validate("m", "filters")
    def _rank(self, proposal):
        m, filters = (proposal["value"] if proposal["trait"].name == name else getattr(self, name) for name in ("m", "filters"))
        if m > filters:
            raise traitlets.TraitError(f"m={m} is not valid: rank m must be from 2 to the number of filters, {filters}")
        return proposal["value"]


class HopfieldRecall(_Small):
    """A Hopfield network of 64 binary neurons that stores 8 x 8 letters and recalls one of them (eq. 4.1; fig. 4.1).

    Neurons are updated one at a time in random order, each to the sign that lowers the energy. Everything shown follows from the traits.

    Synced traits: ``stored``, how many of :data:`LETTERS` are stored, 1 to 10; ``letter``, the one to start from; ``noise``, share of its
    pixels that are flipped, 0 to 0.5; ``seed`` of the flips and the order of updates, 0 to 20; ``start``, 64 characters # and . row by row to
    start from instead, or "" for none; ``updates`` done, from 0 (beyond the end of the recall: its end). ``TraitError`` outside this.
    """

    _esm = module("hopfield")
    _known = limited("letter")

    stored = _whole(4, 1, len(LETTERS))
    letter = traitlets.Unicode("A").tag(sync=True)
    noise = _real(0.2, 0, 0.5, 1 / 64)
    seed = _whole(0, 0, 20)
    start = traitlets.Unicode("").tag(sync=True)
    updates = traitlets.Int(0, min=0).tag(sync=True)

    def __init__(self, **kwargs):
        letters = [dict(name=name, pixels=pixels) for name, pixels in LETTERS.items()]
        super().__init__(dict(letters=letters), dict(letter=list(LETTERS)), **kwargs)

    @traitlets.validate("start")
    def _pixels(self, proposal):
        value = proposal["value"]
        if value and (len(value) != 64 or set(value) - set("#.")):
            raise traitlets.TraitError(f"start={value!r} is not valid: 64 characters, # or ., or none at all")
        return value
