"""The book: its configuration, the host of its widgets, and every built page as a reader's browser shows it.

The tests marked ``page`` look at ``book/_build/html``, once from a folder and once over http, in a Chromium and a Firefox that
are already on the machine, with every other host blocked. ``KHNB_CHROMIUM`` names another Chromium than the one on the path.
"""

import csv
import functools
import json
import re
import shutil
import subprocess
import sys
import threading
from base64 import b64encode
from html import unescape
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import firefox
import pytest
import yaml

from khnb import coverage

ROOT = Path(__file__).parents[1]
BOOK = ROOT / "book"
HTML = BOOK / "_build" / "html"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [TOC["root"]] + [chapter["file"] for part in TOC["parts"] for chapter in part["chapters"]]
VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"


# The configuration


def config() -> dict:
    return yaml.safe_load((ROOT / "_config.yml").read_text())


def test_a_failing_notebook_fails_the_build():
    execute = config()["execute"]
    assert execute["execute_notebooks"] == "cache" and execute["raise_on_error"] is True
    assert "-W -n" in (ROOT / "Makefile").read_text()


def test_no_extension_that_talks_to_other_hosts():
    extensions = config()["sphinx"]["config"]["extensions"]
    assert not {"sphinx_thebe", "sphinx.ext.intersphinx"} & set(extensions)


def test_every_chapter_of_the_contents_has_a_source():
    assert not [name for name in PAGES if not any((BOOK / f"{name}{end}").is_file() for end in (".md", ".ipynb"))]


def test_no_static_folder_that_every_page_would_load():
    assert not (BOOK / "_static").exists()


# A browser


