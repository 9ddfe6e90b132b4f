"""Load and save a model together with its tokenizer and config."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import operator
import pathlib
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import ExperimentConfig, ModelConfig, ModelSettings
from transformer_jax.config.families import config_class_of
from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer, tokenizer_from_bytes
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.data.vocabulary_tokenizer import VocabularyTokenizer
from transformer_jax.json_files import check_shape, located, parse_json
from transformer_jax.models.functional import Model, make_model
from transformer_jax.nn.lora import merge_adapters
from transformer_jax.settings import check_type, checked_path, differences, from_dict, to_dict
from transformer_jax.training.adapters import BASE_FILE, restore_adapters
from transformer_jax.training.checkpoint import CheckpointError, Checkpoints, Restored
from transformer_jax.training.leaves import describe, named_leaves
from transformer_jax.training.manifest import DoesNotFitError

TOKENIZER_FILE = "tokenizer.model"
_HUGGING_FACE_FILES = "huggingface_files.json"


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A model with its tokenizer and its configs.

    Attributes:
      model: the model.
      tokenizer: its tokenizer, or ``None``.
      config: the config of the model.
      step: number of training steps taken.
      experiment: the config of the run that trained the model, or ``None``.
      files: for a model from Hugging Face, the texts of its JSON files and chat templates, by file
        name. ``to_huggingface`` writes them again.
    """

    model: Model
    tokenizer: Tokenizer | HuggingFaceTokenizer | None
    config: ModelConfig
    step: int = 0
    experiment: ExperimentConfig | None = None
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


def load(directory: str | pathlib.Path, *, step: int | str | None = None, average: int = 1,
         template: Model | None = None) -> Bundle:
    """Loads a model that a run or ``save`` has saved.

    The adapters of a run with ``lora.rank`` are merged into the base model.

    Args:
      directory: the workdir of the run, or the directory that was given to ``save``.
      step: the step to load; ``"best"`` for the step with the lowest validation loss; ``None`` for
        the last step.
      average: average the weights of this many checkpoints, up to the one at ``step`` (Vaswani et
        al., 2017, section 6.1).
      template: a model of the same structure, needed if the saved model has custom modules, such as
        ``tj.Decoder(config, key=key, block=MyBlock)`` or its shapes from ``jax.eval_shape``.

    Returns:
      The model with its tokenizer and its configs.

    Raises:
      ValueError: if there is no such checkpoint; if it is damaged, and, when ``step`` is ``None``,
        all earlier ones are damaged too; if there are fewer than ``average`` checkpoints; if the
        saved model has custom modules and the template lacks them.
    """
    if isinstance(average, bool) or not hasattr(average, "__index__") or average < 1:
        raise CheckpointError(f"average={average!r} must be a whole number, at least 1")
    if average > 1 and step == "best":
        raise CheckpointError(f"average={average} averages the last checkpoints up to a step, but only one best "
                              "checkpoint is kept; give a number as step, or leave average out")
    directory = checked_path("directory", directory)
    if not directory.is_dir():
        raise CheckpointError(f"there is no directory {directory}")
    checkpoints = Checkpoints(directory / ("best" if step == "best" else "checkpoints"), read_only=True)
    if not checkpoints.steps():
        raise CheckpointError(f"there is no checkpoint in {directory}; train one with python -m experiments.train")
    restored = checkpoints.restore({}, step=None if step in (None, "best") else _parse_step(step))
    step_directory = checkpoints.directory / str(restored.step)
    with located(str(step_directory / "metadata.json")):
        config, experiment, own = _read_metadata(restored.metadata)
    base_bundle = load(directory / "base") if BASE_FILE in restored.files else None
    shapes = _template(config, own, template)

    def read(restored: Restored) -> Model:
        if base_bundle is not None:
            adapters = restore_adapters(checkpoints, base_bundle.model, step=restored.step)
            return cast(Model, merge_adapters(base_bundle.model, adapters))
        try:
            return checkpoints.read(restored, {"params": shapes})["params"]
        except DoesNotFitError as error:
            if template is not None:
                raise
            raise CheckpointError(f"{error}; if the model was trained with custom modules, pass a model "
                                  "with the same modules: tj.load(directory, template=model)") from error

    model = read(restored)
    if average > 1:
        steps = [kept for kept in checkpoints.steps() if kept <= restored.step][-average:]
        if len(steps) < average:
            raise CheckpointError(f"average={average}, but {checkpoints.directory} keeps {len(steps)} checkpoints up "
                                  f"to step {restored.step}; train with checkpoint.keep={average}, or average fewer")
        for earlier in steps[:-1]:
            model = jax.tree.map(jnp.add, model, read(checkpoints.restore({}, step=earlier)))
        model = jax.tree.map(lambda total: total / average, model)
    tokenizer = None
    if TOKENIZER_FILE in restored.files:
        with located(str(step_directory / "files" / TOKENIZER_FILE)):
            tokenizer = tokenizer_from_bytes(restored.files[TOKENIZER_FILE])
    texts = {} if base_bundle is None else base_bundle.files
    if _HUGGING_FACE_FILES in restored.files:
        texts = parse_json(restored.files[_HUGGING_FACE_FILES], step_directory / "files" / _HUGGING_FACE_FILES,
                           dict[str, str])
    return Bundle(model=model, tokenizer=tokenizer, config=cast(ModelConfig, config), step=restored.step,
                  experiment=experiment, files=texts)


