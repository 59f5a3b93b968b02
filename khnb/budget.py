"""What each figure and table of the thesis costs, whole and at the preset ``laptop``.

``python -m khnb.budget`` writes ``book/budget.md`` anew: counts and operations from the grids, hours from rates in the store, in a record of kind ``timing``. With ``--measure`` (or where
there is no such record) they are measured first, on the machine it runs on, and recorded.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from khnb import costs, costs_gpu, data, sweeps, tables
from khnb.results import Store, atomic_write

PAGE = tables.REFERENCE.parent / "book" / "budget.md"


def outputs(text: str) -> list[tuple[str, str]]:
    """Figures and tables in a line such as ``"figs 9.2-9.4, 9.9a; table A.3"``: (kind, number) of each."""
    found, kind = [], None
    for word in re.findall(r"figs?|tables?|[^\s,;]+", text):
        kind = {"fig": "figure", "figs": "figure", "table": "table", "tables": "table"}.get(word, kind if re.match(r"[\dA-B]+\.\d+[a-b]?(-|$)", word) else None)
        if kind and "." in word:
            first, _, last = (part.rstrip("ab") for part in word.partition("-"))
            chapter, start = first.split(".")
            found += [(kind, f"{chapter}.{i}") for i in range(int(start), int((last or first).split(".")[1]) + 1)]
    return list(dict.fromkeys(found))


def needed() -> dict[tuple[str, str], list[str]]:
    """(figure or table, its number) -> the experiments of ``sweeps/thesis.json`` that it is drawn from: attacks, where there are some (with the models they are on), else models or layers."""
    book = sweeps.read("thesis")["experiments"]
    attacks = {name for name, one in book.items() if any("of" in job or job.get("attacked") for job in one.get("jobs", []))}
    found: dict[tuple[str, str], list[str]] = {}
    for row in tables.thesis("experiments"):
        for output in outputs(row["outputs"]) if book[row["id"]].get("jobs") else []:
            found.setdefault(output, []).append(row["id"])
    order = [(row["kind"], row["id"]) for row in tables.thesis("manifest")]
    return {output: [name for name in found[output] if name in attacks] or found[output] for output in order if output in found}


#: tables of one kind of model, drawn from experiments that attack both
ONE_KIND = {"B.1": False, "B.2": False, "B.3": True, "B.4": True}


@dataclass
class Sum:
    """Of groups of a sweep: how much of each kind, operations, and, where times are given, core seconds."""

    counts: dict[str, int] = field(default_factory=lambda: dict(layers=0, models=0, attacks=0))
    flop: float = 0.0
    seconds: float = 0.0

    @classmethod
    def of(cls, groups: Iterable, times: dict[str, float] | None = None) -> Sum:
        found = cls()
        for group in groups:
            kind = dict(layers="layers", probes="layers", heads="models", bp="models", attacks="attacks")[group.kind]
            found.counts[kind] += group.count * group.body.get("seeds", 1)
            found.flop += _flop(group)
            found.seconds += (times or {}).get(group.id, 0.0)
        return found

    def told(self) -> str:
        """Only the kinds there are."""
        return ", ".join(f"{count:,} {kind if count > 1 else kind[:-1]}" for kind, count in self.counts.items() if count)


_known: dict[str, float] = {}  # operations of groups by id, as figures share them


def _flop(group) -> float:
    if group.id not in _known:
        _known[group.id] = costs.of(group).flop
    return _known[group.id]


ASKED = dict(benchmark="sweep_rates", threads=1)  # of the record of the rates


class Rates:
    """Rates by name as :meth:`khnb.costs.Rates.get` gives them: those ``known``, and from a ``source``, where there is one, those that are not."""

    def __init__(self, known: dict[str, list[float]], source: costs.Rates | None = None):
        self.known, self.source = known, source

    def get(self, name: str, measure: Callable[[], list[float]]) -> list[float]:
        """``ValueError`` for one that has not been measured."""
        if name not in self.known:
            if self.source is None:
                raise ValueError(f"no rate of {name!r} is on record: python -m khnb.budget --measure")
            self.known[name] = self.source.get(name, measure)
        return self.known[name]


def rows(rates: Rates) -> list[dict]:
    """A row for each figure and table that is drawn from experiments, and one for all of them, which counts once what several share.

    Hours are core hours on this machine; those of the whole are the preset's times the operations, kind by kind.
    """
    every: dict[str, dict] = {"thesis": {}, "laptop": {}}
    times: dict[str, float] = {}

    def row(kind, number, experiments):
        grid, sums = "+".join(experiments), {}
        for preset, seen in every.items():
            groups = [group for group in sweeps.groups(grid, preset) if group.bp == ONE_KIND.get(number, group.bp)]
            seen |= {group.id: group for group in groups}
            if preset == "laptop":
                times.update(sweeps.expected([group for group in groups if group.id not in times], rates))
            sums[preset] = groups
        return dict(name=f"{kind} {number}", experiments=", ".join(experiments), **told(sums))

    def told(sums):
        whole, part = Sum.of(sums["thesis"]), Sum.of(sums["laptop"], times)
        hours = 0.0
        for kind in sweeps.NOTEBOOKS:
            large, small = (Sum.of([group for group in sums[preset] if group.kind == kind], times) for preset in ("thesis", "laptop"))
            hours += small.seconds / 3600 * large.flop / small.flop if small.flop else 0.0
        return dict(whole=whole.told(), whole_Pflop=whole.flop / 1e15, whole_hours=hours, laptop=part.told(), Tflop=part.flop / 1e12, hours=part.seconds / 3600)

    found = [row(kind, number, experiments) for (kind, number), experiments in needed().items()]
    return [*found, dict(name="all, each once", experiments="", **told({preset: list(seen.values()) for preset, seen in every.items()}))]


def lists(rates: Rates) -> list[dict]:
    """A row for each committed list of models beside the thesis's grids."""
    found = []
    for path in sorted(sweeps.FOLDER.glob("*.json")):
        if path.stem in ("thesis", "attacks"):  # attacks.json is about whatever the store holds
            continue
        groups = sweeps.groups(path.stem)
        part = Sum.of(groups, sweeps.expected(groups, rates))
        found.append(dict(name=f"`{path.name}`", laptop=part.told(), Tflop=part.flop / 1e12, hours=part.seconds / 3600))
    return found


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.1 else f"{value:.2f}"


