"""Every layout is read right, and every kind of damage is one clear error: nothing else, and nothing executed."""

import gzip
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from khnb import data
from khnb.data import DataError, load

# pickletools warns of odd backslashes in the text opcodes of protocol 0, on the way to a DataError
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
RECORD = 3073


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch, tmp_path):
    """No data set is named or cached, whatever this machine has."""
    monkeypatch.delenv("KHNB_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def small(monkeypatch, sample):
    """A stand-in for CIFAR-10 with 4 real images a batch, known to the module by its own hashes."""
    monkeypatch.setattr(data, "BATCH", 4)
    images, labels = sample.train_images.numpy(), sample.train_labels.numpy().astype(np.uint8)
    names = [*data.BATCHES["train"], *data.BATCHES["test"]]
    batches = {name: (images[4 * i : 4 * i + 4], labels[4 * i : 4 * i + 4]) for i, name in enumerate(names)}
    monkeypatch.setattr(data, "BATCH_SHA256", {name: data.digest(*batch) for name, batch in batches.items()})
    monkeypatch.setattr(
        data,
        "SHA256",
        {"train": data.digest(images[:20], labels[:20]), "test": data.digest(images[20:24], labels[20:24])},
    )
    return batches


def content(batch) -> dict:
    images, labels = batch
    return {
        b"batch_label": b"a batch",
        b"labels": labels.tolist(),
        b"data": images.reshape(len(images), -1),
        b"filenames": [b"x.png"] * len(labels),
    }


def python2(batch) -> bytes:
    """A batch as Python 2 pickled it, protocol 2, byte for byte in the manner of the official files."""
    images, labels = batch

    def short(text):
        return b"U" + bytes([len(text)]) + text

    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x06cnumpy\nndarray\nq\x07K\x00\x85" + short(b"b") + b"\x87R("
    array += (
        b"K\x01M"
        + struct.pack("<H", len(images))
        + b"M\x00\x0c\x86cnumpy\ndtype\n"
        + short(b"u1")
        + b"K\x00K\x01\x87R("
    )
    array += b"K\x03" + short(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    array += b"T" + struct.pack("<i", images.size) + images.tobytes() + b"tb"
    numbers = b"]q\x05(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}q\x01(" + short(b"labels") + b"q\x04" + numbers + short(b"data") + array + b"u."


def write(folder: Path, batches: dict, layout: str) -> Path:
    """All batches in a layout: ``bin``, ``py2`` or ``py`` and the number of a pickle protocol."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, batch in batches.items():
        images, labels = batch
        if layout == "bin":
            (folder / f"{name}.bin").write_bytes(np.column_stack([labels, images.reshape(len(images), -1)]).tobytes())
        elif layout == "py2":
            (folder / name).write_bytes(python2(batch))
        else:
            (folder / name).write_bytes(pickle.dumps(content(batch), protocol=int(layout[2:])))
    return folder


def same(found: data.Dataset, batches: dict) -> bool:
    images, labels = (np.concatenate(part) for part in zip(*batches.values()))
    cut = len(images) - data.BATCH
    return (
        np.array_equal(found.train_images, images[:cut])
        and np.array_equal(found.test_images, images[cut:])
        and np.array_equal(found.train_labels, labels[:cut])
        and np.array_equal(found.test_labels, labels[cut:])
    )


def complaint(*args, **more) -> str:
    """The error of a load, which must be one line."""
    with pytest.raises(DataError) as caught:
        load(*args, **more)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


class TestTheSample:
    def test_shapes_types_and_balance(self, sample):
        assert sample.train_images.shape == (1500, 3, 32, 32) and sample.test_images.shape == (1000, 3, 32, 32)
        assert sample.train_images.dtype == torch.uint8 and sample.train_labels.dtype == torch.int64
        assert torch.bincount(sample.train_labels).tolist() == [150] * 10
        assert torch.bincount(sample.test_labels).tolist() == [100] * 10
        assert len(sample.classes) == 10 and sample.classes[3] == "cat"

    def test_it_is_pinned(self, sample):
        for split, pinned in data.SAMPLE_SHA256.items():
            images, labels = getattr(sample, f"{split}_images").numpy(), getattr(sample, f"{split}_labels").numpy()
            assert sample.sha256[split] == data.digest(images, labels) == pinned

    def test_it_is_small(self):
        assert sum(path.stat().st_size for path in data.ASSETS.iterdir()) < 4.5e6

    def test_it_comes_with_the_package(self):
        """Every file of the assets matches a pattern of pyproject.toml's package data."""
        import fnmatch
        import tomllib

        project = Path(__file__).parents[1] / "pyproject.toml"
        patterns = tomllib.loads(project.read_text())["tool"]["setuptools"]["package-data"]["khnb"]
        for path in data.ASSETS.iterdir():
            assert any(fnmatch.fnmatch(f"assets/{path.name}", pattern) for pattern in patterns), path.name

    @pytest.mark.parametrize("name", ["cifar10-sample-test.webp", "cifar10-sample.json"])
    @pytest.mark.parametrize("damage", ["missing", "cut"])
    def test_a_damaged_sample(self, name, damage, tmp_path, monkeypatch):
        for path in data.ASSETS.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        monkeypatch.setattr(data, "ASSETS", tmp_path)
        (tmp_path / name).unlink()
        if damage == "cut":
            (tmp_path / name).write_bytes((data.Path(data.__file__).parent / "assets" / name).read_bytes()[:900])
        assert "install khnb again" in complaint("cifar10-sample")

    def test_other_images_than_the_pinned_ones(self, monkeypatch):
        monkeypatch.setattr(data, "SAMPLE_SHA256", dict(data.SAMPLE_SHA256, test="0" * 64))
        assert "not the one" in complaint("cifar10-sample")

    def test_make_sample_takes_the_first_of_each_class(self, small, tmp_path, monkeypatch):
        full = load(root=write(tmp_path / "in", small, "bin"))
        monkeypatch.setattr(data, "SHEET", 1)
        monkeypatch.setattr(data, "SAMPLE_PER_CLASS", {"train": 1, "test": 1})
        monkeypatch.setattr(data, "SAMPLE_SHA256", data.make_sample(full, tmp_path / "out"))
        monkeypatch.setattr(data, "ASSETS", tmp_path / "out")
        made = load("cifar10-sample")
        firsts = [full.train_labels.tolist().index(c) for c in sorted(set(full.train_labels.tolist()))]
        assert made.train_index.tolist() == sorted(firsts)
        assert torch.equal(made.train_images, full.train_images[made.train_index])
        assert torch.equal(made.test_labels, full.test_labels[made.test_index])

    @pytest.mark.full
    def test_every_image_is_where_it_says(self, sample, full):
        assert full.train_images.shape == (50000, 3, 32, 32) and full.test_images.shape == (10000, 3, 32, 32)
        assert torch.equal(full.train_images[sample.train_index], sample.train_images)
        assert torch.equal(full.test_images[sample.test_index], sample.test_images)
        assert torch.equal(full.test_labels[sample.test_index], sample.test_labels)
        for c in range(10):  # the first of each class
            assert torch.equal(
                sample.test_index[sample.test_labels == c], torch.nonzero(full.test_labels == c)[:100, 0]
            )

    @pytest.mark.full
    @pytest.mark.slow
    def test_the_full_data_in_the_python_layout(self, full, tmp_path):
        images, labels = full.train_images.numpy(), full.train_labels.numpy().astype(np.uint8)
        batches = {
            n: (images[i * 10000 :][:10000], labels[i * 10000 :][:10000]) for i, n in enumerate(data.BATCHES["train"])
        }
        batches["test_batch"] = full.test_images.numpy(), full.test_labels.numpy().astype(np.uint8)
        other = load(root=write(tmp_path / "cifar-10-batches-py", batches, "py2"))
        assert torch.equal(other.train_images, full.train_images) and other.sha256 == full.sha256


class TestLayouts:
    @pytest.mark.parametrize("layout", ["bin", "py2", "py3", "py4", "py5"])
    def test_all_layouts_hold_the_same(self, small, tmp_path, layout):
        found = load(root=write(tmp_path / "files", small, layout))
        assert same(found, small) and found.sha256 == data.SHA256
        assert found.name == "cifar10" and found.place == str(tmp_path / "files") and found.classes == data.CLASSES
        assert found.train_index.tolist() == list(range(20))

    def test_text_keys_and_a_read_only_array(self, small, tmp_path):
        folder = write(tmp_path, small, "bin")
        for name, (images, labels) in small.items():
            (folder / f"{name}.bin").unlink()
            pixels = images.reshape(4, -1).copy()
            pixels.setflags(write=False)
            (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels.tolist()}, protocol=5))
        assert same(load(root=folder), small)

    @pytest.mark.parametrize("layout, folder", [("bin", "cifar-10-batches-bin"), ("py2", "cifar-10-batches-py")])
    def test_the_parent_may_be_named(self, small, tmp_path, layout, folder, monkeypatch):
        write(tmp_path / folder, small, layout)
        assert same(load(root=tmp_path), small) and same(load("auto", root=str(tmp_path)), small)
        monkeypatch.setenv("KHNB_DATA", str(tmp_path / folder))
        assert same(load(), small)

    def test_the_cache_is_found(self, small, tmp_path):
        write(tmp_path / "cache" / "khnb" / "cifar-10-batches-bin", small, "bin")
        assert same(load(), small)
        assert load("auto").name == "cifar10"

    def test_root_goes_before_the_environment(self, small, tmp_path, monkeypatch):
        monkeypatch.setenv("KHNB_DATA", str(tmp_path / "nowhere"))
        assert same(load(root=write(tmp_path / "files", small, "bin")), small)

    def test_images_can_be_written_to(self, small, tmp_path):
        found = load(root=write(tmp_path, small, "bin"))
        found.test_images[0] = 0
        assert not found.test_images[0].any()


class TestAPlaceThatIsWrong:
    def test_nothing_anywhere(self):
        assert "KHNB_DATA" in complaint() and "download=True" in complaint()
        assert load("auto").name == "cifar10-sample"

    @pytest.mark.parametrize("name", ["cifar10", "auto", "mnist"])
    @pytest.mark.parametrize("how", ["root", "environment"])
    @pytest.mark.parametrize("what", ["missing", "empty", "file", "null"])
    def test_a_named_place_is_never_replaced_by_the_sample(self, name, how, what, tmp_path, monkeypatch):
        place = tmp_path / ("a\0b" if what == "null" and how == "root" else "place")
        if what == "empty":
            place.mkdir()
        elif what == "file":
            place.write_text("not a folder")
        if how == "environment":
            monkeypatch.setenv("KHNB_DATA", str(place))
        message = complaint(name, root=place if how == "root" else None)
        assert "place" in message or "null" in message

    @pytest.mark.parametrize("layout, suffix", [("bin", ".bin"), ("py2", "")])
    @pytest.mark.parametrize("batch", ["data_batch_3", "test_batch"])
    def test_a_missing_batch(self, small, tmp_path, layout, suffix, batch):
        (write(tmp_path, small, layout) / (batch + suffix)).unlink()
        assert f"{batch}{suffix} is missing" in complaint("auto", root=tmp_path)

    def test_an_unreadable_file(self, small, tmp_path):
        path = write(tmp_path, small, "bin") / "data_batch_2.bin"
        path.unlink()
        path.mkdir()
        assert "data_batch_2.bin cannot be read" in complaint(root=tmp_path)

    def test_an_unreadable_folder(self, tmp_path, monkeypatch):
        def refuse(folder):
            raise PermissionError(13, "Permission denied", str(folder))

        monkeypatch.setattr(data.os, "listdir", refuse)
        assert "cannot be read (Permission denied)" in complaint(root=tmp_path)

    def test_an_unknown_name(self):
        assert "cifar10-sample" in complaint("cifar100")


class TestDamagedBatches:
    @pytest.mark.parametrize("layout, suffix", [("bin", ".bin"), ("py2", "")])
    @pytest.mark.parametrize("keep", [0, 1, 5000, 4 * RECORD - 1])
    def test_truncated(self, small, tmp_path, layout, suffix, keep):
        path = write(tmp_path, small, layout) / f"data_batch_4{suffix}"
        path.write_bytes(path.read_bytes()[:keep])
        message = complaint(root=tmp_path)
        assert f"data_batch_4{suffix}" in message and "truncated" in message

    def test_too_long(self, small, tmp_path):
        path = write(tmp_path, small, "bin") / "test_batch.bin"
        path.write_bytes(path.read_bytes() + bytes(2 * RECORD))
        message = complaint(root=tmp_path)
        assert "test_batch.bin is too long" in message and str(6 * RECORD) in message

    def test_a_python_file_of_any_length_is_not_read_whole(self, small, tmp_path, monkeypatch):
        monkeypatch.setattr(data, "LARGEST", 14000)
        path = write(tmp_path, small, "py2") / "data_batch_1"
        path.write_bytes(path.read_bytes() + bytes(14000))
        assert "data_batch_1 is too long" in complaint(root=tmp_path)

    @pytest.mark.parametrize("layout", ["bin", "py2"])
    @pytest.mark.parametrize("pair", [("data_batch_2", "data_batch_5"), ("data_batch_1", "test_batch")])
    def test_swapped(self, small, tmp_path, layout, pair):
        one, other = pair
        write(tmp_path, dict(small, **{one: small[other], other: small[one]}), layout)
        message = complaint(root=tmp_path)
        assert Path(message.split()[0]).stem == one and f"images of {other}" in message and "swapped" in message

    @pytest.mark.parametrize("layout", ["bin", "py2", "py4"])
    @pytest.mark.parametrize("batch", ["data_batch_3", "test_batch"])
    def test_one_wrong_pixel(self, small, tmp_path, layout, batch):
        images, labels = small[batch]
        images = images.copy()
        images[2, 1, 16, 16] ^= 1
        write(tmp_path, dict(small, **{batch: (images, labels)}), layout)
        message = complaint(root=tmp_path)
        assert Path(message.split()[0]).stem == batch and "corrupted" in message

    @pytest.mark.parametrize("layout", ["bin", "py2", "py4"])
    def test_a_wrong_label_byte(self, small, tmp_path, layout):
        images, labels = small["data_batch_2"]
        labels = labels.copy()
        labels[3] = 10
        write(tmp_path, dict(small, data_batch_2=(images, labels)), layout)
        message = complaint(root=tmp_path)
        assert "data_batch_2" in message and "image 3 the label 10" in message

    def test_a_valid_but_wrong_label(self, small, tmp_path):
        images, labels = small["data_batch_2"]
        write(tmp_path, dict(small, data_batch_2=(images, (labels + 1) % 10)), "bin")
        assert "data_batch_2.bin is corrupted" in complaint(root=tmp_path)

    @pytest.mark.parametrize(
        "change",
        [
            lambda c: c.pop(b"data"),
            lambda c: c.pop(b"labels"),
            lambda c: c.update({b"labels": [300, 1, 2, 3]}),
            lambda c: c.update({b"labels": [-1, 1, 2, 3]}),
            lambda c: c.update({b"labels": ["1", 1, 2, 3]}),
            lambda c: c.update({b"labels": [1, 2, 3]}),
            lambda c: c.update({b"labels": {}}),
            lambda c: c.update({b"data": c[b"data"].astype(np.int16)}),
            lambda c: c.update({b"data": c[b"data"].astype(object)}),
            lambda c: c.update({b"data": np.asfortranarray(c[b"data"])}),
            lambda c: c.update({b"data": c[b"data"].T.copy()}),
            lambda c: c.update({b"data": b"1234"}),
            lambda c: c.update({b"data": c[b"data"][:3]}),
        ],
    )
    @pytest.mark.parametrize("protocol", [2, 5])
    def test_a_pickle_of_something_else(self, small, tmp_path, change, protocol):
        path = write(tmp_path, small, "py2") / "data_batch_1"
        batch = content(small["data_batch_1"])
        change(batch)
        path.write_bytes(pickle.dumps(batch, protocol=protocol))
        assert "data_batch_1" in complaint(root=tmp_path)


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path, call=os.system):
        self.mark, self.call = mark, call

    def __reduce__(self):
        return self.call, (
            f"touch {self.mark}" if self.call is os.system else f"open({str(self.mark)!r}, 'w').close()",
        )


