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
# # 9 Attacking the models

# %% tags=["parameters", "hide-input"]
# where and how
data = "auto"  # auto: the full CIFAR-10 where it is found, else the embedded sample; cifar10; cifar10-sample
device = "auto"  # auto, cpu, cuda, cuda:1
group = ""  # a group of a sweep, FILE#ID
seed = 0
# convolution
K = 10
w = 4
m = 3
p = 2
delta = 0.1
conv_eta0 = 1e-3
conv_scheduler = "cosine"
conv_epochs = 30
conv_batch = 1000
init_mean = 0
init_std = 1
conv_share = 1.0  # share of the images an epoch sees
conv_order = 0  # seed of the order of the patches
conv_chunk = 1000  # images whose patches are shuffled together
conv_rank = "activity"  # activity, Q
conv_scale = "max"  # max, mean
# head
sigma = "gelu"
n = 4
w_pool = 5
s_pool = 2
head_eta0 = 2e-3
head_scheduler = "cosine"
head_epochs = 100
head_batch = 1000
head_order = 0  # seed of the order of the images
pooling = "first"  # first, last
head_bias = "yes"  # yes, no
head_init = "uniform"  # uniform, he, zeros
held_out = 0  # training images kept aside
feature_dtype = "float32"
memory = 4.0  # GiB for pooled activities
# schedules "exponential" and "step"
tau = 2.5
gamma = 0.5
s_step = 10
# the BP twin
bp = "stored"  # stored: shown where the store holds it; train: trained where it does not; none
bp_sigma = "elu"
bp_epochs = 70
bp_batch = 1000
# the attack
confidence = 0.8

# %% tags=["remove-cell", "group"]
from khnb import settings, sweeps

names = (
    *settings.ConvSettings.names(), *settings.HeadSettings.names(), "data", "device", "group", "feature_dtype", "memory", "bp", "bp_sigma", "bp_epochs", "bp_batch", "confidence",
)
parameters = settings.of_notebook(globals(), *dict.fromkeys(names))
parameters = sweeps.in_notebook(parameters)  # where a sweep runs this notebook: its work

# %% tags=["remove-cell"]
import torch
from IPython.display import Markdown
from myst_nb import glue

from khnb import data as datasets
from khnb import pipeline, plots, settings, tables, training
from khnb.layer import KHConv2d
from khnb.learning import is_feature
from khnb.widgets import AttackLab

# %% [markdown]
# How far must an image move before the model is fooled? The fast gradient sign method (eq. 7.3) moves every pixel of every
# colour by the same amount $\varepsilon$, in the direction that raises the loss. The smallest $\varepsilon$ that makes the model wrong is the image's
# *adversarial radius* $\rho$. Here it is found for every test image that the model gets right and is at least 80% sure of:
# one gradient gives the direction, a scan in steps of 0.001 the first crossing, and halving the interval the radius to $10^{-6}$.
#
# As in the last chapter, the next cell says what was taken from the store and what was computed now.

# %%
run = pipeline.Run.of(parameters)
records = pipeline.models_of(run, parameters)
attacked = {kind: pipeline.attack(run, record, confidence=parameters["confidence"]) for kind, record in records.items()}

# %% tags=["remove-cell"]
# pictures are always drawn from the embedded sample, so that the page is the same with and without the full data
sample = datasets.load("cifar10-sample")
pixels, labels = training.to_float(sample.test_images[:200]), sample.test_labels[:200]
networks = {kind: pipeline.network(record, run.store) for kind, record in records.items()}
glue("fig-9-1", plots.attack_examples(networks["LL"], pixels, labels, sample.classes), display=False)

