# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A Grid searches
#
# The thesis found its hyperparameters in four searches: two over the KH layer alone, one over LL models and one over BP
# models. **The numbers on this page are the thesis's**, unless a column says "here". Of the first search this book repeats
# a balanced part, of the second every cell, and of the classifiers and BP models balanced parts that grow: the preset `laptop` of the grids in `sweeps/thesis.json`.

# %% tags=["remove-cell"]
import json

import numpy as np
from IPython.display import Markdown
from myst_nb import glue

from khnb import plots, sweeps, tables
from khnb.learning import COLLAPSED
from khnb.results import Store
from khnb.settings import FAST

store = Store()

default = dict(K=10, conv_scheduler="cosine", conv_batch=1000, conv_chunk=1000, conv_rank="activity", conv_scale="max")
layers = store.full("layer", **default, w=4, conv_share=0.2, conv_eta0=2e-3) + store.full("layer", **default, w=8, **FAST)
cells = tables.map_A1(store.full("probe", **default, conv_eta0=1e-3), layers)


def percent(text):
    """A fraction, as printed, in percent."""
    return f"{100 * float(text):.1f}%"


def names(row):
    """The name of a hyperparameter as it is written in this book."""
    word = {"exponential_rate": "exponential, τ ="}.get(row["value"].rsplit("_", 1)[0], row["value"].rsplit("_", 1)[0])
    value = f"{word} {row['value'].rsplit('_', 1)[1]}" if "_" in row["value"] else row["value"]
    return row | {"parameter": f"`{row['parameter']}`", "value": value}


grids = {"table_A2": "E06", "table_A3": "E08+E09", "table_A4": "E10"}
made = {name: sweeps.made(grid, "laptop", store) for name, grid in grids.items()}
headings = dict(parameter="parameter", value="value", n_models="models", avg_accuracy="mean accuracy", max_accuracy="best accuracy")
headings |= dict(here="models, here", here_avg="mean, here", here_max="best, here")
formats = {name: percent for name in ("avg_accuracy", "max_accuracy")} | dict(here_avg=".1%", here_max=".1%")
for name, models in made.items():
    rows = [names(row) for row in tables.by_value(name, models)]
    glue(name.replace("table_", "tab-").replace("A", "a-"), Markdown(tables.markdown(rows, headings, formats)))

twice: dict[tuple, list] = {}
for pair in tables.trained_shorter(store.full("model", held_out=0), tables.robustness(store)):
    twice.setdefault(tuple((name, pair.get(name, "")) for name in ("model", "K", "w", "m", "p", "n", "sigma", "w_pool")), []).append(pair)


def both(pairs, name):
    """Of models trained both ways, as text: the thesis's way, and the shorter."""
    found = [[pair[each] for pair in pairs if pair[each] is not None] for each in (name, f"{name}_shorter")]
    return [tables.spread(each, 3 if name == "accuracy" else 4) if each else "too few images" for each in found]


rows = []
for key, pairs in sorted(twice.items(), key=str):
    (accuracy, accuracy_shorter), (whole, shorter) = both(pairs, "accuracy"), both(pairs, "R")
    rows.append(dict(key) | {"accuracy": accuracy, "accuracy, shorter": accuracy_shorter, "R": whole, "R, shorter": shorter})
glue("tab-shorter", Markdown(tables.markdown(rows or [dict(model="none yet")], formats=dict(p=lambda p: p and f"{p:g}", n="g"))))


def effect(kind):
    """What shorter training does to a kind of model, in words."""
    pairs = [pair for key, each in twice.items() if dict(key)["model"] == kind for pair in each]
    gained = [100 * (pair["accuracy_shorter"] - pair["accuracy"]) for pair in pairs]
    ratios = [pair["R_shorter"] / pair["R"] for pair in pairs if pair["R"] and pair["R_shorter"]]
    accuracy = f"{np.mean(gained):+.1f} points of accuracy (from {min(gained):+.1f} to {max(gained):+.1f}, {len(gained)} pairs)" if gained else "no pair yet"
    return f"{kind} models: {accuracy}" + (f", and {np.median(ratios):.2f} times the R (median; from {min(ratios):.2f} to {max(ratios):.2f})" if ratios else "")


glue("shorter-effect", Markdown("; ".join(map(effect, ("LL", "BP")))))

