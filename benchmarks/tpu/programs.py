"""Programs that are compiled for TPUs on a machine without TPUs (extra ``tpu-aot``); run by
``python -m benchmarks tpu``.

libtpu compiles for a named topology on any Linux machine. The result is the real program, with its
memory and XLA's counts of FLOPs and bytes. For the time of a step there is only a lower bound,
which follows from the published rates of a chip.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import transformer_jax as tj
from transformer_jax.config import ExperimentConfig, MeshConfig, ModelConfig, OptimConfig
from transformer_jax.decoding.logits import Settings
from transformer_jax.decoding.loop import decode, prefill
from transformer_jax.models.functional import make_model
from transformer_jax.nn.stack import unstack
from transformer_jax.runs.preflight import batch_shapes, lower_train_step
from transformer_jax.sharding import make_mesh
from transformer_jax.training.chips import get_chip
from transformer_jax.training.metrics import flops_per_token
from transformer_jax.training.topologies import devices_of

TOPOLOGIES = ("v5e:2x4", "v6e:2x4")


def _bfloat16(name: str, **changes) -> ModelConfig:
    return tj.presets.get(name).replace(dtype="bfloat16", **changes)


@dataclasses.dataclass(frozen=True)
class Program:
    """A step to compile.

    Attributes:
      config: The config of the model.
      kind: ``train``, ``prefill`` or ``decode``.
      batch_size: The number of rows on all devices together.
      mesh: The mesh of all devices of the topology. Prefill and decode use one device.
      prompt: The number of tokens that prefill reads.
      topologies: The topologies to compile for, unless others are asked for.
    """

    config: ModelConfig
    kind: str
    batch_size: int
    mesh: MeshConfig = MeshConfig()
    prompt: int = 512
    topologies: tuple[str, ...] = TOPOLOGIES

    @property
    def flops(self) -> float:
        """The model FLOPs of a step on all devices together. A step of decoding is one token in
        each row."""
        tokens = self.batch_size * {"train": self.config.max_len, "prefill": self.prompt, "decode": 1}[self.kind]
        training = tokens * flops_per_token(self.config, tj.count_parameters(self.config))
        return training if self.kind == "train" else training / 3


# The models have no dropout of attention weights, because the fused kernel does not support it.
PROGRAMS = {
    "gpt2-small train": Program(_bfloat16("gpt2-small", attention_implementation="splash"), "train", 64,
                                 MeshConfig(fsdp=4, tensor=2)),
    "transformer-base train": Program(_bfloat16("transformer-base", attention_dropout=0.0), "train", 64,
                                       MeshConfig(fsdp=4, tensor=2)),
    "roberta-base train": Program(_bfloat16("roberta-base", attention_dropout=0.0), "train", 64,
                                   MeshConfig(fsdp=4, tensor=2)),
    "gpt2-small prefill": Program(_bfloat16("gpt2-small", param_dtype="bfloat16"), "prefill", 8),
    "gpt2-small decode": Program(_bfloat16("gpt2-small", param_dtype="bfloat16"), "decode", 8),
    "gpt3-xl (1.3B) train": Program(_bfloat16("gpt3-xl", remat="full", attention_implementation="splash"), "train", 32,
                                     MeshConfig(fsdp=8)),
    "gemma-2-2b train": Program(_bfloat16("gemma-2-2b", max_len=4096, remat="full", attention_implementation="splash"),
                                "train", 8, MeshConfig(fsdp=4, tensor=2), topologies=("v5e:2x4",)),
    "olmoe-1b-7b train": Program(_bfloat16("olmoe-1b-7b", max_len=2048, remat="full",
                                           attention_implementation="splash"),
                                 "train", 16, MeshConfig(fsdp=4, tensor=2, expert=2), topologies=("v5e:4x4",)),
}


def lower(program: Program, topology: str) -> jax.stages.Lowered:
    """Lowers a program for a topology, from shapes alone."""
    devices = devices_of(topology)
    if program.kind == "train":
        return _training(program, make_mesh(program.mesh, devices))
    return _inference(program, make_mesh(MeshConfig(), devices[:1]))


def _training(program: Program, mesh: Mesh) -> jax.stages.Lowered:
    config = ExperimentConfig(model=program.config, steps=1000, optim=OptimConfig(peak_lr=6e-4))
    lowered, _ = lower_train_step(config, batch_shapes(config, program.batch_size), mesh)
    return lowered


def _inference(program: Program, mesh: Mesh) -> jax.stages.Lowered:
    config, B, P = program.config, program.batch_size, program.prompt

    def replicated(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype,
                                                           sharding=NamedSharding(mesh, PartitionSpec())), tree)

    def separate() -> tj.Decoder:
        model = make_model(config, key=jax.random.key(0))
        model.stack = unstack(model.stack)
        return model

    with jax.set_mesh(mesh):
        model = replicated(jax.eval_shape(separate))
        settings = replicated(jax.eval_shape(lambda: Settings.of(tj.Sampling(temperature=0.0), config.vocab_size, [])))
        ids = jax.ShapeDtypeStruct((B, P), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
        keys = replicated(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B)))
        number = replicated(jax.eval_shape(lambda: jnp.int32(0)))
        arguments = (model, ids, ids, keys, number, settings)
        if program.kind == "prefill":
            return prefill.lower(*arguments, capacity=config.max_len)
        state = replicated(jax.eval_shape(functools.partial(prefill, capacity=config.max_len), *arguments))
        return decode.lower(model, state, settings, number)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program. All counts are for one device.

    Attributes:
      text: The optimised HLO.
      seconds: The compile time.
      peak: The bytes of the arguments, of the results that do not reuse an argument's memory, of
        the temporaries and of the program.
      aliased: The bytes of donated arguments whose memory the results reuse.
      moved: The bytes of arguments and results, which are read or written at least once.
      flops: The FLOPs that XLA counts. They do not include kernels, and only one iteration of each
        loop.
      bytes_accessed: The bytes that XLA counts in the same way, including the chip's fast memory.
    """

    text: str
    seconds: float
    peak: int
    aliased: int
    moved: int
    flops: float
    bytes_accessed: float


