"""From a grid, which is data, to groups that share computation, and what becomes of them."""

import csv
import json
import re
import statistics
import threading
import time
from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from khnb import costs, costs_gpu, pipeline, results, sweeps
from khnb import data as datasets
from khnb.results import Store
from khnb.settings import ConvSettings

ROOT = Path(__file__).parents[1]
BOOK = json.loads((ROOT / "sweeps" / "thesis.json").read_text())["experiments"]


def counts(grid: str, preset: str = "thesis") -> dict:
    """Layers, heads, BP models and attacks of a grid."""
    found = Counter()
    for group in sweeps.groups(grid, preset):
        found[group.kind] += group.count
    return dict(found)


class TestTheThesis:
    def test_every_experiment_is_there_or_says_where_it_is(self):
        with open(ROOT / "reference" / "experiments.csv") as file:
            assert {row["id"] for row in csv.DictReader(file)} == set(BOOK)
        for name, experiment in BOOK.items():
            assert experiment["says"] and bool(experiment.get("jobs")) != bool(experiment.get("where")), name
            for path in re.findall(r"(?:tests|benchmarks)/\w+\.py", experiment.get("where", "")):
                assert (ROOT / path).is_file()

    @pytest.mark.parametrize(
        ("grid", "stated"),
        [
            ("E01", dict(layers=1)), ("E04", dict(layers=960)), ("E05", dict(layers=100)), ("E07", dict(layers=150)), ("E10", dict(bp=780)),
            ("E06", dict(layers=100, heads=100 * 108)),  # of which 56 layers pass, in the thesis
            ("E08", dict(layers=150, heads=150 * 85)), ("E08+E09", dict(layers=150, heads=150 * 126)),
            ("E11", dict(layers=1, heads=1, attacks=1)), ("E14", dict(layers=1, heads=1, attacks=1)),
            ("E19", dict(layers=160, heads=160 * 40)), ("E20", dict(bp=600)), ("E21", dict(layers=160, heads=6400, bp=600, attacks=7000)),
        ],
    )
    def test_as_many_as_the_thesis_has(self, grid, stated):
        assert counts(grid) == stated

    def test_attacks_on_the_same_models_are_in_one_group(self):
        found = [group for group in sweeps.groups("E11+E14+E17") if group.kind == "attacks"]
        assert sum(group.count for group in found) == 3 and len(found) == 1
        assert [[one["kind"] for one in attacks] for attacks in found[0].body["attacks"]] == [["fgsm"], ["pgd", "pgd"]]

    @pytest.mark.parametrize("preset", ["smoke", "laptop"])
    @pytest.mark.parametrize("name", [name for name, one in BOOK.items() if "jobs" in one and not any("of" in job for job in one["jobs"])])
    def test_smaller_presets_are_parts_of_it(self, name, preset):
        small, whole = counts(name, preset), counts(name)
        assert set(small) == set(whole) and all(0 < small[kind] <= whole[kind] for kind in whole)


def test_laptop_grids_have_every_value_of_every_parameter():
    heads = Counter()
    for group in sweeps.groups("E08+E09", "laptop"):
        if group.kind == "heads":
            for head in group.body["heads"]:
                heads.update(dict(group.body["conv"], **head).items())
    for name, values in dict(K=(10, 20), w=(4, 8, 12), m=(2, 3, 4, 5, 6), p=(2, 3, 4, 5, 6), w_pool=(5, 7, 9, 11, 13), n=(2, 4, 8, 16, 25, 50), sigma=("elu", "gelu")).items():
        assert all(heads[name, value] >= 8 for value in values), name


@pytest.mark.parametrize(("table", "kind", "names"), [("B1", "heads", ("K", "w", "m", "p", "n", "w_pool")), ("B2", "heads", ("K", "w", "m", "p", "n", "w_pool")),
                                                     ("B3", "bp", ("K", "w", "sigma", "n", "w_pool")), ("B4", "bp", ("K", "w", "sigma", "n", "w_pool"))])
def test_laptop_ensembles_have_every_row_of_the_thesis(table, kind, names):
    models: Counter = Counter()
    for group in sweeps.groups("E19+E20", "laptop"):
        if group.kind == kind:
            for one in group.body["heads"] if kind == "heads" else group.body["models"]:
                one = group.body["conv"] | one if kind == "heads" else one | one["head"]
                models[tuple(str(one[name]).removesuffix(".0") for name in names)] += 1
    with open(ROOT / "reference" / f"table_{table}.csv") as file:
        rows = [tuple(row[name] or "1" for name in names) for row in csv.DictReader(file)]
    assert len(rows) > 40 and all(models[row] >= (2 if row[:2] == ("10", "4") else 1) for row in rows)


