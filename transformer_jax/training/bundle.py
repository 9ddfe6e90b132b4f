"""A model with its tokenizer and config: what research code loads and saves."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import ExperimentConfig, ModelConfig
from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer, tokenizer_from_bytes
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.models.functional import Model, make_model
from transformer_jax.nn.lora import merge_adapters
from transformer_jax.settings import from_dict, to_dict
from transformer_jax.training.adapters import BASE_FILE, restore_adapters
from transformer_jax.training.checkpoint import CheckpointError, Checkpoints

TOKENIZER_FILE = "tokenizer.model"


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A trained model and what belongs to it.

    Attributes:
      model: the model.
      tokenizer: its tokenizer, if it has one.
      config: the model's config.
      step: training steps taken.
      experiment: the config of the run that trained it, if one did.
    """

    model: Model
    tokenizer: Tokenizer | HuggingFaceTokenizer | None
    config: ModelConfig
    step: int = 0
    experiment: ExperimentConfig | None = None


def load(directory: str | pathlib.Path, *, step: int | str | None = None, average: int = 1,
         template: Model | None = None) -> Bundle:
    """Loads the model of a workdir of a run, or of :func:`save`; the adapters of a run with
    ``lora.rank`` are merged.

    Args:
      directory: the workdir.
      step: a step that is kept there; ``"best"`` for the one with the lowest validation loss;
        ``None`` for the last.
      average: take the mean of the weights of so many checkpoints, up to and with this one (Vaswani
        et al., 2017, section 6.1).
      template: a model of the same structure, whose weights are not read, where the saved one has
        blocks or other modules of its own: ``tj.Decoder(config, key=key, block=MyBlock)``, or its
        shapes by ``jax.eval_shape``.

    Raises:
      ValueError: when there is no such checkpoint, or it is damaged and none before it is whole;
        when fewer than ``average`` are kept; for a model with modules of its own, without a
        template that has them.
    """
    if average < 1:
        raise CheckpointError(f"average={average} must be at least 1")
    if average > 1 and step == "best":
        raise CheckpointError(f"average={average} takes the last checkpoints, up to a step; there is one best")
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"there is no directory {directory}")
    checkpoints = Checkpoints(directory / ("best" if step == "best" else "checkpoints"), read_only=True)
    if not checkpoints.steps():
        raise CheckpointError(f"there is no checkpoint in {directory}; train one with python -m experiments.train")
    found = checkpoints.restore({}, step=None if step in (None, "best") else _number(step))
    experiment = from_dict(ExperimentConfig, found.metadata["config"]) if "config" in found.metadata else None
    config = from_dict(ModelConfig, found.metadata["model"]) if experiment is None else experiment.model
    base = load(directory / "base").model if BASE_FILE in found.files else None
    shapes = _template(config, found.metadata.get("own_modules", {}), template)

    def restore(step: int) -> Model:
        if base is not None:
            return merge_adapters(base, restore_adapters(checkpoints, base, step=step))
        return checkpoints.restore({"params": shapes}, step=step).state["params"]

    model = restore(found.step)
    if average > 1:
        steps = [kept for kept in checkpoints.steps() if kept <= found.step][-average:]
        if len(steps) < average:
            raise CheckpointError(f"average={average}, but {checkpoints.directory} keeps {len(steps)} checkpoints up "
                                  f"to step {found.step}; train with checkpoint.keep={average}, or average fewer")
        for earlier in steps[:-1]:
            model = jax.tree.map(jnp.add, model, restore(earlier))
        model = jax.tree.map(lambda total: total / average, model)
    tokenizer = tokenizer_from_bytes(found.files[TOKENIZER_FILE]) if TOKENIZER_FILE in found.files else None
    return Bundle(model=model, tokenizer=tokenizer, config=config, step=found.step, experiment=experiment)


def save(directory: str | pathlib.Path, bundle: Bundle) -> None:
    """Writes a bundle where :func:`load` finds it; returns when it is on disk.

    Raises:
      ValueError: when it cannot be written, or the directory holds a later step, which ``load``
        would find instead.
    """
    metadata = {"model": to_dict(bundle.config)}
    if bundle.experiment is not None:
        metadata = {"config": to_dict(bundle.experiment)}
    if own := _own_modules(bundle.model, bundle.config):
        metadata["own_modules"] = own
    files = {} if bundle.tokenizer is None else {TOKENIZER_FILE: bundle.tokenizer.to_bytes()}
    with contextlib.closing(Checkpoints(pathlib.Path(directory) / "checkpoints", keep=1)) as checkpoints:
        if max(checkpoints.steps(), default=0) > bundle.step:
            raise CheckpointError(f"{directory} holds step {checkpoints.steps()[-1]} already, later than step "
                                  f"{bundle.step} of this bundle; save it in another directory")
        checkpoints.save(bundle.step, {"params": bundle.model}, metadata=metadata, files=files)


def _modules(model: Model) -> dict[str, str]:
    """The class of every module of a model, by its path."""
    return {".".join(map(str, path)): f"{type(module).__module__}.{type(module).__qualname__}"
            for path, module in nnx.iter_modules(model)}


def _own_modules(model: Model, config: ModelConfig) -> dict[str, str]:
    """Paths and classes of the modules that a model of this config does not have, but for those
    within others."""
    usual = _modules(jax.eval_shape(lambda key: make_model(config, key=key), jax.random.key(0)))
    own = {path: name for path, name in _modules(model).items() if usual.get(path) != name}
    return {path: name for path, name in own.items() if not any(path.startswith(f"{outer}.") for outer in own)}


def _template(config: ModelConfig, own: dict[str, str], template: Model | None) -> Model:
    """The shapes to read: those of the config's model, or of the template."""
    if template is not None:
        given = _modules(template)
        for path, name in own.items():
            # The class may have moved, as from a notebook into a file: its own name tells it.
            if given.get(path, "").rpartition(".")[2] != name.rpartition(".")[2]:
                raise CheckpointError(f"the saved model has a {name} at {path!r}, the template has {given.get(path)}; "
                                      "make the template as the saved model was made")
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), template)
    if own:
        path, name = next(iter(own.items()))
        raise CheckpointError(f"this model has modules of its own (a {name} at {path!r}), which its config does not "
                              f"know: load(directory, template=model), where model is made as the saved one was, such "
                              f"as tj.Decoder(config, key=jax.random.key(0), block={name.rpartition('.')[2]})")
    return jax.eval_shape(lambda key: make_model(config, key=key), jax.random.key(0))


def _number(step: int | str) -> int:
    try:
        return int(step)
    except ValueError:
        raise CheckpointError(f"step {step!r} is neither a number nor 'best'") from None
