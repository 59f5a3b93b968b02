"""The store: whole records or none, whoever writes, whatever lies there."""

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from khnb import results
from khnb.results import DamagedRecord, Rows, Store, atomic_write, pack, provenance, record_id, unpack
from khnb.settings import PARAMETERS, ConvSettings, HeadSettings

DATA = SimpleNamespace(name="cifar10-sample", sha256=dict(train="a" * 64, test="b" * 64))
FULL = SimpleNamespace(name="cifar10", sha256=dict(train="c" * 64, test="d" * 64))
ASKED = dict(model="LL", K=2, seed=0)
ARRAYS = dict(weight=np.arange(6, dtype=np.float32).reshape(2, 3))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def put(store, asked=ASKED, data=DATA, results=None, arrays=ARRAYS, kind="model", **more):
    return store.put(kind, asked, data, results or dict(test_accuracy=0.5), arrays, 1.25, **more)


def files(store):
    return sorted(str(p.relative_to(store.root)) for p in store.root.rglob("*") if p.is_file())


class TestPutAndGet:
    def test_what_is_put_comes_back(self, store):
        record = put(store, layer="0123")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = store.get("model", dict(reversed(ASKED.items())), DATA)
            assert again == record == json.loads(store.path("model", record["id"]).read_text()) == store.find("model")[0]
        found = store.arrays(again)
        assert list(found) == ["weight"] and found["weight"].dtype == np.float32
        np.testing.assert_array_equal(found["weight"], ARRAYS["weight"])
        assert files(store) == [f"arrays/{record['id']}.npz", f"records/model/{record['id']}.json"]

    def test_says_where_it_comes_from(self, store):
        record = put(store, layer="0123")
        assert record["data"] == dict(name="cifar10-sample", **DATA.sha256) and record["layer"] == "0123"
        assert set(record["code"]) == {"version", "commit", "dirty", "source"} and len(record["code"]["source"]) == 16
        assert set(record["libraries"]) == {"python", "torch", "numpy", "scipy"}
        assert record["hardware"]["device"] == "cpu" and record["hardware"]["name"] and record["hardware"]["threads"] >= 1
        assert record["wall_s"] == 1.2 and record["started"].endswith("+00:00")
        assert str(Path.home()) not in json.dumps(provenance())

    def test_an_empty_store(self, store):
        assert store.find("model") == [] and store.get("model", ASKED, DATA) is None and files(store) == []

    def test_all_kinds_of_numbers(self, store):
        arrays = dict(a=np.array([np.nan, np.inf]), b=np.zeros((0, 3), np.int8), c=np.float64(3), d=[True, False], e=[1, 2])
        found = store.arrays(put(store, arrays=arrays))
        for name, value in arrays.items():
            np.testing.assert_array_equal(found[name], np.asarray(value))
            assert found[name].dtype == np.asarray(value).dtype and found[name].shape == np.shape(value)

    def test_a_record_without_arrays(self, store):
        assert store.arrays(put(store, arrays={})) == {}

    def test_putting_again_replaces(self, store):
        put(store), put(store, results=dict(test_accuracy=0.75), arrays=dict(weight=np.ones(2)))
        (record,) = store.find("model")
        assert record["results"] == dict(test_accuracy=0.75)
        np.testing.assert_array_equal(store.arrays(record)["weight"], np.ones(2))