grid1 = store.full("probe", w=8, conv_batch=250, conv_share=0.1, conv_epochs=50, until=50)
ours = tables.shares_8_1([(r["asked"], r["results"]["f_1e4"][0][-1]) for r in grid1])
rows = []
for row in ours:
    shown = names(row)
    for limit in ("0.15", "0.8", "0.95"):
        shown[f"f > {limit}"] = f"{float(row[f'frac_f_gt_{limit}']):.0%}"
        share = row[f"here_{limit}"]
        shown[f"f > {limit}, here"] = "" if share is None else f"{share[0]:.0%} ({100 * share[1]:.0f}–{100 * share[2]:.0f})"
    rows.append(shown)
shares = [f"f > {limit}{where}" for limit in ("0.15", "0.8", "0.95") for where in ("", ", here")]
headings = {"parameter": "parameter", "value": "value", "layers": "layers, here"} | {name: name for name in shares}
glue("tab-8-1", Markdown(tables.markdown(rows, headings)))
told = f"""{len(grid1)} of the 960 combinations were trained here, chosen so that every value comes up equally often and pairs of values as evenly as can be
(`sweeps/grid-1.json`), each on the full CIFAR-10 with the thesis's learning rates, schedules and 50 epochs. To make that affordable an epoch has
a tenth of the patches and an update 250 of them instead of 1,000: four tenths of the updates. A layer that collapses is given up. The brackets are
95% intervals (Wilson): with so few layers only the large differences mean something."""
glue("grid-1-told", Markdown(told if grid1 else "This search has not been repeated here yet, so the columns for it are empty."))

# %% [markdown]
# ## Grid 1: which layers survive
#
# 960 layers with $w=8$, 50 epochs each: $\Delta\in\{0.2,0.4\}$, $K\in\{14,20\}$, $m$ and $p$ from 2 to 5, three learning
# rates, five schedules. 581 collapsed into the Blue Wall of Death ($f<0.15$). {numref}`tab-8-1` gives the share of layers
# above three values of f for each setting.
#
# ```{glue:md} grid-1-told
# :format: myst
# ```
#
# ````{table} Table 8.1: share of grid-1 layers with f above three values, in the thesis (tolerance 1e-6) and here (tolerance 1e-4).
# :name: tab-8-1
#
# ```{glue:md} tab-8-1
# :format: myst
# ```
# ````
#
# A strong $\Delta$ decides almost everything: at 0.4 hardly a layer survives. Small $m$ is safe, and large $p$ survives but
# does not finish. Learning rate and schedule hardly matter. The text calls $m=2$ and $m=3$ equal; in the table they differ
# by up to six percentage points.
#
# ## Grid 2: f-scores
#
# 100 layers with $K=10$. Those with $f\ge0.8$ went on to the next stage. (Appendix A of the thesis gives the sets of $m$
# and $p$ as 2 to 5; the table has 2 to 6.) {numref}`fig-a-1` shows the printed values as a picture, {numref}`tab-a-1`
# as numbers.

# %% tags=["remove-cell"]
glue("fig-a-1", plots.cell_map(cells, "thesis", "f-score (thesis)"), display=False)

for row in cells:
    row["share"] = None if row["runs"] is None else row["collapsed"] / row["runs"]
    row["word"] = None if row["runs"] is None else f"{row['collapsed']} of {row['runs']}"
    row["here"] = ", ".join(f"{f:.2f}" for f in row["f"]) or None
probed = [row for row in cells if row["runs"]]
odd = [row for row in probed if not row["plausible"]]
fig = plots.cell_map(cells, "share", "share of runs that collapsed (here)", lambda row: f"{row['collapsed']}/{row['runs']}", lambda row: row["thesis"] < COLLAPSED)
glue("fig-a-2", fig, display=False)

surely = sum(row["share"] in (0, 1) for row in probed)
likely = [row for row in probed if row["chance"] >= 0.5]
verdict = f"""Of the 100 cells, {len(probed)} have been run. In {surely} of them all runs whose fate is settled had the same one, in {len(probed) - surely} they differed. The
thesis's single draw is plausible under our runs in {len(probed) - len(odd)} of the {len(probed)}, and what most of them did in {len(likely)}"""
if odd:
    named = "; ".join(f"Δ={row['delta']:g}, w={row['w']:g}, p={row['p']:g}, m={row['m']:g} (thesis {row['thesis']:.2f}, here {row['word']} collapsed)" for row in odd)
    verdict += f", and surprising in {len(odd)}: {named}"
glue("map-verdict", Markdown(verdict + "."))


def cell_name(row):
    """A cell with f in the thesis and here."""
    return f"Δ={row['delta']:g}, w={row['w']:g}, p={row['p']:g}, m={row['m']:g} (thesis {row['thesis']:.2f}, here {row['here']})"


