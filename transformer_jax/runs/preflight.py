"""``tj.preflight`` computes memory, FLOPs and the largest batch of a training step in advance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, cast

import jax
from jax.sharding import Mesh

from transformer_jax import tasks
from transformer_jax.config import ExperimentConfig, ModelConfig
from transformer_jax.models.functional import make_model
from transformer_jax.settings import check_type
from transformer_jax.sharding import batch_sharding, make_mesh, num_batch_shards
from transformer_jax.training.chips import CHIPS, Chip, get_chip
from transformer_jax.training.metrics import attention_flops_per_token, flops_per_token
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.processes import check_mesh
from transformer_jax.training.state import TrainState, abstract_state
from transformer_jax.training.step import make_train_step

# The fraction of a device's memory that a step may use; the rest is for compiled programs and gaps.
USABLE = 0.9
_GB = 1e9
_ATTEMPTS = 4


@dataclasses.dataclass(frozen=True)
class Roofline:
    """A lower bound for the time of a step on a chip.

    The bound is the larger of two times: the time of the matrix products, and the time of the
    transfers between the chip and its memory. Communication between devices is not counted.

    Attributes:
      chip: A chip with published rates.
      fits: True if the peak memory of the step fits the chip.
      seconds: The lower bound for the time of a step.
      tokens_per_second: The upper bound for the throughput of all devices together.
      mfu: The upper bound for the model FLOPs utilisation (Chowdhery et al., 2022).
    """

    chip: Chip
    fits: bool
    seconds: float
    tokens_per_second: float
    mfu: float


@dataclasses.dataclass(frozen=True)
class Preflight:
    """The result of ``preflight``. ``str()`` formats it as a table for the terminal.

    Attributes:
      chip: The chip that the step is planned for.
      mesh: The number of devices along each axis.
      compiled_for: The kind of device that the step was compiled for. For another kind, the
        temporaries are different.
      batch_size: The number of rows in a step.
      tokens: The number of tokens in a step, including padding.
      num_parameters: The number of parameters of the model.
      parameters: The bytes of the parameters on each device.
      optimizer: The bytes of the optimizer's state on each device.
      inputs: The bytes of the batch and of small arrays on each device.
      temporaries: The largest number of bytes of activations and gradients on each device at any
        time of the step.
      peak: The sum of the four fields before.
      fits: True if ``peak`` is at most nine tenths of the chip's memory.
      largest_batch: The largest number of rows in a step that fits, with the same gradient
        accumulation; 0 if not even the smallest batch fits. ``None`` if it was not searched.
      flops: The model FLOPs of a step on all devices together, without recomputation.
      rooflines: Bounds for each chip in ``transformer_jax.training.chips.CHIPS``.
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
    """Compiles the training step from shapes alone and reports the memory and FLOPs that it needs.

    Nothing is allocated on a device.

    Args:
      config: The config of the run, in which ``model.vocab_size`` or
        ``data.tokenizer.vocab_size`` must be set.
      batch: The number of rows in a step (``config.batch_size`` by default), or the arrays or
        shapes of a batch by name.
      mesh: A mesh from ``transformer_jax.sharding.make_mesh``; by default the mesh of
        ``config.mesh``. Its devices may belong to a TPU topology that this machine does not have.
        The compiler for that TPU then reports the memory.
      device: A name in ``transformer_jax.training.chips.CHIPS``, or ``"cpu"``; by default the kind
        of device in the mesh.
      search: True to also find the largest batch, which compiles the step several more times.

    Returns:
      The memory, the FLOPs, the largest batch, and bounds for the speed of each known chip.

    Raises:
      ValueError: If the shapes of the task's batches, the device or the size of the vocabulary are
        unknown.
    """
    check_type("config", config, ExperimentConfig, "a tj.ExperimentConfig, such as tj.recipes.get(name)")
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    check_mesh(mesh)
    kind = mesh.devices.flat[0].device_kind
    chip = get_chip(_chip_of(kind) if device is None else device)
    config = config.replace(model=_complete(config))
    shapes = _shapes(config, batch)
    memory, num_parameters = _compile(config, shapes, mesh)
    usable = USABLE * chip.memory
    rows = shapes["tokens"].shape[0]
    largest = _largest_batch(config, shapes, mesh, memory["peak"], usable) if search else None
    tokens = shapes["tokens"].size
    model_flops = tokens * flops_per_token(config.model, num_parameters, config.row_length)
    hardware_flops = model_flops + tokens * _recomputed(config, num_parameters, shapes)
    rooflines = tuple(_roofline(config, other, mesh, memory, model_flops, hardware_flops, tokens, num_parameters)
                      for other in CHIPS.values())
    return Preflight(chip=chip, mesh=dict(mesh.shape), compiled_for=kind, batch_size=rows, tokens=tokens,
                     num_parameters=num_parameters, **memory, fits=memory["peak"] <= usable, largest_batch=largest,
                     flops=model_flops, rooflines=rooflines)


