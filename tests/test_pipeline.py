"""From settings to records and back to networks, on 60 real images."""

import hashlib
import inspect
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from khnb import attacks, learning, pipeline, results, robustness, training
from khnb import data as datasets
from khnb.pipeline import Checkpoint, Run, bp_model, conv_layer, conv_layers, attack, ll_model, models_of, network, pick_device
from khnb.results import Store, record_id
from khnb.settings import PARAMETERS, ConvSettings, HeadSettings, check, of_notebook

CONV = ConvSettings(K=3, w=6, m=2, conv_epochs=3, conv_batch=2000, conv_eta0=0.05)
HEAD = HeadSettings(sigma="relu", n=2, w_pool=9, s_pool=9, head_epochs=3, head_batch=20, head_eta0=0.01)


def cut(sample, train=60, test=40, name="tiny", skip=0):
    """The first images of the sample as a data set of its own."""
    parts = {}
    for split, count in dict(train=train, test=test).items():
        for field in ("images", "labels", "index"):
            parts[f"{split}_{field}"] = getattr(sample, f"{split}_{field}")[skip : skip + count].clone()
    sha256 = {s: datasets.digest(parts[f"{s}_images"].numpy(), parts[f"{s}_labels"].numpy()) for s in ("train", "test")}
    return replace(sample, name=name, sha256=sha256, **parts)


@pytest.fixture(scope="module")
def tiny(sample):
    return cut(sample)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Checkpoints of these tests stay in their own folder."""
    monkeypatch.setattr(pipeline, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def notes():
    return []


@pytest.fixture
def run(tiny, tmp_path, notes):
    return Run(tiny, Store(tmp_path / "store"), "cpu", notes.append)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A store with an LL model, its layer and a BP model, trained without interruption."""
    patch = pytest.MonkeyPatch()
    patch.setattr(pipeline, "cache_dir", lambda: tmp_path_factory.mktemp("cache"))
    run = Run(tiny, Store(tmp_path_factory.mktemp("trained")), "cpu", lambda text: None)
    records = dict(LL=ll_model(run, CONV, HEAD), BP=bp_model(run, 3, 6, HEAD))
    patch.undo()
    return run, records


def no_training(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("nothing was to be computed")

    monkeypatch.setattr(training, "train", fail)
    monkeypatch.setattr(pipeline, "train_heads", fail)
    monkeypatch.setattr(learning, "train_layers", fail)
    monkeypatch.setattr(attacks, "fgsm_radius", fail)


def same(one, two):
    """Two histories without their times."""
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in one] == [
        {k: v for k, v in row.items() if k != "seconds"} for row in two
    ]


MAKE = {
    "layer": lambda run: conv_layer(run, CONV),
    "LL": lambda run: ll_model(run, CONV, HEAD),
    "BP": lambda run: bp_model(run, 3, 6, HEAD),
}


class TestOnce:
    @pytest.mark.parametrize("what", MAKE)
    def test_the_second_call_computes_nothing(self, what, run, notes, monkeypatch, cache):
        first = MAKE[what](run)
        assert any("training on 60 images of tiny, epoch 1 to 3" in note for note in notes)
        assert not list(cache.rglob("*.pt"))
        notes.clear()
        no_training(monkeypatch)
        assert MAKE[what](run) == first
        assert len(notes) == 1 and f"record {first['id']} from the store, computed on tiny, {first['started'][:10]}" in notes[0]

    def test_another_hyperparameter_is_computed(self, trained, monkeypatch):
        run, _ = trained
        no_training(monkeypatch)
        for other in (replace(HEAD, head_eta0=0.02), replace(HEAD, seed=1), replace(HEAD, n=3)):
            with pytest.raises(AssertionError, match="nothing was to be computed"):
                bp_model(run, 3, 6, other)
            with pytest.raises(AssertionError, match="nothing was to be computed"):
                ll_model(run, CONV, other)
        assert bp_model(run, 2, 6, HEAD, train=False) is None

    def test_another_head_takes_the_same_layer(self, run, monkeypatch):
        first = ll_model(run, CONV, HEAD)
        monkeypatch.setattr(learning, "train_layers", None)
        second = ll_model(run, CONV, replace(HEAD, head_epochs=1))
        assert second["id"] != first["id"] and second["layer"] == first["layer"]

    def test_either_feature_dtype_is_taken(self, trained, monkeypatch):
        run, records = trained
        no_training(monkeypatch)
        assert ll_model(run, CONV, HEAD, "bfloat16") == records["LL"]

    def test_impossible_shapes_are_refused_first(self, run, notes):
        with pytest.raises(ValueError, match="w_pool=28.*27 x 27"):
            ll_model(run, CONV, replace(HEAD, w_pool=28))
        with pytest.raises(ValueError, match="w_pool=28.*27 x 27"):
            bp_model(run, 3, 6, replace(HEAD, w_pool=28))
        assert notes == []


class TestRecords:
    def test_layer(self, trained):
        run, records = trained
        (record,) = run.store.find("layer")
        arrays = run.store.arrays(record)
        layer = learning.train_layer(run.data.train_images, CONV, "cpu", None, pipeline.SNAPSHOTS)
        assert torch.equal(torch.from_numpy(arrays["weight"]), layer.weight) and record["id"] == records["LL"]["layer"]
        assert arrays["epochs"].tolist() == [0, 1, 2, 3] and arrays["snapshots"].shape == (4, 9, 3, 6, 6)
        assert record["results"]["f_score_1e4"] == learning.f_score(layer.weight, CONV.p, 1e-4)
        assert record["asked"] == CONV.dict() and len(record["results"]["history"]) == 3

    @pytest.mark.parametrize("kind", ["LL", "BP"])
    def test_results_are_those_of_the_network(self, trained, kind):
        run, records = trained
        model, found = network(records[kind], run.store), records[kind]["results"]
        top, guess = training.predict(model, run.data.test_images).softmax(1).max(1)
        right = guess == run.data.test_labels
        assert found["test_accuracy"] == right.double().mean().item() and found["test_images"] == 40
        assert found["confident_and_correct"] == int((right & (top >= 0.8)).sum())
        assert [row["epoch"] for row in found["history"]] == [1, 2, 3]
        assert records[kind]["asked"]["model"] == kind

    @pytest.mark.parametrize("kind", ["LL", "BP"])
    def test_network_gives_the_very_logits_of_the_trained_model(self, kind, run, monkeypatch):
        seen, train, heads = [], training.train, pipeline.train_heads
        monkeypatch.setattr(training, "train", lambda model, *a, **k: (seen.append(model), train(model, *a, **k))[1])
        monkeypatch.setattr(pipeline, "train_heads", lambda all, *a, **k: (seen.append(all[0].network), heads(all, *a, **k))[1])
        back = network(MAKE[kind](run), run.store)
        (model,) = seen
        assert not back.training and back.head == HEAD
        assert torch.equal(training.predict(back, run.data.test_images), training.predict(model.eval(), run.data.test_images))

    def test_damaged_arrays_are_named(self, run):
        record = bp_model(run, 3, 6, HEAD)
        (run.store.root / "arrays" / f"{record['id']}.npz").write_bytes(b"")
        with pytest.raises(ValueError, match=f"{record['id']}.npz.*delete the record"):
            network(record, run.store)

    def test_a_damaged_record_is_computed_again(self, run, notes):
        record = bp_model(run, 3, 6, HEAD)
        run.store.path("model", record["id"]).write_text("{")
        with pytest.warns(Warning, match="damaged"):
            again = bp_model(run, 3, 6, HEAD)
        same(again["results"]["history"], record["results"]["history"])
        assert run.store.get("model", record["asked"], run.data) == again