class TestNothingIsExecuted:
    @pytest.mark.parametrize("call", [os.system, exec, eval])
    @pytest.mark.parametrize("where", ["whole", "data", "labels", "filenames"])
    @pytest.mark.parametrize("protocol", [0, 2, 4, 5])
    def test_a_malicious_pickle(self, small, tmp_path, call, where, protocol):
        mark = tmp_path / "mark"
        evil = Evil(mark, call)
        path = write(tmp_path / "files", small, "py2") / "data_batch_1"
        batch = evil if where == "whole" else content(small["data_batch_1"]) | {where.encode(): [evil]}
        path.write_bytes(pickle.dumps(batch, protocol=protocol))
        assert "data_batch_1" in complaint(root=tmp_path / "files")
        assert not mark.exists()
        pickle.loads(path.read_bytes())
        assert mark.exists()  # so this pickle does bite where it is run

    @pytest.mark.parametrize(
        "stream",
        [
            b"cos\nsystem\n(S'touch %s'\ntR.",
            b"(S'touch %s'\nios\nsystem\n.",
            b"(cos\nsystem\nS'touch %s'\no.",
            b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x06touch \x85R.",
            b"\x80\x02Pid\n.",
            b"\x80\x02\x82\x01.",
            b"\x80\x02cnumpy.core.multiarray\nfromstring\n)R.",
            b"\x80\x02cnumpy\nload\nU\x01x\x85R.",
            b"\x80\x02cnumpy\nndarray\nU\x01x\x81.",
        ],
    )
    def test_opcodes_that_no_official_file_has(self, small, tmp_path, stream):
        path = write(tmp_path / "files", small, "py2") / "data_batch_1"
        mark = tmp_path / "mark"
        path.write_bytes(stream.replace(b"%s", os.fsencode(mark)))
        assert "data_batch_1" in complaint(root=tmp_path / "files")
        assert not mark.exists()


