"""What of the thesis is reproduced: the manifest (``reference/manifest.csv``) against the records, and the scoreboard page.

``python -m khnb.coverage`` writes ``book/scoreboard.md`` anew.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np

from khnb.results import Store, atomic_write
from khnb.settings import PARAMETERS
from khnb.tables import REFERENCE, accepted_models, attacked_models, ensemble, ensemble_row, markdown, robustness, thesis

PAGE = REFERENCE.parent / "book" / "scoreboard.md"
STATUS = {
    "done": "recomputed here",
    "partial": "recomputed in part, or for a smaller model",
    "adopted": "a convention or setting of the thesis that is used here; nothing to recompute",
    "quoted": "from the literature; nothing to recompute",
    "thesis only": "shown with the thesis's numbers only",
    "not yet": "neither recomputed nor shown yet",
}
KINDS = ("figure", "table", "number", "ensemble")
PGD_B = dict(step=5e-4, radius=0.14)  # the thesis's second setting
BEST = {  # the thesis's most accurate models
    "LL": dict(model="LL", K=20, w=4, m=5, p=4.0, n=16.0, sigma="elu", w_pool=9, conv_share=1.0, conv_epochs=30, head_epochs=100),
    "BP": dict(model="BP", K=20, w=4, n=1.0, sigma="elu", w_pool=9, head_epochs=70),
}
BP_NAMES = {"sigma": "bp_sigma", "head_epochs": "bp_epochs", "head_batch": "bp_batch"}  # of a record, and of a notebook


def manifest(folder: Path = REFERENCE) -> list[dict[str, str]]:
    """The rows of the manifest. ``ValueError`` naming the row for an unknown kind or status, or an id given twice."""
    rows, seen = [], set()
    with (Path(folder) / "manifest.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = row["kind"], row["id"]
            if row["kind"] not in KINDS or row["status"] not in STATUS or key in seen:
                raise ValueError(f"manifest row {key} is not valid: kind {row['kind']!r}, status {row['status']!r}, or given twice")
            seen.add(key)
            rows.append(row)
    return rows


def query(text: str) -> tuple[str, dict]:
    """``"attack:model=LL,K=10"`` as kind of record and hyperparameters, each in its own type."""
    kind, _, rest = text.strip().partition(":")
    asked = dict(item.split("=", 1) for item in rest.split(",") if item)
    return kind, {name: PARAMETERS[name].clean(name, _number(value)) if name in PARAMETERS else value for name, value in asked.items()}


def _number(text):
    try:
        return float(text)
    except ValueError:
        return text


def records(row: dict, store: Store) -> list[dict | None]:
    """The records a row names, on the full CIFAR-10: one per query (joined by ``&``), ``None`` where the store has none."""
    if not row["record"] or row["record"] in ("reference", "computed", "measured"):
        return []
    found = []
    for text in row["record"].split("&"):
        kind, asked = query(text)
        found.append(next(iter(store.full(kind, **asked)), None))
    return found


def recompute(record: dict) -> dict:
    """The object of a grid (see :func:`khnb.pipeline.main`) that this record is the answer to; defaults are left out.

    A record of a layer, a probe, a model or an attack; ``ValueError`` for any other.
    """
    asked, kind = record["asked"], record["kind"]
    if kind not in ("layer", "probe", "model", "attack"):
        raise ValueError(f"a record of kind {kind!r} is not computed by itself; follow what it is of")
    named = {name: asked[name] for name in PARAMETERS if name in asked}
    bp = asked.get("model") == "BP"
    if bp:
        named |= {BP_NAMES[name]: named.pop(name) for name in BP_NAMES}
    attack = {name: named.pop(name) for name in ("confidence", "step", "radius", "max_steps") if name in named}
    found = {"what": {"layer": "layers", "probe": "probes"}.get(kind, "bp" if bp else "models"), "data": record["data"]["name"]}
    found |= {name: value for name, value in named.items() if value != PARAMETERS[name].default}
    if kind == "probe":
        found |= {name: asked[name] for name in ("seeds", "until")}
    if kind in ("model", "attack"):
        found |= {} if bp else {"bp": "none"}
        found |= {"head_seeds": [asked["head_seed"]]} if "head_seed" in asked else {}
        found["attacked"] = [dict(attack=asked["attack"], **attack)] if kind == "attack" else False
    return found


def dig(record: dict, path: str):
    """The value under a dotted path such as ``results.fit.R``."""
    for name in path.split("."):
        record = record[name]
    return record


def stated(row: dict, record: dict | None) -> tuple[str, float | None]:
    """The thesis's value of a number as printed, and its spread where one is printed."""
    if row["kind"] == "number":
        given = next(r for r in thesis("headline_numbers") if r["id"] == row["id"])
        return given["value"], float(given["uncertainty"]) if given["uncertainty"] else None
    if row["id"].startswith("a1_"):
        a = record["asked"]
        same = [r for r in thesis("table_A1") if all(float(r[k]) == a[k] for k in ("delta", "w", "p", "m"))]
        return same[0]["f_score"], None
    printed, name = ensemble_row(record["asked"]), "R" if row["evidence"].endswith(".R") else "acc"
    return printed[f"{name}_mean"], float(printed[f"{name}_std"])


