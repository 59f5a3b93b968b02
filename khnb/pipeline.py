"""From settings to records: what the store holds is used, what it lacks is computed, checkpointed and stored.

``python -m khnb.pipeline sweeps/first-light.json`` or ``... '{"K": 20, "bp": "train"}'`` does it at a terminal.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from khnb import attacks, learning, models, robustness, training
from khnb import audit as auditing
from khnb import data as datasets
from khnb.data import Dataset
from khnb.heads import Head, logits, train_heads
from khnb.native import cache_dir
from khnb.results import Rows, Store, atomic_write, code_version, record_id
from khnb.settings import DTYPES, MEMORY, PARAMETERS, ConvSettings, HeadSettings, check, check_geometry

SNAPSHOTS = (0, 1, 2, 4, 8, 15, 30)  # epochs
AUDITED = 300  # images of an audit, where nothing else is said
DEFAULTS = {name: parameter.default for name, parameter in PARAMETERS.items()}


def pick_device(device: str = "auto") -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU, in full single precision; ``ValueError`` for a device that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.ones(1, device=chosen).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used ({str(error).splitlines()[0]}); try device='cpu'") from error
    if chosen.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # PyTorch would round the factors of convolutions to 10 bits; radii are told to 1e-6
    return chosen


def progress(total: int, what: str, unit: str, done: int = 0):
    """A progress bar where somebody watches: at a terminal or in a live notebook, not under papermill, CI or a book build.

    ``KHNB_PROGRESS=1`` or ``0`` overrules.
    """
    wish, live = os.environ.get("KHNB_PROGRESS"), ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")
    watched = "CI" not in os.environ and (sys.stderr.isatty() or any(name in os.environ for name in live))
    return tqdm(total=total, initial=done, desc=what, unit=unit, disable=not watched if wish is None else wish == "0")


class Checkpoint:
    """State of an unfinished computation: tensors, numbers and lists, written atomically, read without pickle's powers.

    It is kept in the folder named by ``KHNB_CHECKPOINTS`` (to be committed, or carried to another machine), else in the cache.
    """

    def __init__(self, id: str, every_s: float = 30.0):
        folder = Path(os.environ.get("KHNB_CHECKPOINTS") or cache_dir() / "checkpoints").expanduser()
        self.path, self.every_s, self.last = folder / f"{id}.pt", every_s, time.monotonic()

    def load(self):
        """What was saved last, or ``None``. A damaged checkpoint is named and left aside."""
        if not self.path.exists():
            return None
        try:
            return torch.load(self.path, weights_only=True)
        except Exception as error:  # any damage at all means: begin again
            warnings.warn(f"checkpoint {self.path} is damaged ({type(error).__name__}); starting from the beginning")
            return None

    def save(self, state: Callable, force: bool = False) -> None:
        """Write what ``state()`` gives, at most every ``every_s`` seconds."""
        if force or time.monotonic() - self.last > self.every_s:
            buffer = io.BytesIO()
            torch.save(state(), buffer)
            atomic_write(self.path, buffer.getvalue())
            self.last = time.monotonic()

    def clear(self) -> None:
        """Remove the file: the record has taken its place."""
        self.path.unlink(missing_ok=True)


class NotKept(ValueError):
    """A model that is kept without its weights, where these are needed."""


@dataclass
class Run:
    """What a computation works with: images, store, device, and whom to tell what it does.

    ``evidence``: where the images are not the full CIFAR-10, a record made on the full set is taken as well. ``bare``: a model whose weights
    were not kept counts as found; else it is trained again.
    """

    data: Dataset
    store: Store = field(default_factory=Store)
    device: str = "auto"
    note: Callable[[str], None] = print
    evidence: bool = False
    bare: bool = False

    def __post_init__(self):
        code_version()  # that of the code as it is now, not as it may be when a long computation ends

    @classmethod
    def of(cls, parameters: dict, **more) -> Run:
        """The run a notebook's parameters ask for (``data``, ``device``)."""
        return cls(datasets.load(parameters["data"]), device=parameters["device"], evidence=parameters["data"] == "auto", **more)

    def find(self, kind: str, asked: dict, what: str, of: dict | None = None) -> dict | None:
        """The record of exactly this, if there is one; with ``of``, a record that is about this other one and no older."""
        record = self.store.get(kind, asked, self.data)
        if record is None and self.evidence:
            record = next((r for r in self.store.full(kind, **asked) if r["asked"] == asked), None)
        if record and kind == "model" and record["arrays"].get("dropped") and not self.bare:
            self.note(f"{what}: record {record['id']} was kept without its weights.")
            return None
        if record and of and record["started"] < of["started"]:
            self.note(f"{what}: record {record['id']} is older than {of['kind']} record {of['id']}, which was made again since.")
            return None
        if record:
            origin = {"cifar10": "full CIFAR-10"}.get(record["data"]["name"], record["data"]["name"])
            self.note(f"{what}: record {record['id']} from the store, computed on {origin}, {record['started'][:10]}.")
        return record

    def failure(self, kind: str, asked: dict) -> str | None:
        """Why exactly this came to nothing, with the code as it is now, if it was tried; a change of the code may have cured it."""
        record = self.store.get("failure", dict(of=kind) | asked, self.data)
        return record["results"]["reason"] if record and record["code"]["source"] == code_version()["source"] else None

    def put_failure(self, kind: str, asked: dict, reason: str, history: list[dict], wall_s: float) -> None:
        """A record that this was tried and why it came to nothing."""
        results, device = dict(reason=reason, history=_finite(history)), pick_device(self.device)
        self.store.put("failure", dict(of=kind) | asked, self.data, results=results, arrays={}, wall_s=wall_s, device=device)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, side and number of classes of the images."""
        return self.data.train_images.shape[1], self.data.train_images.shape[-1], len(self.data.classes)


def conv_layers(run: Run, convs: list[ConvSettings], snapshots=SNAPSHOTS, stop_collapsed: bool = False) -> list[dict]:
    """Records of KH layers with these settings: the store's, or trained now, in lockstep, on the run's images and stored.

    ``snapshots`` are the epochs of which a record keeps the filters, in half precision, and with them those of the last one. A layer
    that met the Blue Wall of Death, or whose filters stopped being finite, has its record as well: ``results.collapsed`` and
    ``results.stopped`` say so. With ``stop_collapsed`` the former is not trained to the end either.
    """
    found = [run.find("layer", conv.dict(), "KH layer") for conv in convs]
    missing = list(dict.fromkeys(conv for conv, record in zip(convs, found, strict=True) if record is None))
    made = dict(zip(missing, _train_layers(run, missing, snapshots, stop_collapsed), strict=True)) if missing else {}
    return [record or made[conv] for conv, record in zip(convs, found, strict=True)]


def conv_layer(run: Run, conv: ConvSettings) -> dict:
    """The record of one KH layer: see :func:`conv_layers`."""
    return conv_layers(run, [conv])[0]


def _lockstep(run: Run, convs: list[ConvSettings], what: str, snapshots=(), **more) -> list[learning.Layer]:
    """:func:`khnb.learning.train_layers` with checkpoint and progress; the caller clears the checkpoint."""
    data, checkpoint = run.data, _lockstep_checkpoint(run, convs, what)
    state, layers = checkpoint.load(), None
    ends = [min(conv.conv_epochs, more.get("until") or conv.conv_epochs) for conv in convs]
    if state:
        layers = [learning.Layer(conv, **kept) for conv, kept in zip(convs, state, strict=True)]
    done = [len(layer.history) for layer in layers or []]
    name = what if len(convs) == 1 else f"{len(convs)} {what}s in lockstep"
    if any(ends):
        run.note(f"{name}: training on {len(data.train_images)} images of {data.name}, epoch {min(done, default=0) + 1} to {max(c.conv_epochs for c in convs)}.")
    with progress(sum(ends), what, "epoch", sum(done)) as bar:

        def after_epoch(layers):
            bar.total = sum(len(layer.history) if layer.stopped else end for layer, end in zip(layers, ends, strict=True))
            bar.update(sum(len(layer.history) for layer in layers) - bar.n)
            bar.set_postfix(f=layers[0].history[-1]["f_1e4"], norm=layers[0].history[-1]["norm"]) if len(layers) == 1 else None
            checkpoint.save(lambda: [{name: getattr(layer, name) for name in ("weight", "history", "wins", "snapshots", "stopped")} for layer in layers])

        kept = {*snapshots, *(conv.conv_epochs for conv in convs)} if snapshots else ()
        return learning.train_layers(data.train_images, convs, pick_device(run.device), layers, kept, after_epoch, **more)


def _lockstep_checkpoint(run, convs, what):
    return Checkpoint(record_id(what, [conv.dict() for conv in convs], run.data.sha256))


def _train_layers(run: Run, convs: list[ConvSettings], snapshots, stop_collapsed: bool) -> list[dict]:
    records = []
    for layer in _lockstep(run, convs, "KH layer", snapshots, stop_collapsed=stop_collapsed):
        kept = sorted(layer.snapshots)
        record = run.store.put(
            "layer", layer.settings.dict(), run.data,
            results=dict(
                f_score=learning.f_score(layer.weight, layer.settings.p), f_score_1e4=learning.f_score(layer.weight, layer.settings.p, 1e-4),
                collapsed=layer.collapsed, stopped=layer.stopped, history=_finite(layer.history),
            ),
            arrays=dict(
                weight=layer.weight.numpy(), wins=(torch.zeros(len(layer.weight)) if layer.wins is None else layer.wins).numpy(), epochs=np.array(kept, dtype=np.int64),
                # pictures of the way, not to be computed with: half precision
                snapshots=np.array([layer.snapshots[e].half().numpy() for e in kept], dtype=np.float16).reshape(-1, *layer.weight.shape),
            ),
            wall_s=sum(row["seconds"] for row in layer.history), device=pick_device(run.device),
        )
        records.append(record)
    _lockstep_checkpoint(run, convs, "KH layer").clear()
    return records


def _finite(history: list[dict]) -> list[dict]:
    """Rows for a record, which holds no number that is not finite."""
    return [{k: v if math.isfinite(v) else None for k, v in row.items()} for row in history]


def collapse_probes(run: Run, convs: list[ConvSettings], seeds: int, until: int) -> list[dict]:
    """Records that say what becomes of ``seeds`` layers of each setting in the first ``until`` epochs: see :func:`khnb.learning.fates`.

    All of them go in lockstep, on the same patches; the seeds 0 to seeds - 1 decide the initial filters (``conv.seed`` is not
    looked at). With a small ``conv_share`` and many ``conv_epochs`` an epoch is a short stretch of the way.
    """
    asked = [probe_asked(conv, seeds, until) for conv in convs]
    found = [run.find("probe", one, "probe") for one in asked]
    missing = [i for i, record in enumerate(found) if record is None]
    if missing:
        each = [replace(convs[i], seed=seed) for i in missing for seed in range(seeds)]
        layers = _lockstep(run, each, "probe", until=until, stop_collapsed=True)
        for at, i in enumerate(missing):
            mine = layers[at * seeds : (at + 1) * seeds]
            found[i] = run.store.put(
                "probe", asked[i], run.data,
                results=dict(
                    stopped=[layer.stopped for layer in mine],
                    **{name: [[row[name] for row in _finite(layer.history)] for layer in mine] for name in ("f_1e4", "alive", "winners")},
                ),
                arrays={}, wall_s=sum(row["seconds"] for layer in mine for row in layer.history), device=pick_device(run.device),
            )
        _lockstep_checkpoint(run, each, "probe").clear()
    return found


def probe_asked(conv: ConvSettings, seeds: int, until: int) -> dict:
    """What the record of a probe says was asked."""
    return {k: v for k, v in conv.dict().items() if k != "seed"} | dict(seeds=seeds, until=until)


def _images(run: Run, head: HeadSettings):
    """Training images and labels, without those held out."""
    count = len(run.data.train_images) - head.held_out
    if count < 1:
        raise ValueError(f"held_out={head.held_out} is not valid: {run.data.name} has {count + head.held_out} training images")
    return run.data.train_images[:count], run.data.train_labels[:count]


def _told(run: Run, held_out: int) -> list:
    """What a trained model is asked about: the test images and, if any, those held out."""
    return [run.data.test_images, *([run.data.train_images[-held_out:]] if held_out else [])]


def _put_model(run: Run, asked: dict, model: models.Network, said: list, history: list[dict], wall_s: float, device, **more) -> dict:
    """Store a trained model, with its logits of the images of :func:`_told`."""
    data, kept = run.data, model.head.held_out
    top, guess = said[0].softmax(1).max(1)
    right = guess == data.test_labels
    results = dict(
        test_accuracy=right.double().mean().item(), test_images=len(right), confident_and_correct=int((right & (top >= 0.8)).sum()), history=history
    )
    if kept:
        right = said[1].argmax(1) == data.train_labels[-kept:]
        results |= dict(validation_accuracy=right.double().mean().item(), validation_images=kept)
    arrays = {name.replace(".", "_"): value.cpu().numpy() for name, value in model.state_dict().items()}
    return run.store.put("model", asked, data, results=results, arrays=arrays, wall_s=wall_s, device=device, **more)


def ll_models(
    run: Run, conv: ConvSettings, heads: list[HeadSettings], feature_dtype: str = "float32", memory: float = MEMORY, exact: bool = False
) -> list[dict]:
    """Records of LL models with one KH layer: the store's, else trained now, all heads together (:func:`khnb.heads.train_heads`).

    The layer is trained where the store lacks it. Heads have their own seeds. ``feature_dtype`` is how pooled activities are kept while
    heads train (``float16`` and ``bfloat16`` halve their memory), in at most ``memory`` GiB; but for ``exact`` a stored model is taken
    with any of them.
    ``results.history`` of a record has the time of its share: that of an epoch divided by the number of heads in it.
    Raises ``FloatingPointError`` where the loss of a head stops being finite, after the others are stored and a record of the failure.
    """
    for head in heads:
        check_geometry(run.shape[1], conv.w, head.w_pool)
    asked = {head: ll_asked(conv, head) for head in heads}
    found = {}
    for head, ask in asked.items():
        stored = (run.find("model", ask | dict(feature_dtype=dtype), "LL model") for dtype in dict.fromkeys([feature_dtype, *(() if exact else DTYPES)]))
        found[head] = next((record for record in stored if record), None)
    groups: dict[int, list[HeadSettings]] = {}
    stopped = []
    for head in found:
        if found[head] is None:
            reason = run.failure("model", asked[head] | dict(feature_dtype=feature_dtype))
            if reason:
                stopped.append(reason)
            else:
                groups.setdefault(head.held_out, []).append(head)
    for held_out, group in groups.items():
        layer = conv_layer(run, conv)
        trained, wall_s = _train_group(run, conv, layer, group, feature_dtype, memory)
        for one in trained:
            if one.stopped:
                stopped.append(f"{one.stopped} (sigma={one.network.head.sigma}, n={one.network.head.n:g})")
                run.put_failure("model", asked[one.network.head] | dict(feature_dtype=feature_dtype), stopped[-1], one.history, wall_s)
        trained = [one for one in trained if not one.stopped]
        for one, said in zip(trained, zip(*(logits(trained, images) for images in _told(run, held_out)), strict=True), strict=True):
            found[one.network.head] = _put_model(
                run, asked[one.network.head] | dict(feature_dtype=feature_dtype), one.network, said, one.history,
                wall_s=wall_s, device=pick_device(run.device), layer=layer["id"], together=len(group),
            )
        _heads_checkpoint(run, conv, group, feature_dtype).clear()
    if stopped:
        raise FloatingPointError("; ".join(stopped))
    return [found[head] for head in heads]


def ll_asked(conv: ConvSettings, head: HeadSettings) -> dict:
    """The hyperparameters of an LL model. Those that layer and head both have are there once, unless they differ: then ``seed`` is
    the layer's and ``head_seed`` the head's, and so for the constants of the schedules."""
    own, others = conv.dict(), head.dict()
    differ = {name: value for name, value in others.items() if name in own and own[name] != value}
    return dict(model="LL") | own | others | {name: own[name] for name in differ} | {f"head_{name}": value for name, value in differ.items()}


def _heads_checkpoint(run, conv, heads, dtype):
    return Checkpoint(record_id("heads", [conv.dict(), [head.dict() for head in heads], dtype], run.data.sha256))


def _train_group(run: Run, conv: ConvSettings, layer: dict, heads: list[HeadSettings], dtype: str, memory: float):
    """Trained heads with the same held-out images, and each one's share of the time."""
    started, weight = time.perf_counter(), torch.from_numpy(run.store.arrays(layer)["weight"])
    device = pick_device(run.device)
    trained = [Head(models.ll_network(weight, conv.p, head, *run.shape[1:]).to(device).eval()) for head in heads]
    checkpoint = _heads_checkpoint(run, conv, heads, dtype)
    state = checkpoint.load()
    for one, kept in zip(trained, state or [], strict=bool(state)):
        one.resume(kept)
    images, labels = _images(run, heads[0])
    done, before = [len(one.history) for one in trained], sum(row["seconds"] for one in trained for row in one.history)
    name = "LL head" if len(heads) == 1 else f"{len(heads)} LL heads together"
    epochs = [head.head_epochs for head in heads]
    run.note(f"{name}: training on {len(images)} images of {run.data.name}, epoch {min(done) + 1} to {max(epochs)}.")
    with progress(sum(epochs), name, "epoch", sum(done)) as bar:

        def after_epoch(active):
            bar.total = sum(len(one.history) if one.stopped else one.network.head.head_epochs for one in trained)
            bar.update(sum(len(one.history) for one in trained) - bar.n)
            bar.set_postfix(accuracy=active[0].history[-1]["accuracy"])
            checkpoint.save(lambda: [one.state() for one in trained])

        train_heads(trained, images, labels, getattr(torch, dtype), memory * 2**30, after_epoch)
    return trained, (before + time.perf_counter() - started) / len(trained)


