"""Imports go one way only. This file lists what each part of the library may import."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

_CONFIG = {"settings", "lazy", "files", "json_files", "config", "presets"}
_FOUNDATION = {*_CONFIG, "derivatives", "sharding", "ops"}
_MODELS = {*_FOUNDATION, "nn", "models"}
_USES = {*_MODELS, "data", "decoding", "inspection", "training"}
_TASKS = {*_USES, "lazy", "alignment", "baselines", "features", "recipes", "runtime"}
_ALL = {*_TASKS, "tools", "interop", "tasks", "runs", "serving", "lazy"}

# Part of the package -> the other parts that it may import. Parts on one level do not import each
# other, but that inspection reads texts, and has translations made, as decoding does.
MAY_IMPORT = {
    "settings": set(),
    "lazy": {"settings"},
    "files": set(),
    "json_files": {"files"},
    "config": {"settings", "lazy"},
    "presets": {"settings", "lazy", "config"},
    "runtime": set(),
    "derivatives": set(),
    "sharding": {*_CONFIG, "derivatives"},
    "ops": {*_CONFIG, "derivatives", "sharding"},
    "nn": _FOUNDATION,
    "models": {*_FOUNDATION, "nn"},
    "data": {"settings", "lazy", "files", "json_files", "config", "ops"},
    "decoding": {*_MODELS, "data"},
    "inspection": {*_MODELS, "data", "decoding"},
    "training": {*_MODELS, "data"},
    "tools": _USES,
    "alignment": _USES,
    "baselines": _USES,
    "features": _USES,
    "interop": _USES,
    "recipes": {"settings", "config", "presets"},
    "tasks": _TASKS,
    "runs": {*_TASKS, "tasks", "lazy", "interop"},
    "serving": {*_MODELS, "data", "decoding", "inspection", "training", "tools"},
    "evaluation": {*_ALL, "runs"},
    "cli": {*_ALL, "evaluation", "transformer_jax"},
    "experiments": {*_ALL, "evaluation", "cli", "transformer_jax"},
    "benchmarks": {*_ALL, "evaluation", "cli", "transformer_jax", "experiments"},
}
FORBIDDEN_PACKAGES = {"settings": ("jax", "flax"), "config": ("jax", "flax"), "ops": ("flax",),
                      "data": ("flax", "optax", "torch", "tensorflow")}


def part_of(module: str) -> str | None:
    """The part of the library to which a dotted module name belongs; ``None`` for other
    packages."""
    names = module.split(".")
    if names[0] == "transformer_jax":
        return names[1] if len(names) > 1 else "transformer_jax"
    return names[0] if names[0] in ("experiments", "benchmarks") else None


def imported_modules(source: str, module: str) -> list[tuple[int, str]]:
    """Line and absolute name of everything imported, also inside functions and under
    TYPE_CHECKING."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, *([base] if base else [])])
            # `from transformer_jax import presets` imports a part, or a public name of the package
            # itself.
            if base == "transformer_jax":
                found += [(node.lineno, f"{base}.{alias.name}" if alias.name in MAY_IMPORT else base)
                          for alias in node.names]
            else:
                found.append((node.lineno, base))
    return found


def violations(source: str, module: str) -> list[str]:
    """The imports of one module that go the wrong way."""
    own = part_of(module)
    if own not in MAY_IMPORT:
        return [f"{module}: {own!r} is not a part of the house; name it in MAY_IMPORT"]
    wrong = []
    for line, name in imported_modules(source, module):
        part = part_of(name)
        forbidden = name.split(".")[0] in FORBIDDEN_PACKAGES.get(own, ())
        if forbidden or (part is not None and part != own and part not in MAY_IMPORT[own]):
            wrong.append(f"{module}:{line} imports {name}")
    return wrong


def modules() -> dict[str, pathlib.Path]:
    """Every module of the project by dotted name, but for the package's own ``__init__``, which
    imports all parts."""
    found = {}
    for package in ("transformer_jax", "experiments", "benchmarks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    found.pop("transformer_jax.__init__")
    return found


@pytest.mark.parametrize("module", modules())
def test_imports_run_one_way(module):
    assert violations(modules()[module].read_text(), module) == []


def test_the_package_itself_imports_its_parts_for_type_checkers_only():
    lines = (ROOT / "transformer_jax" / "__init__.py").read_text().split("\n")
    outside = "\n".join(line for line in lines if line.startswith(("from ", "import ")))
    assert {part_of(name) for _, name in imported_modules(outside, "transformer_jax.__init__")} == {None, "lazy"}


def test_the_table_has_no_cycle():
    def reach(part: str) -> set[str]:
        direct = MAY_IMPORT.get(part, set())
        return direct | {further for other in direct for further in reach(other)}

    assert all(part not in reach(part) for part in MAY_IMPORT)


@pytest.mark.parametrize(("module", "source"), [
    ("transformer_jax.ops.attention", "from transformer_jax.nn.attention import Attention"),
    ("transformer_jax.ops.attention", "import transformer_jax.nn.attention as attention"),
    ("transformer_jax.ops.attention", "from flax import nnx"),
    ("transformer_jax.ops.attention", "from ..nn import attention"),
    ("transformer_jax.ops.attention", "def late():\n    from transformer_jax import nn"),
    ("transformer_jax.ops.attention", "import transformer_jax as tj"),
    ("transformer_jax.sharding", "from transformer_jax.ops import attend"),
    ("transformer_jax.config", "import jax"),
    ("transformer_jax.nn.blocks", "from transformer_jax.models.output import Trace"),
    ("transformer_jax.nn.blocks", "from transformer_jax.data.tokenizer import Tokenizer"),
    ("transformer_jax.models.decoder", "from transformer_jax.training.state import TrainState"),
    ("transformer_jax.data.text", "from transformer_jax.models.decoder import Decoder"),
    ("transformer_jax.data.text", "from transformer_jax.sharding import make_mesh"),
    ("transformer_jax.decoding.loop", "from transformer_jax.training.step import make_train_step"),
    ("transformer_jax.training.loop", "from transformer_jax.decoding.sample import generate"),
    ("transformer_jax.training.loop", "from experiments import language_model"),
    ("transformer_jax.training.loop", "from benchmarks.timing import timed"),
    ("experiments.preflight", "from benchmarks.tpu import programs"),
    ("transformer_jax.interop.huggingface", "from transformer_jax.alignment import sft"),
    ("transformer_jax.attic.old", "import os"),
])
def test_an_import_the_wrong_way_is_caught(module, source):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(("module", "source"), [
    ("transformer_jax.nn.blocks", "from . import attention\nfrom transformer_jax.ops import attend\nimport jax"),
    ("transformer_jax.data.text", "from transformer_jax.config import DataConfig\nimport numpy as np"),
    ("transformer_jax.training.loop", "from transformer_jax.data import Windows\nfrom transformer_jax import models"),
    ("transformer_jax.alignment.sft", "from transformer_jax.training.step import make_train_step"),
    ("experiments.train", "import transformer_jax as tj\nfrom transformer_jax import Decoder, presets"),
    ("experiments.train", "from experiments import cli"),
    ("benchmarks.cpu.families", "from experiments import cli"),
])
def test_an_import_the_right_way_passes(module, source):
    assert violations(source, module) == []
