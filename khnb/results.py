"""The store: one record per trained layer, trained model or attack, with where it came from.

A record is a small JSON file, ``records/<kind>/<id>.json``; its arrays lie beside it in ``arrays/<id>.npz``. The id is a
hash of what was asked (every hyperparameter, the seed, the data), so asking again finds the record and a changed
hyperparameter never does. Both files are written to the side and moved into place, arrays first: a crash, a full
disk or a second writer leaves whole records or none.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

import khnb
from khnb.settings import LATER, PARAMETERS

KINDS = ("layer", "probe", "model", "attack", "audit", "failure", "timing")
COMPUTING = ("settings", "patches", "layer", "native", "learning", "models", "heads", "training", "attacks", "audit", "robustness")
LIBRARIES = ("torch", "numpy", "scipy")


def default_root() -> Path:
    """``KHNB_RESULTS``, else ``results`` of the source tree khnb runs from, else ``results`` here."""
    named = os.environ.get("KHNB_RESULTS")
    beside = Path(khnb.__file__).parent.parent / "results"
    return Path(named) if named else beside if beside.is_dir() else Path("results")


def record_id(kind: str, asked: dict, data: dict) -> str:
    """The id of a record: 16 hex digits of the SHA-256 of what was asked and of which data."""
    text = json.dumps([kind, asked, data["train"], data["test"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def code_version() -> dict:
    """Version, git commit, whether the tree differed from it, and a hash of the modules that compute."""
    folder = Path(khnb.__file__).parent
    digest = hashlib.sha256()
    for name in COMPUTING:
        digest.update((folder / f"{name}.py").read_bytes())
    for name in ("kernels.c", "kernels_gpu.py"):
        digest.update((folder / name).read_bytes())

    def git(*words):
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--", str(folder))
    return dict(
        version=khnb.__version__, commit=git("rev-parse", "HEAD"), dirty=None if status is None else bool(status),
        source=digest.hexdigest()[:16],
    )


def provenance(device="cpu") -> dict:
    """Code, library versions and hardware of this process."""
    libraries = {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in LIBRARIES}
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    hardware = dict(device=device.type, name=name, threads=torch.get_num_threads(), system=platform.system())
    return dict(code=code_version(), libraries=libraries, hardware=hardware)


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file wholly or not at all. ``OSError`` names the place when it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


#: FGSM radii are whole multiples of this, and as such take less than half the room; the names of arrays that are kept so end like this
GRAIN, IN_GRAINS = 1e-6, "@1e-6"


def _in_grains(value: np.ndarray) -> np.ndarray | None:
    """The numbers k (int32) with value == k * GRAIN to the last bit, -1 for ``inf``; ``None`` where there are none."""
    if value.dtype != np.float64 or not (value >= 0).all():  # nan as well
        return None
    grains = np.rint(np.where(np.isinf(value), -GRAIN, value) / GRAIN)
    if not (grains < 2**31).all():
        return None
    grains = grains.astype(np.int32)
    return grains if _of_grains(grains).tobytes() == value.tobytes() else None


def _of_grains(grains: np.ndarray) -> np.ndarray:
    return np.where(grains < 0, np.inf, grains * GRAIN)


def pack(arrays: dict) -> bytes:
    """Named arrays as compressed npz bytes, for :func:`unpack`; object arrays (which would be pickled) are refused."""
    plain = {name: np.asarray(value) for name, value in arrays.items()}
    for name, value in plain.items():
        if value.dtype.hasobject:
            raise ValueError(f"array {name!r} holds Python objects; only numbers are stored")
    for name, value in list(plain.items()):
        if (grains := _in_grains(value)) is not None:
            plain[name + IN_GRAINS] = grains
            del plain[name]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **plain)
    return buffer.getvalue()


def unpack(content: bytes) -> dict[str, np.ndarray]:
    """What :func:`pack` was given, to the last bit. Raises one of a dozen kinds of exception on bytes that are no npz of numbers."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    if not all(isinstance(value, np.ndarray) for value in found.values()):
        raise ValueError("not all of it is arrays")
    return {name.removesuffix(IN_GRAINS): _of_grains(value) if name.endswith(IN_GRAINS) else value for name, value in found.items()}


class DamagedRecord(Warning):
    """A record, or its arrays, that cannot be trusted; it is named and left out."""


#: parts of a record's results that are long, and that a table does not need
LONG = ("history", "f_1e4", "alive", "winners")
#: seconds: a file that changed so shortly before it was looked at may change again without looking different
RACY = 2


