"""The exceptions that end a training run early."""

import contextlib
import re
import signal
from collections.abc import Iterator

import jax

from transformer_jax.config import ExperimentConfig


class Interrupted(Exception):
    """A signal stopped the training run, which saved a checkpoint first.

    Attributes:
      signum: the number of the signal.
      step: the last step taken.
      saved: the last step on disk, from which the run can be resumed. It is earlier than ``step``
        if the last updates were skipped, and ``None`` if no step is on disk.
    """

    def __init__(self, signum: int, step: int, saved: int | None):
        kept = "no step is saved" if saved is None else f"step {saved} is the last that is saved"
        super().__init__(f"{signal.Signals(signum).name}: " + (
            f"saved step {step}" if saved == step else
            f"stopped at step {step}; {kept}, because the updates after it were skipped as not finite"))
        self.signum = signum
        self.step = step
        self.saved = saved


class OutOfMemoryError(RuntimeError):
    """A device has too little memory for the run; the message says what to change."""

    def __init__(self, config: ExperimentConfig, num_devices: int):
        model, optim, mesh = config.model, config.optim, config.mesh
        remedies = [f"a smaller batch_size (now {config.batch_size}), or a larger optim.accumulation (now "
                    f"{optim.accumulation}), which splits the batch"]
        remat = getattr(model, "remat", "full")  # only a Transformer can recompute its layers
        if remat != "full":
            remedies.append(f"model.remat=full (now {remat})")
        if mesh.fsdp < num_devices:
            remedies.append(f"a larger mesh.fsdp (now {mesh.fsdp} of {num_devices} devices)")
        if model.dtype == "float32":
            remedies.append("model.dtype=bfloat16 (now float32)")
        if config.loss.most_logits:
            remedies.append(f"loss.most_logits=0 (now {config.loss.most_logits}), which computes the loss in chunks")
        numbered = "; ".join(f"({number}) {remedy}" for number, remedy in enumerate(remedies, 1))
        super().__init__(f"a device has too little memory for this run. Change settings in this order: {numbered}. "
                         "Run python -m experiments.preflight to see which settings fit")


class LostProcessError(RuntimeError):
    """Another process of the run has ended or cannot be reached."""


class NotFiniteError(RuntimeError):
    """Too many updates in a row, or the last updates of a run, were skipped.

    An update is skipped if the loss, the gradient or the new weights are not finite.
    """


# The messages of gloo, the coordination service and NCCL when another process is gone.
_LOST = re.compile(r"gloo|connection (closed|reset|refused)|coordination|heartbeat|unavailable|barrier|nccl", re.I)


@contextlib.contextmanager
def explained(config: ExperimentConfig, num_devices: int) -> Iterator[None]:
    """Turns errors of the JAX runtime into errors that tell a user what to do.

    Args:
      config: the config of the run, from which the advice is made.
      num_devices: the number of devices of the run.

    Raises:
      OutOfMemoryError: if a device has too little memory.
      LostProcessError: if another process of the run has ended or cannot be reached.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # a ValueError where a save waited for a lost process
        text = str(error)
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in text:
            raise OutOfMemoryError(config, num_devices) from error
        if jax.process_count() > 1 and _LOST.search(text):
            raise LostProcessError(" ".join(text.split())[:200]) from error
        raise