class Visit:
    """One page, opened: what it asked for, and what went wrong."""

    def __init__(self, browser, address: str, home: str, **how):
        self.wrong, self.strangers = [], []
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, **how)
        self.page = self.context.new_page()

        def allowed(url):
            return url.startswith((home, "data:", "blob:", "about:"))

        def judge(route):
            if allowed(route.request.url):
                return route.continue_()
            self.strangers.append(route.request.url)
            route.abort()

        self.context.route("**/*", judge)
        self.page.on("console", lambda said: said.type == "error" and self.wrong.append(said.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("requestfailed", lambda request: self.wrong.append(f"{request.url}: {request.failure}"))
        self.page.on("response", lambda got: got.status >= 400 and self.wrong.append(f"{got.url}: {got.status}"))
        self.page.goto(address, wait_until="load")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.context.close()

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()

    def wait_for_widgets(self):
        self.page.wait_for_function(
            f"""() => !document.querySelector('script[type="{VIEW}"]')
                && [...document.querySelectorAll(".khnb-widget")].every((el) => el.dataset.state)""",
            timeout=30_000,
        )


# The host of the widgets, on a page made for the test


def embed(tmp_path, entries: dict, views: list[str]) -> Path:
    """A page with the state of some widgets and places for their views, as a built page has them."""
    shutil.copy(BOOK / "_offline" / "khnb-widgets.js", tmp_path)
    state = json.dumps({"version_major": 2, "version_minor": 0, "state": entries}).replace("</", "<\\/")
    places = [json.dumps({"version_major": 2, "model_id": name}) for name in views]
    page = tmp_path / "page.html"
    page.write_text(
        f'<!doctype html><meta charset="utf-8"><script type="{STATE}">{state}</script>'
        '<script defer src="khnb-widgets.js"></script><body>'
        + "".join(f'<script type="{VIEW}">{place}</script>' for place in places)
    )
    return page


def entry(render: str, buffers=(), **state) -> dict:
    buffers = [{"encoding": "base64", "path": path, "data": b64encode(data).decode()} for path, data in buffers]
    return {"state": {"_esm": f"export default {{ {render} }};", **state}, "buffers": buffers}


@pytest.fixture
def mounted(browser, tmp_path):
    visits = []

    def mount(entries, views):
        page = embed(tmp_path, entries, views)
        visits.append(Visit(browser, page.as_uri(), tmp_path.as_uri()))
        visits[-1].wait_for_widgets()
        return visits[-1]

    yield mount
    for visit in visits:
        visit.context.close()


def test_a_widget_gets_its_bytes_and_its_style(mounted):
    render = """render({ model, el }) {
        const weights = model.get("weights"), deep = model.get("deep").list[1];
        el.append(`${weights.getFloat32(0, true)} ${weights.byteLength} ${deep.getUint8(0)} ${model.get("text")}`);
    }"""
    weights = b"\x00\x00\xc0\x3f" + bytes(4)
    buffers = [(["weights"], weights), (["deep", "list", 1], b"\x07")]
    visit = mounted(
        {"a": entry(render, buffers, deep={"list": [0, None]}, text="</script> é", _css=".khnb-widget { color: #010203 }")},
        ["a"],
    )
    assert visit.texts(".khnb-widget") == ["1.5 8 7 </script> é"]
    assert visit.page.locator(".khnb-widget").evaluate("el => getComputedStyle(el).color") == "rgb(1, 2, 3)"
    assert not visit.wrong and not visit.strangers


def test_views_of_one_model_share_it_and_hear_of_changes(mounted):
    render = """
        initialize({ model }) { model.set("count", 1); },
        render({ model, el }) {
            const show = () => { el.textContent = `${model.get("count")} ${model.get("other")}`; };
            const never = () => { throw new Error("was taken off"); };
            model.on("change:count change:other", show);
            model.on("change:count", never);
            model.off("change:count", never);
            show();
            el.onclick = () => { model.set({ count: model.get("count") + 1, other: "b" }); model.save_changes(); };
        }"""
    visit = mounted({"a": entry(render, count=0, other="a"), "b": entry(render, count=5, other="c")}, ["a", "a", "b"])
    assert visit.texts(".khnb-widget") == ["1 a", "1 a", "1 c"]
    visit.page.locator(".khnb-widget").first.click()
    assert visit.texts(".khnb-widget") == ["2 b", "2 b", "1 c"]
    assert not visit.wrong


def test_setting_the_same_value_is_no_change(mounted):
    render = """render({ model, el }) {
        let calls = 0;
        model.on("change", () => { calls += 1; el.textContent = calls; });
        model.set("a", 1); model.set("a", 2); model.set("a", 2);
    }"""
    assert mounted({"a": entry(render, a=1)}, ["a"]).texts(".khnb-widget") == ["1"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a": entry('render() { throw new Error("no luck"); }')}, "no luck"),
        ({"a": {"state": {"value": 3}}}, "needs a running notebook"),
        ({}, "does not hold its state"),
    ],
)
def test_a_widget_that_fails_says_so_and_spares_the_others(mounted, entries, message):
    fine = entry('render({ el }) { el.textContent = "fine"; }')
    visit = mounted({**entries, "fine": fine}, ["a", "fine"])
    failed, other = visit.texts(".khnb-widget")
    assert message in failed and failed.startswith("This widget could not be shown")
    assert other == "fine"
    assert any(message in said for said in visit.wrong)


# The built pages


@pytest.fixture(scope="session")
def built():
    if not (HTML / "index.html").is_file():
        pytest.skip("the book is not built: run `make book` first")
    return HTML


@pytest.fixture(scope="session")
def homes(built):
    """Where the book is read from: a folder, and a server on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(built)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"folder": built.as_uri(), "http": f"http://127.0.0.1:{server.server_port}"}
    server.shutdown()


class Loads(HTMLParser):
    """Addresses a page loads without being asked (scripts, styles, pictures, frames and the like), those it links to, and its ids."""

    def __init__(self):
        super().__init__()
        self.found, self.unnamed, self.views, self.links, self.ids = [], [], 0, [], set()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs["id"]} if attrs.get("id") else set()
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag in {"script", "img", "iframe", "source", "video", "audio", "embed", "track"} and attrs.get("src"):
            self.found.append(attrs["src"])
        if tag == "link" and attrs.get("rel") not in {"next", "prev", "canonical", "author", "license"}:
            self.found.append(attrs.get("href") or "")
        if tag == "object":
            self.found.append(attrs.get("data") or "")
        if tag == "img" and not (attrs.get("alt") or "").strip():
            self.unnamed.append(attrs.get("src"))
        self.views += tag == "script" and attrs.get("type") == VIEW


def parse(path: Path) -> Loads:
    loads = Loads()
    loads.feed(path.read_text(encoding="utf-8"))
    return loads


def is_outside(address: str) -> bool:
    return bool(re.match(r"(?:[a-z]+:)?//", address.strip(), re.IGNORECASE)) and not address.startswith("file:")


@pytest.mark.slow
@pytest.mark.page
class TestBuiltPages:
    def test_every_chapter_is_built(self, built):
        assert not [name for name in PAGES if not (built / f"{name}.html").is_file()]

    def test_no_page_loads_anything_from_another_host(self, built):
        pages = sorted(built.rglob("*.html"))
        found = {str(page.relative_to(built)): [a for a in parse(page).found if is_outside(a)] for page in pages}
        assert not {page: outside for page, outside in found.items() if outside}

    def test_no_style_loads_anything_from_another_host(self, built):
        loaded = re.compile(r"""(?:@import\s+(?:url\()?|url\()\s*["']?([^"')\s]+)""")
        outside = {
            str(sheet.relative_to(built)): [a for a in loaded.findall(sheet.read_text("utf-8")) if is_outside(a)]
            for sheet in built.rglob("*.css")
        }
        assert not {sheet: found for sheet, found in outside.items() if found}

    @pytest.mark.parametrize("name", PAGES)
    def test_every_picture_has_a_text_alternative(self, name, built):
        assert not parse(built / f"{name}.html").unnamed

    @pytest.mark.parametrize("home", ["folder", "http"])
    @pytest.mark.parametrize("name", PAGES)
    def test_it_renders_with_all_other_hosts_blocked(self, name, home, homes, browser, built):
        views = parse(built / f"{name}.html").views
        with Visit(browser, f"{homes[home]}/{name}.html", homes[home]) as visit:
            visit.wait_for_widgets()
            visit.page.evaluate("() => window.MathJax?.startup?.promise")
            assert visit.page.locator("article h1").count() == 1
            look = visit.page.evaluate(
                """() => ({
                    untypeset: [...document.querySelectorAll("article .math")]
                        .filter((el) => !el.querySelector("mjx-container")).map((el) => el.textContent),
                    wrong: [...document.querySelectorAll("mjx-merror, [data-mjx-error]")].map((el) => el.textContent),
                    unshown: (document.querySelector("article").textContent
                        .match(/<?(IPython\\.core|Figure size)[^>]*>|<[\\w.]+ object at 0x|\\{glue|\\| -+ \\|/g) ?? []),
                    flat: [...document.querySelectorAll("article mjx-container, article .khnb-widget")]
                        .filter((el) => el.getBoundingClientRect().height === 0).length,
                    broken: [...document.images].filter((el) => el.complete && !el.naturalWidth).map((el) => el.src),
                    mounted: document.querySelectorAll('.khnb-widget[data-state="mounted"]').length,
                })"""
            )
            assert look == {"untypeset": [], "wrong": [], "unshown": [], "flat": 0, "broken": [], "mounted": views}
            assert not visit.strangers
            assert not visit.wrong

    @pytest.mark.parametrize("name", PAGES)
    def test_it_fits_a_telephone(self, name, homes, browser):
        with Visit(browser, f"{homes['folder']}/{name}.html", homes["folder"]) as visit:
            visit.page.set_viewport_size({"width": 390, "height": 800})
            visit.wait_for_widgets()
            wide = "() => [document.documentElement.scrollWidth, window.innerWidth]"
            page, window = visit.page.evaluate(wide)
            assert page <= window, f"the page is {page} px wide, the window {window}"

    @pytest.mark.parametrize("home", ["folder", "http"])
    def test_the_first_page_leads_to_the_introduction(self, home, homes, browser):
        with Visit(browser, f"{homes[home]}/index.html", homes[home]) as visit:
            visit.page.wait_for_url(f"**/{TOC['root']}.html")
            assert not visit.strangers and not visit.wrong

    @pytest.mark.parametrize("home", ["folder", "http"])
    def test_the_search_finds_the_blue_wall_of_death(self, home, homes, browser):
        with Visit(browser, f"{homes[home]}/search.html?q=Blue+Wall+of+Death", homes[home]) as visit:
            visit.page.wait_for_selector("#search-results li a", timeout=20_000)
            assert any("08_training" in link.get_attribute("href") for link in visit.page.locator("#search-results li a").all())
            assert not visit.strangers and not visit.wrong

    def test_every_internal_link_leads_somewhere(self, built):
        pages = {page.resolve(): parse(page) for page in built.rglob("*.html")}
        lost = []
        for page, read in pages.items():
            for link in read.links:
                if re.match(r"[a-z]+:|//", link) or link in ("#", ""):
                    continue
                path, _, anchor = unquote(link).partition("#")
                target = (page.parent / path).resolve() if path else page
                if not target.exists() or anchor and target in pages and anchor not in pages[target].ids:
                    lost.append((page.name, link))
        assert not lost

    def test_the_book_is_light(self, built):
        size = sum(file.stat().st_size for file in built.rglob("*") if file.is_file())
        heavy = {page.name: page.stat().st_size for page in built.rglob("*.html") if page.stat().st_size > 4e6}
        assert size < 40e6 and not heavy, (size, heavy)

    @pytest.mark.parametrize("row", [r for r in coverage.manifest() if r["kind"] in ("figure", "table")], ids=lambda r: f"{r['kind']}-{r['id']}")
    def test_beside_each_figure_and_table_is_where_it_comes_from(self, row, homes, browser, built):
        page = (built / "notebooks" / f"{row['notebook']}.html").read_text("utf-8")
        after = page[page.index(f'id="{row["anchor"]}"'):]
        block = after.split("khnb-beside")[1].partition("</section>")[0]
        title = f"About {row['kind']} {row['id']}:"
        assert title in block[:400] and "papermill" in block and row["scale"] in unescape(block)
        caption = re.sub(r"<[^>]*>", "", after.partition('class="caption-number">')[2][:60])
        assert caption.startswith({"figure": "Fig. ", "table": "Table "}[row["kind"]] + row["id"] + " "), caption
        named = re.findall(r'href="\.\./(_records/\w+\.json)"', block)
        assert len(named) == len(coverage.records(row, coverage.Store(ROOT / "results")))
        for path in named:
            record = json.loads((built / path).read_text("utf-8"))
            assert record["id"] == Path(path).stem and record["hardware"] and record["started"]

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("name", PAGES)
    def test_nothing_keeps_a_reader_out(self, name, scheme, homes, browser):
        """axe-core finds nothing serious, with every folded block open."""
        axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
        with Visit(browser, f"{homes['folder']}/{name}.html", homes["folder"], color_scheme=scheme, reduced_motion="reduce") as visit:
            visit.wait_for_widgets()
            visit.page.evaluate("() => window.MathJax?.startup?.promise")
            visit.page.evaluate("document.querySelectorAll('article details').forEach((part) => { part.open = true; })")
            visit.page.evaluate("document.querySelectorAll('article .toggle-button').forEach((button) => button.click())")
            visit.page.wait_for_timeout(700)  # what unfolds fades in
            found = axe.run(visit.page).response["violations"]
            serious = [
                (rule["id"], len(rule["nodes"]), rule["nodes"][0]["html"][:200], rule["nodes"][0]["failureSummary"][:300])
                for rule in found if rule["impact"] in ("serious", "critical")
            ]
            assert not serious, "\n".join(map(str, serious))

    def test_a_table_is_saved_as_csv(self, homes, browser, tmp_path):
        with Visit(browser, f"{homes['folder']}/notebooks/A_grid_searches.html", homes["folder"]) as visit:
            tables = visit.page.locator("article table:not(.khnb-beside table)")
            shown = tables.first.locator("tr").all_inner_texts()
            with visit.page.expect_download() as saved:
                visit.page.locator("article button.khnb-csv").first.click()
            saved.value.save_as(tmp_path / "table.csv")
            with (tmp_path / "table.csv").open(newline="", encoding="utf-8-sig") as file:
                rows = list(csv.reader(file))
            assert len(rows) == len(shown) > 2
            assert rows[1] == [cell.strip() for cell in shown[1].split("\t")]


@pytest.fixture(scope="session")
def fox():
    pytest.importorskip("websocket")
    if firefox.program() is None:
        pytest.skip("no Firefox on this machine: install the package firefox-esr")
    fox = firefox.Firefox()
    yield fox
    fox.close()


@pytest.mark.slow
@pytest.mark.page
@pytest.mark.parametrize("home", ["folder", "http"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_in_firefox(name, home, homes, fox, built):
    views = parse(built / f"{name}.html").views
    fox.open(f"{homes[home]}/{name}.html")
    fox.wait(f"""!document.querySelector('script[type="{VIEW}"]') && [...document.querySelectorAll(".khnb-widget")].every((el) => el.dataset.state)""")
    fox.ask("window.MathJax?.startup?.promise.then(() => true)")
    assert fox.ask("""[...document.querySelectorAll(".khnb-widget")].map((el) => el.dataset.state)""") == ["mounted"] * views
    assert fox.ask("""[...document.querySelectorAll("article .math")].filter((el) => !el.querySelector("mjx-container")).length""") == 0
    assert not fox.wrong
    assert not [url for url in fox.asked_for if not url.startswith((homes[home], "data:", "blob:"))]


@pytest.mark.slow
@pytest.mark.page
def test_widgets_work_in_firefox(homes, fox):
    """The keyboard moves from image to image and the model answers; the reader's two selected models are compared."""
    fox.open(f"{homes['folder']}/notebooks/09_attacks.html")
    fox.wait("document.querySelectorAll('.khnb-widget[data-state=mounted]').length === 2")
    fox.ask("document.querySelector('.khnb-thumbs button').focus()")
    fox.press("\ue014")  # arrow to the right
    fox.wait("/image 2 of/.test(document.querySelector('.khnb-attack .khnb-summary').textContent)")
    fox.wait("!document.querySelector('.khnb-pictures .khnb-facts').textContent.includes('…')", 60)
    fox.ask("document.querySelector('.khnb-cloud').focus()")
    fox.press("\ue014", "\ue007", "\ue014", "\ue007")  # to a model, select it, to the next, select it
    fox.wait("document.querySelectorAll('.khnb-compare thead th').length === 2")
    assert not fox.wrong


# An address for the repository


def test_without_an_address_there_are_no_buttons_to_it():
    assert config()["repository"]["url"] == "" and "use_repository_button" not in config()["html"]


@pytest.mark.slow
def test_with_an_address_every_page_has_buttons_to_it(tmp_path):
    """A book of two pages with the configuration of this one and an address."""
    url = "https://github.com/people/khnb"
    (tmp_path / "book").mkdir()
    shutil.copytree(BOOK / "_ext", tmp_path / "book" / "_ext")
    shutil.copytree(BOOK / "_offline", tmp_path / "book" / "_offline")
    given = config() | dict(repository=dict(url=url, branch="main"), execute=dict(execute_notebooks="off"))
    given["sphinx"] = dict(given["sphinx"], local_extensions={"khnb_offline": "_ext"})
    given["sphinx"]["config"] = given["sphinx"]["config"] | dict(
        extensions=[name for name in given["sphinx"]["config"]["extensions"] if name not in ("khnb_beside", "sphinxcontrib.bibtex")], bibtex_bibfiles=[]
    )
    book = tmp_path / "book"
    (book / "_config.yml").write_text(yaml.safe_dump(given))
    (book / "_toc.yml").write_text(yaml.safe_dump(dict(format="jb-book", root="intro", chapters=[dict(file="notebooks/11")])))
    (book / "intro.md").write_text("# First\n\nWords.\n")
    (book / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "01_introduction.ipynb", book / "notebooks" / "11.ipynb")
    subprocess.run([str(Path(sys.executable).with_name("jupyter-book")), "build", str(book)], check=True, timeout=300, capture_output=True)
    first = (book / "_build" / "html" / "intro.html").read_text("utf-8")
    chapter = (book / "_build" / "html" / "notebooks" / "11.html").read_text("utf-8")
    for page, path in ((first, "book/intro.md"), (chapter, "notebooks/11.ipynb")):
        assert f'href="{url}/issues/new' in page and f"{url}/edit/main/{path}" in page
    assert "https://mybinder.org/v2/" in chapter and "notebooks/11.ipynb" in chapter.partition("mybinder.org")[2][:300]