def ll_model(run: Run, conv: ConvSettings, head: HeadSettings, feature_dtype: str = "float32", memory: float = MEMORY) -> dict:
    """The record of one LL model: see :func:`ll_models`."""
    return ll_models(run, conv, [head], feature_dtype, memory)[0]


def bp_model(run: Run, K: int, w: int, head: HeadSettings, train: bool = True) -> dict | None:
    """Record of the BP model with these settings: the store's, else trained end to end, else (``train=False``) ``None``."""
    check_geometry(run.shape[1], w, head.w_pool)
    asked = bp_asked(K, w, head)
    record = run.find("model", asked, "BP model")
    if record or not train:
        return record
    reason = run.failure("model", asked)
    if reason:
        raise FloatingPointError(reason)
    started, device = time.perf_counter(), pick_device(run.device)
    model = models.bp_network(K, w, head, *run.shape).to(device).train()
    checkpoint = Checkpoint(record_id("model", asked, run.data.sha256))
    state = checkpoint.load()
    images, labels = _images(run, head)
    done = len(state["history"]) if state else 0
    run.note(f"BP model: training on {len(images)} images of {run.data.name}, epoch {done + 1} to {head.head_epochs}.")
    with progress(head.head_epochs, "BP model", "epoch", done) as bar:

        def after_epoch(state):
            bar.update()
            bar.set_postfix(loss=state["history"][-1]["loss"], accuracy=state["history"][-1]["accuracy"])
            checkpoint.save(lambda: state)

        try:
            history = training.train(model, images, labels, state, after_epoch)
        except FloatingPointError as error:
            run.put_failure("model", asked, str(error), [], time.perf_counter() - started)
            checkpoint.clear()
            raise
    wall_s = time.perf_counter() - started + sum(row["seconds"] for row in history[:done])
    said = [training.predict(model.eval(), images) for images in _told(run, head.held_out)]
    record = _put_model(run, asked, model, said, history, wall_s, device)
    checkpoint.clear()
    return record


