"""What the thesis claims about many models, each claim with the number of our records that decides it.

Effects of hyperparameters are main effects of a linear model with activation function and way of training as categories, with an interval from a bootstrap over
*layers*, since models on one layer share it. An interval on the claimed side of zero supports a claim, one on the other side contradicts it, and one that holds zero leaves it open.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from khnb.settings import ConvSettings
from khnb.tables import TRAINED

#: a step of each hyperparameter in which effects are told, and its number
STEPS: dict[str, tuple[str, Callable[[dict], float]]] = {
    "K": ("doubled", lambda row: math.log2(row["K"])),
    "w": ("4 more", lambda row: row["w"] / 4),
    "m": ("1 more", lambda row: row["m"]),
    "p": ("1 more", lambda row: row["p"]),
    "n": ("doubled", lambda row: math.log2(max(1.0, row["n"]))),
    "w_pool": ("2 more", lambda row: row["w_pool"] / 2),
}
CATEGORIES = ("sigma", "head_batch")
RESAMPLES, LEAST = 1000, 8  # of the bootstrap; models for any verdict


@dataclass(frozen=True)
class Interval:
    """A number with its 95% interval, and how many models it comes from."""

    value: float
    low: float
    high: float
    models: int

    def verdict(self, above: float | None = None, below: float | None = None) -> str:
        """Whether the number is above, or below, a limit: ``supported``, ``contradicted`` or ``open``."""
        if self.models < LEAST or not all(map(math.isfinite, (self.value, self.low, self.high))):
            return "too few models"
        low, high, limit = (self.low, self.high, above) if above is not None else (-self.high, -self.low, -below)
        return "supported" if low > limit else "contradicted" if high < limit else "open"


def layer_of(row: dict) -> tuple:
    """What models with the same layer have in common; a BP model shares nothing with others."""
    return tuple(row[name] for name in ConvSettings.names() if name in row) if row["model"] == "LL" else (row["id"],)


def resampled(rows: list[dict], number: Callable[[list[dict]], float], seed: int = 0) -> Interval:
    """``number`` of these rows, with the 95% interval of its bootstrap over layers; nan where it cannot be told."""
    layers: dict[tuple, list[dict]] = {}
    for row in rows:
        layers.setdefault(layer_of(row), []).append(row)
    groups, rng = list(layers.values()), np.random.default_rng(seed)
    value = number(rows)
    if len(groups) < 3 or not math.isfinite(value):
        return Interval(value, math.nan, math.nan, len(rows))
    draws = [number([row for i in rng.integers(len(groups), size=len(groups)) for row in groups[i]]) for _ in range(RESAMPLES)]
    return Interval(value, *np.nanquantile(draws, [0.025, 0.975]).tolist(), len(rows))


def effect(rows: list[dict], parameter: str, quantity: str) -> Interval:
    """Change of ``accuracy``, in percentage points, or of ``R``, in percent, with a step (:data:`STEPS`) of a hyperparameter, the others being the same.

    rows : of :func:`khnb.tables.attacked_models`. nan where the parameter does not vary in them, or goes with another.
    """

    def number(rows):
        return _main_effect(rows, parameter, quantity)

    return resampled(rows, number)


def _main_effect(rows: list[dict], parameter: str, quantity: str) -> float:
    vary = [name for name in STEPS if len({row[name] for row in rows}) > 1]
    if parameter not in vary:
        return math.nan
    columns = [[step(row) for row in rows] for name, (_, step) in STEPS.items() if name in vary]
    for name in CATEGORIES:
        columns += [[row[name] == kind for row in rows] for kind in sorted({row[name] for row in rows})[1:]]
    X = np.array([np.ones(len(rows)), *columns], dtype=float).T
    if np.linalg.matrix_rank(X) < X.shape[1]:
        return math.nan
    y = np.array([100 * row["accuracy"] if quantity == "accuracy" else 100 * math.log(row["R"]) for row in rows])
    return float(np.linalg.lstsq(X, y, rcond=None)[0][1 + vary.index(parameter)])


def rank_correlation(rows: list[dict], a: str = "accuracy", b: str = "R") -> float:
    """Spearman's rank correlation of two columns; nan where one of them does not vary."""
    x, y = (rankdata([row[name] for row in rows]) for name in (a, b))
    return float(np.corrcoef(x, y)[0, 1]) if len(rows) > 2 and x.std() and y.std() else math.nan


