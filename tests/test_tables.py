"""Markdown tables, and the thesis's own numbers."""

import json
from types import SimpleNamespace

import pytest

from khnb import tables
from khnb.pipeline import expand
from khnb.results import Store
from khnb.settings import PARAMETERS


def test_markdown():
    rows = [{"a": 1, "b": 0.12345, "c": "x|y"}, {"a": None, "b": 2.0, "c": "z"}]
    text = tables.markdown(rows, {"b": "value", "a": "number", "c": "name"}, {"b": ".2f"})
    assert text.splitlines() == [
        "| value | number | name |",
        "| --- | --- | --- |",
        "| 0.12 | 1 | x\\|y |",
        "| 2.00 |  | z |",
    ]
    assert tables.markdown(rows, ["a"], {"a": lambda v: f"<{v}>"}).splitlines()[2] == "| <1> |"


def test_markdown_says_what_is_wrong():
    with pytest.raises(ValueError, match="no rows"):
        tables.markdown([])
    with pytest.raises(ValueError, match="column 'd' is not in a row with columns a"):
        tables.markdown([{"a": 1}], ["d"])


def test_html_holds_the_same_cells():
    text = tables.html([{"R < 1": 0.5, "b": "x & y"}, {"R < 1": 2, "b": "z"}])
    assert text.count("<tr>") == 3
    assert "<th>R &lt; 1</th><th>b</th>" in text and "<td>0.5</td><td>x &amp; y</td>" in text


def test_thesis_keeps_the_printed_decimals():
    rows = tables.thesis("table_B1")
    assert len(rows) == 44
    assert rows[0]["R_mean"] == "0.0177" and rows[0]["R_std"] == "0.0001"
    assert {r["figure"] for r in tables.thesis("figures")} >= {"9.1", "9.10"}


def test_thesis_lists_the_names_there_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="table_A1"):
        tables.thesis("table_X")
    with pytest.raises(FileNotFoundError, match="missing or empty"):
        tables.thesis("table_A1", tmp_path)


def test_pairs_counts_only_rows_that_agree_in_all_else():
    rows = [dict(K=k, w=w, R=r) for k, w, r in (("10", "4", "1"), ("20", "4", "2"), ("10", "8", "3"), ("20", "8", "3"), ("10", "12", "9"))]
    assert tables.pairs(rows, "K", "10", "20", "R", ("K", "w")) == (1, 0, 1)
    assert tables.pairs(rows, "w", "4", "8", "R", ("K", "w")) == (2, 0, 0)
    assert tables.pairs(rows, "K", "20", "10", "R", ("K", "w")) == (0, 1, 1)


def test_pairs_on_the_ensembles_of_the_thesis():
    rows, settings = tables.thesis("table_B3"), ("K", "w", "n", "w_pool", "sigma")
    assert tables.pairs(rows, "K", "10", "20", "acc_mean", settings)[0] == 20
    assert tables.pairs(rows, "K", "10", "20", "R_mean", settings) == (2, 18, 1)


def test_ensemble_row_is_the_printed_row_of_these_hyperparameters():
    ll = dict(model="LL", K=10, w=4, m=3, p=2.0, n=4.0, w_pool=5, sigma="gelu", delta=0.1)
    assert tables.printed(ll, "acc") == "0.619 ± 0.001"
    assert tables.printed(ll | dict(K=20), "R") == "0.01561 ± 0.00009"
    assert tables.printed(ll | dict(sigma="elu"), "R") == "not stated"
    assert tables.printed(ll | dict(m=2), "R") == "not stated"
    bp = dict(model="BP", K=10, w=4, n=4.0, w_pool=5, sigma="elu")
    assert tables.printed(bp, "R") == "0.0073 ± 0.0002"
    assert tables.printed(bp | dict(sigma="gelu"), "acc") == "0.589 ± 0.003"


def test_the_map_of_table_A1():
    asked = dict(K=10, delta=0.1, w=4, p=2.0, m=6, until=8)  # the thesis's layer collapsed here: 0.04
    def ran(collapsed, formed, open=0):
        """Results of so many runs."""
        last = [(0.02, 40)] * collapsed + [(0.6, 100)] * formed + [(0.1, 100)] * open
        return dict(f_1e4=[[0.0, f] for f, _ in last], alive=[[100, alive] for _, alive in last], winners=[[100, 100] for _ in last])

    probe = dict(asked=asked, results=ran(5, 1, 2))
    other = dict(asked=asked | dict(m=2), results=ran(6, 0))  # and here it did not: 0.99
    layers = [dict(asked=asked | dict(K=k), results=dict(f_score_1e4=f)) for k, f in ((10, 0.3), (10, 0.05), (20, 1.0))]
    short = dict(asked=asked | dict(until=3), results=ran(0, 1))
    unsettled = dict(asked=asked | dict(m=3), results=ran(0, 0, 5))
    rows = tables.map_A1([probe, short, other, unsettled, dict(asked=asked | dict(K=20), results=ran(0, 1))], layers)
    assert len(rows) == 100 and sum(row["runs"] is not None for row in rows) == 2
    found = {row["m"]: row for row in rows if (row["delta"], row["w"], row["p"]) == (0.1, 4, 2)}
    assert (found[6]["collapsed"], found[6]["runs"], found[6]["thesis"], found[6]["f"]) == (5, 6, 0.04, [0.05, 0.3])
    assert found[6]["chance"] == pytest.approx(5.5 / 7) and found[6]["plausible"]
    assert found[2]["chance"] == pytest.approx(0.5 / 7) and not found[2]["plausible"]
    assert found[3]["chance"] is None and found[3]["f"] == []