def bp_asked(K: int, w: int, head: HeadSettings) -> dict:
    """What the record of a BP model says was asked."""
    return dict(model="BP", K=K, w=w, **head.dict())


def bp_head(parameters: dict) -> HeadSettings:
    """The head of the BP twin that a notebook's parameters ask for."""
    own = dict(sigma=parameters["bp_sigma"], head_epochs=parameters["bp_epochs"], head_batch=parameters["bp_batch"])
    return HeadSettings.of(parameters | own)


def models_of(run: Run, parameters: dict) -> dict[str, dict]:
    """The records a notebook's parameters ask for: ``LL``, and ``BP`` as the parameter ``bp`` says."""
    how = {name: parameters[name] for name in ("feature_dtype", "memory") if name in parameters}
    found = dict(LL=ll_model(run, ConvSettings.of(parameters), HeadSettings.of(parameters), **how))
    if parameters["bp"] != "none":
        twin = bp_model(run, parameters["K"], parameters["w"], bp_head(parameters), train=parameters["bp"] == "train")
        if twin:
            found["BP"] = twin
        else:
            run.note("BP model: the store has none for these parameters; -p bp train trains it.")
    return found


def network(record: dict, store: Store | None = None, side: int = 32) -> models.Network:
    """The trained network of a model record, in eval mode on the CPU, its weights fixed: an attack would else find their gradients as well."""
    store = store or Store()
    arrays = {name: torch.from_numpy(value) for name, value in store.arrays(record).items()}
    asked, head = record["asked"], HeadSettings.of(record["asked"])
    if dropped := record["arrays"].get("dropped"):
        raise NotKept(f"model record {record['id']} is kept without {', '.join(dropped)}; delete {store.path('model', record['id'])} to train it again")
    classes = len(arrays["linear_bias"])
    if asked["model"] == "LL":
        model = models.ll_network(arrays["conv_weight"], asked["p"], head, side, classes)
    else:
        model = models.bp_network(asked["K"], asked["w"], head, arrays["conv_weight"].shape[1], side, classes)
    model.load_state_dict({name.replace("_", ".", 1): value for name, value in arrays.items()})
    return model.eval().requires_grad_(False)