class Stop(Exception):
    pass


class TestCheckpoints:
    @pytest.mark.parametrize("what", MAKE)
    @pytest.mark.parametrize("after", [1, 2])
    def test_a_resumed_run_equals_an_uninterrupted_one(self, what, after, run, notes, trained, monkeypatch, cache):
        save = Checkpoint.save

        def save_and_stop(self, state):
            save(self, state, force=True)
            (first, *_) = state() if isinstance(state(), list) else [state()]
            if len(first["history"]) == after and (what != "LL" or "optimizer" in first):
                raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "save", save_and_stop)
            with pytest.raises(Stop):
                MAKE[what](run)
        (left,) = cache.rglob("*.pt")
        notes.clear()
        epochs, module, name = [], *dict(layer=(learning, "train_layers"), LL=(pipeline, "train_heads"), BP=(training, "train"))[what]
        original = getattr(module, name)

        def counted(*given, **named):
            named = dict(zip(inspect.signature(original).parameters, given)) | named
            last = named.pop("after_epoch")
            return original(**named, after_epoch=lambda state: (epochs.append(1), last(state))[1])

        monkeypatch.setattr(module, name, counted)
        resumed = MAKE[what](run)
        assert f"epoch {after + 1} to 3" in notes[-1] and len(epochs) == 3 - after and not left.exists()
        full = trained[1].get(what) or trained[0].store.find("layer")[0]
        assert resumed["id"] == full["id"]
        same(resumed["results"].pop("history"), full["results"]["history"])
        assert resumed["results"] == {k: v for k, v in full["results"].items() if k != "history"}
        expected, got = trained[0].store.arrays(full), run.store.arrays(resumed)
        assert set(expected) == set(got)
        for key, value in expected.items():
            np.testing.assert_array_equal(got[key], value, err_msg=key)

    def test_a_damaged_one_is_named_and_left_aside(self, run, cache, trained):
        asked = trained[1]["BP"]["asked"]
        path = cache / "checkpoints" / f"{record_id('model', asked, run.data.sha256)}.pt"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"PK no checkpoint")
        with pytest.warns(UserWarning, match=f"{path.name} is damaged.*from the beginning"):
            record = bp_model(run, 3, 6, HEAD)
        same(record["results"]["history"], trained[1]["BP"]["results"]["history"])

    def test_a_pickle_is_never_run(self, cache, tmp_path):
        target = tmp_path / "ran"

        class Evil:
            def __reduce__(self):
                return Path.touch, (target,)

        checkpoint = Checkpoint("x")
        checkpoint.path.parent.mkdir(parents=True)
        for write in (lambda: torch.save(dict(history=[Evil()]), checkpoint.path), lambda: checkpoint.path.write_bytes(pickle.dumps(Evil()))):
            write()
            with pytest.warns(UserWarning, match="damaged"):
                assert checkpoint.load() is None
            assert not target.exists()

    def test_comes_back_as_it_was(self, cache):
        checkpoint, state = Checkpoint("x"), dict(weight=torch.randn(3), history=[dict(epoch=1, loss=0.5)], snapshots={0: torch.ones(2)})
        assert checkpoint.load() is None
        checkpoint.save(lambda: state)
        assert checkpoint.load() is None  # not yet: the last one is less than 30 s old
        checkpoint.save(lambda: state, force=True)
        back = checkpoint.load()
        assert torch.equal(back.pop("weight"), state.pop("weight")) and torch.equal(back["snapshots"].pop(0), state["snapshots"].pop(0))
        assert back == state
        checkpoint.clear(), checkpoint.clear()
        assert checkpoint.load() is None

    def test_is_saved_every_so_often(self, cache, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(pipeline.time, "monotonic", lambda: now[0])
        checkpoint, saved = Checkpoint("x"), []
        for now[0] in range(0, 100, 10):
            checkpoint.save(lambda: dict(at=now[0]))
            saved.append((checkpoint.load() or dict(at=None))["at"])
        assert saved == [None, None, None, None, 40, 40, 40, 40, 80, 80]


PGD = dict(step=0.02, radius=0.3, max_steps=12)


class TestAttack:
    @pytest.mark.parametrize("kind", ["LL", "BP"])
    def test_radii_of_the_confident_and_correct(self, trained, kind, monkeypatch):
        run, records = trained
        record = attack(run, records[kind], confidence=0.15)
        model, arrays = network(records[kind], run.store), run.store.arrays(record)
        top, guess = training.predict(model, run.data.test_images).softmax(1).max(1)
        chosen = torch.nonzero((guess == run.data.test_labels) & (top >= 0.15))[:, 0]
        assert len(chosen) > 0 and arrays["images"].tolist() == chosen.tolist()
        images = training.to_float(run.data.test_images[chosen])
        expected = attacks.fgsm_radius(model, images, run.data.test_labels[chosen]).numpy()
        np.testing.assert_allclose(arrays["radii"], expected, rtol=0, atol=2e-6)  # another batch rounds otherwise
        assert arrays["radii"].dtype == np.float64 and (arrays["radii"] > 0).all()
        assert record["results"]["fit"] == robustness.fit(arrays["radii"]).dict() and record["asked"]["of"] == records[kind]["id"]
        assert record["results"]["accuracy"] == records[kind]["results"]["test_accuracy"]
        no_training(monkeypatch)
        assert attack(run, records[kind], confidence=0.15) == record

    def test_nobody_is_confident(self, trained):
        run, records = trained
        record = attack(run, records["BP"], confidence=1.0)
        assert record["results"]["fit"]["status"] == "too-few" and record["results"]["fit"]["n"] == 0
        assert run.store.arrays(record)["radii"].shape == (0,)

    def test_confidence_counts(self, trained):
        run, records = trained
        assert attack(run, records["LL"], confidence=0.15)["id"] != attack(run, records["LL"], confidence=0.2)["id"]

    def test_a_higher_threshold_takes_some_of_the_images(self, trained, tmp_path, monkeypatch):
        run, records = trained
        shutil.copytree(run.store.root / "arrays", tmp_path / "arrays")
        elsewhere = replace(run, store=Store(tmp_path))
        for kind, amounts in (("fgsm", {}), ("pgd", PGD)):
            low = attack(run, records["LL"], kind, confidence=0.1, **amounts)
            least = float(np.median(run.store.arrays(low)["confidences"]))
            alone = attack(elsewhere, records["LL"], kind, confidence=least, **amounts)
            with monkeypatch.context() as patch:
                patch.setattr(pipeline, "_attack_now", None)
                high = attack(run, records["LL"], kind, confidence=least, **amounts)
            assert not (run.store.root / "arrays" / f"{high['id']}.npz").exists()
            for name, values in elsewhere.store.arrays(alone).items():
                np.testing.assert_array_equal(run.store.arrays(high)[name], values)
            assert high["derived_from"] == low["id"] and 0 < high["results"]["fit"]["n"] < low["results"]["fit"]["n"]
            assert high["results"] == alone["results"] and high["id"] == alone["id"]
            assert attack(run, records["LL"], kind, confidence=least, **amounts) == high

    def test_pgd(self, trained):
        run, records = trained
        record = attack(run, records["LL"], "pgd", confidence=0.15, **PGD)
        model, arrays = network(records["LL"], run.store), run.store.arrays(record)
        images, labels = training.to_float(run.data.test_images[arrays["images"]]), run.data.test_labels[arrays["images"]]
        radii, steps = attacks.pgd_radius(model, images, labels, *PGD.values())
        np.testing.assert_allclose(arrays["radii"], radii.numpy(), rtol=0, atol=5.1e-8)
        assert arrays["steps"].tolist() == steps.tolist() and (steps > 0).any() and {k: record["asked"][k] for k in PGD} == PGD
        assert record["results"]["fit"]["n"] == record["results"]["fit_steps"]["n"] == len(radii)
        assert record["results"]["fit_steps"]["n_survived"] == int((steps < 0).sum())

    @pytest.mark.parametrize("kind", ["fgsm", "pgd"])
    def test_goes_on_after_an_interruption(self, trained, monkeypatch, kind):
        """Stopped at every part, each time; the record is that of a run in one go."""
        run, records = trained
        monkeypatch.setattr(training, "part_size", lambda *_: 1)
        amounts, saved, stops = PGD if kind == "pgd" else {}, Checkpoint.save, 0
        whole = attack(run, records["BP"], kind, confidence=0.0, **amounts)
        arrays = run.store.arrays(whole)
        run.store.path("attack", whole["id"]).unlink()

        def interrupted(self, state, force=False):
            saved(self, state, force=True)
            raise KeyboardInterrupt

        monkeypatch.setattr(Checkpoint, "save", interrupted)
        again = None
        while again is None and stops < 100:
            try:
                again = attack(run, records["BP"], kind, confidence=0.0, **amounts)
            except KeyboardInterrupt:
                stops += 1
        assert stops == len(arrays["radii"]) > 1
        for name, values in run.store.arrays(again).items():
            np.testing.assert_array_equal(values, arrays[name])
        assert again["results"] == whole["results"] and not Checkpoint(whole["id"]).path.exists()

    def test_survivors_are_fitted_as_well(self, trained, monkeypatch):
        """Of 40 invented radii ten are never fooled: the record has both fits, the thesis's without them and the one with them."""
        run, records = trained
        radii = np.where(np.arange(40) % 4, np.linspace(0.01, 0.03, 40) ** 1.1, np.inf)
        monkeypatch.setattr(pipeline, "_attack_now", lambda *_: dict(radii=radii, confidences=np.ones(40), images=np.arange(40)))
        found = attack(run, records["BP"], confidence=0.99, eps_max=0.77)["results"]
        assert found["fit"] == robustness.fit(radii).dict() and found["fit_kept"] == robustness.fit(radii, survivors="kept").dict()
        assert found["fit"]["n_survived"] == 10 and found["fit_kept"] != found["fit"]

    def test_refused(self, trained):
        run, records = trained
        for kind, amounts, message in (("cw", {}, "attack='cw' is not valid: one of fgsm, pgd"), ("fgsm", dict(step=1), "unknown parameter 'step'"), ("pgd", dict(radius=2), "radius=2 is not valid")):
            with pytest.raises(ValueError, match=message):
                attack(run, records["BP"], kind, **amounts)

    def test_of_this_model_and_no_other(self, run, sample):
        """Same settings, same test images, but trained on other images: another model, other radii."""
        full = cut(sample, name="cifar10", skip=100)
        there = bp_model(replace(run, data=full), 3, 6, HEAD)
        here = bp_model(run, 3, 6, HEAD)
        first = attack(run, there, confidence=0.0)
        second = attack(run, here, confidence=0.0)
        assert (first["asked"]["of"], second["asked"]["of"]) == (there["id"], here["id"])


class TestLockstep:
    CELLS = [CONV, replace(CONV, m=3, p=3), replace(CONV, seed=4)]

    def test_layers_are_those_trained_alone(self, run, monkeypatch):
        together = pipeline.conv_layers(run, [*self.CELLS, CONV])
        assert together[0] == together[3] and len(run.store.find("layer")) == 3
        for conv, record in zip(self.CELLS, together):
            assert record["asked"] == conv.dict() and record["results"]["stopped"] == "" and record["results"]["collapsed"] in (True, False)
            (alone,) = learning.train_layers(run.data.train_images, [conv])
            np.testing.assert_allclose(run.store.arrays(record)["weight"], alone.weight, atol=1e-5)
        no_training(monkeypatch)
        assert pipeline.conv_layers(run, self.CELLS[::-1]) == together[:3][::-1]

    def test_one_that_failed_has_its_record(self, run):
        wild = replace(CONV, conv_eta0=1e38)
        good, bad = pipeline.conv_layers(run, [CONV, wild])
        assert bad["results"]["stopped"] == "not finite" and good["results"]["stopped"] == ""
        assert run.store.find("layer", conv_eta0=1e38) == [bad]

    @pytest.mark.parametrize("carried", [False, True])
    def test_killed_and_resumed(self, carried, run, cache, notes, monkeypatch, tmp_path):
        """What a kill leaves is the last checkpoint; it may go on elsewhere, from a folder that was carried there."""
        left = cache / "checkpoints"
        if carried:
            left = tmp_path / "left"
            monkeypatch.setenv("KHNB_CHECKPOINTS", str(left))
        whole = learning.train_layers(run.data.train_images, self.CELLS)

        def save_and_stop(self, state, save=Checkpoint.save):
            save(self, state, force=True)
            if len(state()[0]["history"]) == 2:
                raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "save", save_and_stop)
            with pytest.raises(Stop):
                pipeline.conv_layers(run, self.CELLS)
        assert not run.store.find("layer") and len(list(left.glob("*.pt"))) == 1
        if carried:
            monkeypatch.setenv("KHNB_CHECKPOINTS", str(left := left.rename(tmp_path / "here")))
        resumed = pipeline.conv_layers(run, self.CELLS)
        assert "epoch 3 to 3" in notes[-1] and left.is_dir() and not list(left.glob("*.pt"))
        for record, layer in zip(resumed, whole):
            np.testing.assert_array_equal(run.store.arrays(record)["weight"], layer.weight)

    def test_probes(self, run, monkeypatch, cache):
        doomed = ConvSettings(K=5, w=6, m=6, delta=2.0, conv_epochs=40, conv_batch=100, conv_eta0=2e-2)
        records = pipeline.collapse_probes(run, [doomed, replace(doomed, m=2, delta=0.0)], seeds=3, until=20)
        assert [learning.fates(r["results"], 25).count("collapsed") for r in records] == [3, 0]
        assert "seed" not in records[0]["asked"] and records[0]["asked"]["seeds"] == 3
        assert all(len(row) < 20 for row in records[0]["results"]["alive"])  # given up before the end
        assert [len(row) for row in records[1]["results"]["f_1e4"]] == [20] * 3
        assert not list(cache.rglob("*.pt"))
        no_training(monkeypatch)
        assert pipeline.collapse_probes(run, [replace(doomed, seed=9)], seeds=3, until=20) == records[:1]

    @pytest.mark.parametrize("stop", [False, True])
    def test_a_collapsed_layer_has_its_record(self, stop, run):
        doomed = ConvSettings(K=6, w=6, m=6, delta=2.0, conv_epochs=40, conv_batch=100, conv_eta0=2e-2)
        fell, stood = conv_layers(run, [doomed, replace(doomed, m=2, delta=0.0)], [], stop)
        assert fell["results"]["collapsed"] and not stood["results"]["collapsed"]
        assert fell["results"]["stopped"] == ("blue wall of death" if stop else "") and (len(fell["results"]["history"]) < 40) == stop
        assert stood["results"]["stopped"] == "" and len(stood["results"]["history"]) == 40

    def test_lists_are_expanded(self):
        assert pipeline.expand(dict(K=[1, 2], w=3, m=[4, 5])) == [dict(K=k, w=3, m=m) for k in (1, 2) for m in (4, 5)]
        assert pipeline.expand(dict(K=1)) == [dict(K=1)]
        each = [dict(m=2, p=3), dict(m=3, p=2)]
        assert pipeline.expand(dict(K=[1, 2], each=each)) == [dict(K=k) | one for one in each for k in (1, 2)]
        assert pipeline.expand(dict(K=1, each=[dict(m=[2, 3]), dict(K=[4, 5])])) == [dict(K=1, m=2), dict(K=1, m=3), dict(K=4), dict(K=5)]

    @pytest.mark.parametrize("what", ["layers", "probes"])
    def test_at_a_terminal(self, what, tiny, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("KHNB_RESULTS", str(tmp_path / "store"))
        monkeypatch.setattr(datasets, "load", lambda name: tiny)
        given = {k: v for k, v in CONV.dict().items() if k != "m"} | dict(what=what, m=[2, 3], device="cpu")
        pipeline.main([json.dumps(given)])
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("K=")]
        assert len(lines) == 2 and f"m=3 delta={CONV.delta:g}" in lines[1]
        assert len(Store(tmp_path / "store").find(what[:-1])) == 2
        with pytest.raises(ValueError, match="what='x' is not valid"):
            pipeline.main([json.dumps(dict(what="x"))])

    @pytest.mark.parametrize(("snapshots", "kept"), [([1, 2], [1, 2, 3]), ([0], [0, 3]), ([], [])])
    def test_snapshots_are_a_choice(self, snapshots, kept, run):
        (record,) = conv_layers(run, [CONV], snapshots)
        arrays = run.store.arrays(record)
        assert arrays["epochs"].tolist() == kept and arrays["snapshots"].shape == (len(kept), 9, 3, 6, 6)
        stages = pipeline.stages(record, run.store)
        assert list(stages) == (kept or [3]) and all(type(epoch) is int for epoch in stages)
        np.testing.assert_allclose(stages[3], arrays["weight"], rtol=1e-3, atol=1e-6)
        last = pipeline.stages(run.store.drop(record, "epochs", "snapshots"), run.store)
        assert list(last) == [3] and last[3].tobytes() == arrays["weight"].tobytes()

    @pytest.mark.parametrize("wrong", [dict(seeds=0), dict(until=1.5), dict(snapshots=3), dict(snapshots=[-1]), dict(snapshots=["end"]), dict(seeds=True), dict(stop_collapsed=1)])
    def test_what_is_no_number_of_epochs(self, wrong):
        name, value = next(iter(wrong.items()))
        with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is not valid: expected ") + "(a whole|a list of whole numbers|true or)"):
            pipeline.main([json.dumps(dict(what="layers") | wrong)])