class TestFuzz:
    """Whatever is in the files: the right images, or a DataError."""

    def damaged(self, small, tmp_path, layout, change) -> Path:
        """The folder of a whole data set whose first batch was changed."""
        folder = tmp_path / layout
        first = folder / ("data_batch_1.bin" if layout == "bin" else "data_batch_1")
        if not folder.exists():
            write(folder, small, layout)
            first.rename(tmp_path / f"{layout}.whole")
        first.write_bytes(change(bytearray((tmp_path / f"{layout}.whole").read_bytes())))
        return folder

    def read(self, folder, batches):
        try:
            assert same(load(root=folder), batches)
        except DataError as error:
            assert "data_batch_1" in str(error) and "\n" not in str(error)

    @FUZZ
    @given(junk=st.binary(max_size=200), layout=st.sampled_from(["bin", "py2"]))
    def test_random_bytes(self, small, tmp_path, junk, layout):
        folder = self.damaged(small, tmp_path, layout, lambda content: junk)
        with pytest.raises(DataError):
            load(root=folder)

    @FUZZ
    @given(
        where=st.integers(0, 14000),
        bit=st.integers(0, 7),
        layout=st.sampled_from(["bin", "py2", "py4", "py5"]),
        head=st.booleans(),
    )
    def test_bit_flips(self, small, tmp_path, where, bit, layout, head):
        def flip(content):
            content[(where % 200 if head else where) % len(content)] ^= 1 << bit
            return content

        self.read(self.damaged(small, tmp_path, layout, flip), small)

    @FUZZ
    @given(cut=st.integers(0, 14000), layout=st.sampled_from(["bin", "py2", "py4", "py5"]), more=st.binary(max_size=9))
    def test_truncations_and_additions(self, small, tmp_path, cut, layout, more):
        self.read(self.damaged(small, tmp_path, layout, lambda content: content[:cut] + more), small)

    # fmt: off
    PIECES = [
        b"\x80\x02", b"}", b"]", b")", b"(", b"u", b"s", b"e", b"a", b"t", b"\x85", b"\x86", b"\x87", b"R", b"b", b".",
        b"q\x00", b"h\x00", b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f", b"\x94", b"N", b"\x89", b"K\x04", b"M\x00\x0c",
        b"U\x04data", b"U\x06labels", b"U\x02u1", b"c_codecs\nencode\n", b"cnumpy\ndtype\n", b"\x93", b"2", b"1", b"0",
        b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy.core.numeric\n_frombuffer\n", b"\x95\x08" + bytes(7),
        b"X\x06\x00\x00\x00latin1", b"X\x02\x00\x00\x00\xc4\x80",
    ]
    # fmt: on

    @settings(FUZZ, max_examples=400)
    @given(pieces=st.lists(st.sampled_from(PIECES), max_size=40))
    def test_random_programs(self, small, tmp_path, pieces):
        path = tmp_path / "data_batch_1"
        path.write_bytes(b"".join(pieces) + b".")
        with pytest.raises(DataError):
            data._read_python(path)

    def test_deep_nesting(self, small, tmp_path):
        path = tmp_path / "data_batch_1"
        deep = b")" + b"\x85" * 200_000
        for program in (
            deep + b".",
            b"}U\x04data" + deep + b"s.",
            b"}" + deep + b"Ns.",
            b"cnumpy\ndtype\n" + deep + b"R" * 9 + b".",
        ):
            path.write_bytes(b"\x80\x02" + program)
            with pytest.raises(DataError):
                data._read_python(path)