# %% [markdown]
# ## 9.1 What an attack looks like
#
# ```{glue:figure} fig-9-1
# :name: fig-9-1
# :alt: Four rows of three pictures: an image with the class the model gives it, a pattern of coloured dots, and the attacked image, which looks the same but gets another class.
#
# FGSM on the LL model of this page, in the manner of figure 9.1 of the thesis (which shows its best model): the image, the
# sign of the gradient with the adversarial radius, and the attacked image at that radius.
# ```
#
# The attacked image is hard to tell from the original, and yet the prediction flips.
#
# ## 9.2 How robust is a model?
#
# Sorted radii make a curve: the share of images the model still gets right at strength $\varepsilon$. The robustness $\mathcal R$ is the
# inflection point of the generalised logistic curve (eqs. 7.6 and 7.7) fitted to it.

# %% tags=["remove-cell"]
named = {f"{kind} model": (kind, run.store.arrays(record)["radii"], record["results"]["fit"]) for kind, record in attacked.items()}
glue("fig-9-2", plots.robustness_curves(named), display=False)

# %% [markdown]
# ```{glue:figure} fig-9-2
# :name: fig-9-2
# :alt: Relative accuracy against attack strength. Each curve starts at one and falls to zero in the shape of an S; a dot marks its steepest point.
#
# Relative accuracy against the strength of the FGSM attack (thick) with the fitted curve (dashed) and $\mathcal R$ (dot), in the
# manner of figure 9.2 of the thesis, for the models of this page.
# ```

# %% tags=["remove-input"]
rows = []
for kind, record in attacked.items():
    fit = record["results"]["fit"]
    rows.append({
        "model": kind, "R, here": f"{fit['R']:.4f} ± {fit['R_err']:.4f}" if fit["status"] == "ok" else fit["status"],
        "R, thesis": tables.printed(record["asked"], "R"), "images": fit["n"], "never fooled": fit["n_survived"], "R² of the fit": "" if fit["r2"] is None else f"{fit['r2']:.4f}",
        "accuracy": f"{record['results']['accuracy']:.3f}", "data": record["data"]["name"], "record": f"`{record['id']}`",
    })
Markdown(tables.markdown(rows))

# %% [markdown]
# The error beside our $\mathcal R$ is the bootstrap standard error: how much $\mathcal R$ would change with another draw of test images. The
# covariance of the least-squares fit, which the thesis seems to quote, is some hundred times smaller, because the points of
# such a curve are not independent. The thesis's ± is the spread between models trained alike.
#
# The LL model holds out to larger strengths than its BP twin does. That is one pair of models with one attack; whether it is
# robustness, or gradients that mislead the attacker, takes stronger attacks to tell.
#
# (bp-batch)=
# ### What the thesis leaves open: the BP twin's minibatch
#
# The thesis gives the learning rate and the epochs of its BP models, but not how many images make an update. All else equal,
# that number decides how far training gets in the epochs it has, and with it both numbers compared here: fewer, larger
# minibatches end at a lower accuracy and a larger $\mathcal R$. This is the trade-off of the title within a single
# row of table B.3.

# %% tags=["remove-input"]
twin = settings.HeadSettings.of(parameters | dict(sigma=parameters["bp_sigma"], head_epochs=parameters["bp_epochs"])).dict()
twin = dict(model="BP", K=parameters["K"], w=parameters["w"]) | {k: v for k, v in twin.items() if k != "head_batch"}
alike = sorted(run.store.find("attack", attack="fgsm", confidence=parameters["confidence"], **twin), key=lambda r: r["asked"]["head_batch"])
rows = [
    {"images an update": r["asked"]["head_batch"], "accuracy": f"{r['results']['accuracy']:.3f}",
     "R": f"{r['results']['fit']['R']:.4f} ± {r['results']['fit']['R_err']:.4f}" if r["results"]["fit"]["status"] == "ok" else r["results"]["fit"]["status"],
     "data": r["data"]["name"], "record": f"`{r['id']}`"}
    for r in alike
]
stated = {"images an update": "thesis: not stated", "accuracy": tables.printed(twin, "acc"), "R": tables.printed(twin, "R"), "data": "", "record": ""}
Markdown(tables.markdown([*rows, stated]) if rows else "The store holds no such BP models for these parameters.")