KILLED = dict(
    layer="pipeline.conv_layers(run, [settings.ConvSettings(K=5, w=4, m=m, conv_epochs=30, conv_batch=500) for m in (2, 3)])",
    model="""pipeline.ll_models(run, settings.ConvSettings(K=5, w=4, conv_epochs=0), [
        settings.HeadSettings(head_epochs=30, head_batch=20, n=n, w_pool=w, seed=seed) for n in (1, 4) for w, seed in ((5, 0), (9, 0), (9, 1))])""",
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KILLED)
def test_kill_9_and_resume(kind, tmp_path, sample):
    """A process that is killed three times leaves whole checkpoints, and in the end what an undisturbed one makes: layers in lockstep,
    or heads together."""
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(f"""
        import sys, torch
        from dataclasses import replace
        from khnb import data, pipeline, settings
        torch.set_num_threads(1)
        pipeline.Checkpoint.__init__.__defaults__ = (0.0,)  # as often as it can
        images = data.load("cifar10-sample")
        images = replace(images, train_images=images.train_images[:60], train_labels=images.train_labels[:60])
        run = pipeline.Run(images, pipeline.Store(sys.argv[1]), "cpu")
        print([record["id"] for record in {KILLED[kind]}])
    """))

    def start(name):
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / name), "KHNB_PROGRESS": "0"}
        return subprocess.Popen([sys.executable, str(script), str(tmp_path / f"store-{name}")], env=environment, stdout=subprocess.PIPE, text=True)

    def epochs():
        for file in (tmp_path / "killed").rglob("*.pt"):
            return len(torch.load(file, weights_only=True)[0]["history"])
        return 0

    before = 0
    for _ in range(3):
        child = start("killed")
        deadline = time.monotonic() + 60
        while epochs() < before + 2:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert epochs() > before  # never less than the last one left
        before = epochs()
    killed, whole = (Store(tmp_path / f"store-{name}") for name in ("killed", "whole"))
    assert not killed.find(kind)
    found = [start(name).communicate(timeout=120)[0] for name in ("killed", "whole")]
    assert found[0].splitlines()[-1] == found[1].splitlines()[-1] and f"epoch {before + 1} to 30" in found[0]
    for one, other in zip(killed.find(kind), whole.find(kind), strict=True):
        assert one["id"] == other["id"] and len(one["results"]["history"]) == 30
        for name, value in whole.arrays(other).items():
            np.testing.assert_array_equal(killed.arrays(one)[name], value)