class Store:
    """The records under one folder. Reading never fails on a damaged record: it warns (:class:`DamagedRecord`) and skips it.

    ``code`` selects those made with one version of the code: the beginning of a commit or of the hash of the modules that compute, or
    ``current``; others are as if they were not there, and are replaced when they are asked for. The default is ``KHNB_CODE``, else all.
    """

    def __init__(self, root: Path | str | None = None, code: str | None = None):
        self.root = Path(root) if root is not None else default_root()
        code = os.environ.get("KHNB_CODE", "") if code is None else code
        self.code = code_version()["source"] if code == "current" else code
        self._tables: dict[str, dict] = {}

    @property
    def source(self) -> str:
        """The hash of the modules that compute, as they are now; a record has it under ``code``."""
        return code_version()["source"]

    def _chosen(self, record: dict) -> bool:
        of = record["code"]
        return not self.code or any(str(of.get(name) or "").startswith(self.code) for name in ("commit", "source"))

    def light(self, kind: str) -> dict[str, dict]:
        """All records of a kind by id, without the parts that are long (:data:`LONG`): enough for a table, and quick.

        They come from an index beside the records, ``.index/<kind>.json.z``, which is made and kept up by reading. It holds what a file said
        when it had the same name, size, inode and times; a file that is new or differs, or changed less than two seconds before it was read,
        is read itself. A writer replaces a file by a new one, so that nothing stale is served, and whoever reads at the same time reads whole
        indices. It can be deleted at any time, and is left out where it cannot be written.
        """
        folder, place = self.root / "records" / kind, self.root / ".index" / f"{kind}.json.z"
        seen, now = {}, time.time_ns()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.endswith(".json") and not entry.name.startswith("."):
                        stat = entry.stat()
                        seen[entry.name] = [stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino]
        except OSError:
            return {}
        known, table = self._tables.get(kind) or _read_index(place), {}
        for name in sorted(seen):
            of, record = known.get(name, (None, None))
            if of != seen[name]:
                record = self._read(folder / name)
                record = record and _lighten(record)
            if record:
                table[name] = [seen[name], record]
        # not those that are damaged, so that they are named again, nor those that may still change within a tick of the clock
        settled = {name: one for name, one in table.items() if max(one[0][:2]) < now - RACY * 10**9}
        if [one[0] for one in settled.values()] != [one[0] for one in known.values()]:
            with contextlib.suppress(OSError):
                atomic_write(place, zlib.compress(json.dumps(settled).encode(), 1))
        self._tables[kind] = settled
        return {record["id"]: record for _, record in table.values() if self._chosen(record)}

    def path(self, kind: str, id: str) -> Path:
        """Where the record lies, or would."""
        return self.root / "records" / kind / f"{id}.json"

    def put(self, kind: str, asked: dict, data, results: dict, arrays: dict | Rows, wall_s: float, device="cpu", **more) -> dict:
        """Write one record and return it.

        ``asked`` holds every hyperparameter, ``data`` is a :class:`khnb.data.Dataset`, ``results`` plain numbers,
        ``arrays`` name -> array, or some :class:`Rows` of another record's, ``wall_s`` seconds. ``more`` goes into the record as it is.
        ``ValueError`` for another kind, or for a number that is not finite (say ``None``).
        """
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is not valid: one of {', '.join(KINDS)}")
        id, content = record_id(kind, asked, data.sha256), None
        if isinstance(arrays, Rows):
            kept = arrays.record["arrays"] | dict(file=_file(arrays.record), least={arrays.name: arrays.least})
        else:
            content = pack(arrays)
            kept = dict(names=sorted(arrays), sha256=hashlib.sha256(content).hexdigest())
        record = dict(
            id=id, kind=kind, asked=asked, data=dict(name=data.name, **data.sha256), **provenance(device),
            started=datetime.now(timezone.utc).isoformat(timespec="seconds"), wall_s=round(wall_s, 1),
            command=" ".join(sys.argv[:1]), results=results, **more, arrays=kept,
        )
        text = json.dumps(record, indent=1, allow_nan=False)
        if content is not None:
            atomic_write(self.root / "arrays" / f"{id}.npz", content)
        atomic_write(self.path(kind, id), text.encode())
        (self.root / "arrays" / f"{id}-kept.npz").unlink(missing_ok=True)  # of a record that stood here before, see drop
        return record

    def rows(self, rows: Rows) -> dict[str, np.ndarray]:
        """The arrays that a record of these :class:`Rows` has."""
        return _cut(self.arrays(rows.record), {rows.name: rows.least})

    def drop(self, record: dict, *names: str) -> dict:
        """Keep a record without some of its arrays, such as weights that are too large to publish with every model; return it.

        It says what was dropped, with the SHA-256 of each array's bytes, so that one computed again can be compared. Whoever reads meanwhile,
        or a crash, finds the record as it was or as it becomes.
        """
        arrays = self.arrays(record)
        gone = {name: hashlib.sha256(np.ascontiguousarray(arrays.pop(name)).tobytes()).hexdigest() for name in names if name in arrays}
        if not gone:
            return record
        content, before = pack(arrays), self.root / "arrays" / _file(record)
        gone |= record["arrays"].get("dropped", {})
        kept = dict(file=f"{record['id']}-kept.npz", names=sorted(arrays), sha256=hashlib.sha256(content).hexdigest(), dropped=gone)
        record = record | dict(arrays=kept)
        atomic_write(self.root / "arrays" / kept["file"], content)
        atomic_write(self.path(record["kind"], record["id"]), json.dumps(record, indent=1, allow_nan=False).encode())
        if before.name != kept["file"]:
            before.unlink(missing_ok=True)
        return record

    def _read(self, path: Path) -> dict | None:
        try:
            record = json.loads(path.read_bytes(), parse_constant=_refuse)
            whole = record["id"] == path.stem and record["kind"] == path.parent.name
            if not whole or record["id"] != record_id(record["kind"], record["asked"], record["data"]):
                raise ValueError("its id does not match what it says was asked")
            parts = record["asked"], record["results"], record["data"]["name"], record["started"], record["arrays"]["sha256"]
            if not all(isinstance(part, kind) for part, kind in zip(parts, (dict, dict, str, str, str), strict=True)):
                raise ValueError("a part of it is of the wrong kind")
            if not isinstance(record["code"], dict):
                raise ValueError("it does not say with which code it was made")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            warnings.warn(f"record {path} is damaged ({error}) and left out; delete it to compute it again", DamagedRecord)
            return None
        return record

    def get(self, kind: str, asked: dict, data) -> dict | None:
        """The record of exactly this, or ``None``."""
        path = self.path(kind, record_id(kind, asked, data.sha256))
        record = self._read(path) if path.exists() else None
        return record if record and self._chosen(record) else None

    def find(self, kind: str, **asked) -> list[dict]:
        """All records of a kind whose hyperparameters equal those named: full data first, then those with the fewest values other than
        the defaults, then by seed (of an LL model that of its layer, then that of its head).

        A parameter that came later (:data:`khnb.settings.LATER`) and is not in a record has its default there.
        """

        def unusual(record):
            return sum(name in PARAMETERS and name != "seed" and value != PARAMETERS[name].default for name, value in record["asked"].items())

        match = [r for r in self.light(kind).values() if all(r["asked"].get(k, LATER.get(k, _MISSING)) == v for k, v in asked.items())]
        match = [r for r in (self._read(self.path(kind, r["id"])) for r in match) if r]
        return sorted(match, key=lambda r: (r["data"]["name"] != "cifar10", unusual(r), r["asked"].get("seed", 0), r["asked"].get("head_seed", -1), r["id"]))

    def full(self, kind: str, **asked) -> list[dict]:
        """Those of :meth:`find` that were made on the full CIFAR-10."""
        return [r for r in self.find(kind, **asked) if r["data"]["name"] == "cifar10"]

    def arrays(self, record: dict) -> dict[str, np.ndarray]:
        """The arrays of a record. ``ValueError`` naming the file where they are missing or not what was stored."""
        path = self.root / "arrays" / _file(record)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"arrays {path} of {record['kind']} record {record['id']} cannot be read: {error}") from error
        if hashlib.sha256(content).hexdigest() != record["arrays"]["sha256"]:
            raise ValueError(f"arrays {path} are not those of the record; delete the record to compute it again")
        try:
            return _cut(unpack(content), record["arrays"].get("least", {}))
        except Exception as error:  # numpy and zipfile raise a dozen kinds on bytes that are no npz
            raise ValueError(f"arrays {path} are no npz of numbers ({error}); delete the record to compute it again") from error


