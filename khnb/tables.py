"""Small tables: rows to Markdown, and the thesis's own numbers (reference/*.csv) to rows."""

from __future__ import annotations

import csv
from html import escape
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from khnb.learning import COLLAPSED, fates
from khnb.robustness import accepted
from khnb.settings import FAST, PARAMETERS, ConvSettings, HeadSettings

REFERENCE = Path(__file__).resolve().parents[1] / "reference"


def markdown(rows, columns=None, formats=None) -> str:
    """A table in Markdown.

    Parameters
    ----------
    rows : list of dictionaries, one a row.
    columns : the keys to show, in this order, or a dictionary key -> heading; all keys of the first row by default.
    formats : key -> format specification (``".3f"``) or function of the value; other values are shown as they are.

    Raises ``ValueError`` where there is no row, or a row lacks a column. ``None`` is shown as an empty cell. A number and its error
    stay on one line.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("no rows: nothing to show")
    headings = columns if isinstance(columns, dict) else {key: key for key in (columns or rows[0])}
    formats = formats or {}

    def cell(row, key):
        if key not in row:
            raise ValueError(f"column {key!r} is not in a row with columns {', '.join(map(str, row))}")
        value, how = row[key], formats.get(key, "")
        if value is None:
            return ""
        text = how(value) if callable(how) else format(value, how)
        return text.replace("|", "\\|").replace("\n", " ").replace(" ± ", "\u00a0±\u00a0")

    lines = [list(headings.values()), ["---"] * len(headings)]
    lines += [[cell(row, key) for key in headings] for row in rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def html(rows) -> str:
    """Rows as an HTML table, for a page that shows a table of another page's notebook, where Markdown is not read.

    rows : as for :func:`markdown`, all columns of the first row, every value as text.
    """

    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line((row[key] for key in rows[0]), "td") for row in rows)
    table = f'<table class="table"><thead>{line(rows[0], "th")}</thead><tbody>{body}</tbody></table>'
    return f'<div style="overflow-x: auto">{table}</div>'  # on a narrow screen the table scrolls, not the page


def thesis(name: str, folder: Path = REFERENCE) -> list[dict[str, str]]:
    """The rows of a file of the thesis's numbers, every value as the text that was printed.

    name : ``"table_6_1"``, ``"table_A1"``, ``"figures"``, ... Raises ``FileNotFoundError`` listing the valid names.
    """
    path = Path(folder) / f"{name}.csv"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in Path(folder).glob("*.csv"))) or "none: the folder is missing or empty"
        raise FileNotFoundError(f"no thesis numbers under the name {name!r} in {folder}; there are: {names}")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def pairs(rows, parameter: str, low, high, value: str, settings) -> tuple[int, int, int]:
    """In how many pairs of rows ``value`` rises, falls, or stays equal as ``parameter`` goes from low to high.

    A pair agrees in all other ``settings`` (names of columns). Values are compared as printed, as numbers.
    """
    others = [name for name in settings if name != parameter]
    found = {(row[parameter], *(row[name] for name in others)): float(row[value]) for row in rows}
    rises = falls = equal = 0
    for (at, *rest), start in found.items():
        end = found.get((high, *rest)) if at == low else None
        if end is not None:
            rises, falls, equal = rises + (end > start), falls + (end < start), equal + (end == start)
    return rises, falls, equal


#: what a row of the ensemble tables fixes (tables B.1 and B.3)
ENSEMBLE = {"LL": ("K", "w", "m", "p", "n", "w_pool"), "BP": ("K", "w", "n", "w_pool", "sigma")}


def spread(values, digits: int = 3) -> str:
    """Mean ± standard deviation (of a sample) and how many, or the value if there is only one; "none yet" without any."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "none yet"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f} ({len(values)})"


def ensemble_row(asked: dict) -> dict[str, str] | None:
    """The row of the thesis's table B.1 (LL) or B.3 (BP), both for FGSM, with these hyperparameters, or ``None``."""
    kind = asked["model"]
    if kind == "LL" and (asked["sigma"] != "gelu" or asked["delta"] != 0.1):
        return None  # the LL ensembles have these values throughout

    def same(row):
        return all(row[k] == asked[k] if k == "sigma" else float(row[k]) == asked[k] for k in ENSEMBLE[kind])

    return next(filter(same, thesis("table_B1" if kind == "LL" else "table_B3")), None)


def printed(asked: dict, quantity: str) -> str:
    """``acc`` or ``R`` of :func:`ensemble_row` as text, mean ± standard deviation, or "not stated"."""
    row = ensemble_row(asked)
    return f"{row[quantity + '_mean']} ± {row[quantity + '_std']}" if row else "not stated"