class TestGroups:
    def test_those_that_are_needed_come_first(self):
        for grid in ("E11+E18+E22", "first-light"):
            done = set()
            for group in sweeps.groups(grid, "smoke"):
                assert set(group.needs) <= done
                done.add(group.id)

    def test_ids_are_of_what_is_done_and_nothing_else(self):
        one, two = sweeps.groups("E12", "smoke"), sweeps.groups("E12+E01", "smoke")
        assert {group.id for group in one} < {group.id for group in two} and len({group.id for group in two}) == len(two)
        assert {group.id for group in one}.isdisjoint(group.id for group in sweeps.groups("E12", "laptop"))

    def test_layers_in_lockstep_share_their_patches_and_fit_together(self):
        for group in sweeps.groups("E01+E04+E07"):
            convs = [ConvSettings(**conv) for conv in group.body["convs"]]
            assert len({(c.w, c.conv_batch, c.conv_share, c.conv_epochs) for c in convs}) == 1
            assert sum(c.K**2 for c in convs) <= sweeps.NEURONS

    def test_they_come_back_from_json(self):
        for group in sweeps.groups("E02+E12+E18+blue-wall".removesuffix("+blue-wall"), "smoke") + sweeps.groups("blue-wall"):
            again = sweeps.Group(**json.loads(json.dumps(vars(group))))
            assert again.id == group.id and again.title == group.title and sweeps.asks(again) == sweeps.asks(group)

    def test_a_file_is_taken_as_it_is_written(self, tmp_path):
        path = tmp_path / "mine.json"
        path.write_text(json.dumps([dict(K=10, data="cifar10-sample", attacked=False)]))
        assert {group.data for group in sweeps.groups(str(path))} == {"cifar10-sample"}
        assert {group.body["feature_dtype"] for group in sweeps.groups(str(path)) if group.kind == "heads"} == {"float32"}

    def test_an_object_has_presets_of_its_own(self, tmp_path):
        path = tmp_path / "mine.json"
        job = dict(what="layers", data="cifar10-sample", seed=[0, 1, 2])
        experiment = dict(jobs=[job | dict(K=4, laptop=dict(seed=[0, 1])), job | dict(K=5, laptop=dict(take=dict(layers=1)))], laptop=dict(take=None, conv_epochs=2))
        path.write_text(json.dumps(dict(experiments=dict(mine=experiment))))
        for preset, expected in (("laptop", {4: 2, 5: 1}), ("thesis", {4: 3, 5: 3})):
            convs = [conv for group in sweeps.groups(str(path), preset) for conv in group.body["convs"]]
            assert Counter(conv["K"] for conv in convs) == expected
            assert {conv["conv_epochs"] for conv in convs} == {2 if preset == "laptop" else ConvSettings().conv_epochs}

    @pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.json")), ids=lambda path: path.stem)
    def test_every_committed_grid_can_be_read(self, path):
        if path.stem == "attacks":
            with pytest.raises(ValueError, match="grid attacks: what the store holds is not known before: python -m khnb.pipeline does such a grid"):
                sweeps.groups("attacks")
        elif path.stem != "thesis":
            assert sweeps.groups(path.stem) and sweeps.groups(str(path), "smoke")

    def test_parts_have_about_equal_sizes(self):
        assert [len(part) for part in sweeps._parts(list(range(12)), lambda _: 1, 5)] == [4, 4, 4]
        assert [len(part) for part in sweeps._parts([1, 2], lambda _: 9, 5)] == [1, 1] and list(sweeps._parts([], lambda _: 1, 5)) == []