def test_shares_of_grid_1():
    plain = dict(delta=0.2, K=14, m=2, p=2.0, conv_eta0=1e-3, conv_scheduler="cosine", tau=2.5)
    layers = [(plain, 0.96), (plain, 0.9), (plain | dict(conv_scheduler="exponential", tau=4.0, m=5), 0.1), (plain | dict(p=3.0), 0.5)]
    found = {(row["parameter"], row["value"]): row for row in tables.shares_8_1(layers)}
    assert len(found) == 20
    assert found["m", "2"]["layers"] == 3 and found["m", "2"]["frac_f_gt_0.8"] == "0.22"
    share, low, high = found["m", "2"]["here_0.8"]
    assert share == pytest.approx(2 / 3) and low == pytest.approx(0.2077, abs=1e-4) and high == pytest.approx(0.9385, abs=1e-4)  # Wilson, by hand
    assert found["m", "2"]["here_0.15"][0] == 1 and found["m", "5"]["here_0.15"][0] == 0
    assert (found["scheduler", "cosine"]["layers"], found["scheduler", "exponential_rate_4.00"]["layers"], found["scheduler", "exponential_rate_2.50"]["layers"]) == (3, 1, 0)
    assert found["eta0", "1.0e-3"]["layers"] == 4 and found["eta0", "7.5e-4"]["here_0.95"] is None
    assert found["p", "2"]["here_0.95"][0] == pytest.approx(1 / 3) and found["p", "3"]["here_0.8"][0] == 0


def test_the_sweep_of_grid_1_is_balanced():
    (given,) = json.loads((tables.REFERENCE.parent / "sweeps" / "grid-1.json").read_text())
    defaults = {name: parameter.default for name, parameter in PARAMETERS.items()}
    cells = [defaults | cell for cell in expand(given)]
    rows = tables.shares_8_1([(cell, 1.0) for cell in cells])
    assert all(row["layers"] >= 8 for row in rows)
    for name in {row["parameter"] for row in rows}:
        counts = [row["layers"] for row in rows if row["parameter"] == name]
        assert sum(counts) == len(cells) and max(counts) - min(counts) <= 1


def test_spread():
    assert tables.spread([]) == "none yet" and tables.spread([0.12345]) == "0.123"
    assert tables.spread([0.1, 0.2, 0.3]) == "0.200 ± 0.100 (3)"  # of a sample: n - 1


class TestEnsemble:
    ROW = dict(K="10", w="4", m="3", p="2", n="4", w_pool="5")

    def model(self, **more):
        usual = {name: p.default for name, p in PARAMETERS.items()} | dict(model="LL", delta=0.1, feature_dtype="float16")
        return dict(asked=usual | more)

    def test_those_trained_as_the_thesis_trained_come_first(self):
        usual, fast = [self.model(seed=s, feature_dtype=d) for s, d in ((0, "float32"), (1, "float16"))], [self.model(conv_share=0.1, seed=s) for s in range(3)]
        assert tables.ensemble([*fast, *usual], self.ROW, "LL") == (usual, {})
        assert tables.ensemble(fast, self.ROW, "LL") == (fast, dict(conv_share=0.1))
        assert tables.ensemble([*fast, self.model(conv_epochs=0)], self.ROW, "LL")[1] == dict(conv_share=0.1)  # of as many departures the larger group

    @pytest.mark.parametrize("other", [dict(K=20), dict(p=3.0), dict(w_pool=9), dict(model="BP"), dict(n=5.0)])
    def test_other_rows_are_left_out(self, other):
        assert tables.ensemble([self.model(**other)], self.ROW, "LL") == ([], {})

    def test_of_bp_models(self):
        row = dict(K="10", w="4", n="4", w_pool="5", sigma="elu")
        made = [self.model(model="BP", sigma="elu", head_epochs=e) for e in (70, 20)]
        for record in made:
            del record["asked"]["m"], record["asked"]["conv_epochs"]
        assert tables.ensemble(made, row, "BP") == (made[:1], {}) and tables.ensemble(made[1:], row, "BP") == (made[1:], dict(head_epochs=20))
        assert tables.ensemble([self.model(model="BP", sigma="gelu", head_epochs=70)], row, "BP") == ([], {})


