"""Verdicts on the thesis's claims, on models whose effects are known."""

import math

import numpy as np
import pytest

from khnb import claims, tables
from khnb.claims import Interval
from khnb.settings import ConvSettings


def models(count=120, seed=0, kind="LL", **slopes):
    """Rows of LL models, four on a layer, whose accuracy (points) and ln R (percent) change by these per step, and with luck of layer and head."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(count // 4):
        conv = ConvSettings(K=int(rng.choice([10, 20])), w=int(rng.choice([4, 8, 12])), m=int(rng.integers(2, 7)), p=float(rng.integers(2, 7)), seed=i)
        luck = rng.normal(0, 0.3, 2)
        for _ in range(4):
            row = dict(conv.dict(), model=kind, id=f"{i}", n=float(rng.choice([2, 4, 8, 16])), w_pool=int(rng.choice([5, 9, 13])), sigma=str(rng.choice(["elu", "gelu"])),
                       head_epochs=25, head_batch=int(rng.choice([250, 1000])))
            steps = {name: step(row) for name, (_, step) in claims.STEPS.items()}
            accuracy, R = (sum(by * steps[name] for name, by in slopes.get(of, {}).items()) for of in ("accuracy", "R"))
            accuracy += 3 * (row["sigma"] == "gelu") - 2 * (row["head_batch"] == 250) + luck[0] + rng.normal(0, 0.2)
            row |= dict(accuracy=0.5 + accuracy / 100, R=0.02 * math.exp((R + 5 * (row["sigma"] == "gelu") + luck[1] + rng.normal(0, 0.2)) / 100))
            rows.append(row | dict(id=f"{i}-{len(rows)}"))
    return rows


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(claims, "RESAMPLES", 200)


class TestEffects:
    def test_are_found_whatever_else_varies(self):
        rows = models(accuracy=dict(w=-4, p=2, K=3, n=1, m=0.1), R=dict(w=30, p=-7))
        for name, slope in dict(w=-4, p=2, K=3, n=1, m=0.1, w_pool=0).items():
            found = claims.effect(rows, name, "accuracy")
            assert found.value == pytest.approx(slope, abs=0.3) and found.low - 0.1 < slope < found.high + 0.1 and found.models == 120
        assert claims.effect(rows, "w", "R").value == pytest.approx(30, abs=0.5) and claims.effect(rows, "p", "R").value == pytest.approx(-7, abs=0.5)

    def test_cannot_be_told_from_what_does_not_vary(self):
        rows = [row | dict(K=10) for row in models()]
        assert math.isnan(claims.effect(rows, "K", "accuracy").value) and claims.effect(rows, "K", "accuracy").verdict(above=0) == "too few models"
        tied = [row | dict(p=float(row["m"])) for row in models()]
        assert math.isnan(claims.effect(tied, "p", "accuracy").value), "m and p go together: nobody can tell which it is"

    def test_models_on_one_layer_are_not_independent(self):
        """Ten layers, each given four times over: the interval is that of ten layers, not of forty models."""
        rows = models(40, accuracy=dict(w=-4))
        apart = [row | dict(seed=i) for i, row in enumerate(rows)]
        together = claims.resampled(rows, lambda some: np.mean([row["accuracy"] for row in some]))
        assert together.high - together.low > 1.3 * (lambda one: one.high - one.low)(claims.resampled(apart, lambda some: np.mean([row["accuracy"] for row in some])))


class TestVerdicts:
    @pytest.mark.parametrize(
        ("interval", "limit", "said"),
        [
            ((1, 0.5, 2), dict(above=0), "supported"), ((1, -0.5, 2), dict(above=0), "open"), ((-1, -2, -0.5), dict(above=0), "contradicted"),
            ((-1, -2, -0.5), dict(below=0), "supported"), ((1, 0.5, 2), dict(below=0), "contradicted"), ((0.96, 0.955, 0.99), dict(above=0.95), "supported"),
            ((0.9, 0.85, 0.96), dict(above=0.95), "open"), ((math.nan, math.nan, math.nan), dict(above=0), "too few models"),
        ],
    )
    def test_by_the_interval(self, interval, limit, said):
        assert Interval(*interval, 20).verdict(**limit) == said
        assert Interval(*interval, 5).verdict(**limit) == "too few models"

    def test_every_claim_has_a_row_and_an_honest_verdict(self):
        slopes = dict(accuracy=dict(w=-4, p=2, K=3, n=1), R=dict(w=30, p=-7, K=-20, n=-5))
        LL = [row | dict(accuracy=row["accuracy"]) for row in models(**slopes)]
        BP = [row | dict(model="BP", id=f"bp{i}", R=row["R"] / 9, **tables.TRAINED["BP"][i % 2]) for i, row in enumerate(models(80, seed=1))]
        pgd = [row | dict(R=0.9 * row["R"]) for row in LL]
        found = {row["claim"]: row["verdict"] for row in claims.claims(LL, BP, pgd, [row | dict(R=0.7 * row["R"]) for row in LL])}
        right = [name for name in found if name.startswith("LL: ") and any(f": {p} " in f": {name[4:]}" for p in ("w", "p", "K", "n"))]
        assert len(right) == 8 and {found[name] for name in right} == {"supported"}
        assert found["LL: m 1 more: hardly matters for accuracy (less than a point)"] == "supported"
        assert found["PGD finds smaller R than FGSM (mean ratio below 1)"] == "supported"
        assert [found[name] for name in found if "more robust than most BP" in name] == ["supported"] * 2
        turned = [row | dict(accuracy=1 - row["accuracy"], R=0.0004 / row["R"]) for row in LL]
        wrong = {row["claim"]: row["verdict"] for row in claims.claims(turned, BP, [row | dict(R=1.1 * row["R"]) for row in turned], turned)}
        assert {wrong[name] for name in right} == {"contradicted"} and wrong["PGD finds smaller R than FGSM (mean ratio below 1)"] == "contradicted"

    def test_regions(self):
        def bp(n, sigma, accuracy, R, i):
            return models(4, kind="BP")[0] | dict(model="BP", n=n, sigma=sigma, accuracy=accuracy, R=R, id=f"{n}{sigma}{i}")

        as_told = [bp(1, "elu", 0.7, 0.008, i) for i in range(3)] + [bp(8, "gelu", 0.5, 0.004, i) for i in range(3)] + [bp(12, "elu", 0.55, 0.02, i) for i in range(3)]
        rows = claims.claims(models(), as_told, [], [])[-3:]
        assert [row["verdict"] for row in rows] == ["supported"] * 3 and [row["models"] for row in rows] == [3, 3, 3]
        same = [row | dict(accuracy=0.6, R=0.01) for row in as_told]
        assert [row["verdict"] for row in claims.claims(models(), same, [], [])[-3:]] == ["contradicted"] * 3, "no pair is on the claimed side"
        assert [row["verdict"] for row in claims.claims(models(), [], [], [])[-3:]] == ["too few models"] * 3

    def test_without_any_models(self):
        rows = claims.claims([], [], [], [])
        assert len(rows) == 23 and {row["verdict"] for row in rows} <= {"too few models", "no direction claimed"} and all(row["number"] in ("", "0 of 0") for row in rows)


def test_by_value_counts_a_model_in_each_of_its_rows():
    def model(accuracy, **asked):
        return dict(asked=dict(delta=0.1, w=4, K=10, m=2, p=2.0, n=4.0, sigma="gelu", w_pool=5, head_eta0=2e-3) | asked, results=dict(test_accuracy=accuracy))

    rows = tables.by_value("table_A3", [model(0.5), model(0.7, K=20), model(0.4, sigma="rexp", n=1.0)])
    found = {(row["parameter"], row["value"]): (row["here"], row["here_avg"], row["here_max"]) for row in rows}
    assert found["w", "4"] == (3, pytest.approx(1.6 / 3), 0.7) and found["K", "20"] == (1, 0.7, 0.7) and found["sigma", "rExp"] == (1, 0.4, 0.4)
    assert found["n", "4"] == (2, pytest.approx(0.6), 0.7) and found["w", "12"] == (0, None, None)
    (eta,) = (row for row in tables.by_value("table_A2", [model(0.5)]) if row["parameter"] == "eta0" and row["value"] == "2.0e-3")
    assert eta["here"] == 1 and {row["here"] for row in tables.by_value("table_A2", [model(0.5)]) if row["parameter"] == "n"} == {0, 1}