class TestAttacks:
    """Groups of attacks on stub models in a store: what is missing, and what comes to be done again."""

    @staticmethod
    def group(tmp_path, **more):
        path = tmp_path / "mine.json"
        path.write_text(json.dumps([dict(data="cifar10-sample", K=4, attacked=[dict(attack="fgsm", confidence=0.2)], bp="none") | more]))
        return next(group for group in sweeps.groups(str(path)) if group.kind == "attacks")

    def test_audits_and_weights_are_part_of_it(self, tmp_path):
        plain, other = self.group(tmp_path), self.group(tmp_path, audited=True, weights=False)
        assert (plain.body["audited"], plain.body["weights"]) == (0, True) and (other.body["audited"], other.body["weights"]) == (300, False)
        both = [dict(data="cifar10-sample", K=4, bp="none", attacked=[dict(confidence=c)]) | more for c, more in ((0.3, {}), (0.2, dict(audited=True, weights=False)))]
        path = tmp_path / "both.json"
        path.write_text(json.dumps(both))
        (one,) = (group for group in sweeps.groups(str(path)) if group.kind == "attacks")
        assert one.body["audited"] and one.body["weights"], "weights are kept where one of them keeps them"
        assert [[each["confidence"] for each in attacks] for attacks in one.body["attacks"]] == [[0.2, 0.3]]

    @pytest.mark.parametrize("status", ["ok", "too-few"])
    def test_an_audit_is_missing_where_there_is_an_R(self, status, tmp_path):
        group, store = self.group(tmp_path, audited=True), Store(tmp_path)
        data = SimpleNamespace(name="cifar10-sample", sha256=sweeps.SHA256["cifar10-sample"])
        assert [kind for kind, _ in sweeps.missing(group, store)] == ["attack"]
        ((asked, _),) = sweeps._attack_asks(group)
        model = {k: v for k, v in asked.items() if k not in ("attack", "eps_max", "confidence", "of")}
        assert store.put("model", model, data, {}, {}, 1.0)["id"] == asked["of"]
        attack = store.put("attack", asked, data, dict(fit=dict(status=status)), {}, 1.0)
        left = sweeps.missing(group, store)
        if status == "too-few":
            assert left == []
            return
        ((kind, what),) = left
        assert kind == "audit" and what == pipeline.audit_asked(asked, attack["id"])
        store.put("audit", what, data, {}, {}, 1.0)
        assert sweeps.missing(group, store) == []

    def test_an_attack_on_the_model_as_it_was_is_missing(self, tmp_path, monkeypatch):
        group, store = self.group(tmp_path), Store(tmp_path)
        data = SimpleNamespace(name="cifar10-sample", sha256=sweeps.SHA256["cifar10-sample"])
        ((asked, _),) = sweeps._attack_asks(group)
        model = {k: v for k, v in asked.items() if k not in ("attack", "eps_max", "confidence", "of")}
        store.put("model", model, data, {}, {}, 1.0)
        store.put("attack", asked, data, dict(fit=dict(status="ok")), {}, 1.0)
        assert sweeps.missing(group, store) == []
        monkeypatch.setattr(results, "datetime", SimpleNamespace(now=lambda zone: datetime.now(zone) + timedelta(hours=1)))
        store.put("model", model, data, {}, {}, 1.0)
        assert sweeps.missing(group, store) == [("attack", asked)]

    @pytest.mark.parametrize(("more", "kept"), [(dict(attacked=False, weights=False), False), (dict(attacked=False), True), (dict(weights=False), True)])
    def test_weights_are_kept_for_the_attacks_at_least(self, more, kept, tmp_path):
        path = tmp_path / "mine.json"
        path.write_text(json.dumps([dict(data="cifar10-sample", K=4, bp="train") | more]))
        assert [group.body["weights"] for group in sweeps.groups(str(path)) if group.kind in ("heads", "bp")] == [kept, kept]

    def test_without_attacks_they_are_dropped_at_once(self, tmp_path):
        small = dict(data="cifar10-sample", K=3, w=6, m=2, conv_epochs=0, n=1, w_pool=9, head_epochs=1, head_batch=500, weights=False, attacked=False, bp="none")
        path, store = tmp_path / "mine.json", Store(tmp_path / "store")
        path.write_text(json.dumps([small]))
        run = pipeline.Run(datasets.load("cifar10-sample"), store, "cpu", lambda text: None)
        for group in sweeps.groups(str(path)):
            sweeps.work(group, run)
            assert sweeps.missing(group, store) == []
        (record,) = store.find("model")
        assert set(record["arrays"]["dropped"]) == {"linear_weight", "conv_weight"}

    def test_a_model_without_weights_is_trained_again_for_an_attack(self, tmp_path, capsys):
        """The whole way on the embedded sample, at a size of seconds: heads, attacks, weights dropped; one more attack."""
        small = dict(w=6, m=2, conv_epochs=0, n=1, w_pool=9, head_epochs=1, head_batch=500, weights=False, feature_dtype="float32")
        run = pipeline.Run(datasets.load("cifar10-sample"), Store(tmp_path / "store"), "cpu", lambda text: None)
        path = tmp_path / "mine.json"

        def do(**more):
            path.write_text(json.dumps([dict(data="cifar10-sample", K=3, bp="train", bp_epochs=1, bp_batch=500) | small | more]))
            return [(group.kind, sorted(r["kind"] for r in sweeps.work(group, run))) for group in sweeps.groups(str(path))]

        first = do(attacked=[dict(confidence=0.2, eps_max=0.002)])
        assert first == [("layers", ["layer"]), ("heads", ["model"]), ("bp", ["model"]), ("attacks", ["attack"]), ("attacks", ["attack"])]
        models = run.store.find("model")
        assert [set(record["arrays"]["dropped"]) for record in models] == [{"linear_weight", "conv_weight"}] * 2
        time.sleep(1.1)  # records know whole seconds
        assert do(attacked=[dict(confidence=0.2, eps_max=0.002)]) == first and run.store.find("model") == models, "nothing is trained for what is there"
        do(attacked=[dict(confidence=0.2, eps_max=0.002), dict(attack="pgd", confidence=0.2, max_steps=2)])
        again = run.store.find("model")
        assert all(new["started"] > old["started"] and new["arrays"]["dropped"] for new, old in zip(again, models, strict=True))
        since = {record["id"]: record["started"] for record in again}
        assert len(run.store.find("attack")) == 4 and all(r["started"] >= since[r["asked"]["of"]] for r in run.store.find("attack"))


