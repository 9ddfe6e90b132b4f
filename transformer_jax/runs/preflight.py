"""What a training step needs, known before anything is allocated: memory, operations, the batch
that fits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from transformer_jax import tasks
from transformer_jax.config import ExperimentConfig
from transformer_jax.models.functional import make_model
from transformer_jax.sharding import batch_sharding, make_mesh
from transformer_jax.training.chips import CHIPS, Chip, get_chip
from transformer_jax.training.metrics import attention_flops_per_token, flops_per_token
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.state import TrainState, abstract_state
from transformer_jax.training.step import make_train_step

# Of a device's memory; the rest is for the runtime, its programs and gaps between arrays.
USABLE = 0.9
_GB = 1e9
_ATTEMPTS = 4


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time that a step can take on a chip: that of its products, or that of what moves
    through memory.

    What devices send to each other is not counted.

    Attributes:
      chip: with a published rate.
      fits: whether the step's peak fits the chip.
      seconds: a step.
      tokens_per_second: of all devices.
      mfu: model FLOPs utilisation that this is (Chowdhery et al., 2022): no step can have a higher
        one.
    """

    chip: Chip
    fits: bool
    seconds: float
    tokens_per_second: float
    mfu: float


@dataclasses.dataclass(frozen=True)
class Preflight:
    """What :func:`preflight` found; ``str()`` of it is a page to read.

    Attributes:
      chip: the device asked about.
      mesh: devices along each axis.
      compiled_for: the kind of device that the step was compiled for; another one's temporaries
        differ.
      batch_size: rows a step.
      tokens: tokens a step, those of padding included.
      num_parameters: of the model.
      parameters: bytes on each device, as are the next four.
      optimizer: its state.
      inputs: the batch and small things.
      temporaries: activations and gradients, at the worst moment.
      peak: all of these together.
      fits: whether ``peak`` is within nine tenths of the chip's memory.
      largest_batch: most rows a step that fit, with the same accumulation; 0: none do. ``None``:
        not searched.
      flops: model FLOPs a step on all devices together, recomputation not counted.
      rooflines: what the chips of :data:`transformer_jax.training.chips.CHIPS` can do at most.
    """

    chip: Chip
    mesh: Mapping[str, int]
    compiled_for: str
    batch_size: int
    tokens: int
    num_parameters: int
    parameters: int
    optimizer: int
    inputs: int
    temporaries: int
    peak: int
    fits: bool
    largest_batch: int | None
    flops: float
    rooflines: tuple[Roofline, ...]

    def __str__(self) -> str:
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.items() if size > 1) or "one device"
        rows = [("parameters", self.parameters), ("optimizer state", self.optimizer), ("batch", self.inputs),
                ("activations and gradients", self.temporaries), ("peak", self.peak)]
        largest = {None: "not searched", 0: "none"}.get(self.largest_batch, f"{self.largest_batch} rows")
        lines = [
            f"{self.num_parameters:,} parameters, {self.batch_size} rows of {self.tokens // self.batch_size} tokens a "
            f"step, {self.flops:.3g} FLOP a step", f"mesh: {axes}; compiled for {self.compiled_for}", "",
            *(f"{name:<26}{value / _GB:>9.3f} GB a device" for name, value in rows), "",
            f"{self.chip.name}: {self.chip.memory / _GB:.0f} GB, of which {USABLE:.0%} are counted on: "
            f"{'fits' if self.fits else 'DOES NOT FIT'}; largest batch: {largest}", "",
            f"{'chip':<6}{'memory':>8}{'':>6}{'step at least':>16}{'tokens/s at most':>20}{'MFU at most':>14}",
            *(f"{at.chip.name:<6}{at.chip.memory / _GB:>5.0f} GB{'fits' if at.fits else 'no':>6}"
              f"{at.seconds * 1e3:>13.3g} ms{at.tokens_per_second:>20,.0f}{at.mfu:>14.0%}" for at in self.rooflines)]
        return "\n".join(lines)


