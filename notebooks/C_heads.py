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
# # C What matters in a head
#
# The thesis trains more than ten thousand classifiers, "heads", on a few dozen KH layers, and leaves much about them open:
# whether they have a bias, how they start, in which precision they compute, how many images make an update. This appendix varies one thing at a time,
# on one layer ($K=10$, $w=4$, $m=3$, $p=2$, $\Delta=0.1$) trained on the full CIFAR-10, and shows which of them can be settled by taste. **All numbers on
# this page are ours.** Everywhere $s_\text{pool}=2$.

# %% tags=["remove-cell"]
from IPython.display import Markdown
from myst_nb import glue

from khnb import plots, tables
from khnb.results import Store
from khnb.settings import HeadSettings

store = Store()
fixed = dict(model="LL", K=10, w=4, m=3, p=2.0, delta=0.1, conv_share=1.0, conv_epochs=30)


def accuracy(record):
    """Share of the test images that a model gets right."""
    return record["results"]["test_accuracy"]


def departs(record):
    """Where a head is not the usual one: name -> value, seed and precision aside."""
    usual = HeadSettings().dict()
    return {k: record["asked"][k] for k in HeadSettings.names() if k != "seed" and k in record["asked"] and record["asked"][k] != usual.get(k)}


(layer,) = {r["layer"] for r in store.full("model", **fixed, seed=0, n=4.0, sigma="gelu", w_pool=5) if not departs(r)}
models = [r for r in store.full("model", **fixed) if r["layer"] == layer]
usual = {dtype: [r for r in models if not departs(r) and r["asked"]["feature_dtype"] == dtype] for dtype in ("float32", "float16", "bfloat16")}
glue("tab-precision", Markdown(tables.markdown([
    {"features kept as": dtype, "accuracy": tables.spread([accuracy(r) for r in each]), "seed by seed": ", ".join(f"{accuracy(r):.4f}" for r in each)}
    for dtype, each in usual.items()
])), display=False)

half = usual["float16"]
mean = sum(map(accuracy, half)) / len(half)
chosen = [r for r in models if len(departs(r)) == 1 and r["asked"]["feature_dtype"] == "float16" and r["asked"]["seed"] == 0]
rows = [{"what is changed": "nothing", "accuracy": tables.spread([accuracy(r) for r in half]), "difference": "", "training accuracy at the end": f"{half[0]['results']['history'][-1]['accuracy']:.3f}", "record": f"`{half[0]['id']}`"}]
rows += [
    {"what is changed": ", ".join(f"`{k}` = {v:g}" if isinstance(v, (int, float)) else f"`{k}` = {v}" for k, v in departs(r).items()),
     "accuracy": f"{accuracy(r):.4f}", "difference": f"{100 * (accuracy(r) - mean):+.1f} points", "training accuracy at the end": f"{r['results']['history'][-1]['accuracy']:.3f}", "record": f"`{r['id']}`"}
    for r in sorted(chosen, key=lambda r: str(sorted(departs(r).items())))
    if "n" not in departs(r)
]
glue("tab-choices", Markdown(tables.markdown(rows)), display=False)

# %% [markdown]
# ## Precision and chance
#
# Pooled activities can be kept as `float16` or `bfloat16` while heads train (`feature_dtype`), which halves their memory; products and sums are always in
# single precision. The same three seeds with each:
#
# ````{table} Accuracy of three heads a row on 10,000 test images, mean ± standard deviation (here).
# :name: tab-precision
#
# ```{glue:md} tab-precision
# :format: myst
# ```
# ````
#
# ## One thing at a time
#
# The usual head has GeLU, $n=4$, $w_\text{pool}=5$, 100 epochs of 1,000 images an update, AdamW with learning rate 0.002 on a cosine schedule, a bias, and initial weights
# from $\mathcal U(-a,a)$ with $a=1/\sqrt{\text{inputs}}$. Each row changes one of these; seed 0, features in `float16`.
#
# ````{table} What a single change of the head does to its accuracy (here).
# :name: tab-choices
#
# ```{glue:md} tab-choices
# :format: myst
# ```
# ````
#
# What counts is how far a head gets in its training, and little else does. Three times the epochs, or a tenth of the batch and so ten times the updates, gain three to
# four points; a tenth of the epochs or five times the batch lose more. With its 5,000 updates the usual head of the thesis is not at its end: its accuracy on the
# images it learns from still rises. Against this the schedule matters little as long as the rate falls towards zero, and the bias, the start, the order of the images, and whether
# the activation comes before or after the pooling move the accuracy by no more than another seed does. GeLU is ahead of ReLU and ELU by a point at this power.
