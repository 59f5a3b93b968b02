"""The trade-off explorer: accuracy against robustness, one point a model, of every attacked model at once."""

from __future__ import annotations

import math

import traitlets

from khnb import tables
from khnb.settings import LATER, ConvSettings, HeadSettings
from khnb.widgets.base import Widget, limited, module, style

#: the attacks of figs. 9.3 to 9.10, as :func:`khnb.tables.attacked_models` takes them
ATTACKS = (("fgsm", 0.8, {}), ("fgsm", 0.6, {}), ("pgd", 0.8, dict(step=1e-3, radius=0.12)), ("pgd", 0.8, dict(step=5e-4, radius=0.14)))
BRIEF = ("model", "K", "w", "m", "p", "n", "sigma", "w_pool")  # what names a model in a line
HYPERPARAMETERS = tuple(dict.fromkeys((*BRIEF, "head_epochs", "head_batch", *ConvSettings.names(), *HeadSettings.names(), "head_seed", "feature_dtype")))
NEEDED = ("id", "record", "model", "attack", "confidence", "accuracy", "R", "R_err", "images", "n_survived", "r2", "status")
LABELS = dict(
    sigma="activation σ", n="power n", w_pool="pool width w_pool", s_pool="pool stride s_pool", delta="Δ", f="f-score of the filters", images="number of images",
    head_epochs="epochs of the classifier", head_batch="batch of the classifier", head_eta0="η₀ of the classifier", head_scheduler="schedule of the classifier", head_seed="seed of the classifier",
    conv_epochs="epochs of the filters", conv_batch="batch of the filters", conv_eta0="η₀ of the filters", conv_scheduler="schedule of the filters", conv_share="share of images an epoch", tau="τ", gamma="γ",
)
LETTERS = 44  # of ASCII, from "0" to the one before the backslash
FEW = 20  # numbers with more values than that get a colour bar and no check boxes


def _plain(value):
    """A value for JSON, numbers to seven digits, so that what is shown, to five or fewer, is not rounded twice; what is not finite is ``None``."""
    if value is None or isinstance(value, str):
        return value
    value = float(value)
    return None if not math.isfinite(value) else int(value) if value == int(value) else float(f"{value:.7g}")


def _column(values: list) -> dict:
    """A column as its sorted values (LL before BP, ``None`` last) and the place of each row among them, or as it is where most values differ.

    Places among few values are one letter a row, from "0" on, a third of what a list takes; the letters cannot form "</", which would end a page's script.
    """
    distinct = sorted(set(values), key=lambda v: (v is None, isinstance(v, str), v == "BP", 0 if v is None else v))
    if 2 * len(distinct) > len(values) > FEW:
        return dict(values=values)
    place = {value: i for i, value in enumerate(distinct)}
    places = [place[value] for value in values]
    return dict(values=distinct, at="".join(chr(48 + at) for at in places) if len(distinct) <= LETTERS else places)


def _called(row: dict) -> str:
    return "FGSM" if row["attack"] == "fgsm" else f"PGD, S = {row['radius']:g}, step {row['step']:g}"


def _checked(rows: list[dict]) -> None:
    seen = set()
    for i, row in enumerate(rows):
        missing = [name for name in (*NEEDED, *(("step", "radius") if row.get("attack") == "pgd" else ())) if name not in row]
        if missing:
            raise ValueError(f"row {i} has no {', '.join(missing)}: give rows of khnb.tables.attacked_models")
        if row["attack"] not in ("fgsm", "pgd"):
            raise ValueError(f"row {i} has attack={row['attack']!r}: expected fgsm or pgd")
        if not 0 <= row["accuracy"] <= 1:
            raise ValueError(f"row {i} has accuracy={row['accuracy']!r}: expected a number from 0 to 1")
        if row["status"] == "ok" and not all(isinstance(row[name], (int, float)) and math.isfinite(row[name]) for name in ("R", "R_err", "r2")):
            raise ValueError(f"row {i} has status ok, but R={row['R']!r}, R_err={row['R_err']!r}, r2={row['r2']!r}: expected finite numbers")
        key = (row["id"], _called(row), row["confidence"])
        if key in seen:
            raise ValueError(f"row {i} is a second attack on model {key[0]} by {key[1]} at confidence {key[2]:g}: give each once")
        seen.add(key)


