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
# # 6 Implementation

# %% tags=["parameters"]
K = 10  # side of the grid of filters: K^2 filters
w = 4  # width of a filter, in pixels
p = 2.0  # order of the norm
w_pool = 5  # width of the max-pooling window

# %% tags=["remove-cell"]
import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown
from myst_nb import glue

import khnb.data
from khnb import patches, schematics, settings, tables
from khnb.layer import KHConv2d, synapses
from khnb.learning import schedule
from khnb.models import n_features
from khnb.results import Store
from khnb.training import to_float

schematics.vector_graphics()

asked = settings.of_notebook(globals(), "K", "w", "p", "w_pool")
K, w, p, w_pool = (asked[name] for name in ("K", "w", "p", "w_pool"))
settings.check_geometry(32, w, w_pool)

# %% [markdown]
# LL and BP models have the same shape ({numref}`fig-6-1`): $K^2$ filters of width $w$, max-pooling, an activation function
# to the power $n$, and a linear classifier. Two things differ. One is how the filters are found. The other is easily
# missed, as the thesis calls the architectures the same: the convolution of an LL model scales every patch to unit
# $p$-norm and uses the inner product of [eq. 4.3](#eq-4-3), while that of a BP model is an ordinary one.

# %% tags=["remove-cell"]
fig = schematics.architecture(settings.ConvSettings(K=K, w=w, p=p), settings.HeadSettings(w_pool=w_pool))
glue("fig-6-1", fig)
plt.close(fig)

# %% [markdown]
# ```{glue:figure} fig-6-1
# :name: fig-6-1
# :alt: A chain of boxes from image to prediction: convolution, max-pooling, activation to the power n, flatten, linear, softmax, with the shape of the data between them.
#
# Redrawn, with the shapes of this page's parameters above the arrows.
# ```
#
# ## Patches
#
# The LL convolution works on patches. An image of width $I$ has, with padding $P$ and stride $s$,
#
# (eq-6-5)=
#
# $$
# N_p = \left(\left\lfloor\frac{I+2P-w}{s}\right\rfloor+1\right)^{2} \tag{6.5}
# $$
#
# of them. With $P=0$ and $s=1$, as everywhere here, this is $(33-w)^2$.

# %% tags=["hide-input"]
rows = []
for width in (4, 8, 12):
    side = settings.check_geometry(32, width, 1)
    row = {"w": width, "patches": side**2, "values": 3 * width**2}
    for pool in (5, 9, 13):
        head = settings.HeadSettings(w_pool=pool)
        row |= {f"{pool}, {k}": n_features(k * k, 32, width, head) for k in (10, 20)}
    rows.append(row)
headings = {"w": "w", "patches": "patches an image", "values": "values a patch"}
headings |= {key: "inputs of the classifier: w_pool, K = " + key for key in rows[0] if "," in key}
Markdown(tables.markdown(rows, headings, {key: "," for key in headings}))

# %% [markdown]
# The thesis tried four ways of cutting patches out: slicing the image as one vector, row by row (*flat*); slicing it along its axes
# (*slices*); flattening $w$ rows at a time so that each patch is one slice (*rows*); and making a table of positions once, with
# which each image is indexed (*indexer*). It found the last one 4.0, 2.1 and 1.6 times as fast as the third, for $w=4$, 8 and 12, and
# the third about a quarter faster than the first. The same four, written anew and timed in one run:

# %% tags=["remove-input"]
timing = Store().find("timing", benchmark="patch_methods")[0]
rows = []
for row in timing["results"]["rows"]:
    us = row["microseconds_an_image"]
    rows.append({"w": row["w"], "images at once": row["images"]} | us | {"rows / indexer": us["rows"] / us["indexer"]})
formats = {name: ".0f" for name in us} | {"rows / indexer": ".1f"}
note = f"Microseconds an image, one thread of {timing['hardware']['name']}, record `{timing['id']}` (`python benchmarks/patch_methods.py --record`)."
Markdown(tables.markdown(rows, formats=formats) + "\n\n" + note)

# %% [markdown]
# One image at a time the indexer wins, and by less the wider the filter, as the thesis says. With many images at once the loops of the
# other ways are shared by all of them, and copying in order beats copying by a table.
#
# For the forward pass there is a shorter way altogether. The activity $h_k=\langle W_k,v\rangle_k$ is linear in the patch $v$, so scaling the patch
# and scaling the result are the same: $h$ is an ordinary convolution with $\operatorname{sgn}(W)|W|^{p-1}$, divided by a map
# of the patches' norms, and that map is a box filter over $|x|^p$. No patch is ever copied. The cell below compares both
# ways on images of the sample.

# %%
images = to_float(khnb.data.load("cifar10-sample").test_images[:8])
weight = torch.randn(K * K, 3, w, w, generator=torch.Generator().manual_seed(0))

short = KHConv2d(weight, p)(images)

v = patches.normalise(patches.extract(images, w), p)  # images, patches, values of a patch
explicit = (v @ synapses(weight, p).flatten(1).T).transpose(1, 2).reshape(short.shape)

print(f"{tuple(short.shape)}: largest difference {(short - explicit).abs().max().item():.1e}, largest activity {short.max().item():.2f}")