def filters(record: dict, store: Store) -> np.ndarray:
    """The filters (F, C, w, w) of a model: its own, or, where an LL model is kept without, its layer's. ``ValueError`` where neither is kept."""
    arrays = store.arrays(record)
    if "conv_weight" in arrays:
        return arrays["conv_weight"]
    layer = store.light("layer").get(record.get("layer"))
    if layer is None:
        raise ValueError(f"model record {record['id']} is kept without its filters; delete {store.path('model', record['id'])} to train it again")
    return store.arrays(layer)["weight"]


def stages(record: dict, store: Store) -> dict[int, np.ndarray]:
    """The filters (F, C, w, w) of a layer on its way: epoch -> those that its record keeps, in half precision; where it keeps none, the last alone."""
    arrays = store.arrays(record)
    kept = dict(zip(arrays.get("epochs", np.empty(0)).tolist(), arrays.get("snapshots", ()), strict=True))
    return kept or {len(record["results"]["history"]): arrays["weight"]}


def without_weights(store: Store, record: dict) -> dict:
    """A model's record, kept without the weights that training it again, or an LL model's layer, gives."""
    return store.drop(record, "linear_weight", "conv_weight")


#: what an attack can be given, beside the least confidence of the images
AMOUNTS = dict(fgsm=("eps_max",), pgd=("step", "radius", "max_steps"))
#: the thesis's attacks (section 9.1): FGSM on images of both confidences, and both settings of PGD, with the larger step of the two printed for the second
ATTACKS = {
    "thesis": [
        dict(attack="fgsm", confidence=0.6), dict(attack="fgsm", confidence=0.8),
        dict(attack="pgd", step=1e-3, radius=0.12), dict(attack="pgd", step=5e-4, radius=0.14),
    ],
    "separated": [dict(attack="pgd", step=step, radius=radius) for step in (1e-3, 5e-4) for radius in (0.1, 0.12, 0.14)],
}


