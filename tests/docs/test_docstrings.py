"""Every public function, class and method has a docstring that says what goes in, what comes out
and what is raised, in words that a newcomer understands."""

import ast
import functools
import pathlib
import re

import pytest

from transformer_jax.lazy import imports_for_type_checkers

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "transformer_jax"
PACKAGES = [".".join(init.parent.relative_to(REPOSITORY).parts) for init in sorted(PACKAGE.glob("**/__init__.py"))
            if "__all__" in init.read_text()]


@functools.cache
def parsed(path):
    return ast.parse(path.read_text())


@functools.cache
def classes():
    """Every class of the package by its name."""
    return {node.name: node for path in PACKAGE.rglob("*.py") for node in ast.walk(parsed(path))
            if isinstance(node, ast.ClassDef)}


def public(package):
    """The definitions of a package's public names: (dotted name, syntax tree)."""
    init = REPOSITORY.joinpath(*package.split(".")) / "__init__.py"
    for name, home in imports_for_type_checkers(init.read_text()).items():
        path = REPOSITORY.joinpath(*home.split(".")).with_suffix(".py")
        for node in parsed(path).body if home != package and path.exists() else []:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
                yield f"{home}.{name}", node


def overrides(method, node):
    """Whether a base class, which documents the method, defines it too."""
    bases = [classes().get(ast.unparse(base).split("[")[0].split(".")[-1]) for base in node.bases]
    return any(base is not None and (any(isinstance(each, ast.FunctionDef) and each.name == method.name
                                         for each in base.body) or overrides(method, base)) for base in bases)


def raises(function):
    """Whether a function itself, not one inside it, has a ``raise`` of a new error."""
    nodes, found = list(function.body), False
    while nodes and not found:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue
        found = isinstance(node, ast.Raise) and node.exc is not None and "NotImplemented" not in ast.unparse(node.exc)
        nodes.extend(ast.iter_child_nodes(node))
    return found


def missing_of_function(function):
    doc = ast.get_docstring(function)
    if not doc:
        return "has no docstring"
    arguments = function.args
    names = [each.arg for each in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
             if each.arg not in ("self", "cls")]
    section = (re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", doc, re.MULTILINE) or [None, ""])[1]
    lacks = [name for name in names if not re.search(rf"^ +(?:\w+, )*\*?{name}\b[^:\n]*:", section, re.MULTILINE)]
    returns = ast.unparse(function.returns) if function.returns else "None"
    problems = [f"Args lacks {', '.join(lacks)}"] if lacks else []
    if returns != "None" and not re.search(r"^(Returns|Yields):", doc, re.MULTILINE):
        problems.append("has no Returns")
    if raises(function) and not re.search(r"^Raises:", doc, re.MULTILINE):
        problems.append("has no Raises")
    return "; ".join(problems)


def missing(package):
    for name, node in public(package):
        if isinstance(node, ast.FunctionDef):
            yield name, missing_of_function(node)
            continue
        yield name, "" if ast.get_docstring(node) else "has no docstring"
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and not overrides(method, node):
                decorators = {ast.unparse(each) for each in method.decorator_list}
                is_value = decorators & {"property", "functools.cached_property", "cached_property"}
                yield f"{name}.{method.name}", (missing_of_function(method) if not is_value
                                                else "" if ast.get_docstring(method) else "has no docstring")


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings_say_what_goes_in_and_out(package):
    assert [f"{name} {what}" for name, what in missing(package) if what] == []


# Unclear phrases that earlier versions of this project used, and Sphinx roles, which the site
# cannot render.
UNCLEAR = re.compile(r"not to be had|what is no\b|for what is\b|\bof others\b|\bis said\b|\bare said\b|\bsaid here\b"
                     r"|:(?:class|func|meth|mod|attr|data):`", re.IGNORECASE)


@pytest.mark.parametrize("folder", ["transformer_jax", "experiments", "benchmarks", "docs", "."])
def test_no_clipped_phrases(folder):
    found = []
    for path in sorted((REPOSITORY / folder).glob("*" if folder == "." else "**/*")):
        if path.suffix in (".py", ".md") and path.name != "style.md":
            found += [f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}"
                      for number, line in enumerate(path.read_text().splitlines(), start=1) if UNCLEAR.search(line)]
    assert found == []
