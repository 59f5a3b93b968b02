"""Sweeps: a grid, which is data, becomes groups that share computation; each is one run of a chapter's notebook, told to Snakemake.

``python -m khnb.sweeps plan|run|status GRID [PRESET]`` at a terminal. A grid is the name of an experiment of the thesis
(``E08``, or several, ``E06+E08``, or ``thesis`` for all; :file:`sweeps/thesis.json`), the name of another file in ``sweeps/``, or a
file. What an object of a grid means is told by :func:`khnb.pipeline.main`; here come on top

- ``f_least``: LL models are made only of layers whose f-score (at tolerance 1e-4) is at least this;
- ``of``, in place of all else: the models of these experiments, attacked as ``attacked`` says.

A preset's values stand in for those of all objects of a grid, but for those under ``"each"``; an experiment's own presets come after
the common ones, and ``null`` takes a common one's value away. ``take`` is a balanced part (:func:`balanced`) of the ``layers``, of the
``heads`` of each and of the BP ``models``; ``attacks`` holds amounts for each kind of attack.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import khnb
from khnb import data as datasets
from khnb import pipeline
from khnb.models import n_features
from khnb.results import Store, record_id
from khnb.settings import ConvSettings, HeadSettings, check

FOLDER = Path(khnb.__file__).parent.parent / "sweeps"
PRESETS = ("smoke", "laptop", "thesis")
NOTEBOOKS = dict(layers="08_training", probes="08_training", heads="08_training", bp="08_training", attacks="09_attacks")
# a group is made of the same parts on every machine, so that its checkpoint can go on elsewhere
NEURONS = 5000  # in lockstep, at most
HEAD_BYTES = 3 * 2**30  # of classifiers trained together, at most
BP_ATTACKED = 8  # BP models attacked by one group, at most
SHA256 = {"cifar10": datasets.SHA256, "cifar10-sample": datasets.SAMPLE_SHA256}
IMAGES = {"cifar10": dict(train=50_000, test=10_000), "cifar10-sample": dict(train=1500, test=1000)}


@dataclass
class Group:
    """Work that shares computation: see :func:`work`, which does it.

    ``kind`` is ``layers`` (in lockstep), ``probes``, ``heads`` (one layer with its classifiers), ``bp`` (one model) or ``attacks`` (the models of one
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
        return dict(layers=lambda: len(body["convs"]), probes=lambda: len(body["convs"]), heads=lambda: len(body["heads"]), bp=lambda: 1)[self.kind]()

    @property
    def title(self) -> str:
        """One short line."""
        body, count = self.body, self.count
        one = body["convs"][0] if "convs" in body else body.get("conv") or body.get("model") or body["models"][0].get("conv") or body["models"][0]
        names = ("w",) if self.kind in ("layers", "probes") else ("K", "w", "m", "p", "delta", "seed") if "m" in one else ("K", "w")
        of = " ".join(f"{name}={one[name]:g}" for name in names)
        if self.kind == "bp":
            return f"BP model {of} sigma={one['head']['sigma']} n={one['head']['n']:g} w_pool={one['head']['w_pool']} seed={one['head']['seed']}"
        what = dict(layers="KH layers in lockstep", probes="probes", heads="heads on the layer", attacks="attacks on models of")[self.kind]
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
    found = _json(path)
    if isinstance(found, dict) and "experiments" in found:
        return dict(presets=book["presets"] | found.get("presets", {}), experiments=found["experiments"], chosen=list(found["experiments"]))
    jobs = found if isinstance(found, list) else [found]
    return dict(presets=book["presets"], experiments={path.stem: dict(jobs=jobs)}, chosen=[path.stem])


def _json(path: Path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error


def groups(grid: str, preset: str = "thesis") -> list[Group]:
    """What is to be done, those first that others need. ``ValueError`` names the grid and the first value that is wrong, before anything runs."""
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is not valid: one of {', '.join(PRESETS)}")
    book, wanted = read(grid), Wanted()
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
    values = {k: v for k, v in (book["presets"].get(preset, {}) | experiment.get(preset, {})).items() if v is not None}
    take, amounts = values.pop("take", {}), values.pop("attacks", {})
    if set(take) - {"layers", "heads", "models"} or not all(type(count) is int and count > 0 for count in take.values()):
        raise ValueError(f"take={take!r} is not valid: whole numbers > 0 of layers, heads and models")
    for given in experiment.get("jobs", []):
        if "of" in given:
            for other in given["of"]:
                _add(wanted, book, other, preset, given["attacked"])
            continue
        given = given | {k: v for k, v in values.items() if k not in ("f_least",) or k in given}
        f_least = given.pop("f_least", 0.0)
        if isinstance(f_least, bool) or not isinstance(f_least, (int, float)) or not 0 <= f_least <= 1:
            raise ValueError(f"f_least={f_least!r} is not valid: a number from 0 to 1")
        job = pipeline.read_job(given if attacked is None else given | dict(attacked=attacked))
        if attacked is not None and job.what not in ("models", "bp"):
            raise ValueError(f"there are no models to attack, only {job.what}")
        wanted.read.setdefault(name, []).append((job, take, f_least, amounts))
        wanted.add(job, take, f_least, amounts)


def balanced(options: list[dict], count: int, used: Counter | None = None) -> list[int]:
    """Numbers of ``count`` options that have every value of every parameter about equally often, those with rare pairs of values first.

    The choice is the same every time. ``used`` counts what was chosen before, and is added to.
    """
    used, left, chosen = Counter() if used is None else used, list(range(len(options))), []
    names = dict.fromkeys(name for option in options for name in option)
    vary = [name for name in names if len({option.get(name) for option in options}) > 1]

    def pairs(option):
        return [(a, option.get(a), b, option.get(b)) for i, a in enumerate(vary) for b in vary[:i]]

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


class Wanted:
    """Layers, probes, models and attacks that were asked for, each once, and how they go together."""

    def __init__(self):
        self.read: dict[str, list] = {}  # experiment -> what was added for it
        self.layers: dict[tuple, tuple] = {}  # (data, conv) -> (snapshots, stop_collapsed)
        self.probes: dict[tuple, list] = {}  # (data, seeds, until, shared parameters) -> convs
        self.heads: dict[tuple, dict] = {}  # (data, conv, feature_dtype, f_least) -> head -> attacks
        self.bp: dict[tuple, list] = {}  # (data, K, w, head) -> attacks

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
            _merge(self.bp.setdefault(tuple(key), []), attacked, confidence)

    def _add_heads(self, job, distinct, data, convs, take, f_least, attacked) -> None:
        of_layer: dict[tuple, list] = {}
        for where, conv, each in zip(data, convs, job.each, strict=True):
            head = HeadSettings.of(each)
            heads = [head] if job.head_seeds is None else [HeadSettings(**head.__dict__ | dict(seed=seed)) for seed in job.head_seeds]
            if (where, conv) in distinct:
                of_layer.setdefault((where, conv, each["feature_dtype"], f_least), []).extend((head, each["confidence"]) for head in heads)
        used: Counter = Counter()
        for key, heads in of_layer.items():
            chosen = balanced([head.dict() for head, _ in heads], take["heads"], used) if "heads" in take else range(len(heads))
            for head, confidence in (heads[i] for i in chosen):
                _merge(self.heads.setdefault(key, {}).setdefault(head, []), attacked, confidence)

    def groups(self) -> list[Group]:
        """All of it, in groups, those first that others need."""
        found = [*self._layers(), *self._probes()]
        makes = {(group.data, ConvSettings(**conv)): group for group in found if group.kind == "layers" for conv in group.body["convs"]}
        attacking = []
        for (data, conv, dtype, f_least), heads in self.heads.items():
            how = dict(conv=conv.dict(), feature_dtype=dtype, f_least=f_least)
            for part in _parts(list(heads), lambda head: _head_bytes(conv, head), HEAD_BYTES):
                group = Group("heads", data, how | dict(heads=[head.dict() for head in part]), [makes[data, conv].id])
                found.append(group)
                attacking += _attacks(data, [(dict(conv=conv.dict(), head=head.dict(), feature_dtype=dtype), heads[head]) for head in part], f_least, [group])
        alike: dict[tuple, list] = {}
        for (data, K, w, head), attacks in self.bp.items():
            model = dict(K=K, w=w, head=head.dict())
            found.append(Group("bp", data, dict(model=model)))
            alike.setdefault((data, K, w), []).append((model, attacks, found[-1]))
        for (data, _, _), models in alike.items():
            for part in _parts([one for one in models if one[1]], lambda _: 1, BP_ATTACKED):
                attacking += _attacks(data, [(model, attacks) for model, attacks, _ in part], 0.0, [group for *_, group in part])
        return found + attacking

    def _layers(self) -> Iterable[Group]:
        together: dict[tuple, list[ConvSettings]] = {}
        for (data, conv), (snapshots, stop) in self.layers.items():
            together.setdefault((data, snapshots, stop, *_shared(conv), conv.conv_epochs), []).append(conv)
        for (data, snapshots, stop, *_), convs in together.items():
            for part in _parts(sorted(convs, key=lambda conv: conv.K), lambda conv: conv.K**2, NEURONS):
                yield Group("layers", data, dict(convs=[conv.dict() for conv in part], snapshots=list(snapshots), stop_collapsed=stop))

    def _probes(self) -> Iterable[Group]:
        for (data, seeds, until, *_), convs in self.probes.items():
            for part in _parts(list(dict.fromkeys(convs)), lambda conv: conv.K**2 * seeds, NEURONS):
                yield Group("probes", data, dict(convs=[conv.dict() for conv in part], seeds=seeds, until=until))


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


def _attacks(data: str, models: list[tuple[dict, list]], f_least: float, needs: list[Group]) -> list[Group]:
    models = [(model, attacks) for model, attacks in models if attacks]
    if not models:
        return []
    body = dict(models=[model for model, _ in models], attacks=[attacks for _, attacks in models], f_least=f_least)
    return [Group("attacks", data, body, [group.id for group in needs])]


def _merge(attacks: list[dict], more: list[dict], confidence: float) -> None:
    """Add attacks, with all their amounts, that are not there yet; lower confidences first, since others are then taken from their records."""
    for one in more:
        one = dict(confidence=confidence) | one
        full = dict(kind=one["kind"]) | pipeline.attack_amounts(**one)
        if full not in attacks:
            attacks.append(full)
    attacks.sort(key=lambda one: one["confidence"])


# what a group yields, and doing it


def asks(group: Group) -> list[tuple[str, dict]]:
    """Kind of record and what it says was asked, of each layer, probe, model or attack of the group."""
    body = group.body
    if group.kind == "layers":
        return [("layer", conv) for conv in body["convs"]]
    if group.kind == "probes":
        return [("probe", pipeline.probe_asked(ConvSettings(**conv), body["seeds"], body["until"])) for conv in body["convs"]]
    if group.kind == "heads":
        return [("model", _asked(body | dict(head=head))) for head in body["heads"]]
    if group.kind == "bp":
        return [("model", _asked(body["model"]))]
    return [("attack", one) for one, _ in _attack_asks(group)]


def _asked(model: dict) -> dict:
    head = HeadSettings(**model["head"])
    if "conv" in model:
        return pipeline.ll_asked(ConvSettings(**model["conv"]), head) | dict(feature_dtype=model["feature_dtype"])
    return pipeline.bp_asked(model["K"], model["w"], head)


def _attack_asks(group: Group) -> list[tuple[dict, str]]:
    """What was asked of each attack, and the id of its model."""
    found = []
    for model, attacks in zip(group.body["models"], group.body["attacks"], strict=True):
        asked = _asked(model)
        id = record_id("model", asked, SHA256[group.data])
        for one in attacks:
            amounts = {name: value for name, value in one.items() if name != "kind"}
            found.append((pipeline.attack_asked(asked, id, one["kind"], amounts), id))
    return found


def missing(group: Group, store: Store) -> list[tuple[str, dict]]:
    """Those of :func:`asks` of which the store holds neither a record nor why there is none.

    Models of a layer that did not reach ``f_least``, and attacks on models that came to nothing, are not missing.
    """
    sha256, body = SHA256[group.data], group.body
    if body.get("f_least"):
        conv = body["conv"] if group.kind == "heads" else body["models"][0]["conv"]
        layer = store.light("layer").get(record_id("layer", conv, sha256))
        if layer and layer["results"]["f_score_1e4"] < body["f_least"]:
            return []
    left = [(kind, asked) for kind, asked in asks(group) if record_id(kind, asked, sha256) not in store.light(kind)]
    if not left or group.kind not in ("heads", "bp", "attacks"):
        return left
    failed = {record["id"] for record in store.light("failure").values() if record["code"]["source"] == store.source}
    if group.kind == "attacks":
        of = {id: record_id("failure", dict(of="model") | _asked(model), sha256) for model in body["models"] for id in [record_id("model", _asked(model), sha256)]}
        return [(kind, asked) for kind, asked in left if of[asked["of"]] not in failed]
    return [(kind, asked) for kind, asked in left if record_id("failure", dict(of=kind) | asked, sha256) not in failed]


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
    try:
        if group.kind == "heads":
            heads = [HeadSettings(**head) for head in body["heads"]]
            pipeline.ll_models(run, ConvSettings(**body["conv"]), heads, body["feature_dtype"], memory_for(group, run, memory), exact=True)
        elif group.kind == "bp":
            pipeline.bp_model(run, body["model"]["K"], body["model"]["w"], HeadSettings(**body["model"]["head"]))
    except FloatingPointError as error:
        run.note(f"not all of it came to something: {error}")
    if group.kind != "attacks":
        for kind, asked in asks(group):
            found.append(run.store.get(kind, asked, run.data) or run.store.get("failure", dict(of=kind) | asked, run.data))
        return found
    for model, attacks in zip(body["models"], body["attacks"], strict=True):
        record = run.store.get("model", _asked(model), run.data)
        if record is None and run.failure("model", _asked(model)) is None:
            raise ValueError(f"the model {_asked(model)} is not in the store; run the group that trains it first")
        found += [pipeline.attack(run, record, **one) for one in attacks] if record else []
    return found


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
    import torch

    device = pipeline.pick_device(run.device)
    if given is not None or device.type != "cuda":
        return pipeline.PARAMETERS["memory"].default if given is None else given
    conv = ConvSettings(**group.body["conv"])
    heads = sum(_head_bytes(conv, HeadSettings(**head)) for head in group.body["heads"])
    free = torch.cuda.mem_get_info(device)[0]
    return max(0.0, (0.8 * free - heads - 3 * 2**30) / 2**30)  # 3 GiB: the images, and the parts at hand (khnb.heads.DEVICE_PART)