def attack(run: Run, model_record: dict, kind: str = "fgsm", confidence: float = 0.8, **amounts) -> dict:
    """Record of the adversarial radii of every correct, confident test image, and of their fit (eqs. 7.6-7.7).

    The store's record is used where it has one for this model; else that of the same attack on all images of some lower confidence, of
    which these are some; else the run's test images are attacked now.

    Parameters
    ----------
    kind : ``fgsm``, :func:`khnb.attacks.fgsm_radius` with ``eps_max``; or ``pgd``, :func:`khnb.attacks.pgd_radius` with ``step``,
        ``radius`` and ``max_steps``, whose record has ``fit_steps`` as well, the fit of the numbers of steps.
    confidence : the least softmax output of an attacked image (C in section 7.2).
    amounts : defaults are those of :data:`khnb.settings.PARAMETERS`.

    Where some images are never fooled, ``results.fit_kept`` is the fit that keeps them, see :func:`khnb.robustness.fit`. Arrays: ``radii``;
    ``images``, their numbers in the test set; ``confidences``; of pgd ``steps``. ``ValueError`` for another kind or amount.
    """
    amounts = attack_amounts(kind, confidence, **amounts)
    asked = attack_asked(model_record["asked"], model_record["id"], kind, amounts)
    name = f"{kind.upper()} on the {asked['model']} model"
    record = run.find("attack", asked, name, of=model_record)
    if record:
        return record
    started, device, more = time.perf_counter(), pick_device(run.device), {}
    others = run.store.find("attack", **{name: value for name, value in asked.items() if name != "confidence"})
    here = dict(name=run.data.name, **run.data.sha256)
    of_this = [r for r in others if r["data"] == here and r["started"] >= model_record["started"]]
    wider = [r for r in of_this if r["asked"]["confidence"] < confidence and "confidences" in r["arrays"]["names"]]
    if wider:
        kept = Rows(wider[0], "confidences", amounts["confidence"])
        arrays, more = run.store.rows(kept), dict(derived_from=wider[0]["id"])
        run.note(f"{name}: {len(arrays['radii'])} of the {wider[0]['results']['fit']['n']} images of record {wider[0]['id']}.")
    else:
        checkpoint = Checkpoint(record_id("attack", asked | dict(since=model_record["started"]), run.data.sha256))
        kept = arrays = _attack_now(run, model_record, kind, amounts, device, checkpoint)
    results = dict(fit=robustness.fit(arrays["radii"]).dict(), accuracy=model_record["results"]["test_accuracy"])
    if results["fit"]["n_survived"]:
        results["fit_kept"] = robustness.fit(arrays["radii"], survivors="kept").dict()
    if kind == "pgd":
        steps = np.where(arrays["steps"] < 0, np.inf, arrays["steps"])
        results["fit_steps"] = robustness.fit(steps).dict()
    spent = float(arrays.pop("seconds", 0.0)) or time.perf_counter() - started
    record = run.store.put("attack", asked, run.data, results=results, arrays=kept, wall_s=spent, device=device, **more)
    if not wider:
        checkpoint.clear()
    return record