def claims(LL: list[dict], BP: list[dict], pgd: list[dict], low: list[dict]) -> list[dict]:
    """A row for each claim: ``claim``, ``section``, ``models``, ``number`` and ``verdict``.

    LL, BP : models under FGSM that count, rows of :func:`khnb.tables.accepted_models`; pgd : LL models under PGD with the finer step; low : LL models at the lower threshold of
    confidence.
    """
    rows, grid = [], [row for row in LL if any(_trained(row, way) for way in TRAINED["LL"])]

    def add(claim, section, found: Interval, unit="", digits=2, **limit):
        told = f"{found.value:+.{digits}f}{unit} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]" if found.models >= LEAST and math.isfinite(found.value) else ""
        rows.append(dict(claim=claim, section=section, models=found.models, number=told, verdict=found.verdict(**limit)))

    add("LL: accuracy and R go against each other (rank correlation below 0)", "9.1.1", resampled(LL, rank_correlation), below=0)
    upward = {"K": (1, -1), "w": (-1, 1), "p": (1, -1), "n": (1, -1)}
    for name, signs in upward.items():
        some = [row for row in grid if 1 < row["n"] <= 16] if name == "n" else grid  # beyond it the thesis finds accuracy falling again
        for quantity, sign, unit in zip(("accuracy", "R"), signs, (" points", "%"), strict=True):
            what = f"LL: {name} {STEPS[name][0]}: {'more' if sign > 0 else 'less'} {'accurate' if quantity == 'accuracy' else 'robust'}{' (n to 16)' if name == 'n' else ''}"
            add(what, "9.1.1, 10", effect(some, name, quantity), unit, 1, **({"above": 0} if sign > 0 else {"below": 0}))
    for quantity, unit, limit in (("accuracy", " points", 1.0), ("R", "%", 10.0)):
        found = effect(grid, "m", quantity)
        size = Interval(abs(found.value), 0.0, max(abs(found.low), abs(found.high)), found.models)
        verdict = "supported" if size.high < limit else "contradicted" if min(abs(found.low), abs(found.high)) > limit and found.low * found.high > 0 else "open"
        add(f"LL: m 1 more: hardly matters for {'accuracy' if quantity == 'accuracy' else 'R'} (less than {'a point' if quantity == 'accuracy' else '10%'})", "10", found, unit, 1, above=0)
        rows[-1]["verdict"] = verdict if size.verdict(above=0) != "too few models" else "too few models"
    for quantity, unit in (("accuracy", " points"), ("R", "%")):
        add(f"LL: w_pool 2 more: no rule for {'accuracy' if quantity == 'accuracy' else 'R'}", "10", effect(grid, "w_pool", quantity), unit, 1, above=0)
        rows[-1]["verdict"] = "no direction claimed"

    def steep(rows):
        return _difference([row for row in rows if row["sigma"] == "rexp"], [row for row in rows if row["sigma"] in ("relu", "elu", "gelu")])

    add("LL: rExp less accurate than other activation functions (w = 4)", "10", resampled([row for row in LL if row["w"] == 4], steep), " points", 1, below=0)
    for told, way in zip(("as in the thesis", "shorter, in smaller minibatches"), TRAINED["BP"], strict=True):
        some = [row for row in BP if _trained(row, way)]
        add(f"Most LL models are more robust than most BP models, these trained {told} (share of pairs with the same K and w above 0.9)", "9.2, 11", resampled(LL + some, _share_of_pairs), above=0.9)
    add("BP: accuracy and R go against each other less than in LL models (difference of rank correlations above 0)", "9.2", resampled(LL + BP, _less_apparent), above=0)
    add("PGD finds smaller R than FGSM (mean ratio below 1)", "9.1.2", resampled(_joined(LL, pgd), lambda rows: float(np.mean([row["other"] / row["R"] for row in rows])) if rows else math.nan), below=1)
    add("PGD puts models in the same order (rank correlation above 0.95)", "9.1.2", resampled(_joined(LL, pgd), lambda rows: rank_correlation(rows, "other", "R")), above=0.95)
    add("At the lower threshold of confidence R is smaller (mean ratio below 1)", "9.1.1", resampled(_joined(LL, low), lambda rows: float(np.mean([row["other"] / row["R"] for row in rows])) if rows else math.nan), below=1)
    for name, told in REGIONS.items():
        inside = [row for row in BP if region(row) == name]
        count = f"{len(inside)} of {len(BP)}" + (f": accuracy {np.mean([r['accuracy'] for r in inside]):.3f}, R {np.mean([r['R'] for r in inside]):.4f} on average" if inside else "")
        rows.append(dict(claim=f"BP: {told}", section="9.2", models=len(inside), number=count, verdict=""))
    _judge_regions(rows, BP)
    return rows


