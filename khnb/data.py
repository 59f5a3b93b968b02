"""Images: CIFAR-10 in its official layouts, an embedded sample of it, MNIST; every file checked (chapter 5).

Nothing here executes what a file says: the pickles of CIFAR-10's Python layout are read opcode by opcode as plain data,
and what they hold is then compared, like that of the binary layout, with the known SHA-256 of the data set.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import os
import pickletools
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from khnb import native

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ASSETS = Path(__file__).with_name("assets")

SHAPE = (3, 32, 32)
BATCH = 10_000  # images in each of CIFAR-10's six files
BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
FOLDERS = {"binary": "cifar-10-batches-bin", "Python": "cifar-10-batches-py"}  # official names
SUFFIX = {"binary": ".bin", "Python": ""}
LARGEST = 64_000_000  # bytes; an official batch has 31 million in either layout, rewritten by Python 3 up to 47

#: SHA-256 of the pixels (N, C, H, W uint8) followed by the labels (N, uint8)
SHA256 = {
    "train": "1e91790dbaf241617ca1f29a9aba08eb9a62df84cc90676b47edd05ad2ab3c94",
    "test": "9a4c74f5c8b6f2c4e13d3a1dfb43a5a8cda8a9da515e99fd620d2013a1a6287a",
}
#: the same of each file, to name the one that is wrong
BATCH_SHA256 = {
    "data_batch_1": "ba52cb2d72c412975d7556bb26bd094956f1c002d1937053f6f1252f2ac17114",
    "data_batch_2": "350ff9000489d02f2568c0dcf4912ffdbae9e50932147905fb1b8159ad54f0ac",
    "data_batch_3": "a2b8653fc457df407af6c38b7e0d1a12530f3b5f81fce9f81516efd065daf722",
    "data_batch_4": "133e6292c377755074c305db8a684d48d5397372cb0aba34f52b4335eab35d97",
    "data_batch_5": "eb08cdc11fd1267ef871cf4790f193684b3f556d13317be68f4eb374a078ea87",
    "test_batch": "9a4c74f5c8b6f2c4e13d3a1dfb43a5a8cda8a9da515e99fd620d2013a1a6287a",
}
#: the same of the embedded sample
SAMPLE_SHA256 = {
    "train": "8cf69ee45f8859ff90ff884d192f89bd238295657ee8016a04fcb551832ac2a2",
    "test": "658bc89049332ae3279df215777cd93e3400ae74f3abccc4744687af73686acf",
}
SAMPLE_PER_CLASS = {"train": 150, "test": 100}
SHEET = 50  # images in a row of the sample's sheets

MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
MNIST_MOST = {"train": 60_000, "test": 10_000}

NAMES = ("cifar10", "cifar10-sample", "mnist", "auto")
OFFICIAL = {"cifar10": "CIFAR-10's files, in the binary or the Python version", "mnist": "MNIST's four IDX files"}
AGAIN = "get the official file again"


class DataError(ValueError):
    """Images that are missing, damaged or not what they should be: which file, what is wrong, what to do."""


@dataclass(frozen=True, repr=False)
class Dataset:
    """Images and labels, already split, on the CPU.

    ``train_images`` and ``test_images`` are (N, C, H, W) uint8; ``train_labels`` and ``test_labels`` (N,) int64, from 0
    to ``len(classes) - 1``. ``train_index`` and ``test_index`` (N,) int64 tell where each image stands in the full data
    set. ``sha256`` holds, for ``train`` and ``test``, the SHA-256 of the pixels followed by the labels as uint8;
    ``place`` is where the files were found.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    sha256: dict[str, str]
    place: str
    train_index: Tensor
    test_index: Tensor

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.train_images.shape[1:]))
        return f"{self.name}: {len(self.train_images):,} training and {len(self.test_images):,} test images of {size}"