class TestRandomFilters:
    def test_are_as_drawn_of_unit_norm_and_can_have_a_head(self, run):
        control = replace(CONV, conv_epochs=0, p=3.0)
        record = conv_layer(run, control)
        weight = torch.from_numpy(run.store.arrays(record)["weight"])
        drawn = learning.initial_filters(replace(CONV, p=3.0), 3)
        torch.testing.assert_close(weight.flatten(1).abs().pow(3).sum(1), torch.ones(9))
        torch.testing.assert_close(torch.nn.functional.cosine_similarity(weight.flatten(1), drawn.flatten(1)), torch.ones(9))
        assert record["results"]["history"] == [] and record["results"]["f_score"] == 0 and not record["results"]["collapsed"]
        assert ll_model(run, control, HEAD)["layer"] == record["id"]


class TestLater:
    def test_a_parameter_that_came_later_is_in_a_record_only_where_it_differs(self, run, trained):
        plain, other = conv_layer(run, CONV), conv_layer(run, replace(CONV, conv_share=0.5))
        assert "conv_share" not in plain["asked"] and other["asked"]["conv_share"] == 0.5 and plain["id"] != other["id"]
        assert [r["id"] for r in run.store.find("layer", conv_share=1.0)] == [plain["id"]]
        assert [r["id"] for r in run.store.find("layer", conv_share=0.5)] == [other["id"]]
        assert len(run.store.find("layer", K=CONV.K)) == 2

    def test_evidence_is_of_exactly_these_settings(self, run, sample):
        full = replace(run, data=cut(sample, name="cifar10", skip=100))
        conv_layer(full, replace(CONV, conv_share=0.5))
        assert replace(run, evidence=True).find("layer", CONV.dict(), "x") is None
        conv_layer(full, CONV)
        assert replace(run, evidence=True).find("layer", CONV.dict(), "x")["asked"] == CONV.dict()


