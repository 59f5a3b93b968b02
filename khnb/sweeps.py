"""Sweeps: a grid, which is data, becomes groups that share computation; each is one run of a chapter's notebook, told to Snakemake.

``python -m khnb.sweeps plan|run|status GRID [PRESET]`` at a terminal. A grid is the name of an experiment of the thesis
(``E08``, or several, ``E06+E08``, or ``thesis`` for all; :file:`sweeps/thesis.json`), the name of another file in ``sweeps/``, or a
file. What an object of a grid means is told by :func:`khnb.pipeline.main`; here come on top

- ``f_least``: LL models are made only of layers whose f-score (at tolerance 1e-4) is at least this;
- ``of``, in place of all else: the models of these experiments, attacked as ``attacked`` says.

A preset's values stand in for those of all objects of a grid, but for those under ``"each"``; an experiment's own presets come after
the common ones, an object's own after those, and ``null`` takes a common one's value away. ``take`` is a balanced part (:func:`balanced`) of the ``layers``, of the
``heads`` of each, with so many ``poolings``, and of the BP ``models``; ``attacks`` holds amounts for each kind of attack.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import khnb
from khnb import data as datasets
from khnb import pipeline, runner
from khnb.models import n_features
from khnb.results import Store, atomic_write, record_id
from khnb.settings import MEMORY, ConvSettings, HeadSettings, check

FOLDER = Path(khnb.__file__).parent.parent / "sweeps"
PRESETS = ("smoke", "laptop", "thesis")
NOTEBOOKS = dict(layers="08_training", probes="08_training", heads="08_training", bp="08_training", attacks="09_attacks")
# a group is made of the same parts on every machine without a GPU, so that its checkpoint can go on elsewhere; on a GPU, of what its memory holds
NEURONS = 5000  # in lockstep, at most
HEAD_BYTES = 3 * 2**30  # of classifiers trained together, at most
MOST_NEURONS, PER_NEURON = 50_000, 40 * 12_500  # on a GPU: more gain nothing; bytes of a neuron's activities, ranks and changes with the thesis's largest minibatch
BP_TOGETHER = 10  # BP models trained one after the other, or attacked, by one group, at most: starting a notebook takes seconds
SHA256 = {"cifar10": datasets.SHA256, "cifar10-sample": datasets.SAMPLE_SHA256}
IMAGES = {"cifar10": dict(train=50_000, test=10_000), "cifar10-sample": dict(train=1500, test=1000)}


@dataclass
class Group:
    """Work that shares computation: see :func:`work`, which does it.

    ``kind`` is ``layers`` (in lockstep), ``probes``, ``heads`` (one layer with its classifiers), ``bp`` (a few models, one by one) or ``attacks`` (the models of one
    layer, or a few BP models, with all their attacks). ``body`` says what, as plain data; ``needs`` are ids of groups to be done before.
    """

    kind: str
    data: str
    body: dict
    needs: list[str] = field(default_factory=list)

    @property
    def id(self) -> str:
        """16 hex digits, of what is to be done and nothing else."""
        return hashlib.sha256(json.dumps([self.kind, self.data, self.body], sort_keys=True).encode()).hexdigest()[:16]

    @property
    def count(self) -> int:
        """How many layers, probes, models or attacks."""
        body = self.body
        if self.kind == "attacks":
            return sum(map(len, body["attacks"]))
        return len(body[dict(layers="convs", probes="convs", heads="heads", bp="models")[self.kind]])

    @property
    def bp(self) -> bool:
        """Whether it is about BP models."""
        return "models" in self.body and "conv" not in self.body["models"][0]

    @property
    def title(self) -> str:
        """One short line."""
        body, count = self.body, self.count
        one = body["convs"][0] if "convs" in body else body.get("conv") or body["models"][0].get("conv") or body["models"][0]
        names = ("w",) if self.kind in ("layers", "probes") else ("K", "w", "m", "p", "delta", "seed") if "m" in one else ("K", "w")
        of = " ".join(f"{name}={one[name]:g}" for name in names)
        what = dict(bp="BP models", layers="KH layers in lockstep", probes="probes", heads="heads on the layer", attacks="attacks on models of")[self.kind]
        return f"{count} {what} {of}"


def read(grid: str) -> dict:
    """Experiments by name, each with ``jobs``: those of the grid and those they refer to, and the common ``presets``.

    ``ValueError`` naming a grid or an experiment that is not there, or a file that is no JSON.
    """
    book = _json(FOLDER / "thesis.json")
    if grid == "thesis":
        return dict(book, chosen=list(book["experiments"]))
    names = grid.split("+")
    if all(name in book["experiments"] for name in names):
        return dict(book, chosen=names)
    path = Path(grid) if grid.endswith(".json") else FOLDER / f"{grid}.json"
    if not path.is_file():
        others = sorted(each.stem for each in FOLDER.glob("*.json"))
        raise ValueError(f"grid {grid!r} is not there: an experiment of the thesis ({', '.join(book['experiments'])}), one of {', '.join(others)}, or a file")
    found, presets = _json(path), book["presets"] | dict(thesis={})  # as it is written
    if isinstance(found, dict) and "experiments" in found:
        return dict(presets=presets | found.get("presets", {}), experiments=found["experiments"], chosen=list(found["experiments"]))
    jobs = found if isinstance(found, list) else [found]
    return dict(presets=presets, experiments={path.stem: dict(jobs=jobs)}, chosen=[path.stem])


def _json(path: Path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error


def groups(grid: str, preset: str = "thesis", memory: float | None = None) -> list[Group]:
    """What is to be done, those first that others need, in groups for a GPU with so many bytes of ``memory``, else for a CPU.

    ``ValueError`` names the grid and the first value that is wrong, before anything runs.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is not valid: one of {', '.join(PRESETS)}")
    book, wanted = read(grid), Wanted(*((NEURONS, HEAD_BYTES) if memory is None else (min(MOST_NEURONS, memory / 2 / PER_NEURON), memory / 4)))
    for name in book["chosen"]:
        try:
            _add(wanted, book, name, preset)
        except ValueError as error:
            raise ValueError(f"grid {name}: {error}") from error
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"grid {name} is not as a grid should be ({type(error).__name__}: {error})") from error
    return wanted.groups()