def load(name: str = "cifar10", root: str | os.PathLike | None = None, download: bool = False) -> Dataset:
    """A data set, from files that are checked on the way.

    Parameters
    ----------
    name : ``"cifar10"``, all 50,000 + 10,000 images; ``"cifar10-sample"``, the 1,500 + 1,000 that come with khnb;
        ``"mnist"``, digits in IDX files, one channel; ``"auto"``, CIFAR-10 where it is found, else the sample.
    root : a folder with the files, or one that holds the official folder; else the environment variable
        ``KHNB_DATA``; else the user's cache. A place that was named is the only one that is looked at.
    download : fetch what is not there through torchvision, into that place.

    Raises :class:`DataError` (a ``ValueError``), in one line, for anything missing, damaged or unexpected.
    """
    if name not in NAMES:
        raise DataError(f"there is no data set {name!r}; valid names: {', '.join(NAMES)}")
    if name == "cifar10-sample":
        return _sample()
    named = root if root is not None else os.environ.get("KHNB_DATA") or None
    place = Path(named).expanduser() if named is not None else native.cache_dir()
    if name == "auto":
        if named is None and not download and _find("cifar10", place) is None:
            return _sample()
        name = "cifar10"
    found = _find(name, place)
    if found is None and download:
        found = _download(name, place)
    if found is None:
        called = "root" if root is not None else "KHNB_DATA" if named is not None else "the cache"
        wrong = "has none of" if place.is_dir() else "is not a folder with"
        advice = "name the folder that has them (root=... or KHNB_DATA), or ask for download=True"
        raise DataError(f"{place} ({called}) {wrong} {OFFICIAL[name]}: {advice}")
    return _read(name, *found)


def digest(images: np.ndarray, labels: np.ndarray) -> str:
    """SHA-256 of the pixels, in (N, C, H, W) order, followed by the labels; both uint8. Hexadecimal."""
    total = hashlib.sha256(np.ascontiguousarray(images, np.uint8))
    total.update(np.ascontiguousarray(labels, np.uint8))
    return total.hexdigest()


# Finding


def _listing(folder: Path) -> set[str]:
    """Names in a folder, none where it is missing; an unreadable one is an error."""
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise DataError(f"{folder} cannot be read ({_reason(error)}): check its name and permissions") from error


def _find(name: str, place: Path) -> tuple[Path, str] | None:
    """Folder and layout of the first candidate with at least one of the files; an incomplete one is found, too."""
    if name == "mnist":
        files = {n + end for pair in MNIST_FILES.values() for n in pair for end in ("", ".gz")}
        folders = (place, place / "MNIST" / "raw", place / "mnist")
        return next(((folder, "IDX") for folder in folders if files & _listing(folder)), None)
    for layout, official in FOLDERS.items():
        files = {batch + SUFFIX[layout] for batches in BATCHES.values() for batch in batches}
        for folder in (place, place / official):
            if files & _listing(folder):
                return folder, layout
    return None


def _download(name: str, place: Path) -> tuple[Path, str]:
    """Fetch through torchvision into a scratch folder, check, and only then move into place."""
    import torchvision

    kind = {"cifar10": torchvision.datasets.CIFAR10, "mnist": torchvision.datasets.MNIST}[name]
    part = Path(FOLDERS["Python"]) if name == "cifar10" else Path("MNIST") / "raw"
    layout = "Python" if name == "cifar10" else "IDX"
    try:
        place.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=place, prefix=".download-")
    except (OSError, ValueError) as error:
        advice = "name a folder that can (root=... or KHNB_DATA)"
        raise DataError(f"{place} cannot be written ({_reason(error)}): {advice}") from error
    with scratch as folder:
        try:
            kind(folder, download=True)
        except Exception as error:  # torchvision passes on whatever its network, archive and disk calls raise
            wrong = f"the download of {name} into {place} failed ({_reason(error)})"
            raise DataError(f"{wrong}: nothing was kept; try again, or get the official files by hand") from error
        _read(name, Path(folder) / part, layout)
        try:
            (place / part).parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(folder) / part, place / part)
        except OSError as error:
            raise DataError(f"{place / part} cannot be written ({_reason(error)}): move away what is there") from error
    return place / part, layout


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:200]


# Reading


