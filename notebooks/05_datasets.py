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
# # 5 Data sets

# %% tags=["parameters"]
seed = 0  # seed of the choice of images

# %% tags=["remove-cell"]
import matplotlib.pyplot as plt
import torch
from myst_nb import glue

import khnb.data
from khnb import settings

seed = settings.of_notebook(globals(), "seed")["seed"]
data = khnb.data.load("cifar10-sample")

# %% [markdown]
# All results of the thesis, and all of this book's, are about one data set: **CIFAR-10** {cite}`krizhevsky2009`, 60,000
# colour photographs of 32 × 32 pixels, each of one of ten things. 50,000 are for training, 10,000 for testing. It is
# small enough to train thousands of models, and hard enough that they differ: the best networks pass 99%, people manage
# about 94%, and the networks here, with their single layer of filters, stay near 70%.

# %% tags=["remove-cell"]
generator = torch.Generator().manual_seed(seed)
fig, axes = plt.subplots(2, 5, figsize=(8, 3.8))
for label, (ax, name) in enumerate(zip(axes.flat, data.classes)):
    candidates = torch.nonzero(data.test_labels == label)[:, 0]
    index = candidates[torch.randint(len(candidates), (1,), generator=generator)].item()
    ax.imshow(data.test_images[index].permute(1, 2, 0), interpolation="nearest")
    ax.set_title(name, fontsize=10)
    ax.axis("off")
fig.tight_layout()
glue("fig-5-1", fig)
plt.close(fig)

# %% [markdown]
# ```{glue:figure} fig-5-1
# :name: fig-5-1
# :alt: Ten small photographs in two rows, one of each class: aeroplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck.
#
# With a draw of our own: one test image of each class of CIFAR-10, chosen at random. The
# thesis does not say which images it shows.
# ```
#
# Already ten images show how much they vary: in the framing, in how much of the thing is visible, in whether it stands
# before an empty ground or in a scene.
#
# ## From pixels to numbers
#
# A pixel has three values between 0 and 255. They are divided by 255, and that is all the preparation there is: no
# centring, no augmentation. Attack strengths in this book are in these units, so that a strength of 0.01 changes each
# value by at most 2.55 of the original 255 steps. A pixel can never be negative, which shapes what the KH filters become
# ([chapter 4](04_local_learning.ipynb)).
#
# An LL model goes on to scale every *patch* to unit $p$-norm ([chapter 6](06_implementation.ipynb)), so it sees the
# pattern in a patch but not its brightness. A BP model sees the pixels as they are.
#
# Two numbers of the thesis's chapter 5 need care. It speaks of 720 pixels an image; 32 × 32 is 1,024, and with three
# colours an image has 3,072 values. And its comparison with ImageNet {cite}`deng2009`, whose images average 469 × 387
# pixels, says 170 times as much data an image:

# %%
values = 3 * 32 * 32
print(f"{values} values an image; ImageNet has {3 * 469 * 387 / values:.0f} times as many")

# %% [markdown]
# ## Test images decide too much
#
# The thesis keeps no validation set: models, numbers of epochs and learning rates are chosen by their accuracy on the
# test images, the same that are then attacked. With thousands of models to choose from, the best test accuracy is a
# little better than the accuracy on new images would be. For comparing two kinds of model, chosen in the same way, this
# matters less than for the numbers themselves. We repeat the thesis's procedure so that the numbers can be compared.
#
# ## What this book uses
#
# The evidence in chapters [8](08_training.ipynb) and [9](09_attacks.ipynb) comes from the full data set. A sample of it
# is part of the repository, so that every notebook runs without a download:

# %%
for what, images, labels in (("train", data.train_images, data.train_labels), ("test", data.test_images, data.test_labels)):
    counts = torch.bincount(labels, minlength=len(data.classes))
    print(f"{data.name}, {what}: {tuple(images.shape)} {images.dtype}, {counts.min()} to {counts.max()} images a class")

# %% [markdown]
# `khnb.data.load("cifar10")` finds the official files, in either of the two official layouts, in the folder named by
# `KHNB_DATA` or in the cache of the user, and downloads them only when asked. It compares their contents with a known
# fingerprint (SHA-256) before anything is computed from them. `load("auto")`, which the notebooks use, takes the full
# data where it is found and the sample otherwise, and says which.
#
# The thesis tested its code on the handwritten digits of MNIST {cite}`lecun1998`, 60,000 training and 10,000 test images
# of 28 × 28 grey pixels, and shows no results for them. So do we: `load("mnist")` reads the files, every layer takes one
# channel as well as three, and the tests train on real digits.