class TradeOffExplorer(Widget):
    """Look through all attacked models: accuracy against R, coloured, filtered and compared by hyperparameters.

    Parameters
    ----------
    rows : of :func:`khnb.tables.attacked_models`, of any attacks and thresholds, each model once an attack. R is in units of the pixel range (0 to 1), accuracy
        from 0 to 1. They may have ``R_ci``, the two ends of the 95% interval of R, and ``computed``, ``hardware`` and ``code``: when, on what and with which code.

    Synced traits: ``attack`` ("FGSM" or, e.g., "PGD, S = 0.12, step 0.001"); ``confidence`` (a threshold in the rows); ``colour_by`` and ``filter_by`` (whose check boxes
    show), names of columns; ``filters``, name of a hyperparameter -> list of the values shown (``None``: it has none); ``min_images`` (0 or more) and ``min_r2`` (0 to 1): more
    images and a larger R² than these, 0 for any; ``selected``, ids of at most two models.
    ``ValueError`` on wrong rows, ``TraitError`` on wrong traits.
    """

    _esm = module("tradeoff")
    _css = style("tradeoff")
    _known = limited("attack", "confidence", "colour_by", "filter_by")

    attack = traitlets.Unicode().tag(sync=True)
    confidence = traitlets.Float().tag(sync=True)
    colour_by = traitlets.Unicode("model").tag(sync=True)
    filter_by = traitlets.Unicode("model").tag(sync=True)
    filters = traitlets.Dict(key_trait=traitlets.Unicode(), value_trait=traitlets.List()).tag(sync=True)
    min_images = traitlets.Int(500, min=0).tag(sync=True)
    min_r2 = traitlets.Float(0.95, min=0, max=1).tag(sync=True)
    selected = traitlets.List(traitlets.Unicode()).tag(sync=True)

    def __init__(self, rows: list[dict], **traits):
        rows = list(rows)
        if not rows:
            raise ValueError("no rows: give those of khnb.tables.attacked_models, at least one")
        _checked(rows)
        filled = [dict(head_seed=row.get("seed")) | {name: value for name, value in LATER.items() if row["model"] == "LL" or name in HeadSettings.names()} | row for row in rows]
        asked = [name for name in HYPERPARAMETERS if any(name in row for row in rows)]
        given = dict.fromkeys((*NEEDED, *asked, "f", "computed", "hardware", "code"))
        columns = {name: _column([_plain(row.get(name)) for row in filled]) for name in given} | {"attack": _column([_called(row) for row in rows])}
        columns |= {name: _column([_plain((row.get("R_ci") or (None, None))[end]) for row in rows]) for end, name in enumerate(("R_low", "R_high"))}
        many = {name for name, column in columns.items() if "at" not in column or len(column["values"]) > FEW and not any(isinstance(v, str) for v in column["values"])} | {"f", "images"}
        vary = [name for name in asked if len(set(columns[name]["values"]) - {None}) > 1]
        attacks, seen = columns["attack"]["values"], columns["confidence"]["values"]
        few = [name for name in vary if name not in many] or ["model"]
        self._ids = set(columns["id"]["values"])
        limits = dict(attack=attacks, confidence=seen, colour_by=list(dict.fromkeys(["model", *vary, "f", "images"])), filter_by=list(dict.fromkeys(["model", *few])))
        traits = dict(attack=attacks[0], confidence=seen[-1]) | traits
        super().__init__(
            header=dict(count=len(rows), columns=columns, labels=LABELS, asked=asked, vary=vary, many=sorted(many), brief=[name for name in BRIEF if name in asked], choices=limits),
            limits=limits, **traits,
        )

    @classmethod
    def of(cls, store, **traits):
        """All attacks of figs. 9.3 to 9.10 in a :class:`khnb.results.Store`, with their intervals and when and how they were computed. ``ValueError`` where it has none."""
        made = {record["id"]: record for record in store.full("attack")}

        def origin(record):
            hardware, code = record["hardware"], record["code"]
            return dict(R_ci=record["results"]["fit"]["R_ci"], computed=record["started"][:10], hardware=f"{hardware['device']}: {hardware['name']}", code=code["commit"][:10] if code["commit"] else code["source"])

        return cls([row | origin(made[row["record"]]) for attack, seen, how in ATTACKS for row in tables.attacked_models(store, attack, seen, **how)], **traits)

    @traitlets.validate("filters")
    def _filters(self, proposal):
        for name, values in proposal["value"].items():
            if name not in self.limits["filter_by"]:
                raise traitlets.TraitError(f"filters has {name!r}, which is not valid: one of {', '.join(self.limits['filter_by'])}")
            wrong = [value for value in values if value not in self.header["columns"][name]["values"]]
            if wrong:
                raise traitlets.TraitError(f"filters has {name}={wrong[0]!r}, which is not valid: one of {', '.join(map(str, self.header['columns'][name]['values']))}")
        return proposal["value"]

    @traitlets.validate("selected")
    def _selected(self, proposal):
        value = proposal["value"]
        if len(value) > 2 or len(set(value)) < len(value):
            raise traitlets.TraitError(f"selected={value!r} is not valid: at most two models, each once")
        for id in value:
            if id not in self._ids:
                raise traitlets.TraitError(f"selected has {id!r}, which is the id of no model here: see the column id of the rows")
        return value