# %% [markdown]
# During *training* of the filters patches are needed one by one, at random places. They are cut out of the 8-bit images just
# before they are used, once for all layers that are trained together, and a compiled kernel finds the winner and the $m$-th most active
# neuron of a few patches at a time, before their activities have left the processor's nearest cache
# (`khnb/kernels.c`; `benchmarks/kh_learning.py` compares it with other ways). A patch that is black throughout has no direction; its
# activities are 0, and its norm counts as 1. When an LL model is attacked, the
# gradient runs *through* this normalisation. Treating the norms as constants there would make the same model look
# several times more robust than it is.
#
# The *classifiers* of one layer are trained together (`khnb/heads.py`). Filters stay as they are in this stage, so the convolution is computed once
# for all of them, each pooling once for those that share it, each activation function once for all powers of it; what is left for a single
# classifier is a power and a product. Pooled activities are kept as far as a given memory goes (`memory`) and computed again each epoch beyond it, with the same
# result. Classifiers that share the order of the images (`head_order`) see the same minibatches and end as they would have alone.
#
# ## Learning rates
#
# Both stages of training use one of four schedules, with $t$ the epoch and $T$ their number ({numref}`fig-6-schedules`):
#
# (eq-6-1)=
#
# $$ \text{linear:}\quad \eta(t) = \eta_0\,\frac{T-t}{T} \tag{6.1} $$
#
# (eq-6-2)=
#
# $$ \text{exponential:}\quad \eta(t) = \eta_0\,e^{-\tau t/T} \tag{6.2} $$
#
# (eq-6-3)=
#
# $$ \text{cosine:}\quad \eta(t) = \frac{\eta_0}{2}\left(1+\cos\frac{\pi t}{T}\right) \tag{6.3} $$
#
# (eq-6-4)=
#
# $$ \text{step:}\quad \eta(t) = \eta_0\,\gamma^{\lfloor t/s\rfloor} \tag{6.4} $$
#
# The thesis names the rate of the exponential $\tau$ here and $\gamma$ in its table 8.1; this book keeps $\tau$. It lists
# the step schedule but never uses it; its final models all use the cosine.

# %% tags=["remove-cell"]
T = 30
t = np.linspace(0, T, 601)
fig, ax = plt.subplots(figsize=(6.5, 3.4))
styles = {"linear": "-", "exponential": "--", "cosine": "-.", "step": ":"}
for (name, style), colour in zip(styles.items(), (schematics.BLUE, schematics.RED, schematics.GREEN, schematics.ORANGE)):
    ax.plot(t, [schedule(name, 1.0, at, T) for at in t], ls=style, color=colour, lw=2, label=name)
ax.set(xlabel="epoch $t$ of 30", ylabel=r"learning rate $\eta(t)/\eta_0$", xlim=(0, T), ylim=(0, 1.05))
ax.legend()
glue("fig-6-schedules", fig)
plt.close(fig)

# %% [markdown]
# ```{glue:figure} fig-6-schedules
# :name: fig-6-schedules
# :alt: Four falling curves of learning rate against epoch: a straight line, an exponential decay that stays above zero, half a cosine and a staircase of halvings.
#
# The schedules of eqs. 6.1-6.4, for τ = 2.5, γ = 0.5 and steps of 10 epochs.
# ```
#
# ## Starting weights
#
# The KH filters start from a normal distribution of mean 0 and standard deviation 1. For all other weights the thesis
# gives a uniform distribution between $-\sqrt k$ and $\sqrt k$, with $k$ the number of nodes in the layer before. These bounds
# *grow* with the layer: a classifier with 16,900 inputs would start with weights up to 130. What must be meant is the
# usual initialisation with $k$ one over that number, and this is what we use, for the classifier and for the BP
# convolution.
#
# ## Hyperparameters
#
# ````{table} The hyperparameters, with the ranges as printed. A dozen names describe every model of this book.
# :name: tab-6-1
#
# ```{glue:md} tab-6-1
# :format: myst
# ```
# ````

# %% tags=["remove-cell"]
signs = {"sigma(x)": r"$\sigma(x)$", "delta": r"$\Delta$", "eta0": r"$\eta_0$", "eta(t)": r"$\eta(t)$", "K": "$K$", "w": "$w$",
         "m": "$m$", "p": "$p$", "n": "$n$", "w_pool": r"$w_\text{pool}$", "s_pool": r"$s_\text{pool}$",
         "N_epochs": r"$N_\text{epochs}$", "N_batch": r"$N_\text{batch}$"}
headings = {"group": "stage", "description": "hyperparameter", "symbol": "symbol", "valid_range": "range", "model": "models"}
glue("tab-6-1", Markdown(tables.markdown(tables.thesis("table_6_1"), headings, {"symbol": lambda s: signs.get(s, s)})))

# %% [markdown]
# Several of these ranges are narrower on paper than in the thesis's own use: $K>30$ beside $K=10$ (which must refer to
# $K^2$), $p>2$ beside $p=2$, $w_\text{pool}\ge2$ beside $w_\text{pool}=1$. The ranges that this library accepts, and its
# defaults, are these:

# %% tags=["hide-input"]
rows = [
    {"name": name, "meaning": q.meaning, "range": q.range, "default": q.default}
    for name, q in settings.PARAMETERS.items()
]
Markdown(tables.markdown(rows, formats={"name": lambda n: f"`{n}`", "range": lambda r: r.replace("<", "&lt;")}))

# %% [markdown]
# Attack parameters are in the same list; [chapter 7](07_robustness.ipynb) explains them. Where the thesis does not state a
# setting (seeds, biases, AdamW's constants, batch sizes of some searches), ours are part of every stored record, and
# [chapter 8](08_training.ipynb) shows them.
#
# All code uses PyTorch {cite}`paszke2019`, as the thesis's did.