def _add(wanted: Wanted, book: dict, name: str, preset: str, attacked=None) -> None:
    """What an experiment asks for; with ``attacked``, its models attacked like this."""
    if name not in book["experiments"]:
        raise ValueError(f"experiment {name!r} is not there: one of {', '.join(book['experiments'])}")
    experiment = book["experiments"][name]
    if attacked is not None and (again := wanted.read.get(name)):  # as several experiments attack the same models
        for job, take, f_least, amounts in again:
            wanted.add(replace(job, attacked=pipeline.read_job(dict(attacked=attacked)).attacked), take, f_least, amounts)
        return
    for given in experiment.get("jobs", []):
        if "of" in given:
            for other in given["of"]:
                _add(wanted, book, other, preset, given["attacked"])
            continue
        own = {name: given.get(name, {}) for name in PRESETS}
        values = book["presets"].get(preset, {}) | experiment.get(preset, {}) | own[preset]
        values = {k: v for k, v in values.items() if v is not None}
        take, amounts = values.pop("take", {}), values.pop("attacks", {})
        if set(take) - {"layers", "heads", "poolings", "models"} or not all(type(count) is int and count > 0 for count in take.values()):
            raise ValueError(f"take={take!r} is not valid: whole numbers > 0 of layers, heads, poolings and models")
        given = {k: v for k, v in given.items() if k not in own}
        given |= {k: v for k, v in values.items() if k not in ("f_least",) or k in given}
        f_least = given.pop("f_least", 0.0)
        if isinstance(f_least, bool) or not isinstance(f_least, (int, float)) or not 0 <= f_least <= 1:
            raise ValueError(f"f_least={f_least!r} is not valid: a number from 0 to 1")
        job = pipeline.read_job(given if attacked is None else given | dict(attacked=attacked))
        if job.what == "stored":
            raise ValueError("what the store holds is not known before: python -m khnb.pipeline does such a grid")
        if attacked is not None and job.what not in ("models", "bp"):
            raise ValueError(f"there are no models to attack, only {job.what}")
        wanted.read.setdefault(name, []).append((job, take, f_least, amounts))
        wanted.add(job, take, f_least, amounts)


def balanced(options: list[dict], count: int, used: Counter | None = None, beside: dict = {}) -> list[int]:
    """Numbers of ``count`` options that have every value of every parameter about equally often, those with rare pairs of values first.

    The choice is the same every time. ``used`` counts what was chosen before, and is added to; ``beside`` holds values of other parameters that go with
    all options now, and with others at another time: pairs with these count as well.
    """
    used, left, chosen = Counter() if used is None else used, list(range(len(options))), []
    names = dict.fromkeys(name for option in options for name in option)
    vary = [name for name in names if len({option.get(name) for option in options}) > 1]

    def pairs(option):
        return [(a, option.get(a), b, option.get(b)) for i, a in enumerate(vary) for b in vary[:i]] + [(a, option.get(a), *one) for a in vary for one in beside.items()]

    def cost(i):
        option = options[i]
        mix = hashlib.sha256(json.dumps(option, sort_keys=True).encode()).hexdigest()
        return sum(used[name, option.get(name)] for name in vary), sum(used[pair] for pair in pairs(option)), mix

    for _ in range(min(count, len(options))):
        best = min(left, key=cost)
        left.remove(best)
        chosen.append(best)
        used.update([(name, options[best].get(name)) for name in vary] + pairs(options[best]))
    return sorted(chosen)


@dataclass
class After:
    """What is to be done with a model once it is trained: attacks with all their amounts, those on images of lower confidence first, as others are then taken from their records."""

    attacks: list[dict] = field(default_factory=list)
    audited: int = 0
    weights: bool = False

    def add(self, job: pipeline.Job, attacked: list[dict], confidence: float) -> None:
        """These attacks as well, and the audit; the weights are kept where anybody who asks for the model wants them."""
        for one in attacked:
            one = dict(confidence=confidence) | one
            full = dict(kind=one["kind"]) | pipeline.attack_amounts(**one)
            if full not in self.attacks:
                self.attacks.append(full)
        self.attacks.sort(key=lambda one: one["confidence"])
        self.audited, self.weights = max(self.audited, job.audited), self.weights or job.weights

    @property
    def wanted(self) -> bool:
        """Whether the weights are to be kept when the model is trained: for the attacks at least."""
        return self.weights or bool(self.attacks)