def save(directory: str | pathlib.Path, bundle: Bundle) -> None:
    """Saves a bundle so that ``load`` can load it, and returns when it is on disk.

    A model with custom modules or weights is saved too; ``load`` then needs a template.

    Args:
      directory: where to save it.
      bundle: the bundle.

    Raises:
      ValueError: if the bundle cannot be written; if it could not be loaded again, because the
        config is not that of the model or the tokenizer has a class that is not of this library;
        if the directory contains a later step, which ``load`` would load instead.
    """
    check_type("bundle", bundle, Bundle, "a tj.Bundle, as tj.load and tj.train return it")
    if isinstance(bundle.step, bool) or not hasattr(bundle.step, "__index__") or bundle.step < 0:
        raise CheckpointError(f"the step of the bundle is {bundle.step!r}; expected a whole number, 0 or more")
    own = _check_loadable(bundle)
    metadata: dict[str, Any] = {"model": to_dict(bundle.config)}
    if bundle.experiment is not None:
        metadata["config"] = to_dict(bundle.experiment)
    if own:
        metadata["own_modules"] = own
    files = files_to_store(bundle.tokenizer, bundle.files)
    with contextlib.closing(Checkpoints(checked_path("directory", directory) / "checkpoints", keep=1)) as checkpoints:
        if max(checkpoints.steps(), default=0) > bundle.step:
            raise CheckpointError(f"{directory} already contains step {checkpoints.steps()[-1]}, which is later than "
                                  f"step {bundle.step} of this bundle; save it in another directory")
        checkpoints.save(bundle.step, {"params": bundle.model}, metadata=metadata, files=files)


def files_to_store(tokenizer: Tokenizer | HuggingFaceTokenizer | None, kept: Mapping[str, str]) -> dict[str, bytes]:
    """Returns the files, by name, that a checkpoint stores for a tokenizer and ``Bundle.files``."""
    files = {} if tokenizer is None else {TOKENIZER_FILE: tokenizer.to_bytes()}
    texts = json.dumps(dict(kept), ensure_ascii=False).encode()
    return files | ({_HUGGING_FACE_FILES: texts} if kept else {})


# Fields that describe how to train or compute. They change no weight, so the config of the bundle
# may differ from that of the model in them.
_FREE_FIELDS = ("dropout", "attention_dropout", "attention_implementation", "remat", "unroll")
_ARRAY = "array"


def _check_loadable(bundle: Bundle) -> dict[str, str]:
    """Checks that a bundle can be loaded again after it is saved.

    Returns:
      The custom modules and arrays of the model, which its config does not describe: a dict from
      paths to class names, or to ``"array"``.

    Raises:
      CheckpointError: if the bundle could not be loaded again.
    """
    for config in (bundle.config, *([] if bundle.experiment is None else [bundle.experiment])):
        kind = config_class_of(bundle.config.family) if config is bundle.config else ExperimentConfig
        if type(config) is not kind or from_dict(kind, json.loads(json.dumps(to_dict(config)))) != config:
            raise CheckpointError(f"a bundle needs a {kind.__name__} that can be stored as JSON, but this is a "
                                  f"{type(config).__name__} that JSON would change; make it from plain values")
    kinds = (type(None), Tokenizer, HuggingFaceTokenizer, VocabularyTokenizer)
    if type(bundle.tokenizer) not in kinds:
        raise CheckpointError(f"the tokenizer is a {type(bundle.tokenizer).__name__}, which tj.load could not read; "
                              "save the bundle with tokenizer=None, and save the tokenizer separately")
    differing = [line for line in differences(getattr(bundle.model, "config", bundle.config), bundle.config)
                 if line.partition(":")[0] not in _FREE_FIELDS]
    if differing:
        raise CheckpointError(f"the config of the bundle differs from the config that its model was made with "
                              f"({'; '.join(differing[:5])}); save it with config=model.config")
    own = own_modules(bundle.model, bundle.config)
    expected, actual = (
        {name: describe(leaf) for name, leaf in named_leaves(model).items()
         if not any(f"{name}/".startswith(f"{path.replace('.', '/')}/") or not path for path in own)}
        for model in (_shapes(bundle.config), bundle.model))
    for name in sorted(expected.keys() & actual.keys()):
        if expected[name] != actual[name]:
            raise CheckpointError(f"the model has {name} as {actual[name]}, but its config describes it as "
                                  f"{expected[name]}, which tj.load would expect; save it with a config that fits, for "
                                  "example with another param_dtype")
    return own | {name.replace("/", "."): _ARRAY for name in sorted(expected.keys() ^ actual.keys())}