@contextlib.contextmanager
def _open(path: Path, what: str):
    """A file for reading, plain or gzipped by its name; what goes wrong inside becomes a DataError."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: {what} needs it; get the official files again") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged ({_reason(error)}): {AGAIN}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({_reason(error)}): check what it is, and its permissions") from error


def _read(name: str, folder: Path, layout: str) -> Dataset:
    read = {"binary": _read_binary, "Python": _read_python}.get(layout)
    parts, sha256 = {}, {}
    for split in ("train", "test"):
        if name == "mnist":
            parts[split] = _read_mnist(folder, split)
            sha256[split] = digest(*parts[split])
            continue
        paths = [folder / (batch + SUFFIX[layout]) for batch in BATCHES[split]]
        batches = [read(path) for path in paths]
        parts[split] = tuple(np.concatenate(arrays) for arrays in zip(*batches))
        sha256[split] = digest(*parts[split])
        if sha256[split] != SHA256[split]:
            _accuse(split, paths, batches)
    classes = CLASSES if name == "cifar10" else tuple("0123456789")
    return _dataset(name, parts, classes, sha256, folder, {s: np.arange(len(parts[s][1])) for s in parts})


def _dataset(name, parts, classes, sha256, place, index) -> Dataset:
    tensors = {}
    for split, (images, labels) in parts.items():
        tensors[f"{split}_images"] = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        tensors[f"{split}_labels"] = torch.from_numpy(labels.astype(np.int64))
        tensors[f"{split}_index"] = torch.from_numpy(np.asarray(index[split], np.int64))
    return Dataset(name=name, classes=classes, sha256=sha256, place=str(place), **tensors)


def _accuse(split, paths, batches):
    """Say which file is the wrong one."""
    official = {sha: batch for batch, sha in BATCH_SHA256.items()}
    for batch, path, (images, labels) in zip(BATCHES[split], paths, batches):
        sha = digest(images, labels)
        if sha == BATCH_SHA256[batch]:
            continue
        if sha in official:
            wrong = "files were swapped or copied; put each in its place"
            raise DataError(f"{path} holds the images of {official[sha]}: {wrong}")
        raise DataError(f"{path} is corrupted (its SHA-256 starts {sha[:12]}, not {BATCH_SHA256[batch][:12]}): {AGAIN}")
    raise DataError(f"the {split} images in {paths[0].parent} are not CIFAR-10's: get the official files again")


def _check_labels(labels: np.ndarray, path: Path):
    wrong = np.flatnonzero((labels < 0) | (labels > 9))
    if len(wrong):
        first = wrong[0]
        raise DataError(f"{path} gives image {first} the label {labels[first]}, which is not one of 0 to 9: {AGAIN}")


def _read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One batch of the binary layout: for each image a label byte, then the red, green and blue planes row by row."""
    record = 1 + int(np.prod(SHAPE))
    with _open(path, "CIFAR-10") as file:
        content = file.read(BATCH * record + 1)
        size = os.fstat(file.fileno()).st_size
    if size != BATCH * record or len(content) != size:
        wrong = "truncated" if size < BATCH * record else "too long"
        raise DataError(f"{path} is {wrong}: {size} bytes where {BATCH * record} are expected; {AGAIN}")
    records = np.frombuffer(content, np.uint8).reshape(BATCH, record)
    _check_labels(records[:, 0], path)
    return records[:, 1:].reshape(BATCH, *SHAPE), records[:, 0]


# The Python layout. A pickle is a program, and running an unknown one can do anything. So it is not run: pickletools
# tells its opcodes apart, and the few that build plain containers and arrays are followed here. Nothing is imported,
# nothing is called; a name such as numpy.ndarray stays a word.

