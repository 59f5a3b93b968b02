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
# # 10 Discussion
#
# What can be concluded from the thesis's experiments, and what depends on how they were done? This chapter first holds the
# thesis's claims against our own records, then weighs its discussion against its own tables. Chapters [8](08_training.ipynb) and
# [9](09_attacks.ipynb) show the models, and the [scoreboard](../scoreboard.md) says how far the repetition has come.
#
# (claims)=
# ## What our records say
#
# {numref}`tab-claims` takes the claims about many models one by one. Each has the number that decides it, with its 95% interval: claimed side only, supported; other side only,
# contradicted; else open. "So much per step" is what changes with one hyperparameter when the others stay (a linear model over all attacked LL models whose classifiers had the thesis's
# training, or as many updates in fewer epochs; activation function and training are categories in it). The intervals come from drawing *layers*, as models on one layer share it, so they are as wide as
# a few dozen layers make them. Accuracy is in percentage points; models count as in [chapter 9](#many-models).

# %% tags=["remove-cell"]
from IPython.display import Markdown
from myst_nb import glue

from khnb import claims, tables
from khnb.results import Store

store = Store()


def counting(kind, attack="fgsm", confidence=0.8, **amounts):
    """Attacked models of a kind that count."""
    return tables.accepted_models(tables.attacked_models(store, attack, confidence, model=kind, **amounts))


verdicts = claims.claims(counting("LL"), counting("BP"), counting("LL", "pgd", step=5e-4, radius=0.14), counting("LL", confidence=0.6))
columns = {"claim": "claim of the thesis", "section": "section", "models": "models, here", "number": "the number that decides, here", "verdict": "verdict"}
glue("tab-claims", Markdown(tables.markdown(verdicts, columns)))
said = [row["verdict"] for row in verdicts]
glue("claims-first", Markdown(f"{said[0]}, with a rank correlation of {verdicts[0]['number']} over {verdicts[0]['models']} models"))
for told, way in zip((row["number"] for row in verdicts if row["claim"].startswith("Most LL models")), ("thesis", "shorter"), strict=True):
    glue(f"pairs-{way}", Markdown(told.replace("+", "")))
glue("claims-told", Markdown(", ".join(f"{said.count(word)} {word}" for word in ("supported", "contradicted", "open")) + f", {said.count('too few models')} with too few models"))

# %% [markdown]
# ````{table} Claims of the thesis about many models, and what our models on the full CIFAR-10 say (computed here, at a smaller scale than the thesis).
# :name: tab-claims
#
# ```{glue:md} tab-claims
# :format: myst
# ```
# ````
#
# In all: {glue:}`claims-told`. The thesis's main finding, the trade-off among LL models: {glue:}`claims-first`.
# LL models are the more robust of a pair in a share of {glue:}`pairs-thesis` of the pairs with a BP model trained as in the thesis, and of {glue:}`pairs-shorter` with one trained shorter, in
# smaller minibatches: how robust BP models are depends on how they are trained ({numref}`tab-shorter`), and so does how far the two kinds are apart.
#
# ## What each hyperparameter does
#
# The grid searches of the thesis have one model for each set of hyperparameters, and not every set: layers with an
# f-score below 0.8 were left out, powers $n$ above 12 were tried for some sets only. Averages over such a grid compare
# different populations. The *ensembles* do better: for a few sets, up to a hundred models each. There one can compare
# pairs of sets that differ in a single hyperparameter. The table counts in how many pairs the mean rises as the
# hyperparameter goes from the first value to the second; its source are the thesis's tables B.1 and B.3
# ([appendix B](B_ensembles.ipynb)).

# %% tags=["hide-input"]
LL, BP = tables.thesis("table_B1"), tables.thesis("table_B3")
CASES = {
    "LL": (LL, tables.ENSEMBLE["LL"], [("K", "10", "20"), ("w", "4", "12"), ("m", "3", "4"), ("p", "2", "4"), ("n", "4", "12"), ("w_pool", "5", "9")]),
    "BP": (BP, tables.ENSEMBLE["BP"], [("K", "10", "20"), ("w", "4", "12"), ("n", "4", "12"), ("w_pool", "5", "9"), ("w_pool", "9", "11"), ("sigma", "gelu", "elu")]),
}
rows = []
for kind, (table, settings, changes) in CASES.items():
    for name, low, high in changes:
        row = {"models": kind, "change": f"`{name}` {low} → {high}"}
        for heading, column in (("accuracy rises", "acc_mean"), ("R rises", "R_mean")):
            up, down, equal = tables.pairs(table, name, low, high, column, settings)
            row[heading] = f"{up} of {up + down + equal}" + (f" ({equal} equal)" if equal else "")
        rows.append(row)
Markdown(tables.markdown(rows))