whole = [row for row in cells if row["f"]]
parted = [row for row in whole if any((f < COLLAPSED) != (row["thesis"] < COLLAPSED) for f in row["f"])]
told = f"In {len(whole) - len(parted)} of these {len(whole)} cells our layer met the fate of the thesis's, to collapse or not"
glue("whole-verdict", Markdown(told + (f"; not so in {'; '.join(map(cell_name, parted))}." if parted else ".")))
headings = dict(delta="Δ", w="w", p="p", m="m", thesis="f (thesis)", word="collapsed (here)", here="f of a whole layer (here, tolerance 1e-4)")
formats = {name: "g" for name in ("delta", "w", "p", "m")} | dict(thesis=".2f")
glue("tab-a-1", Markdown(tables.markdown(cells, headings, formats)))

conventions = {
    "as in the map": dict(conv_eta0=1e-3),
    "four times the learning rate": dict(conv_eta0=4e-3),
    "patches image by image": dict(conv_chunk=1),
    "250 patches an update": dict(conv_batch=250),
    "4,000 patches an update": dict(conv_batch=4000),
    "ranked by Q": dict(conv_rank="Q"),
    "mean update": dict(conv_scale="mean", conv_eta0=1e-2),
}
maps = {name: tables.map_A1(store.full("probe", w=4, **default | change), []) for name, change in conventions.items()}
border = [(c["delta"], 4, c["p"], c["m"]) for c in json.loads((tables.REFERENCE.parent / "sweeps" / "conventions.json").read_text())[0]["each"]]
compared = [i for i, cell in enumerate(cells) if tuple(cell[name] for name in tables.CELL) in border]
rows = []
for i in compared:
    cell = cells[i]
    row = {"cell": f"Δ={cell['delta']:g}, p={cell['p']:g}, m={cell['m']:g}", "f (thesis)": f"{cell['thesis']:.2f}"}
    rows.append(row | {name: f"{m[i]['collapsed']}/{m[i]['runs']}" if m[i]["runs"] else "open" for name, m in maps.items()})
misses = {"cell": "cells where the thesis's draw is surprising", "f (thesis)": ""}
for name, found in maps.items():
    run = [found[i] for i in compared if found[i]["runs"]]
    misses[name] = f"{sum(row['chance'] < 0.25 for row in run)} of {len(run)}"
glue("tab-conventions", Markdown(tables.markdown([*rows, misses])))