_PUSH = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MAKE = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_LITERAL = {
    "BININT", "BININT1", "BININT2", "BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}
_ENCODE = "_codecs.encode"  # how Python 3 writes bytes in old protocols
_WORDS = {_ENCODE, "numpy.ndarray", "numpy.dtype"} | {  # how NumPy writes an array, in all its versions
    f"numpy.{core}.{name}" for core in ("core", "_core") for name in ("multiarray._reconstruct", "numeric._frombuffer")
}


@dataclass(eq=False)
class _Call:
    """A call that the pickle asks for, and the state it would set: words, not deeds."""

    what: str
    args: tuple
    state: object = None


def _plain(content: bytes):
    """What a pickle of plain containers and arrays describes; anything else raises."""
    stack, marks, memo = [], [], {}

    def since_mark():
        items = stack[marks[-1] :]
        del stack[marks.pop() :]
        return items

    for opcode, arg, _ in pickletools.genops(io.BytesIO(content)):
        op = opcode.name
        if op in ("PROTO", "FRAME"):
            pass
        elif op in _PUSH:
            stack.append(_PUSH[op])
        elif op in _MAKE:
            stack.append(_MAKE[op]())
        elif op in _LITERAL:
            stack.append(arg)
        elif op == "MARK":
            marks.append(len(stack))
        elif op in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if op == "MEMOIZE" else arg] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(op[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif op == "TUPLE":
            stack.append(tuple(since_mark()))
        elif op in ("APPEND", "APPENDS"):
            items = since_mark() if op == "APPENDS" else [stack.pop()]
            _as(list, stack[-1]).extend(items)
        elif op in ("SETITEM", "SETITEMS"):
            items = since_mark() if op == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _as(dict, stack[-1]).update(zip(map(_flat, items[::2]), items[1::2], strict=True))
        elif op in ("GLOBAL", "STACK_GLOBAL"):
            name = arg.replace(" ", ".") if op == "GLOBAL" else ".".join((stack.pop(-2), stack.pop()))
            if name not in _WORDS:
                raise ValueError(f"it asks for {name}, which no CIFAR-10 file does")
            stack.append(_Call(name, ()))
        elif op == "REDUCE":
            args, what = _as(tuple, stack.pop()), _as(_Call, stack.pop()).what
            stack.append(_Call(what, args))
        elif op == "BUILD":
            state = stack.pop()
            _as(_Call, stack[-1]).state = state
        elif op == "STOP":
            return stack.pop()
        else:
            raise ValueError(f"it has the opcode {op}, which no CIFAR-10 file has")
    raise ValueError("it has no end")


def _as(kind, value):
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} stands in an unexpected place")
    return value


def _flat(value) -> bytes:
    """Bytes, in any of the ways that a pickle of Python 2 or 3 writes them."""
    if isinstance(value, _Call) and value.what == _ENCODE:
        value = _as(str, value.args[0])
    return value.encode("latin-1") if isinstance(value, str) else bytes(_as((bytes, bytearray), value))


def _bytes_of(array: _Call) -> tuple[tuple, bytes]:
    """Shape and bytes of an array of uint8 in C order."""
    if array.what.endswith("_frombuffer"):  # protocol 5: buffer, dtype, shape, order
        raw, dtype, shape, order = array.args
        in_order = order == "C"
    else:  # version, shape, dtype, is it Fortran's order, bytes
        _, shape, dtype, fortran, raw = array.state
        in_order = fortran is False
    if _flat(_as(_Call, dtype).args[0]) not in (b"u1", b"|u1") or not in_order:
        raise ValueError("its array is not uint8 in C order")
    return _as(tuple, shape), _flat(raw)


def _read_python(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One batch of the Python layout: a pickled dictionary of ``data``, (10000, 3072) uint8, ``labels``, a list."""
    with _open(path, "CIFAR-10") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise DataError(f"{path} is too long: more than {LARGEST} bytes; {AGAIN}")
    try:
        batch, size = _as(dict, _plain(content)), int(np.prod(SHAPE))
        shape, raw = _bytes_of(_as(_Call, batch[b"data"]))
        labels = np.array([_as(int, label) for label in _as(list, batch[b"labels"])], np.int64)
        if shape != (BATCH, size) or len(raw) != BATCH * size or len(labels) != BATCH:
            raise ValueError(f"{len(raw)} bytes of pixels and {len(labels)} labels, not {BATCH} x {size} and {BATCH}")
    except Exception as error:  # damaged bytes can break any of the steps above, in any way
        reason = f"no {error.args[0]!r}" if isinstance(error, KeyError) else _reason(error)
        raise DataError(f"{path} is truncated or damaged, or no batch of CIFAR-10 ({reason}): {AGAIN}") from error
    _check_labels(labels, path)
    return np.frombuffer(raw, np.uint8).reshape(BATCH, *SHAPE), labels.astype(np.uint8)


def _read_idx(folder: Path, name: str, sizes: tuple, most: int) -> np.ndarray:
    """One IDX file: two zero bytes, type (8: uint8), number of dimensions, the dimensions (big-endian), the bytes."""
    path = folder / (name if name in _listing(folder) or name + ".gz" not in _listing(folder) else name + ".gz")
    dimensions = 1 + len(sizes)
    with _open(path, "MNIST") as file:
        header = file.read(4 + 4 * dimensions)
        if len(header) < 4 + 4 * dimensions or header[:4] != bytes((0, 0, 8, dimensions)):
            raise DataError(f"{path} does not start as an IDX file of {dimensions}-dimensional bytes does: {AGAIN}")
        shape = tuple(int(n) for n in np.frombuffer(header, ">u4", dimensions, 4))
        if shape[1:] != sizes or not 1 <= shape[0] <= most:
            what = "images of 28 x 28" if sizes else "labels"
            raise DataError(f"{path} has the dimensions {shape}, where at most {most} {what} are expected: {AGAIN}")
        expected = int(np.prod(shape))
        content = file.read(expected + 1)
    if len(content) != expected:
        wrong = "truncated" if len(content) < expected else "too long"
        raise DataError(f"{path} is {wrong}: its header promises {expected} bytes of data; {AGAIN}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _read_mnist(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    pictures, digits = MNIST_FILES[split]
    images = _read_idx(folder, pictures, (28, 28), MNIST_MOST[split])
    labels = _read_idx(folder, digits, (), MNIST_MOST[split])
    if len(images) != len(labels):
        raise DataError(f"{folder / digits} has {len(labels)} labels, {pictures} {len(images)} images: {AGAIN}")
    _check_labels(labels, folder / digits)
    return images[:, None], labels


# The embedded sample


def _sample() -> Dataset:
    from PIL import Image

    parts, index, sha256 = {}, {}, {}
    try:
        origin = json.loads((ASSETS / "cifar10-sample.json").read_text())
        for split in ("train", "test"):
            index[split], labels = (np.array(origin[split][key]) for key in ("index", "label"))
            with Image.open(ASSETS / f"cifar10-sample-{split}.webp") as sheet:
                pixels = np.asarray(sheet.convert("RGB"))
            rows = pixels.reshape(len(pixels) // 32, 32, SHEET, 32, 3).transpose(0, 2, 4, 1, 3)  # row, column, C, H, W
            parts[split] = rows.reshape(-1, *SHAPE)[: len(labels)], labels.astype(np.uint8)
            sha256[split] = digest(*parts[split])
    except Exception as error:  # a damaged image or index can break any of the steps above
        raise DataError(f"the sample in {ASSETS} cannot be read ({_reason(error)}): install khnb again") from error
    if sha256 != SAMPLE_SHA256:
        raise DataError(f"the sample in {ASSETS} is not the one this version of khnb came with: install khnb again")
    return _dataset("cifar10-sample", parts, CLASSES, sha256, ASSETS, index)


def make_sample(full: Dataset, folder: Path) -> dict[str, str]:
    """Write the embedded sample: of every class the first images in file order, as two lossless WebP sheets.

    Returns the SHA-256 of both parts.
    """
    from PIL import Image

    origin, sha256 = {}, {}
    folder.mkdir(parents=True, exist_ok=True)
    for split, each in SAMPLE_PER_CLASS.items():
        labels = getattr(full, f"{split}_labels").numpy()
        index = np.sort(np.concatenate([np.flatnonzero(labels == c)[:each] for c in range(len(full.classes))]))
        images = getattr(full, f"{split}_images").numpy()[index]
        rows = images.reshape(-1, SHEET, *SHAPE).transpose(0, 3, 1, 4, 2)  # row, H, column, W, C
        sheet = Image.fromarray(rows.reshape(-1, SHEET * 32, 3))
        sheet.save(folder / f"cifar10-sample-{split}.webp", lossless=True, quality=100, method=6)
        origin[split] = {"index": index.tolist(), "label": labels[index].tolist()}
        sha256[split] = digest(images, labels[index])
    (folder / "cifar10-sample.json").write_text(json.dumps(origin) + "\n")
    return sha256


def main(arguments: list[str] | None = None) -> int:
    """``python -m khnb.data``: find, check and describe a data set, or make the embedded sample anew."""
    parser = argparse.ArgumentParser(prog="python -m khnb.data", description="Find and check a data set.")
    parser.add_argument("name", nargs="?", default="auto", choices=NAMES)
    parser.add_argument("--root", help="folder with the files (else KHNB_DATA, else the user's cache)")
    parser.add_argument("--download", action="store_true", help="fetch what is not there through torchvision")
    parser.add_argument("--make-sample", metavar="FOLDER", type=Path, help="write the embedded sample anew")
    given = parser.parse_args(arguments)
    try:
        data = load("cifar10" if given.make_sample else given.name, given.root, given.download)
    except DataError as error:
        parser.exit(1, f"{error}\n")
    print(f"{data}\nfrom {data.place}")
    sha256 = make_sample(data, given.make_sample) if given.make_sample else data.sha256
    for split, value in sha256.items():
        print(f"sha256 {split:5s} {value}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