def verdict(ours: float, theirs: str, spread: float | None) -> str:
    """In words: equal as printed, within twice the thesis's spread, within 2%, or how far off; of a bound, whether it holds."""
    if theirs[0] in "<>":
        return "agrees" if (ours < float(theirs[1:])) == (theirs[0] == "<") else "differs"
    theirs = theirs.lstrip("~")
    value = float(theirs)
    digits = len(theirs.partition(".")[2]) if "e" not in theirs.lower() else None
    if digits is not None and round(ours, digits) == value or math.isclose(ours, value, rel_tol=1e-9):
        return "equal as printed"
    if spread and abs(ours - value) <= 2 * spread:
        return "agrees (within twice the thesis's spread)"
    off = abs(ours - value) / abs(value)
    return f"close ({off:.1%} off)" if off <= 0.02 else f"differs ({off:.0%} off)"


def measures(store: Store) -> dict[str, tuple[float, str]]:
    """Numbers of the thesis that no single record holds, from many of ours: id -> value, and from what. Those that lack their records are not there."""
    found = {}

    def attacked(kind, attack="fgsm", **how):
        return accepted_models(attacked_models(store, attack, 0.8, model=kind, **how))

    if LL := attacked("LL"):
        from_all = f"{len(LL)} LL models, full CIFAR-10"
        for name in ("acc", "R"):
            values = [row[{"acc": "accuracy"}.get(name, name)] for row in LL]
            found |= {f"ll_{name}_lo": (min(values), from_all), f"ll_{name}_hi": (max(values), from_all)}
        most = max(LL, key=lambda row: row["images"])
        found |= {"max_samples": (most["images"], from_all), "max_samples_frac": (most["images"] / round(10_000 * most["accuracy"]), from_all)}
    steps = [r for r in store.full("attack", attack="pgd", confidence=0.8, model="LL", **PGD_B) if r["results"]["fit"]["status"] == r["results"]["fit_steps"]["status"] == "ok"]
    if steps:
        ratios, medians = zip(*((r["results"]["fit"]["R"] / r["results"]["fit_steps"]["R"] / PGD_B["step"], r["results"]["fit_steps"]["R"]) for r in steps), strict=True)
        found |= {"pgd_ratio": (float(np.median(ratios)), f"median of {len(steps)} LL models"), "pgd_steps": (max(medians), f"largest R in steps of {len(steps)} LL models")}
    models = store.full("model", held_out=0)
    if second := [r["results"]["test_accuracy"] for r in models if r["asked"]["model"] == "LL" and r["asked"]["K"] == 10 and r["asked"]["w"] in (4, 8)]:
        found["g2_best_acc"] = max(second), f"{len(second)} LL models with K=10, w=4 or 8; parts of grids 2 and 3 and others"
    best = {kind: [r["results"]["test_accuracy"] for r in store.full("model", held_out=0, **asked)] for kind, asked in BEST.items()}
    if all(best.values()):
        seeds = " and ".join(f"{len(each)} {kind}" for kind, each in best.items())
        found["bp_minus_ll"] = round(10_000 * (max(best["BP"]) - max(best["LL"]))), f"the best of {seeds} models"
    for kind, table, attack, column in (("LL", "B1", None, "acc"), ("BP", "B3", None, "acc"), ("LL", "B1", "fgsm", "R"), ("BP", "B3", "fgsm", "R"), ("LL", "B2", "pgd", "R"), ("BP", "B4", "pgd", "R")):
        how = PGD_B if attack == "pgd" else {}
        R = robustness(store, attack, **how) if attack else None
        spreads = []
        for row in thesis(f"table_{table}"):
            alike, _ = ensemble(models, row, kind)
            values = [r["results"]["test_accuracy"] if R is None else R[r["id"]] for r in alike if R is None or r["id"] in R]
            spreads += [100 * np.std(values, ddof=1) / np.mean(values)] if len(values) > 1 else []
        if spreads:
            found[f"spread_{kind.lower()}_{attack or 'acc'}"] = float(np.mean(spreads)), f"mean of {len(spreads)} sets of 2 to 5 models"
    for timing in store.find("timing", benchmark="patch_methods")[:1]:
        one, many = ({row["w"]: row["microseconds_an_image"] for row in timing["results"]["rows"] if row["images"] == count} for count in (1, 100))
        gain = {w: (1 - took["rows"] / took["flat"], took["rows"] / took["indexer"]) for w, took in one.items()}
        found["patch_rowwise_gain"] = 1 - many[4]["rows"] / many[4]["flat"], f"w=4, 100 images at once (one at a time: {gain[4][0]:.2f}), one thread"
        found |= {f"indexer_w{w}": (took["rows"] / took["indexer"], f"100 images at once (one at a time: {gain[w][1]:.1f}), one thread") for w, took in many.items()}
    return found