def attack_amounts(kind: str, confidence: float, **amounts) -> dict:
    """All that an attack is to be made with, checked: see :func:`attack`."""
    if kind not in AMOUNTS:
        raise ValueError(f"attack={kind!r} is not valid: one of {', '.join(AMOUNTS)}")
    found = check({name: PARAMETERS[name].default for name in AMOUNTS[kind]} | amounts, AMOUNTS[kind])
    return found | check(dict(confidence=confidence))


def attack_asked(model: dict, id: str, kind: str, amounts: dict) -> dict:
    """What the record of an attack says was asked, of a model with this ``asked`` and id."""
    return dict(model, attack=kind, **amounts, of=id)


def _attack_now(run: Run, model_record: dict, kind: str, amounts: dict, device, checkpoint: Checkpoint) -> dict:
    """The arrays of :func:`attack`, and the ``seconds`` it took, those of an interrupted run included."""
    data, started = run.data, time.perf_counter()
    model = network(model_record, run.store, run.shape[1]).to(device)
    top, guess = training.predict(model, data.test_images).softmax(1).max(1)
    chosen = torch.nonzero((guess == data.test_labels) & (top >= amounts["confidence"]))[:, 0]
    run.note(f"{kind.upper()}: attacking {len(chosen)} of {len(guess)} test images of {data.name}, correct and at least {amounts['confidence']:.0%} sure.")
    state = checkpoint.load() or dict(radii=[], steps=[], seconds=0.0)
    done, size = sum(map(len, state["radii"])), training.part_size(model, data.test_images)
    with progress(len(chosen), kind.upper(), "image", done) as bar:
        for first in range(done, len(chosen), size):
            part = chosen[first : first + size]
            images, labels = training.to_float(data.test_images[part]).to(device), data.test_labels[part].to(device)
            if kind == "fgsm":
                radii, steps = attacks.fgsm_radius(model, images, labels, amounts["eps_max"]), None
            else:
                radii, steps = attacks.pgd_radius(model, images, labels, amounts["step"], amounts["radius"], amounts["max_steps"])
                radii = (radii * 1e7).round() / 1e7  # pixels in single precision know no more, and what they seem to know does not compress
                state["steps"].append(steps.cpu())
            state["radii"].append(radii.cpu())
            bar.update(len(part))
            checkpoint.save(lambda: state | dict(seconds=state["seconds"] + time.perf_counter() - started))
    arrays = dict(radii=torch.cat([torch.empty(0, dtype=torch.float64), *state["radii"]]).numpy(), images=chosen.int().numpy())
    arrays |= dict(confidences=top[chosen].numpy(), seconds=state["seconds"] + time.perf_counter() - started)
    if kind == "pgd":
        arrays["steps"] = torch.cat([torch.empty(0, dtype=torch.int64), *state["steps"]]).short().numpy()
    return arrays


def audit(run: Run, attack_record: dict, model_record: dict, images: int = AUDITED) -> dict:
    """Record of an audit (:func:`khnb.audit.audit`) of a model at the strength of its R, on the first images of an attack on it.

    attack_record, model_record : of :func:`attack` and the model it attacked; images : how many at most. ``results`` are the shares of
    the audit, ``images``, ``epsilon`` and, in words, ``verdict``. ``ValueError`` where the attack has no R.
    """
    fit = attack_record["results"]["fit"]
    if fit["status"] != "ok":
        raise ValueError(f"attack record {attack_record['id']} has no R ({fit['status']}): nothing says at which strength to audit")
    asked = audit_asked(attack_record["asked"], attack_record["id"], images)
    record = run.find("audit", asked, f"audit of the {asked['model']} model", of=attack_record)
    if record:
        return record
    started, device = time.perf_counter(), pick_device(run.device)
    chosen = torch.from_numpy(run.store.arrays(attack_record)["images"][:images]).long()
    model = network(model_record, run.store, run.shape[1]).to(device)
    run.note(f"audit of the {asked['model']} model: several attacks at {fit['R']:.4f} on {len(chosen)} images.")
    x, y = training.to_float(run.data.test_images[chosen]).to(device), run.data.test_labels[chosen].to(device)
    results = auditing.audit(model, x, y, fit["R"])
    results |= dict(verdict=auditing.verdict(results, len(chosen)), images=len(chosen), epsilon=fit["R"])
    return run.store.put("audit", asked, run.data, results=results, arrays={}, wall_s=time.perf_counter() - started, device=device)