class TestRows:
    RADII = dict(radii=np.array([0.1, np.inf, 0.2, 0.3]), sure=np.array([0.6, 0.9, 0.8, 0.7], np.float32))

    def test_some_rows_of_another_record(self, store):
        wide = put(store, arrays=self.RADII)
        narrow = put(store, ASKED | dict(seed=1), arrays=Rows(wide, "sure", 0.7))
        assert files(store) == sorted([f"arrays/{wide['id']}.npz", *(f"records/model/{r['id']}.json" for r in (wide, narrow))])
        again = store.get("model", ASKED | dict(seed=1), DATA)
        assert again == narrow and again["arrays"]["sha256"] == wide["arrays"]["sha256"]
        for found in (store.arrays(again), store.rows(Rows(wide, "sure", 0.7))):
            assert found["radii"].tolist() == [np.inf, 0.2, 0.3] and found["sure"].tolist() == [np.float32(x) for x in (0.9, 0.8, 0.7)]

    def test_of_rows(self, store):
        wide = put(store, arrays=self.RADII)
        narrow = put(store, ASKED | dict(seed=1), arrays=Rows(wide, "sure", 0.7))
        narrowest = put(store, ASKED | dict(seed=2), arrays=Rows(narrow, "sure", 0.85))
        assert store.arrays(narrowest)["radii"].tolist() == [np.inf]

    @pytest.mark.parametrize("changed", [dict(least={"depth": 1}), dict(least={"sure": "much"}), dict(least=3), dict(least=[1])])
    def test_rows_that_make_no_sense(self, store, changed):
        wide = put(store, arrays=self.RADII)
        with pytest.raises(ValueError, match="arrays .*npz"):
            store.arrays(wide | dict(arrays=wide["arrays"] | changed))

    @pytest.mark.parametrize("name", ["../records/x.npz", "/etc/passwd", "0123456789abcdef.json", "", 3, None, "0123456789abcdef.npz\n"])
    def test_a_file_elsewhere(self, store, name):
        record = put(store)
        with pytest.raises(ValueError, match="as the file of its arrays"):
            store.arrays(record | dict(arrays=record["arrays"] | dict(file=name)))


