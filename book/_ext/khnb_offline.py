"""What the pages need from elsewhere, put beside them when the book is built.

A built page asks no other host for anything. MathJax comes from the installed package ``sphinx-mathjax-offline``: of
its files only one is copied, the build that holds every TeX extension and draws in SVG, so that a page opened from a
folder needs neither fonts nor further scripts. The widgets' host script is ours and lies in ``book/_offline``.
The theme's icons are drawn by its script; its requests to fetch icon fonts ahead, which a browser refuses to a page
opened from a folder, are taken out.
"""

import re
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from shutil import copyfile

from docutils import nodes
from sphinx.errors import ExtensionError

PACKAGE = "sphinx-mathjax-offline"
MATHJAX = "tex-svg-full.js"
FONT_AHEAD = re.compile(r'\s*<link rel="preload" as="font"[^>]*>')
# A list in name only: it also holds links, which a list may not, and a screen reader would be told wrong.
CITATIONS = ('<div role="list" class="citation-list">', '<div class="citation-list">')


def find_mathjax() -> Path:
    """Path of the MathJax build inside the installed package."""
    try:
        found = [file.locate() for file in files(PACKAGE) or () if file.name == MATHJAX]
    except PackageNotFoundError:
        raise ExtensionError(f"the package {PACKAGE} is not installed: run `make setup`, or `pip install -e .[book]`")
    if not found:
        raise ExtensionError(f"the package {PACKAGE} holds no {MATHJAX}: install the version named in constraints.txt")
    return Path(found[0])


def configure(app, config):
    config.mathjax_path = MATHJAX
    config.html_static_path.append(str(Path(__file__).parents[1] / "_offline"))
    config.html_css_files.append("khnb.css")
    config.html_js_files.append(("khnb-page.js", {"defer": "defer"}))
    offer_source(config.html_theme_options)
    # The only script a page with widgets loads; myst-nb's default is two scripts from a CDN.
    config.nb_ipywidgets_js = {"khnb-widgets.js": {"defer": "defer"}}


def offer_source(options: dict):
    """Buttons to the source, to Binder and to Colab on every page, once the repository has an address (``repository.url``)."""
    if options.get("repository_url"):
        options |= {f"use_{what}_button": True for what in ("repository", "issues", "edit_page", "source")}
        options["launch_buttons"] = options.get("launch_buttons", {}) | {"binderhub_url": "https://mybinder.org", "colab_url": "https://colab.research.google.com"}


def find_source(app, pagename, templatename, context, doctree):
    """Notebooks lie at the top of the repository (``book/notebooks`` is a link), the other pages in ``book``."""
    if not pagename.startswith("notebooks/"):
        context["doc_path"] = "book"


def free_tags(app, doctree):
    r"""Let a formula carry the thesis's equation number as ``\tag{4.6}``.

    Sphinx puts a formula of several lines into ``split``, where TeX allows no tag; ``equation*`` takes one.
    """
    for formula in doctree.findall(nodes.math_block):
        text = formula.astext()
        if "\\tag{" in text and not formula.get("nowrap"):
            formula["nowrap"] = True
            formula.children = []
            formula += nodes.Text(f"\\begin{{equation*}}\n{text.strip()}\n\\end{{equation*}}")


def finish(app, error):
    if error is not None or app.builder.format != "html":
        return
    out = Path(app.outdir)
    copyfile(find_mathjax(), out / "_static" / MATHJAX)
    for page in out.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        mended = FONT_AHEAD.sub("", text).replace(*CITATIONS)
        if mended != text:
            page.write_text(mended, encoding="utf-8")


def setup(app):
    find_mathjax()  # better an error before the notebooks run than after
    app.connect("config-inited", configure)
    app.connect("doctree-read", free_tags)
    app.connect("html-page-context", find_source, priority=100)  # before the theme makes its buttons
    app.connect("build-finished", finish)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