def scoreboard(store: Store) -> str:
    """The scoreboard page, in MyST Markdown."""
    rows = manifest()
    lines = [
        "# Scoreboard", "",
        "What of the thesis has been repeated, from the manifest `reference/manifest.csv` and the records in `results/`. This page is",
        "written by `python -m khnb.coverage`; a test fails when it is out of date, or when a row claims what the records or the pages",
        "do not hold.", "",
    ]
    count = {kind: {s: sum(r["kind"] == kind and r["status"] == s for r in rows) for s in STATUS} for kind in KINDS[:3]}
    lines += [markdown([{"status": s, "meaning": STATUS[s]} | {f"{k}s": count[k][s] for k in count} for s in STATUS]), ""]
    lines += ["## Numbers compared", ""]
    compared, settings, measured = [], [], measures(store)
    for row in rows:
        if row["record"] == "measured":
            ours, where = measured[row["id"]]
            theirs = {"pgd_ratio": "1"}.get(row["id"]) or stated(row, None)[0]  # R_eps is the step times R_N
            compared.append({"quantity": row["title"], "thesis": theirs, "here": f"{ours:.4g}", "verdict": verdict(ours, theirs, None), "scale": where, "record": "many"})
            continue
        if not row["evidence"] or not (found := records(row, store)) or found[0] is None:
            continue
        ours = dig(found[0], row["evidence"])
        theirs, spread = stated(row, found[0])
        error = found[0]["results"].get("fit", {}).get("R_err") if row["evidence"].endswith(".R") else None
        shown = {
            "quantity": row["title"], "thesis": f"{theirs} ± {spread:g}" if spread else theirs,
            "here": (f"{ours:.4f} ± {error:.4f}" if error else f"{ours:.4g}" if abs(ours) < 1000 else f"{ours:.0f}"), "verdict": verdict(ours, theirs, spread),
            "scale": row["scale"], "record": f"`{found[0]['id']}`",
        }
        (settings if row["status"] == "adopted" else compared).append(shown)
    lines += [markdown(compared) if compared else "None yet: the store holds no record on the full data.", ""]
    lines += [
        "The thesis's ± is the spread over the models of an ensemble; ours, where given, the bootstrap error of one model's $R$.", "",
    ]
    for kind, heading in (("figure", "Figures"), ("table", "Tables"), ("number", "Every number the text states")):
        lines += [f"## {heading}", ""]
        shown = [
            {
                "": row["id"], "what": row["title"], "chapter": f"[{row['chapter']}](notebooks/{row['notebook']}.ipynb)",
                "status": row["status"], "scale": row["scale"], "note": row["note"],
            }
            for row in rows if row["kind"] == kind
        ]
        if kind == "number":
            by_id = {r["id"]: r for r in thesis("headline_numbers")}
            for item in shown:
                item["thesis"] = by_id[item[""]]["value"]
            lines += [markdown(shown, {"what": "what", "thesis": "thesis", "chapter": "chapter", "status": "status", "scale": "scale"}), ""]
        else:
            lines += [markdown(shown), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    atomic_write(PAGE, scoreboard(Store()).encode())
    print(f"wrote {PAGE}")