class TestDrop:
    ARRAYS = dict(weight=np.arange(6.0), bias=np.arange(2.0))

    def test_keeps_the_rest_and_says_what_is_gone(self, store):
        record = put(store, arrays=self.ARRAYS)
        dropped = store.drop(record, "weight", "unknown")
        assert store.get("model", ASKED, DATA) == dropped
        assert {k: v for k, v in dropped.items() if k != "arrays"} == {k: v for k, v in record.items() if k != "arrays"}
        assert dropped["arrays"]["dropped"] == {"weight": hashlib.sha256(np.arange(6.0).tobytes()).hexdigest()} and dropped["arrays"]["names"] == ["bias"]
        assert list(store.arrays(dropped)) == ["bias"] and store.arrays(dropped)["bias"].tolist() == [0, 1]
        assert files(store) == [f"arrays/{record['id']}-kept.npz", f"records/model/{record['id']}.json"]
        assert store.drop(dropped, "weight") == dropped
        assert set(store.drop(dropped, "bias")["arrays"]["dropped"]) == {"weight", "bias"} and store.arrays(store.find("model")[0]) == {}

    def test_putting_again_brings_all_back(self, store):
        store.drop(put(store, arrays=self.ARRAYS), "weight")
        record = put(store, arrays=self.ARRAYS)
        assert sorted(store.arrays(record)) == ["bias", "weight"] and files(store) == [f"arrays/{record['id']}.npz", f"records/model/{record['id']}.json"]

    @pytest.mark.parametrize("at", [0, 1])
    def test_a_crash_leaves_it_as_it_was(self, store, monkeypatch, at):
        record, calls = put(store, arrays=self.ARRAYS), []

        def write(path, content):
            calls.append(path)
            if len(calls) > at:
                raise OSError("disk full")
            atomic_write(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(results, "atomic_write", write)
            with pytest.raises(OSError, match="disk full"):
                store.drop(record, "weight")
        assert store.get("model", ASKED, DATA) == record and sorted(store.arrays(record)) == ["bias", "weight"]
        assert list(store.arrays(store.drop(record, "weight"))) == ["bias"]


class TestId:
    def test_the_same_asked_in_any_order(self):
        one = record_id("model", dict(K=2, p=2.0, sigma="elu"), DATA.sha256)
        assert one == record_id("model", dict(sigma="elu", p=2.0, K=2), dict(reversed(DATA.sha256.items()), name="x"))
        assert len(one) == 16 and int(one, 16) >= 0

    def test_whole_numbers_may_have_a_point(self):
        one, two = ConvSettings(K=10, p=2, m=3.0), ConvSettings(K=10.0, p=2.0, m=3)
        assert record_id("layer", one.dict(), DATA.sha256) == record_id("layer", two.dict(), DATA.sha256)

    @pytest.mark.parametrize("settings", [ConvSettings(), HeadSettings()], ids=["conv", "head"])
    def test_every_hyperparameter_counts(self, settings):
        ids = {record_id("layer", settings.dict(), DATA.sha256)}
        for name in settings.names():
            kind, value = PARAMETERS[name].kind, getattr(settings, name)
            halved = name in ("gamma", "conv_share")  # a share: one more is too much
            other = next(w for w in kind if w != value) if isinstance(kind, tuple) else value / 2 if halved else value + 1
            changed = dataclasses.replace(settings, **{name: other})
            assert changed != settings
            ids.add(record_id("layer", changed.dict(), DATA.sha256))
        assert len(ids) == 1 + len(settings.names())

    def test_kind_and_data_count(self):
        other = [dict(DATA.sha256, train="c"), dict(DATA.sha256, test="c"), dict(train="b" * 64, test="a" * 64)]
        ids = {record_id("model", ASKED, sha) for sha in [DATA.sha256, *other]} | {record_id("layer", ASKED, DATA.sha256)}
        assert len(ids) == 5

    def test_another_hyperparameter_is_not_found(self, store):
        put(store)
        for asked in (ASKED | dict(K=3), ASKED | dict(more=1), dict(model="LL", K=2)):
            assert store.get("model", asked, DATA) is None
        assert store.get("layer", ASKED, DATA) is None and store.get("model", ASKED, FULL) is None


class TestFind:
    def test_full_data_first_then_by_seed(self, store):
        for data in (DATA, FULL):
            for seed in (2, 0, 10):
                put(store, ASKED | dict(seed=seed), data)
        found = [(r["data"]["name"], r["asked"]["seed"]) for r in store.find("model", model="LL", K=2)]
        assert found == [(name, seed) for name in ("cifar10", "cifar10-sample") for seed in (0, 2, 10)]
        assert store.full("model", model="LL", K=2) == store.find("model", model="LL", K=2)[:3] and store.full("model", K=3) == []

    def test_the_usual_before_the_unusual(self, store):
        for more in (dict(seed=0, n=2.0, head_epochs=7), dict(seed=5), dict(seed=1, pooling="last"), dict(seed=1, n=2.0)):
            put(store, dict(K=2, n=4.0, head_epochs=100) | more)
        assert [(r["asked"]["seed"], len(r["asked"])) for r in store.find("model", K=2)] == [(5, 4), (1, 4), (1, 5), (0, 4)]

    def test_only_what_was_named(self, store):
        put(store, dict(K=2, seed=0)), put(store, dict(K=3, seed=0)), put(store, dict(K=2, seed=0), kind="layer")
        assert sorted(r["asked"]["K"] for r in store.find("model", seed=0)) == [2, 3]
        assert len(store.find("model", K=2)) == 1 and store.find("model", K=4) == []
        assert store.find("model", w=None) == []  # not asked is not None


class TestRefused:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("place", ["top", "deep"])
    def test_numbers_that_are_not_finite(self, store, value, place):
        with pytest.raises(ValueError, match="(?i)float|finite"):
            put(store, results=dict(R=float(value)) if place == "top" else dict(history=[dict(loss=0.1), dict(loss=float(value))]))
        assert files(store) == []

    def test_a_hyperparameter_that_is_not_finite(self, store):
        with pytest.raises(ValueError):
            put(store, ASKED | dict(p=float("nan")))
        assert files(store) == []

    def test_another_kind(self, store):
        with pytest.raises(ValueError, match="kind 'modle'.*layer, probe, model, attack"):
            put(store, kind="modle")

    @pytest.mark.parametrize("value", [[None], [{}], [dict(a=1), "x"], np.array([1, "a"], object), [object()]])
    def test_python_objects(self, store, value):
        with pytest.raises(ValueError, match="'bad'.*objects"):
            put(store, arrays=dict(good=np.ones(2), bad=value))
        assert files(store) == []


class TestAtomic:
    def test_a_full_disk_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "x.json"
        atomic_write(path, b"old")

        def full(*_):
            raise OSError(28, "No space left on device")

        for name in ("fsync", "replace"):
            with monkeypatch.context() as patch:
                patch.setattr(os, name, full)
                with pytest.raises(OSError, match="No space"):
                    atomic_write(path, b"new")
            assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.json"]

    def test_others_may_read_it(self, tmp_path):
        atomic_write(tmp_path / "x.json", b"{}")
        assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o644

    def test_arrays_come_first(self, store, monkeypatch):
        written = []

        def stop_at_json(path, content):
            written.append(path.suffix)
            if path.suffix == ".json":
                raise KeyboardInterrupt
            atomic_write(path, content)

        monkeypatch.setattr(results, "atomic_write", stop_at_json)
        with pytest.raises(KeyboardInterrupt):
            put(store)
        assert written == [".npz", ".json"] and store.find("model") == [] and store.get("model", ASKED, DATA) is None

    def test_a_crash_while_replacing_is_noticed(self, store, monkeypatch):
        put(store)
        monkeypatch.setattr(results, "atomic_write", lambda path, content: atomic_write(path, content) if path.suffix == ".npz" else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            put(store, arrays=dict(weight=np.ones(2)))
        for record in store.find("model"):  # the old record: with its own arrays, or with an error
            try:
                np.testing.assert_array_equal(store.arrays(record)["weight"], ARRAYS["weight"])
            except ValueError as error:
                assert record["id"] in str(error)

    def test_leftovers_are_not_read(self, store):
        record = put(store)
        path = store.path("model", record["id"])
        path.with_name(f".{path.name}.x8s7d6_f").write_text("{")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(store.find("model")) == 1

    def test_killed_writers_leave_whole_records(self, tmp_path):
        # a child writes as fast as it can until SIGKILL, some time after its first record; one import serves them all
        out = run_writers(
            tmp_path,
            """
            import itertools, random, signal, time
            random.seed(0)
            os.fsync = lambda file: time.sleep(0.02)  # a slow disk: most kills hit a file that is not yet in place
            for child in range(16):
                ours, theirs = os.pipe()
                pid = os.fork()
                if pid == 0:
                    for i in itertools.count():
                        put(child * 100_000 + i, 20_000)
                        os.write(theirs, b"x")
                os.read(ours, 1)
                time.sleep(0.1 * random.random())
                os.kill(pid, signal.SIGKILL)
                assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
            """,
        )
        assert out.returncode == 0, out.stderr
        store = Store(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            records = store.find("model")
        assert len(records) >= 16
        for record in records:
            assert (store.arrays(record)["x"] == record["asked"]["seed"]).all()
        assert len(list(store.root.glob("records/model/*.json"))) == len(records)
        assert any(Path(name).name.startswith(".") for name in files(store))  # some were hit in the middle

    def test_two_writers_lose_nothing(self, tmp_path):
        out = run_writers(
            tmp_path,
            """
            pids = []
            for child in range(2):
                pids.append(os.fork())
                if pids[-1] == 0:
                    for i in range(10):
                        put(child * 100 + i, 500)
                        put(1000 + i, 500)  # the same by both
                    os._exit(0)
            assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
            """,
        )
        assert out.returncode == 0, out.stderr
        store = Store(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            records = store.find("model")
        expected = [*range(10), *range(100, 110), *range(1000, 1010)]
        assert [r["asked"]["seed"] for r in records] == expected
        assert all((store.arrays(r)["x"] == r["asked"]["seed"]).all() for r in records)
        assert len(files(store)) == 2 * len(expected)


def run_writers(root, body):
    start = """
        import os, sys
        from types import SimpleNamespace
        import numpy as np
        from khnb.results import Store, provenance
        data = SimpleNamespace(name="cifar10-sample", sha256=dict(train="a", test="b"))
        provenance()  # asks git once, not in every child

        def put(seed, size):
            Store(sys.argv[1]).put("model", dict(seed=seed), data, dict(a=0.5), dict(x=np.full(size, seed)), 1.0)
    """
    script = textwrap.dedent(start) + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", script, str(root)], capture_output=True, text=True, timeout=120)


def rewrite(store, record, change):
    """The record's file after ``change`` on its dictionary."""
    record = json.loads(json.dumps(record))
    change(record)
    store.path("model", record["id"]).write_text(json.dumps(record))


DAMAGE = {
    "empty": lambda text: b"",
    "half": lambda text: text[: len(text) // 2],
    "not text": lambda text: b"\xff\xfe" + text,
    "null": lambda text: b"null",
    "a list": lambda text: b"[1, 2]",
    "a number": lambda text: b"7",
    "an empty object": lambda text: b"{}",
    "nested": lambda text: b"[" * 100_000,
    "another K": lambda text: text.replace(b'"K": 2', b'"K": 3'),
    "another seed": lambda text: text.replace(b'"seed": 0', b'"seed": 1'),
    "other images": lambda text: text.replace(b"a" * 64, b"c" * 64),
    "another kind": lambda text: text.replace(b'"kind": "model"', b'"kind": "layer"'),
    "no results": lambda text: text.replace(b'"results"', b'"result"'),
    "results of text": lambda text: text.replace(b'"results": {', b'"results": "x", "other": {'),
    "no arrays": lambda text: text.replace(b'"arrays"', b'"array"'),
    "huge number": lambda text: text.replace(b'"K": 2', b'"K": ' + b"9" * 5000),
}


class TestDamaged:
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_is_named_and_left_out(self, store, damage):
        record, good = put(store), put(store, ASKED | dict(seed=5))
        path = store.path("model", record["id"])
        text = path.read_bytes()
        assert DAMAGE[damage](text) != text
        path.write_bytes(DAMAGE[damage](text))
        with pytest.warns(DamagedRecord, match=f"{record['id']}.json is damaged.*delete it"):
            assert store.find("model") == [good]
        with pytest.warns(DamagedRecord):
            assert store.get("model", ASKED, DATA) is None

    def test_under_another_name(self, store):
        record = put(store)
        path = store.path("model", record["id"])
        path.rename(path.with_name("0123456789abcdef.json"))
        with pytest.warns(DamagedRecord, match="0123456789abcdef.json"):
            assert store.find("model") == []

    def test_in_another_folder(self, store):
        path = store.path("model", put(store)["id"])
        (store.root / "records" / "layer").mkdir()
        path.rename(store.root / "records" / "layer" / path.name)
        with pytest.warns(DamagedRecord):
            assert store.find("layer") == []

    def test_a_folder_in_its_place(self, store):
        store.path("model", "0123456789abcdef").mkdir(parents=True)
        with pytest.warns(DamagedRecord):
            assert store.find("model") == []

    @pytest.mark.parametrize("name", ["id", "kind", "asked", "data", "results", "arrays", "started"])
    def test_a_field_that_is_missing(self, store, name):
        record = put(store)
        path = store.path("model", record["id"])
        path.write_text(json.dumps({k: v for k, v in record.items() if k != name}))
        with pytest.warns(DamagedRecord):
            assert store.find("model") == []

    def test_a_data_set_without_a_name(self, store):
        rewrite(store, put(store), lambda r: r["data"].pop("name"))
        with pytest.warns(DamagedRecord):
            assert store.find("model") == []

    def test_asked_is_no_dictionary_but_the_id_fits(self, store):
        record = put(store)
        record.update(asked=["K"], id=record_id("model", ["K"], DATA.sha256))
        store.path("model", record["id"]).write_text(json.dumps(record))
        with pytest.warns(DamagedRecord):
            assert len(store.find("model", K=2)) == 1

    def test_a_number_that_is_not_finite(self, store):
        record = put(store)
        path = store.path("model", record["id"])
        path.write_text(path.read_text().replace('"test_accuracy": 0.5', '"test_accuracy": NaN'))
        with pytest.warns(DamagedRecord):
            assert store.find("model") == []


class TestDamagedArrays:
    def content(self, store, record, content, resign=False):
        (store.root / "arrays" / f"{record['id']}.npz").write_bytes(content)
        if resign:  # as one would who wants to be believed
            record["arrays"]["sha256"] = results.hashlib.sha256(content).hexdigest()
        return record

    @pytest.mark.parametrize("change", [lambda c: b"", lambda c: c[:-1], lambda c: c + b"x", lambda c: c.replace(b"weight", b"Weight")])
    def test_are_named(self, store, change):
        record = put(store)
        content = pack(ARRAYS)
        assert change(content) != content
        with pytest.raises(ValueError, match=f"{record['id']}.npz.*delete the record"):
            store.arrays(self.content(store, record, change(content)))

    def test_missing(self, store):
        record = put(store)
        (store.root / "arrays" / f"{record['id']}.npz").unlink()
        with pytest.raises(ValueError, match=f"{record['id']}.npz.*cannot be read"):
            store.arrays(record)

    def test_a_pickle_inside_is_never_run(self, store, tmp_path):
        target = tmp_path / "ran"

        class Evil:
            def __reduce__(self):
                return Path.touch, (target,)

        content = io.BytesIO()
        np.savez(content, weight=np.array([Evil()], dtype=object))
        record = self.content(store, put(store), content.getvalue(), resign=True)
        with pytest.raises(ValueError, match="[Oo]bject arrays"):
            store.arrays(record)
        assert not target.exists()
        with np.load(io.BytesIO(content.getvalue()), allow_pickle=True) as file:  # it would have been
            file["weight"]
        assert target.exists()

    @pytest.mark.parametrize("content", ["empty", "zip without end", "npy", "pickle", "text in a zip", "damaged inside"])
    def test_whatever_is_signed_gives_one_kind_of_error(self, store, content):
        import pickle
        import zipfile

        npy, odd, whole = io.BytesIO(), io.BytesIO(), pack(dict(weight=np.arange(1000)))
        np.save(npy, np.ones(3))
        with zipfile.ZipFile(odd, "w") as file:
            file.writestr("weight.npy", "no array")
        content = {
            "empty": b"", "zip without end": b"PK\x03\x04" + bytes(40), "npy": npy.getvalue(), "pickle": pickle.dumps(1),
            "text in a zip": odd.getvalue(), "damaged inside": whole[:60] + bytes(40) + whole[100:],
        }[content]
        record = put(store)
        with pytest.raises(ValueError, match=record["id"]):
            store.arrays(self.content(store, record, content, resign=True))


class TestPacking:
    @given(st.lists(st.one_of(st.integers(0, 2**33).map(lambda k: k * 1e-6), st.just(np.inf)), max_size=20), st.sampled_from([(-1,), (1, -1)]))
    def test_whole_multiples_come_back_to_the_last_bit(self, values, shape):
        value = np.array(values).reshape(shape if values else (0,))
        back = unpack(pack(dict(a=value)))["a"]
        assert back.dtype == value.dtype and back.shape == value.shape and back.tobytes() == value.tobytes()

    @given(st.lists(st.floats(width=64), max_size=20))
    def test_so_do_all_others(self, values):
        back = unpack(pack(dict(a=np.array(values))))["a"]
        assert back.dtype == np.float64 and back.tobytes() == np.array(values).tobytes()

    def test_radii_are_kept_as_whole_numbers(self):
        radii = np.append(np.random.default_rng(0).integers(0, 10**5, 4000) * 1e-6, np.inf)
        with np.load(io.BytesIO(pack(dict(radii=radii)))) as file:
            assert file.files == ["radii@1e-6"] and file["radii@1e-6"].dtype == np.int32
        assert len(pack(dict(radii=radii))) < 0.6 * len(pack(dict(radii=radii + 1e-9)))

    @pytest.mark.parametrize("value", [-1e-6, -0.0, np.nan, 1.5e-6, 2.0**31 * 1e-6, np.float32(1e-6), np.int64(3), True])
    def test_what_is_none_stays_as_it_is(self, value):
        with np.load(io.BytesIO(pack(dict(a=value)))) as file:
            assert file.files == ["a"] and file["a"].tobytes() == np.asarray(value).tobytes()


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=6)


def places(value, path=()):
    """Paths to everything inside a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


class TestFuzz:
    @pytest.fixture
    def written(self, store):
        return store, json.loads(json.dumps(put(store))), put(store, ASKED | dict(seed=5))

    def read(self, written, content):
        store, record, good = written
        path = store.path("model", record["id"])
        path.write_bytes(content)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found, got = store.find("model", model="LL"), store.get("model", ASKED, DATA)
        assert {w.category for w in caught} <= {DamagedRecord}
        assert good in found and len(found) + (got is None) >= 2
        if got is None:  # left out, and said so
            assert found == [good] and all(record["id"] in str(w.message) for w in caught) and len(caught) == 2
        else:  # what is believed is what was asked
            assert got["asked"] == ASKED and got["data"]["train"] == DATA.sha256["train"] and not caught
            try:
                store.arrays(got)
            except ValueError as error:
                assert record["id"] in str(error)

    @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(content=st.binary(max_size=200))
    def test_any_bytes(self, written, content):
        self.read(written, content)

    @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(value=JSON)
    def test_any_json(self, written, value):
        self.read(written, json.dumps(value).encode())

    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_one_place_replaced_or_gone(self, written, data):
        record = json.loads(json.dumps(written[1]))
        *way, last = data.draw(st.sampled_from([p for p in places(record) if p]))
        inside = record
        for key in way:
            inside = inside[key]
        if data.draw(st.booleans()):
            inside[last] = data.draw(JSON)
        else:
            del inside[last]
        self.read(written, json.dumps(record).encode())

    @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(at=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans())
    def test_one_byte_wrong_or_a_cut(self, written, at, byte, cut):
        text = json.dumps(written[1], indent=1).encode()
        i = int(at * len(text))
        self.read(written, text[:i] if cut else text[:i] + bytes([byte]) + text[i + 1 :])


def settle(store, kind="model"):
    """As if the records had been written a minute ago, but for the inode's own time."""
    for path in (store.root / "records" / kind).glob("*.json"):
        os.utime(path, (1e9, 1e9))


class TestLight:
    """The index beside the records: never stale, never needed."""

    @pytest.fixture
    def filled(self, store, monkeypatch):
        monkeypatch.setattr(results, "RACY", -3600)  # as if everything had been there for long
        for seed in range(3):
            put(store, dict(K=10, seed=seed), results=dict(test_accuracy=0.5, history=[dict(epoch=1)] * 3))
        assert len(store.light("model")) == 3
        return store

    def index(self, store):
        return store.root / ".index" / "model.json.z"

    def test_has_all_but_what_is_long(self, filled):
        whole = filled.find("model", seed=1)[0]
        light = Store(filled.root).light("model")[whole["id"]]
        assert light["asked"] == whole["asked"] and "history" in whole["results"]
        assert light == whole | dict(results={k: v for k, v in whole["results"].items() if k != "history"})

    def test_is_read_from_the_index(self, filled, monkeypatch):
        monkeypatch.setattr(Store, "_read", lambda *_: pytest.fail("a record was read"))
        assert len(Store(filled.root).light("model")) == 3

    @pytest.mark.parametrize("again", [True, False], ids=["the same store", "another"])
    def test_replaced_new_and_gone(self, filled, again):
        store = filled if again else Store(filled.root)
        put(filled, dict(K=10, seed=0), results=dict(test_accuracy=0.99))
        put(filled, dict(K=10, seed=7))
        next(iter((filled.root / "records" / "model").glob(f"{filled.find('model', seed=1)[0]['id']}.json"))).unlink()
        found = {r["asked"]["seed"]: r["results"].get("test_accuracy") for r in store.light("model").values()}
        assert set(found) == {0, 2, 7} and found[0] == 0.99

    def test_changed_in_place_with_the_same_size_and_time(self, filled):
        path = filled.path("model", filled.find("model", seed=1)[0]["id"])
        before, text = path.stat(), path.read_text()
        with open(path, "r+") as file:
            file.write(text.replace('"kind"', '"kinD"'))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # only the inode's own time tells
        with pytest.warns(DamagedRecord, match=path.name):
            assert len(Store(filled.root).light("model")) == 2
        with pytest.warns(DamagedRecord, match=path.name):  # and again, every time
            assert len(Store(filled.root).light("model")) == 2

    def test_what_changed_just_now_is_not_kept(self, store):
        put(store, dict(K=10))
        assert len(store.light("model")) == 1 and results._read_index(self.index(store)) == {}

    @pytest.mark.parametrize("content", [b"", b"x", zlib.compress(b"[1]"), zlib.compress(b'{"a.json": 1}'), zlib.compress(b"{")])
    def test_a_damaged_index_is_made_again(self, filled, content):
        self.index(filled).write_bytes(content)
        assert len(Store(filled.root).light("model")) == 3 and len(results._read_index(self.index(filled))) == 3

    def test_where_it_cannot_be_written(self, filled):
        self.index(filled).unlink()
        self.index(filled).parent.rmdir()
        self.index(filled).parent.write_text("in the way")
        assert len(Store(filled.root).light("model")) == 3 == len(Store(filled.root).find("model"))

    def test_written_and_read_at_once(self, filled):
        writers = [threading.Thread(target=lambda i=i: [put(filled, dict(K=10, seed=100 * i + j)) for j in range(20)]) for i in range(1, 4)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for thread in writers:
                thread.start()
            counts = [len(Store(filled.root).light("model")) for _ in range(20)]
            for thread in writers:
                thread.join()
        assert counts == sorted(counts) and len(Store(filled.root).light("model")) == 63

    @pytest.mark.slow
    def test_twenty_thousand_in_two_seconds(self, store):
        put(store, dict(K=10), results=dict(history=[dict(epoch=i, eta=0.001, loss=1 / (i + 1), accuracy=0.5, seconds=1.25) for i in range(100)]))
        folder, record = store.root / "records" / "model", store.find("model")[0]
        for seed in range(20_000):
            asked = record["asked"] | dict(seed=seed)
            one = record | dict(asked=asked, id=record_id("model", asked, record["data"]))
            (folder / f"{one['id']}.json").write_text(json.dumps(one, indent=1))
        time.sleep(results.RACY + 1)
        started = time.process_time()
        assert len(store.light("model")) == 20_001
        built, started = time.process_time() - started, time.process_time()
        assert len(Store(store.root).light("model")) == 20_001
        print(f"20,000 records: {built:.1f} s the first time, then {time.process_time() - started:.2f} s")
        assert time.process_time() - started < 2


class TestCode:
    def test_records_of_one_version_are_selected(self, store, monkeypatch):
        old = put(store, dict(K=10))
        now = results.code_version()
        monkeypatch.setattr(results, "code_version", lambda: now | dict(source="feedfeedfeedfeed", commit="c0ffee"))
        put(store, dict(K=11))
        everything = {r["code"]["source"] for r in Store(store.root).find("model")}
        assert everything == {now["source"], "feedfeedfeedfeed"}
        for code in ("current", "feedfeed", "c0ffee"):
            assert [r["asked"]["K"] for r in Store(store.root, code).find("model")] == [11]
            assert Store(store.root, code).get("model", dict(K=10), DATA) is None
        monkeypatch.setenv("KHNB_CODE", now["source"][:6])
        assert [r["id"] for r in Store(store.root).find("model")] == [old["id"]] == list(Store(store.root).light("model"))
