"""The documentation site: it builds without a warning, documents every public name, and works in a
browser from the disk."""

import ast
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "transformer_jax"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs (mkdocs)"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The directory of the built site."""
    built = tmp_path_factory.mktemp("site")
    result = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(built)],
                            cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return built


def public_names():
    for init in sorted(PACKAGE.glob("**/__init__.py")):
        package = ".".join(init.parent.relative_to(REPOSITORY).parts)
        for node in ast.parse(init.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                yield from ((package, name) for name in ast.literal_eval(node.value)
                            if not (init.parent / name).is_dir())


def test_every_public_name_has_an_entry(site):
    names = list(public_names())
    assert ("transformer_jax", "generate") in names and len(names) > 200
    pages = {package: (site / "reference" / f"{package}.html").read_text() for package in {name[0] for name in names}}
    assert [f"{package}.{name}" for package, name in names if f'id="{package}.{name}"' not in pages[package]] == []


def test_no_page_loads_anything_from_another_host(site):
    loads = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=["']?(https?://[^"'\s>]+)""")
    found = {(page.name, address) for page in site.rglob("*.html") for address in loads.findall(page.read_text())
             if 'rel="canonical"' not in address}
    assert found == set()


def open_page(browser, path):
    browser.open(path.as_uri(), ready="document.readyState === 'complete'")


def test_every_page_opens_from_the_disk(site, browser):
    pages = [page for page in sorted(site.rglob("*.html")) if page.name != "404.html"]  # which needs a server
    assert len(pages) > 40
    for page in pages:
        browser.resize(1300, 900)
        open_page(browser, page)
        elsewhere = [address for address in browser.requests if address.startswith("http")]
        nameless = browser.run("[...document.images].filter(image => !image.alt).map(image => image.src)")
        assert (browser.console, elsewhere, nameless) == ([], [], []), page.name
        browser.resize(400, 800)
        assert browser.run("document.documentElement.scrollWidth") <= 400, f"{page.name} is wider than a phone"


def test_search_finds_the_function(site, browser):
    browser.resize(1300, 900)
    open_page(browser, site / "index.html")
    browser.click(".md-search__input")
    browser.send("Input.insertText", text="attend")
    browser.until("document.querySelectorAll('.md-search-result__link').length > 0")
    found = browser.run("[...document.querySelectorAll('.md-search-result__link')].map(link => link.href)")
    assert any("transformer_jax.ops.attend" in address for address in found), found


def test_the_dark_scheme_follows_the_system(site, browser):
    browser.resize(1300, 900, dark=True)
    open_page(browser, site / "index.html")
    assert browser.run("document.body.dataset.mdColorScheme") == "slate"
    browser.resize(1300, 900)
