"""khnb: the small library behind the reproducible companion to a thesis on Krotov-Hopfield learning.

Data flows one way, and a module imports only from modules above it in this list:

======================  =====================================================================
:mod:`khnb.settings`    every hyperparameter: one name, one range, one default
:mod:`khnb.data`        images, integrity checks, the embedded sample
:mod:`khnb.patches`     patches and their p-norms
:mod:`khnb.native`      what is compiled: kernels.c for a CPU, kernels_gpu.py for a GPU
:mod:`khnb.layer`       the KH layer, forward (eqs. 4.2-4.4, 6.5)
:mod:`khnb.learning`    the KH learning rule, schedules, f-score (eqs. 4.5-4.7, 6.1-6.4)
:mod:`khnb.models`      the one architecture of fig. 6.1, LL and BP
:mod:`khnb.training`    end-to-end training of the BP twin; predictions
:mod:`khnb.heads`       classifiers on one KH layer, trained together on shared features
:mod:`khnb.attacks`     FGSM, IFGSM, PGD; adversarial radius per image (eqs. 7.3-7.5)
:mod:`khnb.audit`       robust, or a gradient that leads nowhere?
:mod:`khnb.robustness`  the logistic curve, its fitter, R with its error (eqs. 7.6-7.7)
:mod:`khnb.results`     the store: one record per trained or attacked model
:mod:`khnb.pipeline`    from settings to records: use what the store holds, compute the rest
:mod:`khnb.runner`      one job of a sweep: a notebook run by papermill, and its lock
:mod:`khnb.sweeps`      grids, the groups they make, what has become of them
:mod:`khnb.costs`       what groups cost: operations, bytes, seconds here
:mod:`khnb.costs_gpu`   the same on a GPU, by shapes
:mod:`khnb.tables`      the tables, from records, beside the thesis's values
:mod:`khnb.claims`      the thesis's claims, each with the number that decides it
:mod:`khnb.coverage`    how much of the thesis is drawn again: the scoreboard
:mod:`khnb.budget`      what each figure and table costs
:mod:`khnb.plots`       the figures, drawn from records
:mod:`khnb.widgets`     the interactive parts of the book
======================  =====================================================================
"""

import os

# PyTorch's threads wait for more work by spinning. The kernels have threads of their own, which would find the cores taken: with two of them they
# ran at half speed. Read when PyTorch is first imported; set it in the environment to have it otherwise.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"
