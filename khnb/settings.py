"""Every hyperparameter under one name, with its range, its default and its meaning.

The names are the thesis's symbols (table 6.1). A notebook, a sweep and a record all use
these names and no others, so a misspelt or out-of-range value is caught in one place.
"""

from __future__ import annotations

import difflib
import functools
import math
from dataclasses import dataclass, field, fields

SCHEDULERS = ("constant", "linear", "exponential", "cosine", "step")
MEMORY = 4.0  # GiB, by default, for the pooled activities that classifiers are trained on
PRELU_SLOPE = 0.25  # the thesis gives no alpha for eq. 2.7; this is the start value of PyTorch's PReLU
ACTIVATIONS = ("sigmoid", "tanh", "relu", "prelu", "elu", "gelu", "rexp")
DTYPES = ("float32", "float16", "bfloat16")
RANKS = ("activity", "Q")
INITS = ("uniform", "he", "zeros")
SCALES = ("max", "mean")


@dataclass(frozen=True)
class Parameter:
    """One hyperparameter.

    ``kind`` is ``int``, ``float`` or a tuple of allowed words; ``low`` and ``high`` are the
    closed bounds of a number.
    """

    kind: object
    default: object
    meaning: str
    low: float = -math.inf
    high: float = math.inf

    @property
    def range(self) -> str:
        """The valid values, in words."""
        if isinstance(self.kind, tuple):
            return "one of " + ", ".join(self.kind)
        if self.kind is str:
            return self.meaning
        word = {int: "whole number", float: "number"}[self.kind]
        if math.isinf(self.high):
            return word if math.isinf(self.low) else f"{word} >= {self.low:g}"
        return f"{word} from {self.low:g} to {self.high:g}"

    def clean(self, name, value):
        """The value in its own type; ``ValueError`` says what is wrong and what is valid."""
        if self.kind is str:
            if not isinstance(value, str):
                raise ValueError(f"{name}={value!r} is not valid: {name} must be a word ({self.meaning})")
            return value
        complaint = ValueError(f"{name}={value!r} is not valid: {name} ({self.meaning}) must be {self.range}")
        if isinstance(self.kind, tuple):
            words = {word.lower(): word for word in self.kind}
            if not isinstance(value, str) or value.lower() not in words:
                raise complaint
            return words[value.lower()]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise complaint
        if self.kind is int and value != int(value):
            raise complaint
        value = self.kind(value)
        if not self.low <= value <= self.high:
            raise complaint
        return value