_MISSING = object()


@dataclass(frozen=True)
class Rows:
    """Those rows of a record's arrays in which the array ``name`` is at least ``least``: a record of its own that repeats no number."""

    record: dict
    name: str
    least: float


def _cut(arrays: dict, least: dict) -> dict:
    for name, value in least.items():
        some = arrays[name] >= value
        arrays = {name: values[some] for name, values in arrays.items()}
    return arrays


def _file(record: dict) -> str:
    """The name of the file with a record's arrays: its own id, unless it says otherwise. ``ValueError`` for what leads elsewhere."""
    name = record["arrays"].get("file", f"{record['id']}.npz")
    if not isinstance(name, str) or not re.fullmatch(r"[0-9a-f]{16}(-kept)?\.npz", name):
        raise ValueError(f"{record['kind']} record {record['id']} names {name!r} as the file of its arrays, which is no name of one")
    return name


def _lighten(record: dict) -> dict:
    return record | dict(results={name: value for name, value in record["results"].items() if name not in LONG})


def _read_index(place: Path) -> dict:
    """What :meth:`Store.light` wrote, or nothing where that is not there or damaged."""
    try:
        found = json.loads(zlib.decompress(place.read_bytes()))
        whole = isinstance(found, dict) and all(isinstance(one, list) and len(one) == 2 and isinstance(one[1], dict) for one in found.values())
        return found if whole else {}
    except (OSError, ValueError, zlib.error):
        return {}


def _refuse(constant: str):
    raise ValueError(f"{constant} is no number")