def only(found: list[Group], wanted: list[str]) -> list[Group]:
    """Those groups all whose layers or BP models have these values (``K=10``), and the groups that they need. ``ValueError`` where none has."""
    values = {}
    for text in wanted:
        name, _, value = text.partition("=")
        if name not in (*ConvSettings.names(), *HeadSettings.names()):
            raise ValueError(f"--only {text} is not valid: NAME=VALUE with the name of a parameter, say K=10")
        values |= check({name: _number(value)})

    def fits(group):
        body = group.body
        each = body.get("convs") or ([body["conv"]] if "conv" in body else [dict(one.get("conv", one), **one["head"] if "conv" not in one else {}) for one in body["models"]])
        return all(one.get(name) == value for one in each for name, value in values.items())

    chosen = {group.id for group in found if fits(group)}
    for group in reversed(found):  # what is needed comes before
        chosen |= set(group.needs) if group.id in chosen else set()
    if not chosen:
        raise ValueError(f"nothing in this grid has {' and '.join(wanted)}")
    return [group for group in found if group.id in chosen]


def _number(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


class Wanted:
    """Layers, probes, models and attacks that were asked for, each once, and how they go together."""

    def __init__(self, neurons: float = NEURONS, head_bytes: float = HEAD_BYTES):
        self.neurons, self.head_bytes = neurons, head_bytes
        self.read: dict[str, list] = {}  # experiment -> what was added for it
        self.layers: dict[tuple, tuple] = {}  # (data, conv) -> (snapshots, stop_collapsed)
        self.probes: dict[tuple, list] = {}  # (data, seeds, until, shared parameters) -> convs
        self.heads: dict[tuple, dict] = {}  # (data, conv, feature_dtype, f_least) -> head -> what follows
        self.bp: dict[tuple, After] = {}  # (data, K, w, head) -> what follows

    def add(self, job: pipeline.Job, take: dict, f_least: float, amounts: dict) -> None:
        """What a job asks for, or a balanced part of it."""
        data = [each["data"] for each in job.each]
        data = ["cifar10" if name == "auto" else name for name in data]
        convs = [ConvSettings.of(each) for each in job.each]
        attacked = [dict(one) | {k: v for k, v in amounts.get(one["kind"], {}).items()} for one in job.attacked]
        if job.what == "probes":
            for where, conv in zip(data, convs, strict=True):
                self.probes.setdefault((where, job.seeds, job.until, *_shared(conv), conv.conv_epochs), []).append(conv)
            return
        distinct = list(dict.fromkeys(zip(data, convs, strict=True)))
        if "layers" in take and job.what != "bp":
            distinct = [distinct[i] for i in balanced([conv.dict() for _, conv in distinct], take["layers"])]
        if job.what != "bp":
            for key in distinct:
                self.layers.setdefault(key, (tuple(job.snapshots), job.stop_collapsed))
        if job.what == "models":
            self._add_heads(job, set(distinct), data, convs, take, f_least, attacked)
        bps = [(where, each["K"], each["w"], pipeline.bp_head(each), each["confidence"]) for where, each in zip(data, job.each, strict=True)
               if job.what == "bp" or each["bp"] == "train"]
        bps = list(dict.fromkeys(bps))
        if "models" in take:
            bps = [bps[i] for i in balanced([dict(K=K, w=w) | head.dict() for _, K, w, head, _ in bps], take["models"])]
        for *key, confidence in bps:
            self.bp.setdefault(tuple(key), After()).add(job, attacked, confidence)

    def _add_heads(self, job, distinct, data, convs, take, f_least, attacked) -> None:
        of_layer: dict[tuple, list] = {}
        for where, conv, each in zip(data, convs, job.each, strict=True):
            head = HeadSettings.of(each)
            heads = [head] if job.head_seeds is None else [HeadSettings(**head.__dict__ | dict(seed=seed)) for seed in job.head_seeds]
            if (where, conv) in distinct:
                of_layer.setdefault((where, conv, each["feature_dtype"], f_least), []).extend((head, each["confidence"]) for head in heads)
        used: Counter = Counter()
        for key, heads in of_layer.items():
            for head, confidence in _some(heads, key[1], take, used):
                self.heads.setdefault(key, {}).setdefault(head, After()).add(job, attacked, confidence)

    def groups(self) -> list[Group]:
        """All of it, in groups, those first that others need."""
        found = [*self._layers(), *self._probes()]
        makes = {(group.data, ConvSettings(**conv)): group for group in found if group.kind == "layers" for conv in group.body["convs"]}
        attacking = []
        for (data, conv, dtype, f_least), heads in self.heads.items():
            how = dict(conv=conv.dict(), feature_dtype=dtype, f_least=f_least)
            for part in _parts(list(heads), lambda head: _head_bytes(conv, head), self.head_bytes):
                body = how | dict(heads=[head.dict() for head in part], weights=any(heads[head].wanted for head in part))
                group = Group("heads", data, body, [makes[data, conv].id])
                found.append(group)
                attacking += _attacks(data, [(dict(conv=conv.dict(), head=head.dict(), feature_dtype=dtype), heads[head]) for head in part], f_least, [group])
        alike: dict[tuple, list] = {}
        for (data, K, w, head), after in self.bp.items():
            alike.setdefault((data, K, w), []).append((dict(K=K, w=w, head=head.dict()), after))
        for (data, _, _), models in alike.items():
            for part in _parts(models, lambda _: 1, BP_TOGETHER):
                group = Group("bp", data, dict(models=[model for model, _ in part], weights=any(after.wanted for _, after in part)))
                found.append(group)
                attacking += _attacks(data, part, 0.0, [group])
        return found + attacking

    def _layers(self) -> Iterable[Group]:
        together: dict[tuple, list[ConvSettings]] = {}
        for (data, conv), (snapshots, stop) in self.layers.items():
            together.setdefault((data, snapshots, stop, *_shared(conv), conv.conv_epochs), []).append(conv)
        for (data, snapshots, stop, *_), convs in together.items():
            for part in _parts(sorted(convs, key=lambda conv: conv.K), lambda conv: conv.K**2, self.neurons):
                yield Group("layers", data, dict(convs=[conv.dict() for conv in part], snapshots=list(snapshots), stop_collapsed=stop))

    def _probes(self) -> Iterable[Group]:
        for (data, seeds, until, *_), convs in self.probes.items():
            for part in _parts(list(dict.fromkeys(convs)), lambda conv: conv.K**2 * seeds, self.neurons):
                yield Group("probes", data, dict(convs=[conv.dict() for conv in part], seeds=seeds, until=until))


def _some(heads: list[tuple], conv: ConvSettings, take: dict, used: Counter) -> list[tuple]:
    """A balanced part of the heads of a layer, or all; of one pooling where ``take`` says so, since pooled activities are most of the work."""
    if "heads" not in take:
        return heads
    beside = {name: getattr(conv, name) for name in ("K", "w", "m", "p")}
    if take.get("poolings"):
        pools = list(dict.fromkeys(head.w_pool for head, _ in heads))
        chosen = {pools[i] for i in balanced([dict(w_pool=pool) for pool in pools], take["poolings"], used, beside)}
        heads = [one for one in heads if one[0].w_pool in chosen]
    return [heads[i] for i in balanced([head.dict() for head, _ in heads], take["heads"], used, beside)]


def _shared(conv: ConvSettings) -> tuple:
    """What layers in lockstep have in common."""
    return conv.w, conv.conv_batch, conv.conv_order, conv.conv_chunk, conv.conv_share


def _head_bytes(conv: ConvSettings, head: HeadSettings) -> int:
    """Of a classifier while it is trained: weights, gradients and AdamW's two moments, and sums for two threads."""
    return 24 * len(datasets.CLASSES) * n_features(conv.K**2, datasets.SHAPE[-1], conv.w, head)


def _parts(things: list, size, most: float) -> Iterable[list]:
    """Of these, in order, as many at a time as have sizes of at most so much together, at least one; parts of about equal size."""
    total = sum(map(size, things))
    limit, part, held = total / max(1, -(-total // most)), [], 0
    for thing in things:
        if part and held + size(thing) > min(most, limit + size(thing) / 2):
            yield part
            part, held = [], 0
        part.append(thing)
        held += size(thing)
    if part:
        yield part


def _attacks(data: str, models: list[tuple[dict, After]], f_least: float, needs: list[Group]) -> list[Group]:
    models = [(model, after) for model, after in models if after.attacks]
    if not models:
        return []
    body = dict(
        models=[model for model, _ in models], attacks=[after.attacks for _, after in models], f_least=f_least,
        audited=max(after.audited for _, after in models), weights=any(after.weights for _, after in models),
    )
    return [Group("attacks", data, body, [group.id for group in needs])]


# what a group yields, and doing it


def asks(group: Group) -> list[tuple[str, dict]]:
    """Kind of record and what it says was asked, of each layer, probe, model or attack of the group; audits depend on what comes out."""
    body = group.body
    if group.kind == "layers":
        return [("layer", conv) for conv in body["convs"]]
    if group.kind == "probes":
        return [("probe", pipeline.probe_asked(ConvSettings(**conv), body["seeds"], body["until"])) for conv in body["convs"]]
    if group.kind == "heads":
        return [("model", _asked(body | dict(head=head))) for head in body["heads"]]
    if group.kind == "bp":
        return [("model", _asked(model)) for model in body["models"]]
    return [("attack", asked) for asked, _ in _attack_asks(group)]


def _asked(model: dict) -> dict:
    if "conv" in model:
        return pipeline.ll_asked(ConvSettings.of(model["conv"]), HeadSettings.of(model["head"])) | dict(feature_dtype=model["feature_dtype"])
    return pipeline.bp_asked(model["K"], model["w"], HeadSettings.of(model["head"]))


def _attack_asks(group: Group) -> list[tuple[dict, str]]:
    """What was asked of each attack, and the id of its record."""
    found, sha256 = [], SHA256[group.data]
    for model, attacks in zip(group.body["models"], group.body["attacks"], strict=True):
        asked = _asked(model)
        id = record_id("model", asked, sha256)
        for one in attacks:
            attack = pipeline.attack_asked(asked, id, one["kind"], {name: value for name, value in one.items() if name != "kind"})
            found.append((attack, record_id("attack", attack, sha256)))
    return found


def missing(group: Group, store: Store) -> list[tuple[str, dict]]:
    """Those of :func:`asks`, and of the audits that follow, of which the store holds neither a record nor why there is none.

    Models of a layer that did not reach ``f_least``, and attacks on models that came to nothing, are not missing; attacks on a model as it was before it was
    trained again are.
    """
    sha256, body = SHA256[group.data], group.body
    if body.get("f_least"):
        conv = body["conv"] if group.kind == "heads" else body["models"][0]["conv"]
        layer = store.light("layer").get(record_id("layer", conv, sha256))
        if layer and layer["results"]["f_score_1e4"] < body["f_least"]:
            return []
    if group.kind == "attacks":
        left = _missing_attacks(group, store)
        model = dict(of="model")
        failures = {asked["of"]: record_id("failure", model | _model_of(asked), sha256) for _, asked in left}
    else:
        kept = store.light(dict(layers="layer", probes="probe").get(group.kind, "model"))
        left = [(kind, asked) for kind, asked in asks(group) if record_id(kind, asked, sha256) not in kept]
    if not left or group.kind in ("layers", "probes"):
        return left
    failed = {id for id, record in store.light("failure").items() if record["code"]["source"] == store.source}
    if group.kind == "attacks":
        return [(kind, asked) for kind, asked in left if failures[asked["of"]] not in failed]
    return [(kind, asked) for kind, asked in left if record_id("failure", dict(of=kind) | asked, sha256) not in failed]


def _model_of(attack: dict) -> dict:
    """What was asked of the model, of what was asked of an attack or audit."""
    others = {"attack", "confidence", "of", "audited", "images", *(name for names in pipeline.AMOUNTS.values() for name in names)}
    return {name: value for name, value in attack.items() if name not in others}


def made(grid: str, preset: str, store: Store, kind: str = "model") -> list[dict]:
    """The records of a kind that a grid asks for at a preset, as far as the store has them, without their long parts (:meth:`khnb.results.Store.light`)."""
    kept = store.light(kind)
    return [kept[id] for id in dict.fromkeys(id for what, id in _ids(groups(grid, preset)) if what == kind) if id in kept]


def _missing_attacks(group: Group, store: Store) -> list[tuple[str, dict]]:
    models, kept, audits, left, found, images = store.light("model"), store.light("attack"), store.light("audit"), [], {}, group.body["audited"]
    for asked, id in _attack_asks(group):
        record, of = kept.get(id), models.get(asked["of"])
        if record is None or of and record["started"] < of["started"]:
            left.append(("attack", asked))
        else:
            found.setdefault(asked["of"], []).append(record)
    due = [pipeline.audit_asked(one["asked"], one["id"], images) for each in found.values() for one in pipeline.to_audit(each)] if images else []
    return left + [("audit", asked) for asked in due if record_id("audit", asked, SHA256[group.data]) not in audits]


def work(group: Group, run: pipeline.Run, memory: float | None = None) -> list[dict]:
    """Do what the store lacks of a group and return its records.

    A model that comes to nothing has a record of that (kind ``failure``), which is among those returned. ``memory`` is for pooled activities, in GiB.
    """
    body, found = group.body, []
    if group.kind == "layers":
        return pipeline.conv_layers(run, [ConvSettings(**conv) for conv in body["convs"]], body["snapshots"], body["stop_collapsed"])
    if group.kind == "probes":
        return pipeline.collapse_probes(run, [ConvSettings(**conv) for conv in body["convs"]], body["seeds"], body["until"])
    if not _layer_passes(group, run):
        return []
    if group.kind == "heads":
        heads = [HeadSettings(**head) for head in body["heads"]]
        _try(replace(run, bare=True), pipeline.ll_models, ConvSettings(**body["conv"]), heads, body["feature_dtype"], memory_for(group, run, memory), exact=True)
    for model in body["models"] if group.kind == "bp" else []:
        _try(replace(run, bare=True), pipeline.bp_model, model["K"], model["w"], HeadSettings(**model["head"]))
    if group.kind != "attacks":
        for kind, asked in asks(group):
            record = run.store.get(kind, asked, run.data)
            if record and not body["weights"]:
                record = pipeline.without_weights(run.store, record)
            found.append(record or run.store.get("failure", dict(of=kind) | asked, run.data))
        return found
    there = {}
    for i, (model, attacks) in enumerate(zip(body["models"], body["attacks"], strict=True)):
        record = run.store.get("model", _asked(model), run.data)
        if record is None and run.failure("model", _asked(model)) is None:
            raise ValueError(f"the model {_asked(model)} is not in the store; run the group that trains it first")
        if record:
            there[i] = record, attacks
    return pipeline.follow(replace(run, bare=True), there, lambda some: _again(group, run, some, memory), body["audited"], body["weights"])


def _again(group: Group, run: pipeline.Run, some: list[int], memory: float | None) -> dict[int, dict]:
    """Train models of a group of attacks, by their numbers, that were kept without the weights which an attack takes."""
    models = [group.body["models"][i] for i in some]
    heads = [HeadSettings(**model["head"]) for model in models]
    if "conv" in models[0]:
        how = models[0]["feature_dtype"], memory_for(group, run, memory)
        records = pipeline.ll_models(run, ConvSettings(**models[0]["conv"]), heads, *how, exact=True)
    else:
        records = [pipeline.bp_model(run, model["K"], model["w"], head) for model, head in zip(models, heads, strict=True)]
    return dict(zip(some, records, strict=True))


def _try(run: pipeline.Run, make, *given, **more) -> None:
    try:
        make(run, *given, **more)
    except FloatingPointError as error:  # the store has a record of it
        run.note(f"not all of it came to something: {error}")


def _layer_passes(group: Group, run: pipeline.Run) -> bool:
    body = group.body
    if not body.get("f_least"):
        return True
    conv = body["conv"] if group.kind == "heads" else body["models"][0]["conv"]
    f = pipeline.conv_layer(run, ConvSettings(**conv))["results"]["f_score_1e4"]
    if f < body["f_least"]:
        run.note(f"nothing to do: the layer has f = {f:.2f}, less than {body['f_least']:g}")
    return f >= body["f_least"]


def memory_for(group: Group, run: pipeline.Run, given: float | None = None) -> float:
    """GiB for pooled activities: what was given, else the parameter's default on a CPU, or what the group's classifiers leave free on its GPU."""
    device = pipeline.pick_device(run.device)
    if given is not None or device.type != "cuda":
        return MEMORY if given is None else given
    conv, models = ConvSettings(**(group.body.get("conv") or group.body["models"][0]["conv"])), group.body.get("models", [])
    heads = sum(_head_bytes(conv, HeadSettings(**head)) for head in group.body.get("heads") or [model["head"] for model in models])
    free = torch.cuda.mem_get_info(device)[0]
    return max(0.0, (0.8 * free - heads - 3 * 2**30) / 2**30)  # 3 GiB: the images, and the parts at hand (khnb.heads.DEVICE_PART)


# in a notebook


@contextlib.contextmanager
def own_gpu(device: str):
    """The device to use: where ``auto`` means a GPU, one that no other job of this machine's sweeps has, held until the end."""
    if device != "auto" or not torch.cuda.is_available():
        yield device
        return
    places = [Path(tempfile.gettempdir()) / f"khnb-gpu-{torch.cuda.get_device_properties(i).uuid}" for i in range(torch.cuda.device_count())]
    while True:
        for i, place in enumerate(places):
            try:
                lock = runner.held(place, wait=False)
                lock.__enter__()
            except BlockingIOError:
                continue
            try:
                yield f"cuda:{i}"
            finally:
                lock.__exit__(None, None, None)
            return
        time.sleep(1)


def in_notebook(parameters: dict) -> dict:
    """Do the group that the parameter ``group`` names (``FILE#ID``), show its records, and give the parameters of the first model among them,
    which the page follows from there on. Without a group the parameters are given back as they are."""
    if not parameters["group"]:
        return parameters
    from IPython.display import Markdown, display

    from khnb import tables

    place, _, id = parameters["group"].partition("#")
    try:
        plan = _json(Path(place))
        group = next(Group(**{name: one[name] for name in ("kind", "data", "body", "needs")}) for one in plan["groups"] if one["id"] == id)
    except (OSError, StopIteration, KeyError, TypeError) as error:
        raise ValueError(f"group={parameters['group']!r} is not valid: FILE#ID of a plan that python -m khnb.sweeps made ({error!r})") from error
    run = pipeline.Run.of(dict(data=group.data, device=parameters["device"]))
    with own_gpu(parameters["device"]) as run.device:  # all that needs no GPU was done before
        records = work(group, run, plan.get("memory"))
    rows = [{"record": f"`{r['id']}`", "kind": r["kind"], "what": _what(r["asked"]), "outcome": _outcome(r), "seconds": f"{r['wall_s']:.1f}"} for r in records]
    display(Markdown(f"**{group.title}**\n\n" + (tables.markdown(rows) if rows else "Nothing was to be made.")))
    model = (group.body.get("models") or [{}])[0]
    first = dict(model.get("conv") or group.body.get("conv") or group.body.get("convs", [{}])[0])
    head = model.get("head") or group.body.get("heads", [{}])[0]
    if "conv" in model or not model:
        return parameters | first | head | dict(data=group.data, bp="none")
    own = {f"bp_{name}": head[f"{long}{name}"] for name, long in (("sigma", ""), ("epochs", "head_"), ("batch", "head_"))}
    return parameters | dict(K=model["K"], w=model["w"], data=group.data, bp="stored") | {k: v for k, v in head.items() if k not in ("sigma", "head_epochs", "head_batch")} | own


def _what(asked: dict) -> str:
    names = ("model", "K", "w", "m", "p", "delta", "sigma", "n", "w_pool", "seed", "head_seed", "attack", "confidence")
    return " ".join(f"{name}={asked[name]:g}" if isinstance(asked[name], float) else f"{name}={asked[name]}" for name in names if name in asked)


def _outcome(record: dict) -> str:
    results = record["results"]
    if record["kind"] == "failure":
        return results["reason"]
    if record["kind"] == "layer":
        return f"f {results['f_score_1e4']:.2f} {results['stopped']}"
    if record["kind"] == "model":
        return f"accuracy {results['test_accuracy']:.4f}"
    if record["kind"] == "attack":
        return f"R {results['fit']['R']:.5f}" if results["fit"]["status"] == "ok" else results["fit"]["status"]
    return ""


# at a terminal


from khnb import costs  # noqa: E402  it is about groups, and what follows about what they cost


def runs() -> Path:
    """Where sweeps keep what they need on their way: ``KHNB_RUNS``, else ``runs`` of the source tree."""
    return Path(os.environ.get("KHNB_RUNS") or FOLDER.parent / "runs").absolute()


def write_plan(folder: Path, grid: str, preset: str, found: list[Group], device: str, threads: int, times: dict, todo=None, workers=1, memory=None) -> Path:
    """``groups.json``, which says all that the engine and the notebooks need to know, and the notebooks up to the cell that does the work."""
    import nbformat

    folder.mkdir(parents=True, exist_ok=True)
    notebooks = FOLDER.parent / "notebooks"
    for name in {NOTEBOOKS[group.kind] for group in found}:
        notebook = nbformat.read(notebooks / f"{name}.ipynb", as_version=4)
        last = next(i for i, cell in enumerate(notebook.cells) if "group" in cell.metadata.get("tags", []))
        notebook.cells = notebook.cells[: last + 1]
        atomic_write(folder / f"{name}.ipynb", nbformat.writes(notebook).encode())
    kept = MEMORY if memory is None else memory
    told = [
        dict(id=group.id, title=group.title, kind=group.kind, data=group.data, body=group.body, needs=group.needs, notebook=NOTEBOOKS[group.kind], threads=threads,
             mem_mb=round(1024 * costs.of(group, kept).gib)) | ({"seconds": round(times[group.id], 1)} if group.id in times else {})
        for group in found
    ]
    plan = dict(grid=grid, preset=preset, device=device, memory=memory, workers=workers, notebooks=str(notebooks), groups=told, todo=[group.id for group in found] if todo is None else todo)
    atomic_write(folder / "groups.json", json.dumps(plan).encode())
    return folder / "groups.json"


def expected(found: list[Group], rates: costs.Rates, memory: float = MEMORY, tell=None) -> dict[str, float]:
    """Seconds of each group, its notebook's start included. What has not been measured is measured, which takes a second or so a setting."""
    each, start = {}, costs.start(rates)
    for i, group in enumerate(found):
        each[group.id] = start + costs.seconds(group, rates, memory)
        if tell:
            tell(i + 1, len(found))
    return each


def plan(found: list[Group], times: dict[str, float], workers: int, todo: list[Group], memory: float = MEMORY) -> str:
    """What a sweep costs, as text: numbers, operations, disk and time, of all of it and of what is still to do."""
    rows = [f"{'':10}{'groups':>8}{'records':>10}{'Tflop':>12}{'disk':>12}{'core time':>12}"]
    for kind in (*NOTEBOOKS, "all"):
        some = [group for group in found if kind in (group.kind, "all")]
        if some:
            each = [costs.of(group, memory) for group in some]
            time = runner.minutes(sum(times[group.id] for group in some)) if times else ""
            rows.append(f"{kind:10}{len(some):8}{sum(g.count for g in some):10}{sum(c.flop for c in each) / 1e12:12,.1f}{_size(sum(c.disk for c in each)):>12}{time:>12}")
    rows.append(f"{len(found) - len(todo)} of {len(found)} groups are done.")
    if times and todo:
        left = costs.schedule(todo, times, workers)
        rows.append(f"The {len(todo)} left take about {runner.minutes(left)} on {workers} worker{'s' * (workers != 1)}.")
    if any(group.body.get("f_least") for group in found):
        rows.append("Models of layers that do not reach f_least are counted here, and will not be made.")
    return "\n".join(rows)


def _size(count: float) -> str:
    return next(f"{count / 1000**i:.1f} {name}" for i, name in ((3, "GB"), (2, "MB"), (1, "kB"), (0, "B")) if count >= 1000**i or i == 0)


def status(found: list[Group], store: Store, folder: Path, workers: int) -> str:
    """How far a sweep is, from its records, the locks of those at work, and what its jobs left."""
    done, running, failed, left = [], [], [], []
    for group in found:
        if not missing(group, store):
            done.append(group)
        elif runner.is_held(folder / "locks" / group.id):
            running.append(group)
        elif (folder / "failed" / f"{group.id}.txt").exists():
            failed.append(group)
        else:
            left.append(group)
    rows = [f"{len(done)} of {len(found)} groups finished, {len(running)} running, {len(failed)} failed, {len(left)} to come"]
    rows[0] += f"; {'an engine is at it' if runner.is_held(folder / 'engine') else 'no engine is running'}"
    try:
        told = {one["id"]: one.get("seconds") for one in _json(folder / "groups.json")["groups"]}
    except (OSError, ValueError, KeyError):
        told = {}
    if running + left and all(told.get(group.id) for group in running + left):
        seconds = runner.pace(folder) * costs.schedule(running + left, told, workers)
        rows.append(f"about {runner.minutes(seconds)} left on {workers} worker{'s' * (workers != 1)}; so far groups took {runner.pace(folder):.2f} times what was expected")
    versions = Counter(record["code"]["source"] for kind, id in _ids(done) if (record := store.light(kind).get(id)))
    failures = store.light("failure")
    nothing = failures and len(failures.keys() & {record_id("failure", dict(of=kind) | asked, SHA256[group.data]) for group in done for kind, asked in asks(group)})
    if versions:
        rows.append("records by code version: " + ", ".join(f"{source[:8]} {count}{' (as it is now)' * (source == store.source)}" for source, count in versions.most_common()))
    if nothing:
        rows.append(f"models that came to nothing, with a record of why: {nothing}")
    rows += [f"running: {group.title}" for group in running]
    rows += [f"failed: {group.title}: {(folder / 'failed' / f'{group.id}.txt').read_text().splitlines()[0][:200]}" for group in failed]
    return "\n".join(rows)


def _ids(found: list[Group]) -> Iterable[tuple[str, str]]:
    for group in found:
        for kind, asked in asks(group):
            yield kind, record_id(kind, asked, SHA256[group.data])


def main(words: list[str]) -> int:
    """``plan``, ``run`` or ``status`` of a grid at a preset; what comes after ``--`` goes to Snakemake as it is."""
    words, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(prog="python -m khnb.sweeps", description=main.__doc__)
    parser.add_argument("do", choices=["plan", "run", "status"])
    parser.add_argument("grid", help="an experiment (E08), several (E08+E09), thesis, a name in sweeps/, or a file")
    parser.add_argument("preset", nargs="?", default="thesis", help=", ".join(PRESETS) + " (the default)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME=VALUE", help="of layers and BP models with this value, say K=10; can be repeated")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    parser.add_argument("--threads", type=int, default=1, help="of each job (1: as many jobs as cores)")
    parser.add_argument("--memory", type=float, help="GiB for the pooled activities of a job")
    parser.add_argument("--no-estimate", action="store_true", help="measure nothing")
    given = parser.parse_args(words)
    try:
        device = pipeline.pick_device(given.device)
        found = groups(given.grid, given.preset, torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None)
        found = only(found, given.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    store, folder = Store(), runs() / f"{Path(given.grid).stem}-{given.preset}"
    workers = max(1, given.cores // given.threads) if device.type == "cpu" else torch.cuda.device_count()
    if given.do == "status":
        print(status(found, store, folder, workers))
        return 0
    todo = [group for group in found if missing(group, store)]
    memory = MEMORY if given.memory is None else given.memory
    times = {} if given.no_estimate or device.type != "cpu" else expected(found, costs.Rates(given.threads), memory, _counter(found))
    print(plan(found, times, workers, todo, memory), flush=True)
    if given.do == "plan" or not todo:
        return 0
    return _engine(given, found, todo, times, device, folder, workers, more)


def _counter(found: list[Group]):
    """A line that counts, where somebody watches."""
    if not sys.stderr.isatty():
        return None
    return lambda done, total: print(f"\rmeasuring rates: {done} of {total} groups", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _engine(given, found, todo, times, device, folder: Path, workers: int, more: list[str]) -> int:
    """Let Snakemake do what is missing. One engine a sweep: a second one is told so."""
    try:
        with runner.held(folder / "engine", wait=False):
            place = write_plan(folder, given.grid, given.preset, found, given.device, given.threads, times, [group.id for group in todo], workers, given.memory)
            for group in todo:  # what the store lacks is to be made, whatever a sweep before left
                for old in (folder / "done" / f"{group.id}.ipynb", folder / "failed" / f"{group.id}.txt"):
                    old.unlink(missing_ok=True)
            megabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
            command = [
                sys.executable, "-m", "snakemake", "--snakefile", str(FOLDER / "Snakefile"), "--directory", str(folder), "--config", f"plan={place}",
                f"python={sys.executable}", f"gpu={int(device.type == 'cuda')}", "--cores", str(given.cores), "--resources", f"mem_mb={megabytes}", f"gpu={2 * max(1, workers)}",  # one more to start each while another computes: own_gpu lets it wait
                # the lock on this folder is ours, and ends with us even when we are killed; what was cut short is done again, and the store knows what is there
                "--nolock", "--rerun-incomplete", "--rerun-triggers", "mtime", "--keep-going", "--quiet", "all", *more,
            ]
            engine = subprocess.Popen(command)
            while True:
                try:
                    code = engine.wait()
                    break
                except KeyboardInterrupt:  # Snakemake was interrupted as well, and ends its jobs
                    continue
    except BlockingIOError:
        print(f"this sweep is running already: see python -m khnb.sweeps status {given.grid} {given.preset}", file=sys.stderr)
        return 3
    print(status(found, Store(), folder, workers), flush=True)
    return code


if __name__ == "__main__":
    from khnb.sweeps import main as again  # the module under its own name, once

    sys.exit(again(sys.argv[1:]))