PARAMETERS: dict[str, Parameter] = {
    # convolution (chapter 4, table 6.1)
    "K": Parameter(int, 10, "side of the square grid of filters: K^2 filters", 2, 100),
    "w": Parameter(int, 4, "width of a filter, in pixels", 1, 32),
    "m": Parameter(int, 3, "rank of the inhibited neuron, from 2 to K^2", 2),
    "p": Parameter(float, 2.0, "order of the Lebesgue norm", 2.0, 12.0),  # above, float32 loses dark pixels: (1/255)^16 is 0
    "delta": Parameter(float, 0.1, "anti-Hebbian strength", 0.0),
    "conv_eta0": Parameter(float, 1e-3, "initial learning rate of the convolution", 0.0),
    "conv_scheduler": Parameter(SCHEDULERS, "cosine", "learning-rate schedule of the convolution"),
    "conv_epochs": Parameter(int, 30, "passes over all patches; 0: random filters of unit norm, a control", 0),
    "conv_batch": Parameter(int, 1000, "patches an update", 1),
    "conv_share": Parameter(float, 1.0, "share of the images whose patches an epoch passes over", 1e-6, 1.0),
    "conv_order": Parameter(int, 0, "seed of the order of the patches, which layers trained together share", 0, 2**31),
    "conv_chunk": Parameter(int, 1000, "images whose patches are shuffled together", 1),
    "conv_rank": Parameter(RANKS, "activity", "what neurons are ranked by: activity, or Q (eq. 4.4)"),
    "conv_scale": Parameter(SCALES, "max", "an update is divided by its largest entry (max) or by the number of patches (mean)"),
    "init_mean": Parameter(float, 0.0, "mean of the initial filters"),
    "init_std": Parameter(float, 1.0, "standard deviation of the initial filters", 0.0),
    # head (chapter 6)
    "sigma": Parameter(ACTIVATIONS, "gelu", "activation function"),
    "n": Parameter(float, 4.0, "power of the activation", 1.0),
    "w_pool": Parameter(int, 5, "width of the max-pooling window", 1, 32),
    "s_pool": Parameter(int, 2, "stride of the max-pooling", 1, 31),
    "head_eta0": Parameter(float, 2e-3, "initial learning rate of the classifier", 0.0),
    "head_scheduler": Parameter(SCHEDULERS, "cosine", "learning-rate schedule of the classifier"),
    "head_epochs": Parameter(int, 100, "passes over all images", 1),
    "head_batch": Parameter(int, 1000, "images an update", 1),
    "head_order": Parameter(int, 0, "seed of the order of the images, which heads trained together share", 0, 2**31),
    "pooling": Parameter(("first", "last"), "first", "whether the max-pooling comes before the activation function or after it"),
    "head_bias": Parameter(("yes", "no"), "yes", "whether the classifier has a bias"),
    "head_init": Parameter(INITS, "uniform", "initial classifier: U(-a, a), a = 1/sqrt(inputs) or, he, sqrt(6/inputs) without bias; or zeros"),
    "held_out": Parameter(int, 0, "training images kept aside, the last ones, to choose by", 0),
    # schedules 6.2 and 6.4
    "tau": Parameter(float, 2.5, "decay rate of the exponential schedule (eq. 6.2)", 0.0),
    "gamma": Parameter(float, 0.5, "factor of the step schedule (eq. 6.4)", 0.0, 1.0),
    "s_step": Parameter(int, 10, "epochs between two steps of the step schedule (eq. 6.4)", 1),
    # every random choice
    "seed": Parameter(int, 0, "seed of the initial filters and weights", 0, 2**63 - 1),
    # attack and fit (chapter 7)
    "confidence": Parameter(float, 0.8, "least confidence of an attacked image", 0.0, 1.0),
    "step": Parameter(float, 5e-4, "step of PGD, in units of the [0, 1] pixel range", 1e-9, 1.0),
    "radius": Parameter(float, 0.14, "radius of PGD's l-infinity ball (the thesis's S)", 1e-9, 1.0),
    "max_steps": Parameter(int, 300, "largest number of PGD steps", 1),
    "min_images": Parameter(int, 500, "a model counts with more confident images than this (section 9.1.1)", 0),
    "min_r2": Parameter(float, 0.95, "a model counts with a larger R^2 of its fit than this (section 9.1.1)", 0.0, 1.0),
    # the BP twin, where it differs from the LL model
    "bp_sigma": Parameter(ACTIVATIONS, "elu", "activation function of the BP twin"),
    "bp_epochs": Parameter(int, 70, "passes over all images of the BP twin", 1),
    "bp_batch": Parameter(int, 1000, "images an update of the BP twin", 1),
    # how to run
    "data": Parameter(("auto", "cifar10", "cifar10-sample"), "auto", "which images: auto takes the full set where it is found"),
    "device": Parameter(str, "auto", "auto, cpu, cuda or cuda:N"),
    "feature_dtype": Parameter(DTYPES, "float32", "how pooled activities are kept while heads train"),
    "memory": Parameter(float, MEMORY, "GiB for pooled activities; what does not fit is computed again each epoch", 0.0),
    "bp": Parameter(("stored", "train", "none"), "stored", "the BP twin: shown where the store holds it, trained, or left out"),
    "group": Parameter(str, "", "what a sweep does in this notebook, FILE#ID; nothing by default"),
    "eps_max": Parameter(float, 1.0, "largest FGSM strength tried", 1e-9, 1.0),
}


LATER = {name: PARAMETERS[name].default for name in ("conv_share", "conv_order", "conv_chunk", "conv_rank", "conv_scale", "head_order", "pooling", "head_bias", "head_init", "held_out")}


#: a schedule of the convolution at a tenth of the cost, which ends at nearly the same filters and accuracy (chapter 8)
FAST = dict(conv_share=0.1, conv_eta0=4e-3)


def check(given: dict, allowed=None) -> dict:
    """Validate named hyperparameters.

    Parameters
    ----------
    given : name -> value.
    allowed : the names that make sense here; all of :data:`PARAMETERS` by default.

    Returns the values in their own types. Raises ``ValueError`` naming the first wrong name
    or value, and what is valid instead.
    """
    names = list(PARAMETERS if allowed is None else allowed)
    clean = {}
    for name, value in given.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"unknown parameter {name!r}{hint} Valid parameters: {', '.join(names)}")
        clean[name] = PARAMETERS[name].clean(name, value)
    return clean