def preflight(config: ExperimentConfig, batch: int | Mapping[str, Any] | None = None, mesh: Mesh | None = None, *,
              device: str | None = None, search: bool = True) -> Preflight:
    """Compiles the training step ahead of time from shapes, allocating nothing, and says what it
    needs.

    Args:
      config: of the run; ``model.vocab_size`` or ``data.tokenizer.vocab_size`` must be set.
      batch: rows a step (``config.batch_size`` by default), or arrays or shapes in place of a
        batch.
      mesh: from :func:`transformer_jax.sharding.make_mesh`; that of ``config.mesh`` by default. Its
        devices may be those of a TPU topology, of which none need be here: then the memory is what
        that compiler counts.
      device: a name in :data:`transformer_jax.training.chips.CHIPS`, or ``"cpu"``; by default that
        of the mesh.
      search: also find the largest batch, which compiles the step a few times more.

    Raises:
      ValueError: for a task whose batches have no known shape, an unknown device, or a vocabulary
        that is not known.
    """
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    kind = mesh.devices.flat[0].device_kind
    chip = get_chip(_chip_of(kind) if device is None else device)
    config = config.replace(model=_complete(config))
    shapes = _shapes(config, batch)
    memory, num_parameters = _compile(config, shapes, mesh)
    usable = USABLE * chip.memory
    rows = shapes["tokens"].shape[0]
    largest = _largest_batch(config, shapes, mesh, memory["peak"], usable) if search else None
    tokens = shapes["tokens"].size
    model_flops = tokens * flops_per_token(config.model, num_parameters)
    hardware_flops = model_flops + tokens * _recomputed(config, num_parameters, shapes)
    rooflines = tuple(_roofline(config, other, mesh, memory, model_flops, hardware_flops, tokens, num_parameters)
                      for other in CHIPS.values())
    return Preflight(chip=chip, mesh=dict(mesh.shape), compiled_for=kind, batch_size=rows, tokens=tokens,
                     num_parameters=num_parameters, **memory, fits=memory["peak"] <= usable, largest_batch=largest,
                     flops=model_flops, rooflines=rooflines)


def batch_shapes(config: ExperimentConfig, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of full rows of the config's task."""
    return tasks.make(config).batch_shapes(batch_size)


def lower_train_step(config: ExperimentConfig, batch: Mapping[str, jax.ShapeDtypeStruct],
                     mesh: Mesh) -> tuple[jax.stages.Lowered, TrainState]:
    """The training step of a config for the devices of a mesh, which need not be here, and the
    state's shapes."""
    optimizer = make_optimizer(config.optim, config.steps)
    task = tasks.make(config)
    with jax.set_mesh(mesh):
        state = abstract_state(lambda key: make_model(config.model, key=key), optimizer, mesh)
        sharding = batch_sharding(mesh)
        placed = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in batch.items()}
        step = make_train_step(task.loss, optimizer, config.optim.accumulation, config.optim.gradient_dtype)
        return step.lower(state, placed), state


def _complete(config: ExperimentConfig) -> Any:
    model = config.model
    if config.lora.rank:
        raise ValueError(f"preflight knows the training of all weights, not of adapters: lora.rank={config.lora.rank}")
    if model.vocab_size is None and config.data.tokenizer.vocab_size is None:
        raise ValueError("the size of the vocabulary is not known before the text is; set model.vocab_size")
    return model if model.vocab_size is not None else model.replace(vocab_size=config.data.tokenizer.vocab_size)


def _shapes(config: ExperimentConfig, batch: int | Mapping[str, Any] | None) -> dict[str, jax.ShapeDtypeStruct]:
    if batch is None or isinstance(batch, int):
        return batch_shapes(config, config.batch_size if batch is None else batch)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}