# %% [markdown]
# For LL models the trade-off is plain. Wider filters ($w$), and smaller $p$, make models more robust and less accurate;
# more filters ($K$) and a higher power $n$ make them more accurate and, with few exceptions, less robust. $m$ matters
# little, which the thesis notes came too late to leave it out of the grids. For $w_\text{pool}$ there is no single rule.
#
# For BP models the text of the thesis and its table disagree more than once:
#
# - It says that $K=20$ gives *higher* robustness and *lower* accuracy than $K=10$. The table shows the opposite in nearly
#   every pair.
# - It says that ELU is always the more robust of ELU and GeLU, and a larger pooling window always better. Both hold in
#   most pairs, not in all; the exceptions have $w=12$.
# - It says that for $n=12$ the narrow filters are the robust ones, and shortly after that the high robustness at
#   large $n$ occurs only for $w=12$. The table agrees with the second statement.
#
# In each case we take the table to be right.
#
# ## Trade-off
#
# A price of robustness paid in accuracy is known from adversarial training and regularisation {cite}`zhang2019,tsipras2019`.
# The thesis finds it among models that were trained for neither, and calls this its main finding. It offers an
# explanation for one hyperparameter: the rule holds every filter at unit $p$-norm, which works as a regulariser, and a
# larger $p$ lets single weights grow larger. For the others the mechanism is open. Whether BP models show a trade-off is
# put differently in different places: the abstract says that they do not, the conclusions that it is less apparent, and
# the description of figure 9.9 (accurate models with low $R$, less accurate ones with high $R$) sounds like one.
#
# ## rExp
#
# The rectified exponential was tried because its power series holds every power, and power means capacity in a dense
# associative memory. The thesis drops the argument in its discussion, and calls LL models with rExp less accurate
# than all others. On average over grid 3 that is so compared with the usual activation functions (mean accuracy 0.524);
# but models with $n\ge35$ are worse still. For BP models rExp has the *highest* mean of all activation functions
# (tables A.3 and A.4, [appendix A](A_grid_searches.ipynb)).
#
# ## The threshold on f
#
# Only layers with $f\ge0.8$ were given classifiers. That saved time, and left out many combinations: of the ten layers
# with $K=10$, $w=12$ perhaps two or three passed. The thesis later thinks the threshold too high. There is a further
# reason for care. A filter counts as a feature if its norm is within $10^{-6}$ of 1, about the rounding error of
# single-precision arithmetic accumulated over an update. How many filters pass then depends on the schedule's last
# steps and on the arithmetic. [Chapter 8](08_training.ipynb) gives f at two tolerances for this reason.
#
# ## What R measures
#
# $R$ makes thousands of models comparable, and the order it puts them in hardly changes between FGSM and PGD. But
#
# - it is about *confident, correct* images only. Of the best LL model 4,523 images are said to be used, elsewhere that no
#   model had more than 3,826; our models of the same hyperparameters go with the first ([chapter 9](#many-models));
# - the most robust models are measured on the fewest images, some barely more than the 500 required;
# - images that were never fooled are dropped, although they are the most robust of all. This lowers $R$, and more so
#   under PGD, though by little where few survive ([chapter 9](09_attacks.ipynb) has both fits);
# - the inflection point is a choice. Another point of the curve, such as the median radius, would be as defensible.
#
# ## How strong the attacks are
#
# The thesis finds that the distance reached by PGD is exactly the step times the number of steps, in every model. This says
# that the ball around the image never mattered: its radius was several times larger than any $R$. PGD was thus IFGSM
# in effect. The thesis compares two settings of PGD and ascribes the lower $R$ of one to its larger radius. As both have
# room to spare, the finer step is the likelier cause, and with step and radius varied one at a time [chapter 9](09_attacks.ipynb) finds that it is. (That step is printed as $5\cdot10^{-5}$, which would need
# about a thousand steps for the most robust models; the text says that fewer than a hundred were needed. We read
# $5\cdot10^{-4}$.)
#
# For some BP models PGD gives a *larger* $R$ than FGSM, which a stronger attack should not. PGD can only report multiples
# of its step, and always rounds up; for the least robust models the step is a noticeable part of $R$.

# %% tags=["hide-input"]
def larger(fgsm, pgd, names):
    """In how many common rows R under PGD exceeds R under FGSM, and of how many."""
    by = {tuple(row[name] for name in names): float(row["R_mean"]) for row in tables.thesis(fgsm)}
    common = [(by[key], float(row["R_mean"])) for row in tables.thesis(pgd) if (key := tuple(row[n] for n in names)) in by]
    return sum(b > a for a, b in common), len(common)


for kind, fgsm, pgd in (("LL", "table_B1", "table_B2"), ("BP", "table_B3", "table_B4")):
    count, total = larger(fgsm, pgd, CASES[kind][1])
    print(f"{kind}: R under PGD larger than under FGSM in {count} of {total} sets (thesis's tables)")

# %% [markdown]
# Last, robustness against random noise or occlusion, for which these networks were first praised {cite}`patel2020`, is
# another matter. The thesis calls such disturbances white-box attacks in two places; by its own definition in chapter 7 they
# are black-box.
#
# ## Smooth boundaries
#
# Regularising the slope of a network makes its decision boundaries smoother {cite}`hoffman2019`. If the unit norm of the
# filters has a similar effect, then one step along the gradient already finds nearly the nearest boundary, and iterating
# gains little. That FGSM and PGD agree so well for LL models would fit this picture; the thesis leaves it untested.