def of_notebook(namespace: dict, *names: str) -> dict:
    """The parameters of a notebook: call it right after the parameters cell, as ``of_notebook(globals(), "K", ...)``.

    Papermill sets whatever name it is given. Here a plain value under a name that is not among ``names`` is a misspelt
    parameter: ``ValueError`` lists the valid ones, as it does for a value out of range. Returns name -> clean value.
    """
    plain = {k: v for k, v in namespace.items() if not k.startswith("_") and isinstance(v, (int, float, str, bool))}
    missing = [name for name in names if name not in plain]
    if missing:
        raise ValueError(f"parameters {', '.join(missing)} are missing, or not plain values. Valid parameters: {', '.join(names)}")
    return check(plain, names)


def _default(name):
    return field(default=PARAMETERS[name].default)


class _Settings:
    """What the settings below share: each value is checked, a dictionary comes out."""

    def __post_init__(self):
        for name, value in check({f.name: getattr(self, f.name) for f in fields(self)}).items():
            object.__setattr__(self, name, value)

    @classmethod
    @functools.cache
    def names(cls) -> tuple[str, ...]:
        """The parameters of this kind of settings."""
        return tuple(f.name for f in fields(cls))

    @classmethod
    def of(cls, values: dict):
        """These settings out of a dictionary that may hold others as well."""
        own = [(name, values[name]) for name in cls.names() if name in values]
        try:
            return _made(cls, tuple((name, type(value), value) for name, value in own))
        except TypeError:  # a value that cannot be hashed is not valid either
            return cls(**dict(own))

    def dict(self) -> dict:
        """Name -> value, as stored in a record.

        What became a parameter only later (:data:`LATER`) is there only where it differs from its default, so that records
        made before stay the records of what they were made with.
        """
        return {k: v for k, v in vars(self).items() if k not in LATER or v != LATER[k]}


@functools.lru_cache(100_000)
def _made(cls, own: tuple):
    """Settings that were checked once: they cannot change, and a grid of thousands of models has few that differ."""
    return cls(**{name: value for name, _, value in own})


@dataclass(frozen=True)
class ConvSettings(_Settings):
    """The KH convolution layer and its unsupervised training (chapter 4; table 6.1)."""

    K: int = _default("K")
    w: int = _default("w")
    m: int = _default("m")
    p: float = _default("p")
    delta: float = _default("delta")
    conv_eta0: float = _default("conv_eta0")
    conv_scheduler: str = _default("conv_scheduler")
    conv_epochs: int = _default("conv_epochs")
    conv_batch: int = _default("conv_batch")
    conv_share: float = _default("conv_share")
    conv_order: int = _default("conv_order")
    conv_chunk: int = _default("conv_chunk")
    conv_rank: str = _default("conv_rank")
    conv_scale: str = _default("conv_scale")
    init_mean: float = _default("init_mean")
    init_std: float = _default("init_std")
    tau: float = _default("tau")
    gamma: float = _default("gamma")
    s_step: int = _default("s_step")
    seed: int = _default("seed")

    def __post_init__(self):
        super().__post_init__()
        if self.m > self.K**2:
            raise ValueError(f"m={self.m} is not valid: rank m must be from 2 to K^2 = {self.K**2}")


@dataclass(frozen=True)
class HeadSettings(_Settings):
    """Pooling, activation and classifier, and their supervised training (chapter 6)."""

    sigma: str = _default("sigma")
    n: float = _default("n")
    w_pool: int = _default("w_pool")
    s_pool: int = _default("s_pool")
    head_eta0: float = _default("head_eta0")
    head_scheduler: str = _default("head_scheduler")
    head_epochs: int = _default("head_epochs")
    head_batch: int = _default("head_batch")
    head_order: int = _default("head_order")
    pooling: str = _default("pooling")
    head_bias: str = _default("head_bias")
    head_init: str = _default("head_init")
    held_out: int = _default("held_out")
    tau: float = _default("tau")
    gamma: float = _default("gamma")
    s_step: int = _default("s_step")
    seed: int = _default("seed")

    def __post_init__(self):
        super().__post_init__()
        if self.w_pool == 1:  # the thesis pools with stride 2, but takes stride 1 where nothing is pooled
            object.__setattr__(self, "s_pool", 1)
        if self.n != int(self.n) and self.sigma not in ("sigmoid", "relu", "rexp"):
            raise ValueError(f"n={self.n} is not valid with sigma={self.sigma}: negative activities need a whole power")


def check_geometry(side: int, w: int, w_pool: int) -> int:
    """Side of the activity map of a ``side`` x ``side`` image; ``ValueError`` where nothing is left.

    The number of patches is the square of the result (eq. 6.5 with stride 1, no padding).
    """
    out = side - w + 1
    if out < 1:
        raise ValueError(f"w={w} is not valid: a filter must fit into the {side} x {side} image")
    if w_pool > out:
        raise ValueError(f"w_pool={w_pool} is not valid: the map after w={w} is only {out} x {out}")
    return out