def _compile(config: ExperimentConfig, shapes: Mapping[str, jax.ShapeDtypeStruct],
             mesh: Mesh) -> tuple[dict[str, int], int]:
    """Bytes on each device, and the number of parameters."""
    lowered, state = lower_train_step(config, shapes, mesh)
    found = lowered.compile().memory_analysis()
    parameters, optimizer_bytes = _bytes_held(state.params), _bytes_held(state.opt_state)
    arguments = found.argument_size_in_bytes
    temporaries = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return {"parameters": parameters, "optimizer": optimizer_bytes,
            "inputs": max(arguments - parameters - optimizer_bytes, 0), "temporaries": temporaries,
            "peak": arguments + temporaries}, sum(leaf.size for leaf in jax.tree.leaves(state.params))


def _bytes_held(tree: Any) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _largest_batch(config: ExperimentConfig, shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh, peak: int,
                   usable: float) -> int:
    """The peak is nearly a line over the rows: guess by two points, compile the guess, guess again
    where it is off."""
    unit = mesh.shape["data"] * mesh.shape["fsdp"] * config.optim.accumulation

    def measured(rows: int) -> int:
        resized = {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in shapes.items()}
        return _compile(config, resized, mesh)[0]["peak"]

    first = shapes["tokens"].shape[0]
    half = max(first // unit // 2, 1) * unit
    other = 2 * first if half == first else half
    known = {first: peak, other: measured(other)}
    for _ in range(_ATTEMPTS):
        (low, low_peak), (high, high_peak) = sorted(known.items())[:: len(known) - 1]
        slope = max((high_peak - low_peak) / (high - low), 1.0)
        guess = int((usable - low_peak) / slope + low) // unit * unit
        fitting = [rows for rows, found in known.items() if found <= usable]
        failing = [rows for rows, found in known.items() if found > usable]
        guess = max(guess, max(fitting, default=0))
        guess = min(guess, min(failing) - unit) if failing else guess
        if guess < unit or guess in known:
            break
        known[guess] = measured(guess)
    return max((rows for rows, found in known.items() if found <= usable), default=0)


def _recomputed(config: ExperimentConfig, num_parameters: int, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> float:
    """Operations on a token beyond those that the model needs."""
    model = config.model
    forward = flops_per_token(model, num_parameters) / 3
    attention = attention_flops_per_token(model) / 3
    layers = forward - 2 * model.vocab_size * model.model_dim * (model.family != "encoder")
    again = {"none": 0.0, "dots": attention, "offload": attention, "full": layers}[model.remat]
    # A task without targets among its batches computes no logits that this library would walk in
    # chunks.
    predicted = max((shapes[name].size for name in ("masked_targets", "targets") if name in shapes), default=0)
    if predicted // config.optim.accumulation * model.vocab_size >= config.loss.most_logits:
        again += 2 * model.vocab_size * model.model_dim * predicted / shapes["tokens"].size
    return again


def _roofline(config: ExperimentConfig, chip: Chip, mesh: Mesh, memory: Mapping[str, int], model_flops: float,
              hardware_flops: float, tokens: int, num_parameters: int) -> Roofline:
    width = 4 if config.model.dtype == "float32" else 2
    # Forward and backward of each microbatch read the weights; the update reads and writes them and
    # its state.
    weights = num_parameters * width / mesh.shape["tensor"]
    moved = (2 * config.optim.accumulation * weights + 2 * (memory["parameters"] + memory["optimizer"])
             + memory["parameters"] + 2 * memory["temporaries"])
    peak = chip.peak_flops * mesh.size
    seconds = max(hardware_flops / peak, moved / chip.bandwidth)
    return Roofline(chip, fits=memory["peak"] <= USABLE * chip.memory, seconds=seconds,
                    tokens_per_second=tokens / seconds, mfu=model_flops / peak / seconds)


def _chip_of(kind: str) -> str:
    """The chip that jax calls by this name."""
    for word, name in (("v5 lite", "v5e"), ("v5e", "v5e"), ("v6", "v6e"), ("H100", "h100"), ("H200", "h200"),
                       ("cpu", "cpu")):
        if word.lower() in kind.lower():
            return name
    raise ValueError(f"the table of chips has no {kind!r}; name one of {', '.join([*CHIPS, 'cpu'])}")