def _read_metadata(metadata: Mapping[str, Any]) -> tuple[ModelSettings, ExperimentConfig | None, dict[str, str]]:
    """Returns the model's config, the run's config and the custom modules from metadata."""
    own = check_shape(metadata.get("own_modules", {}), "own_modules", dict[str, str])
    experiment = from_dict(ExperimentConfig, metadata["config"]) if "config" in metadata else None
    if "num_members" in metadata:
        raise CheckpointError("these are all models of a sweep; load the best of them from its directory best_model")
    if "model" in metadata:
        return from_dict(ModelSettings, metadata["model"]), experiment, own
    if experiment is not None:
        return experiment.model, experiment, own
    if "lora" in metadata:
        raise CheckpointError("these are adapters without the model that they belong to; load them with "
                              "tj.load_adapters(directory, base)")
    raise CheckpointError(f"there is no config of a model; expected one of the keys model and config, but found "
                          f"{sorted(metadata)}")


def _class_names(model: Model) -> dict[str, str]:
    """Returns the name of the class of every module of a model, by the path of the module."""
    return {".".join(map(str, path)): f"{type(module).__module__}.{type(module).__qualname__}"
            for path, module in nnx.iter_modules(model)}


def own_modules(model: Model, config: ModelSettings) -> dict[str, str]:
    """Finds the custom modules of a model, which a model made from the config does not have.

    Args:
      model: the model.
      config: its config.

    Returns:
      The class names of the custom modules, by their paths. Modules within a custom module are left
      out.
    """
    usual = _class_names(_shapes(config))
    own = {path: name for path, name in _class_names(model).items() if usual.get(path) != name}
    if "" in own:
        return {"": own[""]}
    return {path: name for path, name in own.items() if not any(path.startswith(f"{outer}.") for outer in own)}


def _shapes(config: ModelSettings) -> Model:
    """Returns the model of a config, with shapes instead of arrays."""
    return jax.eval_shape(lambda key: make_model(config, key=key), jax.random.key(0))


def _template(config: ModelSettings, own: dict[str, str], template: Model | None) -> Model:
    """Returns the shapes to load: those of the template, or else those of the config's model."""
    if template is not None:
        given = _class_names(template)
        for path, name in own.items():
            # Only the names of the classes must be equal: a class may have moved to another file.
            if name != _ARRAY and given.get(path, "").rpartition(".")[2] != name.rpartition(".")[2]:
                raise CheckpointError(f"the saved model has {_describe_module(path, name)}, but the template has "
                                      f"{given.get(path)} there; make the template as the saved model was made")
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), template)
    if own:
        parts = [_describe_module(path, name) for path, name in own.items()]
        more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
        raise CheckpointError(f"this model has custom modules, which its config does not describe: "
                              f"{', '.join(parts[:3])}{more}. Pass a model that is made like the saved one, with any "
                              f"weights: tj.load(directory, template=model), {_template_code(config, own)}")
    return _shapes(config)


def _describe_module(path: str, name: str) -> str:
    """Describes a custom module in an error message."""
    article = "an" if name == _ARRAY else "a"
    return f"{article} {name} at {path!r}" if path else f"the class {name}"


def _template_code(config: ModelSettings, own: dict[str, str]) -> str:
    """Returns example code that makes a template with these custom modules, for error messages."""
    usual = f"tj.{type(_shapes(config)).__name__}(config, key=jax.random.key(0))"
    path, name = next(iter(own.items()))
    name = name.rpartition(".")[2]
    if not path:
        return f"model = {name}(config, key=jax.random.key(0))"
    if path.endswith(".blocks"):
        return f"model = {usual[:-1]}, block={name})"
    return f"model = {usual} with its custom module assigned to model.{path}"


def _parse_step(step: int | str) -> int:
    """Returns the step as an int."""
    try:
        return int(step) if isinstance(step, str) else operator.index(step)
    except (TypeError, ValueError):
        raise CheckpointError(f"step {step!r} is neither a number nor 'best'") from None