def ensemble(models: list[dict], row: dict[str, str], kind: str) -> tuple[list[dict], dict]:
    """Our models of a row of the ensemble tables, all trained alike, and what they have that the thesis's have not.

    models : records; row : of ``table_B1`` ... ``table_B4``; kind : ``"LL"`` or ``"BP"``. Of several kinds of training the one with the
    fewest settings other than the thesis's is taken (their names -> values are the second result), then the one with the most models.
    """
    usual = {name: PARAMETERS[name].default for name in (*ConvSettings.names(), *HeadSettings.names()) if name not in ("seed", *ENSEMBLE[kind])}
    usual |= dict(sigma="gelu") if kind == "LL" else dict(head_epochs=PARAMETERS["bp_epochs"].default)
    groups: dict[tuple, list[dict]] = {}
    for record in models:
        asked = record["asked"]
        if asked["model"] == kind and all(row[k] == asked[k] if k == "sigma" else float(row[k]) == asked[k] for k in ENSEMBLE[kind]):
            other = tuple((name, asked[name]) for name in usual if name in asked and asked[name] != usual[name])
            groups.setdefault(other, []).append(record)
    other = min(groups, key=lambda other: (len(other), -len(groups[other])), default=())
    return groups.get(other, []), dict(other)


CELL = ("delta", "w", "p", "m")  # what a cell of table A.1 fixes


def map_A1(probes, layers) -> list[dict]:
    """The cells of the thesis's table A.1, each with what our records say of it.

    probes, layers : records of those kinds with K = 10 (others are left out; of several probes of a cell the longest counts). Each
    row has the cell (``delta``, ``w``, ``p``, ``m``), ``thesis`` (f as printed), ``collapsed`` and ``runs`` (of the probe, only those
    whose fate is settled; ``None`` without any), ``chance``: the probability of what the thesis's single draw did, collapse
    (f < 0.15) or not, if the next run were one of ours (Jeffreys' prior, (k + 1/2) / (n + 1)), ``plausible``: whether that is at least 0.1, and ``f``: f-scores at tolerance 1e-4 of our whole layers.
    """

    def key(values):
        return tuple(float(values[name]) for name in CELL)

    longest = sorted((r for r in probes if r["asked"]["K"] == 10), key=lambda r: r["asked"]["until"])
    probed = {key(r["asked"]): [fate == "collapsed" for fate in fates(r["results"], r["asked"]["K"] ** 2) if fate] for r in longest}
    whole = {}
    for record in layers:
        if record["asked"]["K"] == 10:
            whole.setdefault(key(record["asked"]), []).append(record["results"]["f_score_1e4"])
    rows = []
    for cell in thesis("table_A1"):
        found = probed.get(key(cell))
        row = dict(zip(CELL, key(cell), strict=True)) | dict(thesis=float(cell["f_score"]), collapsed=None, runs=None, chance=None, plausible=None)
        if found:
            chance = (sum(found) + 0.5) / (len(found) + 1)
            row |= dict(collapsed=sum(found), runs=len(found), chance=chance if row["thesis"] < COLLAPSED else 1 - chance)
            row["plausible"] = row["chance"] >= 0.1
        rows.append(row | dict(f=sorted(whole.get(key(cell), []))))
    return rows


def shares_8_1(layers: list[tuple[dict, float]]) -> list[dict]:
    """The rows of the thesis's table 8.1, each with the same shares among our layers.

    layers : (hyperparameters, f-score) of each. To a row's columns, all as printed, come ``layers`` (how many of ours have the value) and,
    for each threshold, ``here_0.15``, ``here_0.8`` and ``here_0.95``: ``None`` without layers, else (share, low, high), with Wilson's
    95% interval.
    """
    called = dict(eta0="conv_eta0", scheduler="conv_scheduler")

    def has(asked, row):
        name, value = row["parameter"], row["value"]
        if name == "scheduler" and "_rate_" in value:
            return asked["conv_scheduler"] == "exponential" and asked["tau"] == float(value.rpartition("_")[2])
        given = asked[called.get(name, name)]
        return given == value if isinstance(given, str) else given == float(value)

    rows = []
    for row in thesis("table_8_1"):
        f = [score for asked, score in layers if has(asked, row)]
        found = {"layers": len(f)}
        for limit in ("0.15", "0.8", "0.95"):
            above = sum(score > float(limit) for score in f)
            found[f"here_{limit}"] = (above / len(f), *binomtest(above, len(f)).proportion_ci(method="wilson")) if f else None
        rows.append(row | found)
    return rows