def idx(array: np.ndarray) -> bytes:
    return (
        bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


@pytest.fixture
def four(digits):
    """MNIST's four files, by name, with a few digits each."""
    return {
        "train-images-idx3-ubyte": idx(digits.train_images[:20, 0].numpy()),
        "train-labels-idx1-ubyte": idx(digits.train_labels[:20].numpy()),
        "t10k-images-idx3-ubyte": idx(digits.test_images[:5, 0].numpy()),
        "t10k-labels-idx1-ubyte": idx(digits.test_labels[:5].numpy()),
    }


def put(folder: Path, files: dict, zipped=False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / (name + ".gz" if zipped else name)).write_bytes(
            gzip.compress(content, mtime=0) if zipped else content
        )
    return folder


class TestMnist:
    @pytest.mark.parametrize("zipped", [False, True])
    @pytest.mark.parametrize("sub", [".", "MNIST/raw", "mnist"])
    def test_it_is_read(self, digits, four, tmp_path, zipped, sub):
        put(tmp_path / sub, four, zipped)
        found = load("mnist", root=tmp_path)
        assert found.name == "mnist" and found.classes == tuple("0123456789")
        assert torch.equal(found.train_images, digits.train_images[:20]) and torch.equal(
            found.test_labels, digits.test_labels[:5]
        )
        assert found.sha256["test"] == data.digest(digits.test_images[:5].numpy(), digits.test_labels[:5].numpy())

    def test_from_the_cache(self, four, tmp_path):
        put(tmp_path / "cache" / "khnb" / "mnist", four, True)
        assert len(load("mnist").train_images) == 20

    @pytest.mark.parametrize(
        "name, change, words",
        [
            ("train-images-idx3-ubyte", lambda c: c[:-1], "truncated"),
            ("train-images-idx3-ubyte", lambda c: c + b"\0", "too long"),
            ("train-images-idx3-ubyte", lambda c: b"\0\0\x08\x01" + c[4:], "does not start"),
            ("train-images-idx3-ubyte", lambda c: c[:9], "does not start"),
            ("train-images-idx3-ubyte", lambda c: c[:4] + b"\xff\xff\xff\xff" + c[8:], "dimensions"),
            ("t10k-images-idx3-ubyte", lambda c: c[:11] + b"\x1b" + c[12:], "dimensions"),
            ("t10k-labels-idx1-ubyte", lambda c: c[:-1] + b"\x0a", "label 10"),
            ("t10k-labels-idx1-ubyte", lambda c: c[:7] + b"\x04" + c[8:-1], "4 labels"),
            ("t10k-labels-idx1-ubyte", lambda c: c[:7] + b"\x00" + c[8:-5], "dimensions"),
            ("train-labels-idx1-ubyte", lambda c: None, "is missing"),
        ],
    )
    @pytest.mark.parametrize("zipped", [False, True])
    def test_damage(self, four, tmp_path, name, change, words, zipped):
        four[name] = change(four[name])
        if four[name] is None:
            del four[name]
        put(tmp_path, four, zipped)
        message = complaint("mnist", root=tmp_path)
        assert name in message and words in message

    def test_a_truncated_gzip_file(self, four, tmp_path):
        path = put(tmp_path, four, True) / "train-images-idx3-ubyte.gz"
        path.write_bytes(path.read_bytes()[:-20])
        assert "train-images-idx3-ubyte.gz is damaged" in complaint("mnist", root=tmp_path)

    @FUZZ
    @given(
        where=st.integers(0, 20000), bit=st.integers(0, 7), cut=st.none() | st.integers(0, 20000), head=st.booleans()
    )
    def test_fuzz_gzip(self, digits, four, tmp_path, where, bit, cut, head):
        path = tmp_path / "train-images-idx3-ubyte.gz"
        if not path.exists():
            put(tmp_path, four, True)
        damaged = bytearray(gzip.compress(four["train-images-idx3-ubyte"], mtime=0))
        damaged[(where % 20 if head else where) % len(damaged)] ^= 1 << bit
        path.write_bytes(damaged[:cut])
        try:
            found = load("mnist", root=tmp_path)
        except DataError as error:
            assert "train-images" in str(error) and "\n" not in str(error)
        else:
            assert torch.equal(found.train_images, digits.train_images[:20])

    @FUZZ
    @given(
        junk=st.binary(max_size=40),
        start=st.sampled_from([b"", b"\0\0\x08\x03", b"\0\0\x08\x03\0\0\0\x14\0\0\0\x1c\0\0\0\x1c"]),
    )
    def test_fuzz_plain(self, four, tmp_path, junk, start):
        put(tmp_path, four | {"train-images-idx3-ubyte": start + junk})
        assert "train-images" in complaint("mnist", root=tmp_path)


class TestDownload:
    """torchvision itself is replaced: these tests need no network."""

    @pytest.fixture
    def fetch(self, monkeypatch):
        """Have torchvision's CIFAR10 or MNIST do as told; gives the list of folders it was asked to fill."""
        import torchvision

        asked = []

        def set_up(work, kind="CIFAR10"):
            def stand_in(root, download):
                asked.append(Path(root))
                assert download is True
                work(Path(root))

            monkeypatch.setattr(torchvision.datasets, kind, stand_in)
            return asked

        return set_up

    @pytest.mark.parametrize("name", ["cifar10", "auto"])
    def test_into_the_cache(self, small, tmp_path, fetch, name):
        asked = fetch(lambda root: write(root / "cifar-10-batches-py", small, "py2"))
        assert same(load(name, download=True), small)
        assert os.listdir(tmp_path / "cache" / "khnb") == ["cifar-10-batches-py"]
        assert same(load(name, download=True), small) and len(asked) == 1  # what is there is not fetched again

    def test_mnist(self, four, tmp_path, fetch):
        fetch(lambda root: put(root / "MNIST" / "raw", four), "MNIST")
        assert len(load("mnist", root=tmp_path / "new", download=True).test_images) == 5
        assert len(load("mnist", root=tmp_path / "new").test_images) == 5
        assert os.listdir(tmp_path / "new") == ["MNIST"]

    def test_only_when_asked(self, fetch):
        asked = fetch(lambda root: None)
        complaint()
        assert load("auto").name == "cifar10-sample" and not asked

    @pytest.mark.parametrize(
        "error", [OSError("no route to host"), RuntimeError("File not found or corrupted.\nReally"), EOFError()]
    )
    def test_a_failed_download_leaves_nothing(self, small, tmp_path, fetch, error):
        def half(root):
            write(root / "cifar-10-batches-py", dict(list(small.items())[:3]), "py2")
            raise error

        fetch(half)
        message = complaint("auto", root=tmp_path / "here", download=True)
        assert "failed" in message and "nothing was kept" in message and str(tmp_path / "here") in message
        assert os.listdir(tmp_path / "here") == []

    def test_an_interrupted_download_leaves_nothing(self, small, tmp_path, fetch):
        def interrupt(root):
            write(root / "cifar-10-batches-py", small, "py2")
            raise KeyboardInterrupt

        fetch(interrupt)
        with pytest.raises(KeyboardInterrupt):
            load(root=tmp_path / "here", download=True)
        assert os.listdir(tmp_path / "here") == []

    def test_wrong_images_are_not_kept(self, small, tmp_path, fetch):
        wrong = dict(small, data_batch_1=small["test_batch"])
        fetch(lambda root: write(root / "cifar-10-batches-py", wrong, "py2"))
        assert "images of test_batch" in complaint(root=tmp_path / "here", download=True)
        assert os.listdir(tmp_path / "here") == []

    def test_damaged_files_are_not_replaced(self, small, tmp_path, fetch):
        asked = fetch(lambda root: None)
        (write(tmp_path / "here", small, "bin") / "test_batch.bin").unlink()
        assert "test_batch.bin is missing" in complaint(root=tmp_path / "here", download=True)
        assert not asked

    def test_a_place_that_cannot_be_written(self, tmp_path, fetch):
        fetch(lambda root: None)
        (tmp_path / "file").write_text("in the way")
        assert "cannot be written" in complaint(root=tmp_path / "file" / "data", download=True)
        assert "cannot be written" in complaint(root=tmp_path / "file", download=True)

    def test_a_place_with_something_in_the_way(self, small, tmp_path, fetch):
        (tmp_path / "cifar-10-batches-py").mkdir()
        (tmp_path / "cifar-10-batches-py" / "notes").write_text("mine")
        fetch(lambda root: write(root / "cifar-10-batches-py", small, "py2"))
        assert "move away" in complaint(root=tmp_path, download=True)
        assert os.listdir(tmp_path) == ["cifar-10-batches-py"]


class TestCommandLine:
    def test_it_describes_what_it_finds(self, small, tmp_path, capsys):
        assert data.main(["cifar10", "--root", str(write(tmp_path, small, "bin"))]) == 0
        said = capsys.readouterr().out
        assert str(tmp_path) in said and data.SHA256["train"] in said and "20 training and 4 test images" in said

    def test_it_says_what_is_wrong(self, tmp_path, capsys):
        with pytest.raises(SystemExit) as caught:
            data.main(["cifar10", "--root", str(tmp_path)])
        assert caught.value.code == 1 and capsys.readouterr().err.count("\n") == 1