class TestBalanced:
    options = [dict(a=a, b=b, c=c) for a in range(2) for b in range(3) for c in range(5)]

    @pytest.mark.parametrize("count", [1, 4, 10, 30, 99])
    def test_every_value_about_equally_often(self, count):
        chosen = [self.options[i] for i in sweeps.balanced(self.options, count)]
        assert len(chosen) == min(count, 30)
        for name, values in dict(a=2, b=3, c=5).items():
            often = Counter(one[name] for one in chosen)
            assert max(often.values()) - min(often[value] for value in range(values)) <= 2

    def test_the_same_every_time_and_goes_on_from_what_was_used(self):
        assert sweeps.balanced(self.options, 7) == sweeps.balanced(self.options, 7)
        used = Counter()
        first, second = sweeps.balanced(self.options, 15, used), sweeps.balanced(self.options, 15, used)
        assert used["a", 0] == used["a", 1] == 15 and first != second


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(m=0), "grid mine: m=0 is not valid"), (dict(Kk=3), "grid mine: unknown parameter 'Kk'"), (dict(m=[2, 500]), "m=500 is not valid"),
            (dict(f_least=2), "f_least=2 is not valid"), (dict(what="x"), "what='x' is not valid"), (dict(w=30, w_pool=9), "w_pool=9 is not valid"),
            (dict(attacked=[dict(attack="cw")]), "attack='cw' is not valid"), (dict(K=True), "K=True is not valid"), (dict(of=["E99"], attacked=[]), "'E99' is not there"),
        ],
    )
    def test_a_value_is_named_with_its_grid(self, change, message, tmp_path):
        path = tmp_path / "mine.json"
        path.write_text(json.dumps([dict(K=10), dict(K=10) | change]))
        with pytest.raises(ValueError, match=re.escape(message)):
            sweeps.groups(str(path))

    def test_what_is_no_grid(self, tmp_path):
        (tmp_path / "a.json").write_text("[1]")
        (tmp_path / "b.json").write_text("{")
        (tmp_path / "c.json").write_text(json.dumps(dict(experiments=dict(x=dict(jobs=[{}], smoke=dict(take=dict(layers=0)))))))
        for grid, preset, message in (("E99", "smoke", "is not there: an experiment"), (str(tmp_path / "a.json"), "thesis", "grid a"), ("E01", "huge", "preset='huge'"),
                                      (str(tmp_path / "b.json"), "thesis", "no JSON"), (str(tmp_path / "c.json"), "smoke", "take=")):
            with pytest.raises(ValueError, match=message):
                sweeps.groups(grid, preset)