# %% [markdown]
# No single size among these gives both of the thesis's numbers, so something else must differ as well; what is not stated
# elsewhere (the order of operations, the precision, the library's defaults at the time) is not explored yet. The LL models
# leave less open, since their filters are fixed before the labels are seen.
#
# (n-three)=
# ### The gap at n = 3
#
# In the thesis's figure 9.9 the BP models with $n=1$ and $2$ are accurate and about as robust as the best LL models, and most others, from $n=4$ on, have a very low $\mathcal R$. It
# guesses that models with $n=3$, which it did not train, would fill the gap in between (its section 9.2). Here are BP models that differ in $n$ alone ($K=10$, $w=4$, ELU,
# $w_\text{pool}=5$; 70 epochs on the full CIFAR-10).

# %% tags=["remove-input"]
steps = run.store.full("attack", model="BP", K=10, w=4, sigma="elu", w_pool=5, head_batch=1000, head_epochs=70, seed=0, attack="fgsm", confidence=0.8)
rows = [
    {"n": f"{r['asked']['n']:g}", "accuracy": f"{r['results']['accuracy']:.3f}", "R": f"{r['results']['fit']['R']:.4f} ± {r['results']['fit']['R_err']:.4f}",
     "images": r["results"]["fit"]["n"], "record": f"`{r['id']}`"}
    for r in sorted(steps, key=lambda r: r["asked"]["n"]) if r["results"]["fit"]["status"] == "ok"
]
Markdown(tables.markdown(rows))

# %% [markdown]
# (unconverged)=
# ### Filters that never converged
#
# The most accurate models of the thesis have many filters that are no features. Do these carry information of their own, and make the models
# easier to fool? The thesis compares the mean activity of the two kinds of filter over many images, and so does the table, for a few layers trained on the
# full CIFAR-10 (1,000 test images of the embedded sample; all patches).

# %% tags=["remove-input"]
images = training.to_float(sample.test_images[:1000])
rows = []
for chosen in (dict(K=10, m=3, p=2.0, conv_share=1.0), dict(K=20, m=3, p=2.0, conv_share=1.0), dict(K=10, m=3, p=4.0, conv_share=0.1), dict(K=10, m=4, p=5.0, conv_share=0.1)):
    eta = 1e-3 if chosen["conv_share"] == 1 else 2e-3
    record = run.store.full("layer", w=4, delta=0.1, conv_batch=1000, conv_scheduler="cosine", conv_eta0=eta, **chosen)[0]
    weight = torch.from_numpy(run.store.arrays(record)["weight"])
    feature, layer = is_feature(weight, chosen["p"], 1e-4), KHConv2d(weight, chosen["p"])
    mean = torch.cat([layer(part).mean((2, 3)) for part in images.split(100)]).mean(0)
    rows.append({
        "K": chosen["K"], "m": chosen["m"], "p": f"{chosen['p']:g}", "images an epoch": f"{chosen['conv_share']:.0%}",
        "features": int(feature.sum()), "others": int((~feature).sum()),
        "mean activity of features": f"{mean[feature].mean():.2f}", "of others": f"{mean[~feature].mean():.2f}", "record": f"`{record['id']}`",
    })
Markdown(tables.markdown(rows))

# %% [markdown]
# The thesis's finding holds in each of them: filters that are no features are less active on average, with $p=2$ by far (where it is negative, most patches
# *inhibit* them). Low activity alone does not show that they carry nothing; a classifier without them would.
#
# ## Attack a model yourself
#
# The models below are the ones of this page and run in your browser. Choose an image and a strength and watch the ten
# probabilities.

# %% tags=["remove-input"]
some = torch.cat([torch.nonzero(labels == c)[:3, 0] for c in range(10)])  # three images of every class
AttackLab({kind: network for kind, network in networks.items()}, sample.test_images[some].numpy(), labels[some].numpy(), sample.classes)