# %% [markdown]
# ```{glue:figure} fig-a-1
# :name: fig-a-1
# :alt: Heat maps of f-score over m and p, from 2 to 6 each. With delta 0.1 nearly all values are high; with delta 0.2 many are near zero, most of all for small p and large m.
#
# The thesis's table A.1 as a picture: f-score of 100 layers, one draw each.
# ```
#
# The printed values are one draw each. Whether a layer collapses is partly chance, and it is settled when the first features
# form: the features either spread over all neurons, or most neurons are pushed so far down that no
# patch excites them any more. So a faithful repetition is a *probability* in each cell, and a cheap one. {numref}`fig-a-2` comes from
# short runs on the full CIFAR-10, with different initial filters and the thesis's learning rate, given up when the outcome is clear, or after 0.8 passes
# over the patches for $p=2$, where features form fast, and up to 2.5 for larger $p$ (5 in one cell); runs not settled by then were repeated for longer. A collapsed layer has $f=(m-1)/K^2$, the few winners being the only features; this explains the values
# 0.01 to 0.05 of the table.
#
# ```{glue:figure} fig-a-2
# :name: fig-a-2
# :alt: Heat maps over m and p with the number of collapsed runs in each cell. The cells where the thesis's layer collapsed are framed; they are nearly the ones where all of our runs do.
#
# How many of our short runs collapsed (full CIFAR-10, computed here). Framed: the cells where the thesis's layer has $f<0.15$.
# ```
#
# ```{glue:md} map-verdict
# :format: myst
# ```
#
# A short run does not see what happens later; layers with $K=20$ can collapse after more than a pass ([chapter 8](#blue-wall)). "Plausible" means that, with our
# runs as the evidence (Jeffreys' prior), the next run does what the thesis's did with a probability of at least one in ten; it takes five runs to the
# contrary to rule that out. A run that had neither collapsed nor 15% features at its end would be left out.
#
# ### Other readings of the update
#
# The thesis does not say how many patches make an update, in which order patches come, what neurons are ranked by and how the sum
# is scaled. {numref}`tab-conventions` repeats the cells near the border under other readings, each changed alone. (For the mean of the
# update instead of its division by the largest entry, the learning rate is $10^{-2}$, as with $10^{-3}$ hardly anything moves.)
#
# ````{table} How many runs collapse near the border (w = 4), under several conventions (here).
# :name: tab-conventions
#
# ```{glue:md} tab-conventions
# :format: myst
# ```
# ````
#
# "Surprising" here: a chance below one in four, as there are only one to six runs in a cell. "Open": no run had collapsed, or had 15% features, when
# it was ended, after 1.2 passes (ranked by Q) or 3 passes (mean).
#
# The number of patches an update and the learning rate leave the map as it is, up to chance. The order of the patches moves one cell
# across the border: with patches image by image, successive updates see much the same patches. Ranked by $Q$, where the size of a filter is no
# advantage, features had hardly begun in a stretch in which most others are done; with the mean most runs were not settled either. So
# none explains the map of the thesis better than the convention this book has, which stays the default; the others can be chosen (`conv_batch`,
# `conv_chunk`, `conv_rank`, `conv_scale`).
#
# {numref}`tab-a-1` has all cells, and f at the end of one whole layer where one was trained here: with $w=4$ on a fifth of the images an
# epoch and twice the learning rate, with $w=8$ on the preset `fast` ([chapter 8](#fast)). {glue:}`whole-verdict`
#
# ````{table} F-scores of the layers of grid 2 in the thesis, with the collapses and f-scores found here.
# :name: tab-a-1
# :class: dropdown
#
# ```{glue:md} tab-a-1
# :format: myst
# ```
# ````
#
# Classifiers on the layers that passed gave {numref}`tab-a-2`. It covers only a third of the combinations described
# (2,129 models of 6,048), its learning-rate rows sum to 2,101, and the rows for $w_\text{pool}$ are missing.
#
# (laptop)=
# The columns "here" of this table and the next two are from balanced parts of the grids: each value comes up about equally often, also together with each value of
# the others; four classifiers a layer with one pooling, and layers below $f=0.8$ left out as in the thesis. To fit a machine without a GPU their training is shorter (layers: the
# preset [`fast`](#fast); classifiers: 25 epochs in minibatches of 250, which are as many updates as the thesis's 100 epochs in those of 1,000; BP models: 10 epochs in minibatches of 150; what this does to a model is in {numref}`tab-shorter`). So compare rows with each other, not columns. `make sweep GRID=E06 PRESET=laptop` goes on where this has stopped.
#
# ````{table} Models trained as in the thesis and, with the same seeds, as in the preset "laptop": test accuracy, and R under FGSM (mean ± standard deviation over as many as is said).
# :name: tab-shorter
#
# ```{glue:md} tab-shorter
# :format: myst
# ```
# ````
#
# What the shorter training does: {glue:}`shorter-effect`. How robust a BP model is depends much on how long it was trained on how large minibatches; the thesis states the epochs, not the minibatch, and varied
# neither ([chapter 9](#bp-batch) varies the minibatch alone).
#
# ````{table} Classifiers of grid 2 in the thesis, and a balanced part of it computed here.
# :name: tab-a-2
#
# ```{glue:md} tab-a-2
# :format: myst
# ```
# ````
#
# ## Grid 3: LL models
#
# 150 layers, $K\in\{10,20\}$, $w\in\{4,8,12\}$, $m$ and $p$ from 2 to 6, $\Delta=0.1$, 30 epochs; on those with $f\ge0.8$,
# classifiers for many $\sigma$, $n$ and $w_\text{pool}$. The text counts 86 layers and 11,089 models; the rows of
# {numref}`tab-a-3` fit 88 layers and 11,086.
#
# ````{table} LL models of grid 3 in the thesis, and a balanced part of it computed here.
# :name: tab-a-3
#
# ```{glue:md} tab-a-3
# :format: myst
# ```
# ````
#
# These means cannot be compared across rows without care, as the search was not a full grid. Powers from 35 on were
# tried with GeLU alone and are bad; they pull GeLU's mean down from about 60% to 56%. The four activation functions
# listed add up to 440 models fewer than the other rows: a fifth one, without powers, must have been part of the search.
#
# ## BP models
#
# ````{table} BP models of the thesis, and a balanced part of it computed here.
# :name: tab-a-4
#
# ```{glue:md} tab-a-4
# :format: myst
# ```
# ````
#
# For BP models accuracy falls steadily with the power $n$ ({numref}`tab-a-4`), which has no role in them; for LL models it rises to a maximum near
# $n=16$. Here, too, 30 models of an unnamed activation function are missing from the rows of $\sigma$.