def by_value(name: str, models: list[dict]) -> list[dict]:
    """The rows of the thesis's table A.2, A.3 or A.4, each with ``here`` (how many of our models have the value), ``here_avg`` and ``here_max`` of their accuracy.

    name : ``"table_A2"`` ...; models : records. Without models ``here`` is 0 and the others are ``None``. rExp and PReLU have no power: they are in no row of n.
    """

    def has(asked, row):
        parameter, value = row["parameter"], row["value"]
        if parameter == "n" and asked["sigma"] in ("rexp", "prelu"):
            return False
        given = asked[{"eta0": "head_eta0"}.get(parameter, parameter)]
        return given == value.lower() if isinstance(given, str) else given == float(value)

    rows = []
    for row in thesis(name):
        found = [r["results"]["test_accuracy"] for r in models if has(r["asked"], row)]
        rows.append(row | dict(here=len(found), here_avg=np.mean(found) if found else None, here_max=max(found, default=None)))
    return rows


def robustness(store, attack: str = "fgsm", confidence: float = 0.8, **amounts) -> dict[str, float]:
    """Id of a model -> its R, of the models on the full CIFAR-10 that have one under this attack (``amounts``: ``step``, ``radius``, ...)."""
    records = store.full("attack", attack=attack, confidence=confidence, **amounts)
    return {record["asked"]["of"]: record["results"]["fit"]["R"] for record in records if record["results"]["fit"]["status"] == "ok"}


#: how models are trained that are compared with one another: as the thesis's, and as the preset ``laptop`` says
TRAINED = {
    "LL": (dict(conv_share=1.0, conv_eta0=1e-3, head_epochs=100, head_batch=1000), dict(**FAST, head_epochs=25, head_batch=250)),
    "BP": (dict(head_epochs=70, head_batch=1000), dict(head_epochs=10, head_batch=150)),
}


def trained_shorter(models: list[dict], R: dict[str, float]) -> list[dict]:
    """Pairs of models that differ in nothing but :data:`TRAINED`, and in how features were kept.

    models : records; R : id of a model -> its robustness, of those that have one. Each row has the hyperparameters, and ``accuracy``, ``accuracy_shorter``,
    ``R`` and ``R_shorter`` (``None`` where there is none).
    """
    pairs: dict[tuple, dict] = {}
    for record in sorted(models, key=lambda record: record["asked"].get("feature_dtype", "")):  # of two the one with float32
        asked = record["asked"]
        for which, way in zip(("", "_shorter"), TRAINED[asked["model"]], strict=True):
            if all(asked.get(name) == value for name, value in way.items()):
                key = tuple((name, value) for name, value in asked.items() if name not in (*way, "feature_dtype"))
                pairs.setdefault(key, {}).update({f"accuracy{which}": record["results"]["test_accuracy"], f"R{which}": R.get(record["id"])})
    return [dict(key) | found for key, found in pairs.items() if len(found) == 4]


def attacked_models(store, attack: str = "fgsm", confidence: float = 0.8, **amounts) -> list[dict]:
    """A row for each model on the full CIFAR-10 that was attacked like this (``amounts``: ``step``, ``radius``, ...), whatever came of it.

    Rows have the hyperparameters of the model, and ``id``, ``record`` (of the attack), ``accuracy``, what the fit says (``R``, ``R_err``, ``n``, ``n_survived``, ``r2``,
    ``status``) and, of LL models, the ``f`` of their layer at tolerance 1e-4. rExp stands at n = 0, as in the thesis.
    """
    layers = {r["id"]: r["results"]["f_score_1e4"] for r in store.full("layer")}
    models = {r["id"]: r for r in store.full("model")}
    rows = []
    for record in store.full("attack", attack=attack, confidence=confidence, **amounts):
        asked, fit = record["asked"], record["results"]["fit"]
        of = models.get(asked["of"], {})
        rows.append(asked | {name: fit[name] for name in ("R", "R_err", "n_survived", "r2", "status")} | dict(
            id=asked["of"], record=record["id"], accuracy=record["results"]["accuracy"], images=fit["n"], f=layers.get(of.get("layer")),
            n=0 if asked["sigma"] == "rexp" else asked["n"],
        ))
    return rows


def accepted_models(rows: list[dict], min_images: int = 500, min_r2: float = 0.95) -> list[dict]:
    """Those of :func:`attacked_models` that count by the thesis's rule, see :func:`khnb.robustness.accepted`."""
    return [row for row in rows if accepted(row | dict(n=row["images"]), min_images, min_r2)]


def counted(rows: list[dict], kept: list[dict]) -> str:
    """How many models a figure shows, in words, with the reasons why others are missing."""
    reasons = {}
    for row in rows:
        if row not in kept:
            why = {"ok": "too few images or too poor a fit", "no-inflection": "without an inflection point"}.get(row["status"], "too few images to fit")
            reasons[why] = reasons.get(why, 0) + 1
    left = "; ".join(f"{count} {why}" for why, count in reasons.items())
    return f"{len(kept)} of {len(rows)} models" + (f" (left out: {left})" if left else "")
