"""The figures and tables of the thesis: under their numbers there, and beside each what was found, and how to compute it again.

The manifest (``reference/manifest.csv``) says which place of which page shows what. After each such place comes a folded block with the thesis's
values, our own finding and its scale, the records behind it (copied beside the pages), the cell that draws it, and the commands that redraw and recompute it. A figure or table that the thesis does not have has the number of its chapter and a letter.
"""

import csv
import json
from pathlib import Path
from shutil import copyfile

from docutils import nodes
from sphinx.util import logging

ROOT = Path(__file__).parents[2]
FOLDER = "_records"
LOG = logging.getLogger(__name__)


def manifest() -> list[dict]:
    """Its rows of figures and tables. Read here, as khnb takes seconds to import, which a build of a changed sentence need not wait for."""
    with (ROOT / "reference" / "manifest.csv").open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["kind"] in ("figure", "table")]


def cell(notebook: str, anchor: str) -> str:
    """The source of the code cell that makes what has this anchor, or nothing where it is written as text."""
    cells = json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    found = ("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    return next((source for source in found if f'"{anchor}"' in source), "")


def text(*parts) -> nodes.paragraph:
    """A paragraph of strings and nodes."""
    return nodes.paragraph("", "", *(nodes.Text(part) if isinstance(part, str) else part for part in parts))


def fields(rows: dict) -> nodes.field_list:
    found = nodes.field_list()
    for name, body in rows.items():
        found += nodes.field("", nodes.field_name("", name), nodes.field_body("", *(body if isinstance(body, list) else [body])))
    return found


def block(row: dict, values: str, records: list[dict], up: str) -> nodes.admonition:
    """The folded block of one row of the manifest; ``up`` leads from its page to the top of the book."""
    from khnb import coverage

    links = [nodes.reference("", "", nodes.literal("", f"{r['kind']} {r['id']}"), refuri=f"{up}{FOLDER}/{r['id']}.json", internal=True) for r in records]
    redraw = f"cd notebooks && papermill {row['notebook']}.ipynb out.ipynb"
    again = "\n".join(f"python -m khnb.pipeline '{json.dumps(coverage.recompute(r))}'" for r in records)
    source = cell(row["notebook"], row["anchor"])
    shown = {
        "The thesis": text(values or "its values are printed beside ours"),
        "Here": text(": ".join(filter(None, (coverage.STATUS[row["status"]], row["note"]))) + f" ({row['scale']})"),
        "Records": text(*(part for link in links for part in (link, " "))) if links else None,
        "Draw it again": nodes.literal_block(redraw, redraw, language="bash"),
        "Compute it again": nodes.literal_block(again, again, language="bash") if again else None,
        "The cell that draws it": nodes.literal_block(source, source, language="python") if source else None,
    }
    title = f"About {row['kind']} {row['id']}: the thesis, this book, code, records"
    return nodes.admonition("", nodes.title("", title), fields({k: v for k, v in shown.items() if v}), classes=["dropdown", "khnb-beside"])


def place(app, doctree):
    """Put the blocks after the figures and tables of this page."""
    page = Path(app.env.docname)
    wanted = {row["anchor"]: row for row in manifest() if page.name == row["notebook"]}
    if not wanted:
        return
    from khnb import coverage
    from khnb.results import Store
    from khnb.tables import thesis

    store, values = Store(ROOT / "results"), {row["figure"]: row["thesis_values"] for row in thesis("figures")}
    app.env.khnb_records[app.env.docname] = {}
    for node in list(doctree.findall(lambda n: isinstance(n, (nodes.figure, nodes.table)))):
        row = next((wanted.pop(id) for id in node["ids"] if id in wanted), None)
        if row:
            said = values[row["id"]] if row["kind"] == "figure" else ""
            records = [record for record in coverage.records(row, store) if record]
            app.env.khnb_records[app.env.docname] |= {record["id"]: record["kind"] for record in records}
            node.parent.insert(node.parent.index(node) + 1, block(row, said, records, "../" * (len(page.parts) - 1)))
    for anchor in wanted:
        LOG.warning("the manifest names %s on this page, which has no such figure or table", anchor, location=str(page))


def forget_numbers(app, env):
    """Back to Sphinx's own numbers, with which it looks for what has changed since the last build."""
    env.toc_fignumbers = getattr(env, "khnb_plain_numbers", env.toc_fignumbers)
    return []


def number(app, env):
    """The thesis's numbers for what is in the manifest, 9.a, 9.b ... for the rest of chapter 9."""
    env.khnb_plain_numbers = env.toc_fignumbers
    known = {(row["kind"], row["notebook"], row["anchor"]): tuple(row["id"].split(".")) for row in manifest()}
    env.toc_fignumbers = {}
    for doc, kinds in env.khnb_plain_numbers.items():
        page = Path(doc).name
        chapter, _, rest = page.partition("_")
        env.toc_fignumbers[doc] = {}
        for kind, ids in kinds.items():
            letters = iter("abcdefghijklmnopqrstuvwxyz")
            own = (lambda plain: (chapter.lstrip("0"), next(letters))) if rest else (lambda plain: plain)
            env.toc_fignumbers[doc][kind] = {id: known.get((kind, page, id)) or own(plain) for id, plain in ids.items()}
    return []


def remember(app):
    """The records of each page, kept with the rest of what Sphinx knows of it."""
    app.env.khnb_records = getattr(app.env, "khnb_records", {})


def forget_page(app, env, docname):
    env.khnb_records.pop(docname, None)


def merge_pages(app, env, docnames, other):
    env.khnb_records |= {doc: other.khnb_records[doc] for doc in docnames if doc in other.khnb_records}


def copy_records(app, error):
    """Put the records that the pages name beside them."""
    if error is not None or app.builder.format != "html":
        return
    out = Path(app.outdir) / FOLDER
    out.mkdir(exist_ok=True)
    for id, kind in {id: kind for page in app.env.khnb_records.values() for id, kind in page.items()}.items():
        copyfile(ROOT / "results" / "records" / kind / f"{id}.json", out / f"{id}.json")


def setup(app):
    app.connect("builder-inited", remember)
    app.connect("env-purge-doc", forget_page)
    app.connect("env-merge-info", merge_pages)
    app.connect("doctree-read", place)
    app.connect("env-get-updated", forget_numbers, priority=400)  # Sphinx numbers figures at 500
    app.connect("env-get-updated", number, priority=600)
    app.connect("build-finished", copy_records)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