def to_audit(attacks: list[dict]) -> list[dict]:
    """Of the records of attacks on one model, in the order in which they were asked for, that at whose R it is audited: the last FGSM that has one, if any."""
    return [each for each in attacks if each["asked"]["attack"] == "fgsm" and each["results"]["fit"]["status"] == "ok"][-1:]


def audit_asked(attack: dict, id: str, images: int = AUDITED) -> dict:
    """What the record of an audit says was asked, at the strength of an attack with this ``asked`` and id."""
    return dict(attack, audited=id, images=images)


def expand(given: dict) -> list[dict]:
    """One dictionary for each combination of the values that are given as lists, for each of the dictionaries under ``"each"``."""
    found = []
    for more in given.get("each", [{}]):
        one = {name: value for name, value in given.items() if name != "each"} | more
        lists = {name: value for name, value in one.items() if isinstance(value, list)}
        found += [one | dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    return found


def main(words: list[str]) -> None:
    """Compute what JSON objects name, e.g. ``{"K": 20, "bp": "train"}``, or files that hold a list of them.

    A value that is a list stands for one object each; ``"each"`` is a list of objects to be merged into this one. Parameters that are
    not named have their defaults. ``"what"`` is ``"models"`` (LL models, with their BP twins as ``"bp"`` says; where it is not named),
    ``"bp"`` (BP models alone), ``"stored"`` (whatever models with these parameters, and ``"model"`` and ``"head_seed"``, the store holds; none is
    trained), ``"layers"`` (with ``"snapshots"`` and ``"stop_collapsed"``, see :func:`conv_layers`) or ``"probes"`` (with
    ``"seeds"`` and ``"until"``, see :func:`collapse_probes`). Layers and probes of one object are trained in lockstep, LL models with the
    same KH layer together; ``"head_seeds"`` is a list of the seeds of their classifiers, where these are not to be ``"seed"``. Models are
    attacked as well, with FGSM: ``"attacked"`` is ``false`` for not at all, one of :data:`ATTACKS` by name, or a list of attacks, objects with
    ``"attack"``, ``"confidence"`` and amounts as :func:`attack` takes them; with ``"audited": true``, or a number of images, they are audited
    at the R of the last FGSM among them (:func:`audit`), and with ``"weights": false`` their weights, by far the most of a model, are not kept (an LL model's filters are in the record of its layer): a model that is to be attacked or audited later is then
    trained again, and attacked again, as its weights may not come out the same to the last bit. ``ValueError`` before anything runs where something is wrong.
    """
    for job in [read_job(given) for given in read_asked(words)]:
        run = Run.of(DEFAULTS | job.each[0], bare=True)
        if job.what == "stored":
            _stored(run, job)
        elif job.what in ("models", "bp"):
            _models(run, job)
        else:
            _layers(run, job)


def read_asked(words: list[str]) -> list[dict]:
    """The JSON objects that these words are, or that the files they name hold. ``ValueError`` for what is no JSON."""
    asked = []
    for word in words:
        text = Path(word).read_text() if word.endswith(".json") else word
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{word} is no JSON ({error}); expected an object, or a file with a list of them") from error
        asked += found if isinstance(found, list) else [found]
    return asked


@dataclass
class Job:
    """One object of a grid, checked: ``each`` has all parameters of everything it stands for, and of stored models those that were named. See :func:`main`."""

    what: str
    each: list[dict]
    seeds: int
    until: int
    snapshots: list[int]
    stop_collapsed: bool
    attacked: list[dict]
    audited: int  # images; 0: not
    weights: bool
    head_seeds: list[int] | None


def read_job(given: dict) -> Job:
    """An object of a grid; ``ValueError`` names the first thing that is wrong with it, before anything runs."""
    given = dict(given)
    what, seeds, until = given.pop("what", "models"), given.pop("seeds", 5), given.pop("until", 1)
    snapshots, stop = given.pop("snapshots", list(SNAPSHOTS)), given.pop("stop_collapsed", False)
    attacked, head_seeds = given.pop("attacked", True), given.pop("head_seeds", None)
    audited, weights = given.pop("audited", False), given.pop("weights", True)
    for name, value in (("stop_collapsed", stop), ("weights", weights)):
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} is not valid: expected true or false")
    if not isinstance(audited, int) or audited < 0:
        raise ValueError(f"audited={audited!r} is not valid: expected true, false or a number of images")
    audited = AUDITED if audited is True else int(audited)
    attacked = _attacks(attacked)
    lists = dict(snapshots=(snapshots, 0), head_seeds=([0] if head_seeds is None else head_seeds, 0))
    for name, (numbers, least) in (dict(seeds=([seeds], 1), until=([until], 1)) | lists).items():
        if not isinstance(numbers, list) or not all(type(number) is int and number >= least for number in numbers):
            value = numbers if name in lists else numbers[0]
            wanted = f"whole numbers >= {least}" if name in lists else f"a whole number >= {least}"
            raise ValueError(f"{name}={value!r} is not valid: expected {'a list of ' if name in lists else ''}{wanted}")
    if what not in ("models", "bp", "layers", "probes", "stored"):
        raise ValueError(f"what={what!r} is not valid: one of models, bp, layers, probes, stored")
    if what == "stored":
        kept = {name: given.pop(name) for name in ("model", "head_seed") if name in given}
        each = [check(one) | kept for one in expand(given)]
    else:
        each = [DEFAULTS | check(one) for one in expand(given)]
        for parameters in each:
            ConvSettings.of(parameters), HeadSettings.of(parameters), bp_head(parameters)
            check_geometry(datasets.SHAPE[-1], parameters["w"], parameters["w_pool"] if what in ("models", "bp") else 1)
    return Job(what, each, seeds, until, snapshots, stop, attacked, audited, weights, head_seeds)