class TestEvidence:
    @pytest.fixture
    def full(self, run, sample):
        """A record made on "the full set"."""
        return bp_model(replace(run, data=cut(sample, name="cifar10", skip=100)), 3, 6, HEAD)

    def test_is_taken_only_where_allowed(self, run, full, notes):
        assert bp_model(run, 3, 6, HEAD, train=False) is None
        notes.clear()
        assert bp_model(replace(run, evidence=True), 3, 6, HEAD, train=False) == full
        assert "computed on full CIFAR-10" in notes[0]

    def test_own_images_come_first(self, run, full):
        own = bp_model(run, 3, 6, HEAD)
        assert own["id"] != full["id"] and bp_model(replace(run, evidence=True), 3, 6, HEAD) == own

    def test_only_the_full_set_is_evidence(self, run, sample):
        bp_model(replace(run, data=cut(sample, name="mnist", skip=100)), 3, 6, HEAD)
        assert bp_model(replace(run, evidence=True), 3, 6, HEAD, train=False) is None

    @pytest.mark.parametrize("name, evidence", [("auto", True), ("cifar10-sample", False), ("cifar10", False)])
    def test_only_with_data_auto(self, name, evidence, tiny, tmp_path, monkeypatch):
        asked = []
        monkeypatch.setattr(datasets, "load", lambda name: (asked.append(name), tiny)[1])
        run = Run.of(dict(data=name, device="cpu"), store=Store(tmp_path))
        assert run.evidence is evidence and asked == [name] and run.device == "cpu" and run.data is tiny
        assert run.shape == (3, 32, 10)