class TestTrainedShorter:
    @staticmethod
    def model(kind, accuracy, way, **more):
        usual = {name: p.default for name, p in PARAMETERS.items() if kind == "LL" or name not in ("m", "p", "conv_share", "conv_eta0", "feature_dtype")}
        return dict(id=f"{accuracy}", asked=usual | dict(model=kind) | tables.TRAINED[kind][way] | more, results=dict(test_accuracy=accuracy))

    def test_pairs_differ_in_nothing_else(self):
        models = [self.model("BP", 0.65, 0), self.model("BP", 0.66, 1), self.model("BP", 0.5, 1, n=12.0), self.model("BP", 0.7, 0, head_batch=2500), self.model("LL", 0.62, 0),
                  self.model("LL", 0.61, 1, feature_dtype="float16"), self.model("LL", 0.6, 1, m=5), self.model("LL", 0.63, 0, feature_dtype="float16")]
        rows = tables.trained_shorter(models, {"0.65": 0.007, "0.61": 0.018})
        found = {row["model"]: [row[name] for name in ("accuracy", "accuracy_shorter", "R", "R_shorter")] for row in rows}
        assert len(rows) == 2 and found == {"BP": [0.65, 0.66, 0.007, None], "LL": [0.62, 0.61, None, 0.018]}

    def test_the_ways_are_the_thesis_and_the_preset(self):
        preset = json.loads((tables.REFERENCE.parent / "sweeps" / "thesis.json").read_text())["presets"]["laptop"]
        for kind, (thesis, laptop) in tables.TRAINED.items():
            named = {name: f"bp_{name.removeprefix('head_')}" if kind == "BP" else name for name in thesis}
            assert thesis == {name: PARAMETERS[other].default for name, other in named.items()}
            assert laptop == {name: preset[other] for name, other in named.items()}


class TestAttackedModels:
    @pytest.fixture
    def store(self, tmp_path):
        """Two LL models of one layer, a BP model, and one on other images."""
        data, store = SimpleNamespace(name="cifar10", sha256=dict(train="a" * 64, test="b" * 64)), Store(tmp_path)
        layer = store.put("layer", dict(K=10), data, dict(f_score_1e4=0.9), {}, 1.0)
        for model, sigma, n, R, images in (("LL", "gelu", 4.0, 0.02, 900), ("LL", "rexp", 1.0, 0.01, 500), ("BP", "elu", 1.0, None, 900)):
            asked = dict(model=model, sigma=sigma, n=n)
            record = store.put("model", asked, data, dict(test_accuracy=0.6), {}, 1.0, **(dict(layer=layer["id"]) if model == "LL" else {}))
            fit = dict(R=R, R_err=R and 1e-4, n=images, n_survived=2, r2=0.99, status="ok" if R else "no-inflection")
            for attack in (dict(attack="fgsm", confidence=0.8), dict(attack="pgd", confidence=0.8, step=1e-3)):
                store.put("attack", asked | attack | dict(of=record["id"]), data, dict(fit=fit, accuracy=0.6), {}, 1.0)
        store.put("attack", dict(model="LL", attack="fgsm", confidence=0.8), SimpleNamespace(name="cifar10-sample", sha256=data.sha256), dict(), {}, 1.0)
        return store

    def test_rows(self, store):
        rows = sorted(tables.attacked_models(store), key=lambda row: row["sigma"])
        assert [(row["sigma"], row["n"], row["f"], row["R"], row["images"], row["accuracy"]) for row in rows] == [
            ("elu", 1.0, None, None, 900, 0.6), ("gelu", 4.0, 0.9, 0.02, 900, 0.6), ("rexp", 0, 0.9, 0.01, 500, 0.6),
        ]
        assert tables.attacked_models(store, "pgd", step=5e-4) == [] and len(tables.attacked_models(store, "pgd", step=1e-3, model="LL")) == 2
        assert tables.attacked_models(store, confidence=0.6) == []

    def test_the_rule_of_the_thesis_and_what_it_leaves_out(self, store):
        rows = tables.attacked_models(store)
        kept = tables.accepted_models(rows)
        assert [row["sigma"] for row in kept] == ["gelu"] and len(tables.accepted_models(rows, 499)) == 2 and tables.accepted_models(rows, 0, 0.99) == []
        said = tables.counted(rows, kept)
        assert said.startswith("1 of 3 models (left out: ") and "1 too few images or too poor a fit" in said and "1 without an inflection point" in said
        assert tables.counted(kept, kept) == "1 of 1 models"