@functools.cache
def compile_for(program: Program, topology: str) -> Compiled:
    """Compiles the program for the topology."""
    lowered = lower(program, topology)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    peak = (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes)
    return Compiled(compiled.as_text(), seconds, peak, memory.alias_size_in_bytes,
                    memory.argument_size_in_bytes + memory.output_size_in_bytes, cost["flops"], cost["bytes accessed"])


def tpu(names: list[str] | None = None, topologies: tuple[str, ...] | None = None, *,
        compile_program: Callable[[Program, str], Compiled] = compile_for) -> list[dict]:
    """Compiles the programs for the topologies.

    Args:
      names: The names of the programs; by default all.
      topologies: The topologies; by default those of each program.
      compile_program: The function that compiles a program for a topology.

    Returns:
      A row for each program and topology. The lower bound for the time of a step is the larger of
      two times: that of its model FLOPs, and that of its memory traffic.
    """
    try:
        devices_of(TOPOLOGIES[0])
    except ImportError:
        sys.exit('error: compiling for TPUs needs libtpu: pip install -e ".[tpu-aot]"')
    unknown = sorted({*(names or ())} - {*PROGRAMS})
    if unknown:
        sys.exit(f"error: there is no program {unknown[0]!r}; the programs are: {', '.join(PROGRAMS)}")
    rows = []
    for name in PROGRAMS if names is None else names:
        program = PROGRAMS[name]
        for topology in program.topologies if topologies is None else topologies:
            compiled, chip = compile_program(program, topology), get_chip(topology.partition(":")[0])
            count = len(devices_of(topology)) if program.kind == "train" else 1
            bounds = {"products": program.flops / count / chip.peak_flops,
                      "memory": compiled.moved / chip.bandwidth}
            rows.append({
                "config": name, "topology": topology if count > 1 else f"{chip.name}, 1 device",
                "compile s": compiled.seconds, "peak HBM GB": compiled.peak / 1e9,
                "fits": compiled.peak <= chip.memory, "model TFLOP": program.flops / 1e12,
                "XLA's TFLOP a device": compiled.flops / 1e12, "GB accessed a device": compiled.bytes_accessed / 1e9,
                "step at least ms": 1e3 * max(bounds.values()), "bound by": max(bounds, key=bounds.get)})
    return rows
