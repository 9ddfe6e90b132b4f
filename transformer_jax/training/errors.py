"""How a training run can end early."""

import contextlib
import re
import signal
from collections.abc import Iterator

import jax

from transformer_jax.config import ExperimentConfig


class Interrupted(Exception):
    """Training was stopped by a signal, after saving."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"{signal.Signals(signum).name}: saved step {step}")
        self.signum = signum
        self.step = step


class OutOfMemoryError(RuntimeError):
    """A device has too little memory for the run; says what to change, the cheapest first."""

    def __init__(self, config: ExperimentConfig, num_devices: int):
        model, optim, mesh = config.model, config.optim, config.mesh
        levers = [f"a smaller batch_size ({config.batch_size}), or a larger optim.accumulation ({optim.accumulation}), "
                  "which splits it"]
        if model.remat != "full":
            levers.append(f"model.remat=full ({model.remat})")
        if mesh.fsdp < num_devices:
            levers.append(f"a larger mesh.fsdp ({mesh.fsdp} of {num_devices} devices)")
        if model.dtype == "float32":
            levers.append("model.dtype=bfloat16 (float32)")
        if config.loss.most_logits:
            levers.append(f"loss.most_logits=0 ({config.loss.most_logits}): the loss in chunks")
        numbered = "; ".join(f"({number}) {lever}" for number, lever in enumerate(levers, 1))
        super().__init__(f"the memory of a device does not hold this run. Change, in this order: {numbered}. "
                         "python -m experiments.preflight says what fits")


class LostProcessError(RuntimeError):
    """Another process of the run has ended or cannot be reached."""


class NotFiniteError(RuntimeError):
    """Too many updates in a row had a gradient that is not finite."""


# What the runtime says when a peer is gone: gloo, the coordination service, NCCL.
_LOST = re.compile(r"gloo|connection (closed|reset|refused)|coordination|heartbeat|unavailable|barrier|nccl", re.I)


@contextlib.contextmanager
def explained(config: ExperimentConfig, num_devices: int) -> Iterator[None]:
    """Says of the runtime's errors what a user can do about them: OutOfMemoryError,
    LostProcessError."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # a ValueError where a save waited for a lost process
        text = str(error)
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in text:
            raise OutOfMemoryError(config, num_devices) from error
        if jax.process_count() > 1 and _LOST.search(text):
            raise LostProcessError(" ".join(text.split())[:200]) from error
        raise
