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
# # 1 Introduction
#
# A neural network that names the object in a picture can be fooled by a change too small to see {cite}`szegedy2014`.
# The usual explanation of *why* points at how such networks learn: backpropagation shapes every weight, from the first
# layer to the last, so that one error signal at the end becomes small, and nothing asks the first layer to hold
# patterns that make sense by themselves.
#
# The thesis behind this book {cite}`torvik2023` asks what happens when the first layer learns differently. Its filters
# learn *without labels*, by a rule in which each neuron sees only its own input, its own weights and how it ranks
# among its neighbours: the rule of Krotov and Hopfield {cite}`krotov2019`. Only the classifier on top is then trained
# with labels. The question is:
#
# > Is an image classifier whose filters learned by the Krotov-Hopfield rule harder to fool with first-order
# > adversarial attacks than one of the same shape trained by backpropagation, and are its filters easier to read?
#
# This book retells the thesis in our own words, redraws its figures and tables from models that we trained ourselves,
# and puts our numbers beside the thesis's. Where the thesis contradicts itself, or leaves out something that a
# repetition needs, the chapter concerned says so and says which reading we took.
#
# ## Why a local rule might help
#
# The Krotov-Hopfield rule descends from models of memory. A Hopfield network {cite}`hopfield1982` stores patterns as
# the valleys of an energy; a *dense associative memory* {cite}`krotov2016` makes these valleys steeper and can store
# far more of them. A dense associative memory is equivalent to a feed-forward network with one hidden layer whose
# activation function is steep, and so the thesis's networks have exactly one layer of filters, and a power $n$ on the
# activation. Patel and Kozma {cite}`patel2020` had found such networks more stable under noise and occlusion than
# their twins trained by backpropagation. Those disturbances do not know the network they disturb; the thesis turns to
# attacks that do.
#
# ## Two kinds of model
#
# LL model
# : **local learning**: filters trained by the Krotov-Hopfield (KH) rule on patches of the images, without labels; then
#   a linear classifier trained on the filters' pooled activities.
#
# BP model
# : its twin, of the same architecture, filters and classifier trained together by backpropagation. Its convolution is
#   an ordinary one.
#
# Three measures are used throughout. **Accuracy** is the share of the 10,000 CIFAR-10 test images named correctly. The
# **robustness** $R$ is the strength of attack at which a model loses its correct answers fastest
# ([chapter 7](07_robustness.ipynb)); larger is better. The **f-score** of an LL model's filters is the share that has
# become a feature ([chapter 8](08_training.ipynb)).
#
# ## The way through this book
#
# | chapter | what it is about |
# |---|---|
# | [2](02_neural_networks.ipynb), [3](03_supervised_training.ipynb) | networks, convolution, activation functions; gradient descent and backpropagation |
# | [4](04_local_learning.ipynb) | from Hebb and Hopfield to the KH rule, and the rule at work on a toy |
# | [5](05_datasets.ipynb), [6](06_implementation.ipynb) | the images; the architecture, patches and hyperparameters |
# | [7](07_robustness.ipynb) | the attacks, and robustness as one number |
# | [8](08_training.ipynb), [9](09_attacks.ipynb) | our trained models, and what attacks do to them |
# | [10](10_discussion.ipynb), [11](11_conclusions.ipynb) | what to make of it |
# | [A](A_grid_searches.ipynb), [B](B_ensembles.ipynb) | the grid searches and the ensembles |
#
# ## What the thesis did
#
# These are the experiments of the thesis. The scale is part of the difficulty of repeating it: more than 20,000 models.

# %% tags=["hide-input"]
from IPython.display import Markdown

from khnb import tables

rows = [row for row in tables.thesis("experiments") if row["id"] not in ("E00", "E23", "E24")]
columns = {"id": "", "chapter": "section", "purpose": "experiment", "n_models": "models (as far as stated)"}
Markdown(tables.markdown(rows, columns))

# %% [markdown]
# The [scoreboard](../scoreboard.md) says which of its figures, tables and numbers this book has reproduced so far, at
# what scale, and how well they agree.
#
# ## Abbreviations
#
# BP
# : backpropagation
#
# BWD
# : Blue Wall of Death: the collapse of a KH layer, in which a few neurons win every patch
#
# CNN, FNN, FFNN
# : convolutional, fully connected, feed-forward neural network
#
# DAM
# : dense associative memory
#
# FGSM, IFGSM, PGD
# : fast gradient sign method, its iterated form, projected gradient descent
#
# KH
# : Krotov-Hopfield
#
# LL
# : local learning