def batch_shapes(config: ExperimentConfig, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a training batch with full rows.

    Args:
      config: The config of the run.
      batch_size: The number of rows in the batch.

    Returns:
      The shape and data type of each array of the batch, by name.

    Raises:
      ValueError: If the shapes of the task's batches depend on the data.
    """
    return tasks.make(config).batch_shapes(batch_size)


def lower_train_step(config: ExperimentConfig, batch: Mapping[str, jax.ShapeDtypeStruct],
                     mesh: Mesh) -> tuple[jax.stages.Lowered, TrainState]:
    """Lowers the training step of a config for a mesh, without allocating anything.

    Args:
      config: The config of the run.
      batch: The shape of each array of the batch, by name.
      mesh: A mesh of devices, which this machine need not have.

    Returns:
      The lowered step, and the shapes of the training state.
    """
    optimizer = make_optimizer(config.optim, config.steps)
    task = tasks.make(config)
    with jax.set_mesh(mesh):
        state = abstract_state(lambda key: make_model(config.model, key=key), optimizer, mesh)
        sharding = batch_sharding(mesh)
        sharded_batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in batch.items()}
        step = make_train_step(task.loss, optimizer, config.optim.accumulation, config.optim.gradient_dtype)
        return step.lower(state, sharded_batch), state


def _complete(config: ExperimentConfig) -> Any:
    """Returns the config of the model with the size of its vocabulary, completed by the task."""
    model = config.model
    if config.lora.rank:
        raise ValueError("preflight can plan the training of all weights only, but the config trains adapters: "
                         f"lora.rank={config.lora.rank}; set lora.rank=0")
    if model.vocab_size is None and config.data.tokenizer.vocab_size is None:
        raise ValueError("the size of the vocabulary is unknown before the text is read; set model.vocab_size")
    size = config.data.tokenizer.vocab_size if model.vocab_size is None else model.vocab_size
    return tasks.make(config).complete_model(model.replace(vocab_size=size), None)


def _shapes(config: ExperimentConfig, batch: int | Mapping[str, Any] | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch; see ``preflight`` for ``batch``."""
    if batch is None or isinstance(batch, int):
        return batch_shapes(config, config.batch_size if batch is None else batch)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}


def _compile(config: ExperimentConfig, shapes: Mapping[str, jax.ShapeDtypeStruct],
             mesh: Mesh) -> tuple[dict[str, int], int]:
    """Compiles the step, and returns the bytes on each device and the number of parameters."""
    lowered, state = lower_train_step(config, shapes, mesh)
    found = lowered.compile().memory_analysis()
    if found is None:
        raise ValueError("the compiler for these devices does not report memory; choose another device")
    parameters, optimizer_bytes = _bytes_held(state.params), _bytes_held(state.opt_state)
    arguments = found.argument_size_in_bytes
    temporaries = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return {"parameters": parameters, "optimizer": optimizer_bytes,
            "inputs": max(arguments - parameters - optimizer_bytes, 0), "temporaries": temporaries,
            "peak": arguments + temporaries}, sum(leaf.size for leaf in jax.tree.leaves(state.params))


def _bytes_held(tree: Any) -> int:
    """Returns the bytes of a tree of arrays on each device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _largest_batch(config: ExperimentConfig, shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh, peak: int,
                   usable: float) -> int:
    """Finds the largest number of rows whose peak memory fits, by linear extrapolation. The peak
    grows almost linearly with the rows; each guess is compiled and improves the next one."""
    unit = num_batch_shards(mesh) * config.optim.accumulation

    def peak_bytes(rows: int) -> int:
        resized = {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in shapes.items()}
        return _compile(config, resized, mesh)[0]["peak"]

    first = shapes["tokens"].shape[0]
    half = max(first // unit // 2, 1) * unit
    other = 2 * first if half == first else half
    known = {first: peak, other: peak_bytes(other)}
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
        known[guess] = peak_bytes(guess)
    return max((rows for rows, found in known.items() if found <= usable), default=0)


def _recomputed(config: ExperimentConfig, num_parameters: int, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> float:
    """Returns the FLOPs per token of recomputation in the backward pass."""
    model, vocab_size = config.model, cast(int, config.model.vocab_size)
    if not isinstance(model, ModelConfig):
        return 0.0  # other families save all that the backward pass reads
    forward = flops_per_token(model, num_parameters, config.row_length) / 3
    attention = attention_flops_per_token(model, config.row_length) / 3
    layers = forward - 2 * vocab_size * model.model_dim * (model.family != "encoder")
    recomputed = {"none": 0.0, "dots": attention, "offload": attention, "full": layers}[model.remat]
    # If the batches have targets, the loss recomputes the logits that it computes in chunks.
    num_predictions = max((shapes[name].size for name in ("masked_targets", "targets") if name in shapes), default=0)
    if num_predictions // config.optim.accumulation * vocab_size >= config.loss.most_logits:
        recomputed += 2 * vocab_size * model.model_dim * num_predictions / shapes["tokens"].size
    return recomputed


def _roofline(config: ExperimentConfig, chip: Chip, mesh: Mesh, memory: Mapping[str, int], model_flops: float,
              hardware_flops: float, tokens: int, num_parameters: int) -> Roofline:
    """Returns the bounds for one chip; see ``Roofline``."""
    width = 4 if config.model.dtype == "float32" else 2
    # The forward and the backward pass of each microbatch read the weights. The update reads and
    # writes the weights and the optimizer's state.
    weights = num_parameters * width / mesh.shape["tensor"]
    moved = (2 * config.optim.accumulation * weights + 2 * (memory["parameters"] + memory["optimizer"])
             + memory["parameters"] + 2 * memory["temporaries"])
    peak = cast(float, chip.peak_flops) * mesh.size
    seconds = max(hardware_flops / peak, moved / chip.bandwidth)
    return Roofline(chip, fits=memory["peak"] <= USABLE * chip.memory, seconds=seconds,
                    tokens_per_second=tokens / seconds, mfu=model_flops / peak / seconds)


def _chip_of(kind: str) -> str:
    """Returns the name of a chip in ``CHIPS`` from the name that JAX uses for the device."""
    for word, name in (("v5 lite", "v5e"), ("v5e", "v5e"), ("v6", "v6e"), ("H100", "h100"), ("H200", "h200"),
                       ("cpu", "cpu")):
        if word.lower() in kind.lower():
            return name
    raise ValueError(f"the device {kind!r} is not in the table of chips; set device to one of "
                     f"{', '.join([*CHIPS, 'cpu'])}")