#: the thesis's three regions of BP models (section 9.2), by the hyperparameters that are said to lead there
REGIONS = {
    "first": "n = 1, 2 or rExp: most accurate, as robust as the best LL models",
    "second": "all others: much less robust than those of the first region",
    "third": "ELU with n = 10, 12, 16: moderately accurate, much more robust than other BP models",
}


def region(row: dict) -> str:
    """The region in which the thesis finds BP models with these hyperparameters."""
    if row["sigma"] == "rexp" or row["n"] <= 2:
        return "first"
    return "third" if row["sigma"] == "elu" and row["n"] >= 10 else "second"


def _judge_regions(rows: list[dict], BP: list[dict]) -> None:
    """A region's claim stands where most of its models are on the claimed side of most of the others', in both accuracy and R."""
    by = {name: [row for row in BP if region(row) == name] for name in REGIONS}

    def beats(a, b, quantity):
        pairs = [x[quantity] > y[quantity] for x in by[a] for y in by[b]]
        return np.mean(pairs) if pairs else math.nan

    tests = {"first": [beats("first", "second", "accuracy"), beats("first", "third", "accuracy")], "second": [beats("first", "second", "R")], "third": [beats("third", "first", "R"), beats("third", "second", "R")]}
    for row, (name, shares) in zip(rows[-len(REGIONS):], tests.items(), strict=True):
        few = len(by[name]) < 3 or not all(map(math.isfinite, shares))
        row["verdict"] = "too few models" if few else "supported" if min(shares) > 0.75 else "contradicted" if max(shares) < 0.25 else "open"


def _difference(some: list[dict], others: list[dict]) -> float:
    """Of mean accuracies, in points."""
    return 100 * float(np.mean([r["accuracy"] for r in some]) - np.mean([r["accuracy"] for r in others])) if some and others else math.nan


def _trained(row: dict, way: dict) -> bool:
    """Whether a classifier, or a BP model, was trained like this; a layer's schedule does not matter."""
    return all(row[name] == way[name] for name in ("head_epochs", "head_batch"))


def _share_of_pairs(rows: list[dict]) -> float:
    """Share of the pairs of an LL and a BP model with the same K and w in which the LL model is more robust; nan without pairs."""
    LL, BP = (np.array([[row["R"], row["K"], row["w"]] for row in rows if row["model"] == kind]).reshape(-1, 3) for kind in ("LL", "BP"))
    alike = (LL[:, None, 1:] == BP[:, 1:]).all(2)
    return float((LL[:, None, 0] > BP[:, 0])[alike].mean()) if alike.any() else math.nan


def _less_apparent(rows: list[dict]) -> float:
    LL, BP = ([row for row in rows if row["model"] == kind] for kind in ("LL", "BP"))
    return rank_correlation(BP) - rank_correlation(LL)


def _joined(rows: list[dict], others: list[dict]) -> list[dict]:
    """Rows with R of the other table's row of the same model under ``other``."""
    R = {row["id"]: row["R"] for row in others}
    return [row | dict(other=R[row["id"]]) for row in rows if row["id"] in R]