def _attacks(given) -> list[dict]:
    """What :func:`attack` is to be called with, from ``"attacked"``."""
    if isinstance(given, bool):
        return [dict(kind="fgsm")] * given
    if isinstance(given, str) and given in ATTACKS:
        given = ATTACKS[given]
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise ValueError(f"attacked={given!r} is not valid: expected true, false, {', '.join(ATTACKS)} or a list of attacks")
    found = []
    for one in given:
        one = dict(one)
        kind = one.pop("attack", "fgsm")
        if kind not in AMOUNTS:
            raise ValueError(f"attack={kind!r} is not valid: one of {', '.join(AMOUNTS)}")
        found.append(dict(kind=kind) | check(one, (*AMOUNTS[kind], "confidence")))
    return found


def _layers(run: Run, job: Job) -> None:
    convs, layers = [ConvSettings.of(parameters) for parameters in job.each], job.what == "layers"
    records = conv_layers(run, convs, job.snapshots, job.stop_collapsed) if layers else collapse_probes(run, convs, job.seeds, job.until)
    for conv, record in zip(convs, records, strict=True):
        results = record["results"]
        told = f"f {results['f_score_1e4']:.2f}" if layers else f"{learning.fates(results, conv.K**2).count('collapsed')} of {job.seeds} collapsed"
        print(f"K={conv.K} w={conv.w} p={conv.p:g} m={conv.m} delta={conv.delta:g}: {told} ({record['id']})", flush=True)


def _stored(run: Run, job: Job) -> None:
    names = [{name: value for name, value in one.items() if name not in ("data", "device", "confidence")} for one in job.each]
    found = {r["id"]: r for one in names for r in run.store.find("model", **one) if r["data"]["train"] == run.data.sha256["train"]}
    attacks = _with_confidence(job.attacked, DEFAULTS | job.each[0])
    found = {id: (r, attacks) for id, r in found.items() if not r["arrays"].get("dropped")}  # those are done with
    follow(run, found, lambda ids: {}, job.audited, job.weights)


def _models(run: Run, job: Job) -> None:
    """Train what is missing, LL models with the same layer together; then what follows."""
    together: dict[tuple, list[HeadSettings]] = {}
    for parameters in job.each if job.what == "models" else []:
        head = HeadSettings.of(parameters)
        each = [head] if job.head_seeds is None else [replace(head, seed=seed) for seed in job.head_seeds]
        together.setdefault((ConvSettings.of(parameters), parameters["feature_dtype"], parameters["memory"]), []).extend(each)
    attacks = _with_confidence(job.attacked, job.each[0])

    def then(train: Callable, keys: list) -> None:
        """``train`` gives the records of some of these models in a run."""
        found = zip(keys, train(run, keys), strict=True)
        follow(run, {key: (r, attacks) for key, r in found if r}, lambda some: dict(zip(some, train(replace(run, bare=False), some), strict=True)), job.audited, job.weights)

    for (conv, *how), heads in together.items():
        then(lambda run, heads, conv=conv, how=how: ll_models(run, conv, heads, *how, exact=True), list(dict.fromkeys(heads)))
    for parameters in job.each:
        if job.what == "bp" or parameters["bp"] != "none":
            train = job.what == "bp" or parameters["bp"] == "train"
            then(lambda run, heads, at=(parameters["K"], parameters["w"]), train=train: [bp_model(run, *at, head, train) for head in heads], [bp_head(parameters)])


def _with_confidence(attacked: list[dict], parameters: dict) -> list[dict]:
    return [dict(confidence=parameters["confidence"]) | one for one in attacked]


def follow(run: Run, models: dict, again: Callable[[list], dict], audited: int = 0, weights: bool = True) -> list[dict]:
    """Attack models, audit them, say what came out, and return the records.

    models : key -> record of a model, and what :func:`attack` is to be called with, for each attack. again : trains the models with some of the keys once more,
    for those that were kept without the weights that this takes. audited, weights : see :func:`main`.
    """
    found, lacking = [], {}
    for key, (record, attacks) in models.items():
        told = f"{record['asked']['model']} {record['id']}: accuracy {record['results']['test_accuracy']:.4f}"
        try:
            made = [attack(run, record, **one) for one in attacks]
            audits = [audit(run, each, record, audited) for each in to_audit(made)] if audited else []
        except NotKept:
            lacking[key] = attacks
            continue
        for one, fit in zip(attacks, (each["results"]["fit"] for each in made), strict=True):
            told += f", {one['kind']} R {fit['R']:.5f} +- {fit['R_err']:.5f}, {fit['n']} images" if fit["status"] == "ok" else f", {one['kind']} {fit['status']}"
        told += "".join(f", {one['results']['verdict']}" for one in audits)
        found += made + audits
        if not weights:
            without_weights(run.store, record)
        run.note(told)
    if lacking and (trained := again(list(lacking))):
        found += follow(run, {key: (record, lacking[key]) for key, record in trained.items()}, lambda keys: {}, audited, weights)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