FORMATS = dict(whole_Pflop=",.2f", whole_hours=_hours, Tflop=",.0f", hours=_hours)
COLUMNS = dict(
    name="drawn from experiments", experiments="experiments", whole="the thesis's", whole_Pflop="Pflop", whole_hours="core hours", laptop="preset `laptop`", Tflop="Tflop",
    hours="core hours",
)


def page(record: dict) -> str:
    """The text of ``book/budget.md``, with the rates of this record."""
    rates = Rates(record["results"]["rates"])
    budget, others, gpu = rows(rates), lists(rates), costs_gpu.thesis()
    return f"""(budget)=
# What it costs

What it takes to draw each figure and table of the thesis again, whole and on one machine without a GPU. Models and operations are counted from the
grids in `sweeps/` (how far attacks go, from those in the store); hours are those of one core ({record["hardware"]["name"]}), from short runs
of the very engines, {len(record["results"]["rates"])} rates in record `{record["id"]}`. The page is written by `python -m khnb.budget`, and a test holds it to the grids and the records. What a sweep costs on your machine says `make plan GRID=E08+E12 PRESET=laptop`, and how far it is `make status`
with the same words; how much of each figure and table is done is on the [scoreboard](scoreboard.md).

## By figure and table

The thesis's experiments whole, and at the preset `laptop`: a balanced part of each grid, with [shorter training](#laptop). Figures share models; the last row counts each once. Hours of the thesis's are those of the preset, times the operations.
Models on layers that do not reach the f-score they need are counted, and not made. Figures and tables that are missing here need no experiment: they are drawn or computed with the page, in seconds.

{tables.markdown(budget, COLUMNS, FORMATS)}

Reduced, so that all of it fits two days of two cores: the numbers of layers and models, the images an epoch of KH layers, the epochs of classifiers and BP models, and the ensembles to
one to four models a row. What does not fit, and stays the thesis's alone: its counts of models, and means over its whole grids. In tables that show both, the columns that say "here" are from such models.

Figures 8.1 to 8.6 and table 8.1 are drawn from the lists below instead, and so are 8.7, 8.8, 9.1, 9.2 and 9.7, which are about single models.

## Models at the thesis's own settings

Beside the grids there are lists of models that a chapter looks at closely, most with the thesis's training at full length.

{tables.markdown(others, dict(name="list", laptop="what", Tflop="Tflop", hours="core hours"), FORMATS)}

## On one GPU

An estimate, from pieces that were measured on an NVIDIA H200 (`benchmarks/gpu-h200.json`); **no whole model of the thesis was trained on a GPU**. For each group of models, the larger of the times that products and bytes of memory take at such a GPU's
peaks, which is the floor, over the share of it that was reached there: {", ".join(f"{share:.0%} by {name}" for share, name in zip(costs_gpu.REACHED.values(), ("KH layers", "classifiers", "BP models", "attacks"), strict=True))}. `sweeps/README.md` has the arithmetic.

{tables.markdown(gpu, formats=costs_gpu.FORMATS)}
"""


def measured(store: Store) -> dict:
    """The record of all rates that the page takes, measured now where this machine has not measured them before."""
    started, rates = time.perf_counter(), Rates({}, costs.Rates())
    rows(rates), lists(rates)
    return store.put("timing", ASKED, data.load("cifar10-sample"), dict(rates=rates.known), {}, time.perf_counter() - started)


def main(words: list[str]) -> None:
    store = Store()
    record = next(iter(store.find("timing", **ASKED)), None)
    if record is None or words == ["--measure"]:
        record = measured(store)
    atomic_write(PAGE, page(record).encode())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