class TestTogether:
    EACH = [HEAD, replace(HEAD, n=3), replace(HEAD, w_pool=9, sigma="elu"), replace(HEAD, seed=4, head_epochs=2)]

    def test_records_of_many_heads(self, run, trained, monkeypatch, cache):
        records = pipeline.ll_models(run, CONV, self.EACH)
        assert not list(cache.rglob("*.pt")) and len({record["layer"] for record in records}) == 1
        assert [record["asked"]["n"] for record in records] == [h.n for h in self.EACH] and all(r["together"] == 4 for r in records)
        np.testing.assert_allclose(
            [row["loss"] for row in records[0]["results"]["history"]], [row["loss"] for row in trained[1]["LL"]["results"]["history"]], rtol=1e-5
        )
        for record, head in zip(records, self.EACH, strict=True):
            said = training.predict(network(record, run.store), run.data.test_images)
            assert record["results"]["test_accuracy"] == (said.argmax(1) == run.data.test_labels).double().mean().item()
            assert [record] == [r for r in run.store.find("model") if r["asked"] == record["asked"]]
        no_training(monkeypatch)
        assert pipeline.ll_models(run, CONV, self.EACH[::-1]) == records[::-1]

    def test_only_the_missing_ones_are_trained(self, run, monkeypatch):
        first = pipeline.ll_models(run, CONV, self.EACH[:2])
        seen, heads = [], pipeline.train_heads
        monkeypatch.setattr(pipeline, "train_heads", lambda all, *a, **k: (seen.append(len(all)), heads(all, *a, **k))[1])
        again = pipeline.ll_models(run, CONV, [*self.EACH, HEAD])
        assert seen == [2] and again[:2] == first and again[4] == again[0]

    def test_one_that_overflows_is_named_and_the_others_are_stored(self, run, cache):
        with pytest.raises(FloatingPointError, match=r"epoch 1: lower head_eta0=1e\+37 \(sigma=gelu, n=4\)"):
            pipeline.ll_models(run, CONV, [*self.EACH, replace(HEAD, head_eta0=1e37, sigma="gelu", n=4)])
        assert len(run.store.find("model")) == 4 and not list(cache.rglob("*.pt"))

    @pytest.mark.parametrize("kind", ["LL", "BP"])
    def test_held_out_images_are_not_trained_on(self, kind, run):
        head, held = replace(HEAD, held_out=20), {}
        for change in (0, 1):  # other labels of the held-out images change nothing but the number
            labels = run.data.train_labels.clone()
            labels[-20:] = (labels[-20:] + change) % 10
            other = replace(run, data=replace(run.data, train_labels=labels), store=Store(run.store.root / str(change)))
            held[change] = ll_model(other, CONV, head) if kind == "LL" else bp_model(other, 3, 6, head)
            said = training.predict(network(held[change], other.store), run.data.train_images[-20:]).argmax(1)
            assert held[change]["results"]["validation_accuracy"] == (said == labels[-20:]).double().mean().item()
            assert held[change]["results"]["validation_images"] == 20 and held[change]["asked"]["held_out"] == 20
        same(held[0]["results"]["history"], held[1]["results"]["history"])
        assert len(held[0]["results"]["history"]) == HEAD.head_epochs

    def test_every_layer_with_every_head(self, run):
        """A model is known by the seeds of its layer and of its head, and so for whatever else both have."""
        convs, heads = [replace(CONV, seed=seed) for seed in (0, 1)], [replace(HEAD, seed=0), replace(HEAD, seed=1), replace(HEAD, seed=1, tau=1.0)]
        made = {(conv, head): ll_model(run, conv, head) for conv in convs for head in heads}
        assert len({record["id"] for record in made.values()}) == len(run.store.find("model")) == 6
        for (conv, head), record in made.items():
            assert record["layer"] == conv_layer(run, conv)["id"] and ll_model(run, conv, head) == record
            assert record["asked"]["seed"] == conv.seed and record["asked"].get("head_seed", conv.seed) == head.seed
            assert record["asked"]["tau"] == conv.tau and record["asked"].get("head_tau", conv.tau) == head.tau
        assert [r["asked"].get("head_seed") for r in run.store.find("model", tau=CONV.tau, seed=0)] == [None, 1, 1]

    def test_not_all_images_can_be_held_out(self, run):
        with pytest.raises(ValueError, match="held_out=60 is not valid: tiny has 60 training images"):
            ll_model(run, CONV, replace(HEAD, held_out=60))

    def test_at_a_terminal(self, tiny, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("KHNB_RESULTS", str(tmp_path / "store"))
        monkeypatch.setattr(datasets, "load", lambda name: tiny)
        monkeypatch.setattr(pipeline, "attack", None)
        given = TestModelsOf.parameters | dict(device="cpu", bp="none", attacked=False, n=[1, 2], w_pool=[5, 9])
        pipeline.main([json.dumps(given)])
        found = Store(tmp_path / "store").find("model")
        assert len(found) == 4 and all(record["together"] == 4 for record in found)
        assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("LL ") and "accuracy" in line]) == 4
        pipeline.main([json.dumps(TestModelsOf.parameters | dict(what="bp", device="cpu", attacked=False))])
        pipeline.main([json.dumps(given | dict(n=2, w_pool=5, feature_dtype=["float32", "float16"], head_seeds=[7, 8]))])
        store = Store(tmp_path / "store")
        made = sorted((r["asked"].get("head_seed", 0), r["asked"]["feature_dtype"]) for r in store.find("model", n=2.0, w_pool=5, seed=0))
        assert [one for one in made if one[0] in (7, 8)] == [(7, "float16"), (7, "float32"), (8, "float16"), (8, "float32")]
        assert len({r["layer"] for r in store.find("model", model="LL")}) == len(store.find("layer")) == 1
        assert [r["asked"]["model"] for r in Store(tmp_path / "store").find("model", model="BP")] == ["BP"]
        for wrong, message in (
            (1, "attacked=1 is not valid: expected true, false, thesis, separated or a list of attacks"), ([3], "or a list of attacks"), ("all", "attacked='all'"),
            ([{"attack": "cw"}], "attack='cw' is not valid: one of fgsm, pgd"), ([{"step": 0.1}], "unknown parameter 'step'"),
            ([{"attack": "pgd", "max_steps": 0}], "max_steps=0 is not valid"),
        ):
            with pytest.raises(ValueError, match=message):
                pipeline.main([json.dumps({"attacked": wrong})])

    def test_attacks_at_a_terminal(self, tiny, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("KHNB_RESULTS", str(tmp_path / "store"))
        monkeypatch.setattr(datasets, "load", lambda name: tiny)
        given = TestModelsOf.parameters | dict(what="bp", device="cpu", confidence=0.1)
        pipeline.main([json.dumps(given | dict(attacked=[{"confidence": 0.2}, {"attack": "pgd", "step": 0.01, "radius": 0.1, "max_steps": 5}]))])
        asked = {r["asked"]["attack"]: r["asked"] for r in Store(tmp_path / "store").find("attack")}
        assert asked["fgsm"]["confidence"] == 0.2 and asked["pgd"]["confidence"] == 0.1
        assert [asked["pgd"][name] for name in ("step", "radius", "max_steps")] == [0.01, 0.1, 5]
        assert "fgsm too-few, pgd too-few" in capsys.readouterr().out


def test_the_version_is_that_of_the_code_when_a_run_began(tiny, tmp_path, monkeypatch):
    results.code_version.cache_clear()
    run = Run(tiny, Store(tmp_path), "cpu", lambda text: None)
    before = results.code_version()
    monkeypatch.setattr(results.Path, "read_bytes", lambda self: b"changed while a model was trained")
    assert run.store.put("layer", {}, tiny, {}, {}, 1.0)["code"] == before
    results.code_version.cache_clear()
    assert results.code_version()["source"] != before["source"]
    monkeypatch.undo()
    results.code_version.cache_clear()


class TestAudit:
    def test_is_recorded_at_the_strength_of_R(self, trained, monkeypatch):
        run, records = trained
        attacked = attack(run, records["BP"], confidence=0.0)
        with pytest.raises(ValueError, match=r"has no R \(too-few\)"):
            pipeline.audit(run, attacked, records["BP"])
        attacked["results"]["fit"] |= dict(status="ok", R=0.03)
        given = []
        monkeypatch.setattr(pipeline.auditing, "audit", lambda model, images, labels, epsilon: given.append((images, labels, epsilon)) or dict(HEALTHY))
        record = pipeline.audit(run, attacked, records["BP"], images=2)
        (images, labels, epsilon), chosen = given[0], run.store.arrays(attacked)["images"][:2]
        assert epsilon == record["results"]["epsilon"] == 0.03 and record["results"]["verdict"] == pipeline.auditing.verdict(HEALTHY, 2) and record["results"]["images"] == 2
        assert torch.equal(images, training.to_float(run.data.test_images[chosen])) and torch.equal(labels, run.data.test_labels[chosen])
        assert record["asked"]["audited"] == attacked["id"] and pipeline.audit(run, attacked, records["BP"], images=2) == record and len(given) == 1


class Later:
    """A clock that is an hour ahead."""

    @staticmethod
    def now(zone):
        return datetime.now(zone) + timedelta(hours=1)


HEALTHY = dict(zero_gradients=0.0, zero_pixels=0.0, noise=0.0, fgsm=0.5, pgd=0.6, restarts=0.6, apgd=0.6, unbounded=1.0)


class TestWithoutWeights:
    def test_a_notebook_trains_again_and_a_sweep_does_not(self, tiny, tmp_path):
        told = []
        run = Run(tiny, Store(tmp_path), "cpu", told.append)
        before = bp_model(run, 3, 6, HEAD)
        weights = run.store.arrays(before)
        kept = run.store.drop(before, "linear_weight")
        assert bp_model(replace(run, bare=True), 3, 6, HEAD) == kept
        with pytest.raises(ValueError, match=f"model record {kept['id']} is kept without linear_weight; delete .*{kept['id']}.json to train it again"):
            network(kept, run.store)
        again = bp_model(run, 3, 6, HEAD)
        assert "was kept without its weights" in told[-2] and again["id"] == before["id"]
        for name, values in run.store.arrays(again).items():
            np.testing.assert_array_equal(values, weights[name])
        assert hashlib.sha256(weights["linear_weight"].tobytes()).hexdigest() == kept["arrays"]["dropped"]["linear_weight"]
        network(again, run.store)

    def test_filters_are_the_models_own_or_its_layers(self, tiny, tmp_path):
        run = Run(tiny, Store(tmp_path), "cpu", lambda text: None)
        LL, BP = ll_model(run, ConvSettings(K=3, w=6, m=2, conv_epochs=1), HEAD), bp_model(run, 3, 6, HEAD)
        before = pipeline.filters(LL, run.store)
        slim = pipeline.without_weights(run.store, LL)
        assert run.store.arrays(slim).keys() == {"linear_bias"} and before.shape == (9, 3, 6, 6)
        np.testing.assert_array_equal(pipeline.filters(slim, run.store), before)
        np.testing.assert_array_equal(pipeline.filters(BP, run.store), run.store.arrays(BP)["conv_weight"])
        with pytest.raises(ValueError, match=f"model record {BP['id']} is kept without its filters; delete .*json to train it again"):
            pipeline.filters(pipeline.without_weights(run.store, BP), run.store)

    def test_the_audit_is_of_the_last_fgsm(self, tiny, tmp_path, monkeypatch):
        run, at = Run(tiny, Store(tmp_path), "cpu", lambda text: None), []
        fake = dict(id="x", results=dict(fit=dict(status="ok", R=0.02, R_err=0.001, n=9)))
        monkeypatch.setattr(pipeline, "attack", lambda run, record, **how: fake | dict(asked=dict(attack=how["kind"], **how)))
        monkeypatch.setattr(pipeline, "audit", lambda run, attacked, record, images: at.append(attacked["asked"] | dict(images=images)) or dict(results=dict(verdict="")))
        job = pipeline.read_job(TestModelsOf.parameters | dict(bp="none", attacked="thesis", audited=True))
        pipeline._models(run, job)
        assert at == [dict(attack="fgsm", kind="fgsm", confidence=0.8, images=300)]

    def test_what_the_store_holds(self, tiny, tmp_path, monkeypatch):
        """All that match, none of other images, none trained: attacked, then kept without their weights."""
        monkeypatch.setenv("KHNB_RESULTS", str(tmp_path))
        monkeypatch.setattr(datasets, "load", lambda name: tiny)
        run = Run(tiny, Store(tmp_path), "cpu", lambda text: None)
        one, two = (bp_model(run, 3, 6, replace(HEAD, seed=seed)) for seed in (0, 1))
        other = bp_model(replace(run, data=replace(tiny, sha256=dict(train="0", test="0"))), 3, 6, HEAD)
        no_training(monkeypatch)
        pipeline.main(['{"what": "stored", "model": "BP", "K": 3, "seed": [1, 2], "attacked": [{"attack": "pgd", "max_steps": 2}], "weights": false, "confidence": 0.0}'])
        (found,) = run.store.find("attack")
        assert found["asked"]["of"] == two["id"] and found["asked"]["max_steps"] == 2
        assert [r["id"] for r in run.store.find("model") if "dropped" in r["arrays"]] == [two["id"]] and other["id"] not in (one["id"], two["id"])
        with pytest.raises(ValueError, match="unknown parameter 'Kk'"):
            pipeline.main(['{"what": "stored", "Kk": 3}'])

    def test_at_a_terminal(self, tiny, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("KHNB_RESULTS", str(tmp_path / "store"))
        monkeypatch.setattr(datasets, "load", lambda name: tiny)
        words = [json.dumps(TestModelsOf.parameters | dict(device="cpu", bp="none", confidence=0.1, weights=False, audited=True))]
        pipeline.main(words)
        store = Store(tmp_path / "store")
        (record,) = store.find("model")
        assert set(record["arrays"]["dropped"]) == {"linear_weight", "conv_weight"} and store.find("audit") == []  # too few images for an R
        pipeline.main(words)
        assert store.find("model") == [record] and "fgsm too-few" in capsys.readouterr().out
        later = json.dumps(json.loads(words[0]) | dict(attacked=[dict(attack="pgd", max_steps=2)]))
        monkeypatch.setattr(results, "datetime", Later)
        pipeline.main([later])  # takes the weights: the model is trained again, and what was known of it before is not taken for what is
        (again,), before = store.find("model"), {r["id"]: r["started"] for r in store.find("attack", attack="fgsm")}
        assert again["started"] > record["started"] and again["arrays"]["dropped"] == record["arrays"]["dropped"] and len(store.find("attack", attack="pgd")) == 1
        pipeline.main(words)
        after = {r["id"]: r["started"] for r in store.find("attack", attack="fgsm")}
        assert after.keys() == before.keys() and all(after[id] > before[id] for id in after), "an attack on the model as it was before"
        for name, value, message in (("weights", 3, "true or false"), ("audited", -1, "true, false or a number of images"), ("audited", "x", "true, false or a number of images")):
            with pytest.raises(ValueError, match=f"{name}={value!r} is not valid: expected {message}"):
                pipeline.main([json.dumps({name: value})])


class TestModelsOf:
    parameters = {name: p.default for name, p in PARAMETERS.items()} | CONV.dict() | HEAD.dict() | dict(bp_sigma="relu", bp_epochs=3, bp_batch=HEAD.head_batch)

    def test_both_from_the_store(self, trained, monkeypatch):
        run, records = trained
        no_training(monkeypatch)
        assert models_of(run, self.parameters | dict(bp="stored")) == models_of(run, self.parameters | dict(bp="train")) == records
        assert models_of(run, self.parameters | dict(bp="none")) == dict(LL=records["LL"])

    def test_the_twin_has_its_own_activation_and_epochs(self, trained, notes):
        run = replace(trained[0], note=notes.append)
        assert "BP" not in models_of(run, self.parameters | dict(bp="stored", bp_sigma="elu"))
        assert "BP" not in models_of(run, self.parameters | dict(bp="stored", bp_epochs=4))
        assert notes[-1] == "BP model: the store has none for these parameters; -p bp train trains it."

    def test_at_a_terminal(self, tiny, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("KHNB_RESULTS", str(tmp_path / "store"))
        monkeypatch.setattr(datasets, "load", lambda name: tiny)
        given = dict(self.parameters, device="cpu", bp="train", confidence=0.15)
        pipeline.main([json.dumps(given)])
        lines = [line for line in capsys.readouterr().out.splitlines() if ": accuracy " in line]
        found = {r["asked"]["model"]: r for r in Store(tmp_path / "store").find("model")}
        assert [line.split(":")[0] for line in lines] == [f"{kind} {found[kind]['id']}" for kind in ("LL", "BP")]
        assert f"accuracy {found['BP']['results']['test_accuracy']:.4f}" in lines[1]

    def test_a_file_of_models_at_a_terminal(self, tiny, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("KHNB_RESULTS", str(tmp_path / "store"))
        monkeypatch.setattr(datasets, "load", lambda name: tiny)
        given = dict(self.parameters, device="cpu", confidence=0.15)
        grid = tmp_path / "grid.json"
        grid.write_text(json.dumps([given, dict(given, n=2)]))
        pipeline.main([str(grid)])
        assert {r["asked"]["n"] for r in Store(tmp_path / "store").find("model")} == {2.0, float(given.get("n", 4))}
        grid.write_text(json.dumps([given, dict(given, n=0)]))
        with pytest.raises(ValueError, match="n=0 is not valid"):  # before the first one is looked at
            pipeline.main([str(grid)])
        with pytest.raises(ValueError, match="is no JSON"):
            pipeline.main(["K=20"])

    @pytest.mark.parametrize("grid", sorted(path for path in (Path(__file__).parents[1] / "sweeps").glob("*.json") if path.stem != "thesis"), ids=lambda path: path.stem)
    def test_the_committed_grids_are_valid(self, grid, monkeypatch):
        asked = []
        store = SimpleNamespace(find=lambda kind, **named: [])
        monkeypatch.setattr(pipeline.Run, "of", lambda parameters, **more: asked.append(parameters) or SimpleNamespace(store=store))
        monkeypatch.setattr(pipeline, "_models", lambda *given: None)
        for name in ("conv_layers", "collapse_probes"):
            fake = dict(id="", results=dict(f_1e4=[], alive=[], winners=[], f_score_1e4=0))
            monkeypatch.setattr(pipeline, name, lambda run, convs, *more: [fake for _ in convs])
        pipeline.main([str(grid)])
        assert asked

    def test_a_misspelt_name_at_a_terminal(self):
        with pytest.raises(ValueError, match="unknown parameter 'Kk'"):
            pipeline.main(['{"Kk": 20}'])


class TestDevice:
    def test_auto(self):
        assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu") and pick_device("cpu") == torch.device("cpu")

    @pytest.mark.parametrize("name", ["cuda:99", "gpu", "", "cpu:x"])
    def test_one_that_is_not_there(self, name):
        with pytest.raises(ValueError, match=f"device={name!r} cannot be used .*; try device='cpu'") as caught:
            pick_device(name)
        assert "\n" not in str(caught.value)

    def test_one_without_numbers(self):
        with pytest.raises(ValueError, match="meta"):  # tensors without content: no model can be trained there
            pick_device("meta")


class TestProgress:
    @pytest.mark.parametrize("wish, shown", [("1", True), ("0", False), (None, False)])
    def test_only_where_somebody_watches(self, wish, shown, monkeypatch):
        monkeypatch.setenv("CI", "1")
        monkeypatch.delenv("KHNB_PROGRESS", raising=False)
        if wish:
            monkeypatch.setenv("KHNB_PROGRESS", wish)
        with pipeline.progress(3, "x", "epoch") as bar:
            assert bar.disable is not shown


class TestOfNotebook:
    """What a notebook does right after its parameters cell."""

    names = ("K", "w", "m", "sigma", "conv_eta0", "seed")
    cell = dict(K=20, w=4, m=3, sigma="gelu", conv_eta0=1e-3, seed=0)

    def read(self, **more):
        rest = dict(__name__="__main__", _i="x", _=3, np=np, In=["x"], Out={}, get_ipython=print)  # as in a kernel
        return of_notebook(rest | self.cell | more, *self.names)

    def test_clean_values(self):
        assert self.read() == self.cell
        found = self.read(K=20.0, conv_eta0=1, sigma="GELU")
        assert found == self.cell | dict(conv_eta0=1.0) and type(found["K"]) is int and type(found["conv_eta0"]) is float

    @pytest.mark.parametrize("name, value, near", [("sigm", "relu", "sigma"), ("conv_eta", 0.1, "conv_eta0"), ("k", 3, None), ("bp", "none", None)])
    def test_a_misspelt_name_lists_the_valid_ones(self, name, value, near):
        with pytest.raises(ValueError) as caught:
            self.read(**{name: value})
        text = str(caught.value)
        assert f"unknown parameter {name!r}" in text and text.endswith("Valid parameters: " + ", ".join(self.names))
        assert (f"did you mean {near}?" in text) == (near is not None)

    @pytest.mark.parametrize(
        "name, value, valid",
        [
            ("K", 1, "whole number from 2 to 100"), ("K", 101, "whole number from 2 to 100"), ("K", 2.5, "whole number from 2 to 100"),
            ("K", "20", "whole number"), ("K", True, "whole number"), ("m", 1, "whole number >= 2"), ("conv_eta0", -1e-3, "number >= 0"),
            ("conv_eta0", float("nan"), "number >= 0"), ("conv_eta0", float("inf"), "number >= 0"), ("sigma", "swish", "one of sigmoid, tanh"),
            ("sigma", 3, "one of sigmoid, tanh"), ("seed", -1, "whole number from 0"),
        ],
    )
    def test_out_of_range(self, name, value, valid):
        with pytest.raises(ValueError, match=f"^{name}=.* is not valid.*must be {valid}"):
            self.read(**{name: value})

    @pytest.mark.parametrize("value", [None, [1], np.float64, {}])
    def test_missing_or_no_plain_value(self, value):
        with pytest.raises(ValueError, match="parameters m are missing.*Valid parameters: K, w, m, sigma"):
            self.read(m=value)
        with pytest.raises(ValueError, match="parameters K, w, m, sigma, conv_eta0, seed are missing"):
            of_notebook({}, *self.names)

    def test_every_default_is_valid(self):
        defaults = {name: p.default for name, p in PARAMETERS.items()}
        assert check(defaults) == defaults == of_notebook(defaults, *PARAMETERS)
        assert all(p.range and p.meaning for p in PARAMETERS.values())

    def test_m_and_n_depend_on_others(self):
        with pytest.raises(ValueError, match=r"m=5.*2 to K\^2 = 4"):
            ConvSettings(K=2, m=5)
        with pytest.raises(ValueError, match="n=2.5.*gelu.*whole power"):
            HeadSettings(n=2.5)
        assert HeadSettings(n=2.5, sigma="relu").n == 2.5 and HeadSettings(w_pool=1).s_pool == 1
