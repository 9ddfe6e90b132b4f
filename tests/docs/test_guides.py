"""The Python blocks of the guides run in order, and the shell commands name programs and settings
that exist."""

import contextlib
import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
GUIDES = ["../README.md", "index.md", *sorted(str(path.relative_to(DOCS)) for path in DOCS.glob("guides/*.md"))]
# Packages of optional extras without which a guide cannot run.
NEEDS = {"guides/constrained.md": ["llguidance"], "guides/evaluation.md": ["rouge_score", "bm25s"]}
COMING_FROM = ["README", "transformerlens", "nnsight", "saelens", "circuit_tracer", "huggingface", "nanogpt",
               "maxtext"]


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def run(blocks, folder, names=None):
    names = {} if names is None else names
    with contextlib.chdir(folder):
        for page, block in blocks:
            exec(compile(block, str(page), "exec"), names)
    return names


@pytest.mark.long
@pytest.mark.parametrize("page", GUIDES)
def test_a_guide_runs(page, tmp_path):
    for package in NEEDS.get(page, []):
        pytest.importorskip(package, reason=f"{page} needs {package}; its first lines say what to install")
    blocks = [(page, block) for block in python_blocks(page)]
    assert blocks
    run(blocks, tmp_path)


@pytest.mark.long
def test_the_coming_from_pages_run(tmp_path):
    """The blocks of these pages share the names of the first one."""
    pages = [f"coming_from/{name}.md" for name in COMING_FROM]
    assert sorted(pages) == sorted(str(path.relative_to(DOCS)) for path in DOCS.glob("coming_from/*.md"))
    names = run([(page, block) for page in pages for block in python_blocks(page)], tmp_path)
    assert set(names["result"].trace.names()) >= {"layers.1.neurons", "final"}
    assert names["maps"].shape == (2, 1, 2, 7, 7)


@pytest.mark.long
def test_every_line_of_the_tables_of_interpretability_runs(tmp_path):
    """The code of the right column, of all rows but the one that would download a model."""
    pages = [f"coming_from/{name}.md" for name in ("README", "transformerlens", "nnsight", "saelens", "circuit_tracer")]
    names = {}
    for page in pages:
        run([(page, block) for block in python_blocks(page)], tmp_path, names)
        rows = [row for row in re.findall(r"^\|.*\|$", (DOCS / page).read_text(), re.MULTILINE)
                if not row.startswith(("|---", "| You want"))]
        lines = [code for row in rows for code in re.findall(r"`([^`]+)`", row.rstrip("|").split(" | ")[-1])
                 if "from_huggingface" not in code]
        assert page.endswith("README.md") or (len(rows) >= 36 and len(lines) >= 36), (page, len(rows))
        for line in lines:
            run([(line, line)], tmp_path, dict(names))


def test_links_between_files_lead_somewhere():
    """Of the pages outside the site; MkDocs checks those inside it."""
    for path in DOCS.parent.glob("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            assert target.startswith("https://") or (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_code_in_the_tables_names_what_exists():
    """Every ``tj.a.b`` and ``inspection.a`` in the documentation is a public name, and every
    ``--config.a.b`` a setting."""
    import transformer_jax as tj

    places = {"tj": tj, "inspection": tj.inspection}
    for path in [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]:
        text = path.read_text()
        for start, dotted in re.findall(r"\b(tj|inspection)((?:\.[a-z_]+)+)\b", text, re.IGNORECASE):
            value = places[start.lower()]
            for name in dotted.removeprefix(".").split("."):
                if isinstance(value, type) or callable(value) or name in ("md", "py", "png", "html"):
                    break
                assert hasattr(value, name), f"{path.name}: {start}{dotted}"
                value = getattr(value, name)
        for dotted in re.findall(r"--config\.([a-z_0-9.]+)", text):
            value = tj.ExperimentConfig()
            for name in dotted.rstrip(".").split("."):
                if value is None:  # a group of settings that is off
                    break
                assert hasattr(value, name), f"{path.name}: --config.{dotted}"
                value = getattr(value, name)
