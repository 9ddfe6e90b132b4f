"""Programs compiled for TPUs of which none is here (extra ``tpu-aot``); run by
``python -m benchmarks tpu``.

libtpu compiles for a named topology on any Linux machine. What comes out is the real program, its
memory and what XLA counts in it; how long a step takes is only bounded from below, by a chip's
published rates.
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
      config: of the model.
      kind: ``train``, ``prefill`` or ``decode``.
      batch_size: rows, over all devices.
      mesh: of all devices of the topology; prefill and decode take one device.
      prompt: tokens that prefill reads.
    """

    config: ModelConfig
    kind: str
    batch_size: int
    mesh: MeshConfig = MeshConfig()
    prompt: int = 512

    @property
    def flops(self) -> float:
        """Model FLOPs of one step on all devices together; of decoding, of one token a row."""
        tokens = self.batch_size * {"train": self.config.max_len, "prefill": self.prompt, "decode": 1}[self.kind]
        training = tokens * flops_per_token(self.config, tj.count_parameters(self.config))
        return training if self.kind == "train" else training / 3


# Without dropout of attention weights, which the fused kernel does not have.
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
}


def lower(program: Program, topology: str) -> jax.stages.Lowered:
    """The program lowered for the topology, from shapes alone."""
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

    def here(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype,
                                                           sharding=NamedSharding(mesh, PartitionSpec())), tree)

    def separate() -> tj.Decoder:
        model = make_model(config, key=jax.random.key(0))
        model.stack = unstack(model.stack)
        return model

    with jax.set_mesh(mesh):
        model = here(jax.eval_shape(separate))
        settings = here(jax.eval_shape(lambda: Settings.of(tj.Sampling(temperature=0.0), config.vocab_size, [])))
        ids = jax.ShapeDtypeStruct((B, P), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
        keys = here(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B)))
        number = here(jax.eval_shape(lambda: jnp.int32(0)))
        arguments = (model, ids, ids, keys, number, settings)
        if program.kind == "prefill":
            return prefill.lower(*arguments, capacity=config.max_len)
        state = here(jax.eval_shape(functools.partial(prefill, capacity=config.max_len), *arguments))
        return decode.lower(model, state, settings, number)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program, for each device.

    Attributes:
      text: the optimised HLO.
      seconds: that compiling took.
      peak: bytes of memory: arguments, results not written over them, temporaries and the program.
      aliased: bytes of donated arguments that results are written over.
      moved: bytes of arguments and results, each of which goes through memory at least once.
      flops: as XLA counts them, without those of kernels; of a loop, one turn.
      bytes_accessed: likewise, those in the chip's fast memory too.
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


def tpu(names: list[str] | None = None, topologies: tuple[str, ...] = TOPOLOGIES, *,
        compile_program: Callable[[Program, str], Compiled] = compile_for) -> list[dict]:
    """One row a program and topology; a step takes at least its model FLOPs, or what it moves, at
    the chip's rates."""
    try:
        devices_of(topologies[0])
    except ImportError:
        sys.exit('error: compiling for TPUs needs libtpu: pip install -e ".[tpu-aot]"')
    unknown = sorted({*(names or ())} - {*PROGRAMS})
    if unknown:
        sys.exit(f"error: there is no program {unknown[0]!r}; known: {', '.join(PROGRAMS)}")
    rows = []
    for name in PROGRAMS if names is None else names:
        program = PROGRAMS[name]
        for topology in topologies:
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