class TestCosts:
    def test_operations_of_one_layer_and_one_head(self):
        """By hand: 50,000 images of 29 x 29 patches of 48 values, 30 times; 100 filters, two products each."""
        layers = [group for group in sweeps.groups("E05") if group.kind == "layers"]
        one = replace(layers[0], body=layers[0].body | dict(convs=[ConvSettings(K=10, w=4).dict()]))
        assert costs.of(one).flop == 4 * 100 * 48 * 50_000 * 29**2 * 30
        heads = next(group for group in sweeps.groups("E11") if group.kind == "heads")
        features, passes = 400 * 11**2, 1 + 10_000 / 50_000
        assert costs.of(heads, memory=100).flop == pytest.approx(4 * 10 * features * 50_000 * 100 + 2 * 400 * 48 * 29**2 * 50_000 * passes)
        assert costs.of(heads, memory=0).flop > 10 * costs.of(heads, memory=100).flop, "activities that are not kept are computed every epoch"

    def test_more_workers_and_what_they_wait_for(self):
        a, b, c, d = (sweeps.Group("layers", "cifar10", dict(convs=[dict(w=i)])) for i in range(4))
        c.needs, d.needs = [a.id], [b.id, c.id]
        times = {a.id: 3.0, b.id: 4.0, c.id: 2.0, d.id: 1.0}
        assert [costs.schedule([a, b, c, d], times, workers) for workers in (1, 2, 9)] == [10, 6, 6]
        assert costs.schedule([a, b, c, d], times, 1, {a.id, b.id}) == 3 and costs.schedule([], {}, 2) == 0

    def test_rates_are_measured_once_and_say_where(self, tmp_path):
        rates = costs.Rates(1, tmp_path / "rates.json")
        assert rates.get("x", lambda: [1.23456, 2]) == [1.235, 2] == costs.Rates(1, tmp_path / "rates.json").get("x", lambda: pytest.fail("measured again"))
        (machine,) = json.loads((tmp_path / "rates.json").read_text()).values()
        assert machine["provenance"]["hardware"]["name"] and machine["provenance"]["code"]["source"]
        (tmp_path / "rates.json").write_text("{")
        assert costs.Rates(1, tmp_path / "rates.json").get("x", lambda: [3]) == [3]
        assert costs.Rates(2, tmp_path / "rates.json").get("x", lambda: [4]) == [4], "two threads are another machine"

    def test_a_plan_says_what_it_costs(self):
        found = sweeps.groups("E11", "thesis")
        told = sweeps.plan(found, {group.id: 3600.0 for group in found}, 2, found[1:])
        assert "layers" in told and "1 of 3 groups are done." in told and "The 2 left take about 2.0 h on 2 workers." in told

    def test_on_a_gpu_the_slowest_of_products_bytes_and_launches_counts(self):
        group, card, share = sweeps.groups("E18", "smoke")[0], costs_gpu.Card(half=1e30, tensor=1e30, single=1e30, bandwidth=1e30, launch=1.0), costs_gpu.REACHED["bp"]
        use = costs_gpu.of(group)
        assert group.kind == "bp" and costs_gpu.seconds(group, card) == use.launches
        assert costs_gpu.seconds(group, replace(card, half=1.0, single=2.0)) == (use.half + use.single / 2) / share
        assert costs_gpu.seconds(group, replace(card, bandwidth=1e-3)) == pytest.approx(1e3 * use.moved / share)
        (layers,) = sweeps.groups("E02")
        assert 2 * costs_gpu.of(layers).tensor >= costs.of(layers).flop, "each product is two operations; activities and updates, all of them"

    def test_shares_that_a_gpu_reached_are_those_that_were_measured(self):
        cases = json.loads((Path(__file__).parent.parent / "benchmarks" / "gpu-h200.json").read_text())["cases"]
        shares = {kind: [case["floor_ms"] / case["kernels_ms"] for case in cases if case["kind"] == kind] for kind in costs_gpu.REACHED}
        assert {kind: round(statistics.median(each), 2) for kind, each in shares.items()} == costs_gpu.REACHED


class Cuda:
    """What :mod:`khnb.sweeps` asks PyTorch about GPUs, of two that are not there."""

    def __init__(self, monkeypatch, free=80 * 2**30):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"fake-{i}"))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))


class TestGpu:
    """With fake devices: several GPUs at once have not been tried."""

    def test_two_jobs_never_share_one(self, monkeypatch, tmp_path):
        Cuda(monkeypatch)
        monkeypatch.setattr(sweeps.tempfile, "gettempdir", lambda: str(tmp_path))
        with sweeps.own_gpu("auto") as one, sweeps.own_gpu("auto") as two:
            assert (one, two) == ("cuda:0", "cuda:1")
            waiting = threading.Thread(target=lambda: sweeps.own_gpu("auto").__enter__(), daemon=True)
            waiting.start()
            waiting.join(0.3)
            assert waiting.is_alive(), "a third one waits"
        waiting.join(10)
        assert not waiting.is_alive()
        with sweeps.own_gpu("cpu") as device:
            assert device == "cpu"

    def test_what_is_kept_fits_into_its_memory(self, monkeypatch):
        group = next(group for group in sweeps.groups("E08") if group.kind == "heads")
        run = SimpleNamespace(device="auto")
        assert sweeps.memory_for(group, run) == 4 and sweeps.memory_for(group, run, 7) == 7  # on a CPU
        monkeypatch.setattr(sweeps.pipeline, "pick_device", lambda device: torch.device("cuda"))
        for gib in (80, 16, 4):
            Cuda(monkeypatch, gib * 2**30)
            assert 0 <= sweeps.memory_for(group, run) < gib
