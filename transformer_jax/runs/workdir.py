"""The directory of a run: one config, one data set, one process at a time, resumed by the same
call."""

from __future__ import annotations

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from transformer_jax.config import ExperimentConfig
from transformer_jax.data import Tokenizer
from transformer_jax.data.huggingface_tokenizer import tokenizer_from_bytes
from transformer_jax.settings import differences, from_dict, to_dict
from transformer_jax.training.bundle import TOKENIZER_FILE

_RECORD = "run.json"

# Fields that may change from one start of a run to the next: they do not change what is computed.
_FREE = ("log_every", "checkpoint.", "eval.", "sample.", "metrics.", "mesh.", "data.cache_dir", "model.unroll",
         "model.remat", "loss.most_logits")


class Workdir:
    """A directory that belongs to one run from its first start on.

    Attributes:
      path: of the directory.
      record: of the run that it belongs to: its config and the digests of its data; ``None`` before
        the first start.
    """

    def __init__(self, path: str | pathlib.Path, config: ExperimentConfig):
        """Reads the record of an earlier start.

        Raises:
          ValueError: when the directory belongs to a run with another config.
        """
        self.path = pathlib.Path(path)
        self._config = config
        self.record: dict[str, Any] | None = None
        if (self.path / _RECORD).exists():
            self.record = json.loads((self.path / _RECORD).read_bytes())
            _check_config(self.path, from_dict(ExperimentConfig, self.record["config"]), config)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the earlier start."""
        return tokenizer_from_bytes((self.path / TOKENIZER_FILE).read_bytes())

    def check_contents(self, contents: Sequence[str], has_base: bool) -> None:
        """Raises ValueError when data, or the model to start from (the last digest), differ from
        the first start's."""
        if self.record is None or self.record["contents"] == list(contents):
            return
        same_data = self.record["contents"][:-1] == list(contents)[:-1]
        what = "model to start from" if has_base and same_data else "text"
        raise ValueError(f"the {what} is not the one that the run in {self.path} began with; use another --workdir, "
                         f"or the same {what} to resume")

    def claim(self, contents: Sequence[str], tokenizer: Tokenizer | None) -> None:
        """Writes the record, and the tokenizer if there is one: from here on the directory belongs
        to this run."""
        if tokenizer is not None:
            write_whole(self.path / TOKENIZER_FILE, tokenizer.to_bytes())
        record = {"config": to_dict(self._config), "contents": list(contents)}
        write_whole(self.path / _RECORD, json.dumps(record, indent=1).encode())


def _check_config(path: pathlib.Path, old: ExperimentConfig, new: ExperimentConfig) -> None:
    changed = [line for line in differences(old, new) if not line.startswith(_FREE)]
    if old.task is None:  # the record of a version that kept the task in the program
        changed = [line for line in changed if not line.startswith("task:")]
    if changed:
        raise ValueError(f"{path} holds a run with another config ({'; '.join(changed)}); use another --workdir, or "
                         "the same settings to resume")


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Holds a workdir, which is made if needed: two runs in it would write over each other."""
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("w") as lock:
        if jax.process_index() == 0:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another run is using {path}") from None
        yield


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that other processes see whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
