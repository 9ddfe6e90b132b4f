"""Pages of the site that are made from other files when the site is built.

MkDocs calls ``on_files`` (see ``hooks`` in mkdocs.yml). It adds the changelog, the notebooks and one
reference page for each public package.
"""

import ast
import pathlib
import re
import shutil

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "transformer_jax"


def public_names(package: pathlib.Path) -> list[str]:
    """The names in ``__all__`` of a package, read without importing it."""
    for node in ast.parse((package / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return ast.literal_eval(node.value)
    return []


def reference_pages() -> dict[str, str]:
    """Markdown of one page for each package that has public names, by the page's path."""
    packages = {".".join(file.parent.relative_to(REPOSITORY).parts): file.parent
                for file in sorted(PACKAGE.glob("**/__init__.py"))}
    named = {dotted: names for dotted, folder in packages.items() if (names := public_names(folder))}
    pages = {}
    for dotted, names in named.items():
        summary = ast.get_docstring(ast.parse((packages[dotted] / "__init__.py").read_text()))
        parts = [name for name in names if f"{dotted}.{name}" in packages]
        links = "\n".join(f"- [{dotted}.{name}]({dotted}.{name}.md)" for name in parts if f"{dotted}.{name}" in named)
        entries = "\n\n".join(f"::: {dotted}.{name}" for name in names if name not in parts)
        pages[f"reference/{dotted}.md"] = f"# {dotted}\n\n{summary}\n\n{links}\n\n{entries}\n"
    return pages


@event_priority(100)  # before the plugin that renders notebooks
def on_files(files: Files, config) -> Files:
    """Adds the pages that are not files under docs/."""
    for path, text in reference_pages().items():
        files.append(File.generated(config, path, content=text))
    changelog = (REPOSITORY / "CHANGELOG.md").read_text().replace("](docs/", "](")  # the site's root is docs/
    files.append(File.generated(config, "changelog.md", content=changelog))
    executed, pages = REPOSITORY / "build" / "notebooks", REPOSITORY / "build" / "pages"
    (pages / "tutorials").mkdir(parents=True, exist_ok=True)
    for notebook in sorted((REPOSITORY / "colab").glob("*.ipynb")):
        source = executed / notebook.name
        shutil.copy(source if source.exists() else notebook, pages / "tutorials")
        files.append(File(f"tutorials/{notebook.name}", str(pages), config.site_dir, config.use_directory_urls))
    return files


def on_post_page(output: str, page, config) -> str:
    """Takes out what a page would load from other hosts.

    Material's offline search loads a small script from unpkg.com, of which docs/assets/vendor has a
    copy; the notebooks show a badge of Colab, which becomes a link in words.
    """
    shim = get_relative_url("assets/vendor/iframe-worker.js", page.url)
    output = output.replace("https://unpkg.com/iframe-worker/shim", shim)
    return re.sub(r'<img[^>]*src="https://colab[^>]*>', "Open in Colab", output)


def on_post_template(output: str, template_name: str, config) -> str:
    """The page for addresses that do not exist has no ``on_post_page``; a server shows it."""
    return output.replace("https://unpkg.com/iframe-worker/shim", "/assets/vendor/iframe-worker.js")
