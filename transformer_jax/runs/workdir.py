"""The directory of a run. It belongs to one config and one data set, only one run at a time may use
it, and the same call resumes the run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from transformer_jax.config import ExperimentConfig
from transformer_jax.data import Tokenizer
from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer, tokenizer_from_bytes
from transformer_jax.files import locked_directory, naming, partial_path
from transformer_jax.json_files import located
from transformer_jax.runs.paths import current_directory
from transformer_jax.runs.record import RECORD, Record, changed_settings, last_step, read_record
from transformer_jax.settings import to_dict
from transformer_jax.training.bundle import TOKENIZER_FILE
from transformer_jax.training.checkpoint import Checkpoints
from transformer_jax.training.manifest import flush


class Workdir:
    """A directory that belongs to one run, from the first start of the run.

    Attributes:
      path: The path of the directory.
      record: The record of the run, or ``None`` before the first start.
      changed: The settings that differ from those of the last start, as ``name: old -> new``,
        without those that do not change the result.
    """

    def __init__(self, path: str | pathlib.Path, config: ExperimentConfig, *, change: bool = False,
                 sweep: Mapping[str, Sequence[Any]] | None = None):
        """Reads the record of the earlier start, if there was one.

        Args:
          path: The path of the directory.
          config: The config of this start.
          change: True if settings of the optimizer, the loss and dropout may differ from those of
            the last start.
          sweep: For a sweep, the values of each setting that differs between its models.

        Raises:
          ValueError: If the directory belongs to a run with another config or to another sweep, or
            the run has already taken more steps than the config has.
        """
        self.path = pathlib.Path(path)
        self._config = config
        self._sweep = None if sweep is None else {name: list(values) for name, values in sweep.items()}
        self.record: Record | None = read_record(self.path)
        self.changed: list[str] = []
        if self.record is not None:
            if self.record.get("sweep") != self._sweep:
                raise ValueError(f"{self.path} holds {_described(self.record.get('sweep'))}, but this is "
                                 f"{_described(self._sweep)}; use another workdir")
            self.changed = changed_settings(self.path, self.record, config, change)

    def tokenizer(self) -> Tokenizer | HuggingFaceTokenizer:
        """Loads the tokenizer of the earlier start.

        If its file is damaged or missing, the copy in the newest checkpoint replaces it, with a
        warning.

        Returns:
          The tokenizer.

        Raises:
          ValueError: If the file and all copies are damaged or missing.
        """
        path = self.path / TOKENIZER_FILE
        content = path.read_bytes() if path.is_file() else None
        digest = None if self.record is None else self.record.get("tokenizer")
        if content is not None and hashlib.sha256(content).hexdigest() == digest:
            return tokenizer_from_bytes(content)
        good = ((place, copy) for place, copy in self._tokenizers_of_checkpoints()
                if digest in (None, hashlib.sha256(copy).hexdigest()))
        place, copy = next(good, (None, b""))
        # The record of an older version has no digest. The file is then accepted unless the copy in
        # a checkpoint is different.
        if digest is None and content is not None and (place is None or content == copy):
            with located(str(path)):
                return tokenizer_from_bytes(content)
        state = "is damaged" if content is not None else "is missing"
        if place is None:
            raise ValueError(f"{path} {state}, and no checkpoint of this run has a copy; restore the file that this "
                             "run started with, or start a new run in another --workdir")
        warnings.warn(f"{path} {state}; it is replaced by the copy in {place}", stacklevel=2)
        write_whole(path, copy)
        return tokenizer_from_bytes(copy)

    def _tokenizers_of_checkpoints(self) -> Iterator[tuple[str, bytes]]:
        """Yields the path and the content of each copy of the tokenizer in an undamaged checkpoint,
        the newest first."""
        for directory in ("checkpoints", "best"):
            checkpoints = Checkpoints(self.path / directory, read_only=True)
            for step in reversed(checkpoints.steps()):
                with contextlib.suppress(ValueError):  # a damaged step
                    files = checkpoints.restore({}, step=step).files
                    if TOKENIZER_FILE in files:
                        yield f"{self.path / directory}/{step}/files/{TOKENIZER_FILE}", files[TOKENIZER_FILE]

    def check_contents(self, contents: Sequence[str], has_base: bool) -> None:
        """Checks that the data and the base are the same as at the first start.

        Args:
          contents: The digests of the data, followed by that of the base if there is one.
          has_base: True if the run starts from a base.

        Raises:
          ValueError: If a digest differs.
        """
        if self.record is None or self.record["contents"] == list(contents):
            return
        same_data = self.record["contents"][:-1] == list(contents)[:-1]
        what = "model to start from" if has_base and same_data else "training data"
        raise ValueError(f"the {what} is not the same as when the run in {self.path} started; use another --workdir, "
                         f"or the same {what} to resume")

    def check_given(self, given: Mapping[str, Any]) -> None:
        """Checks that the caller passes the same kinds of arguments as at the first start, among
        those that the record cannot store, such as examples or an optimizer.

        Args:
          given: The names of these arguments, each with True if the caller passed it.

        Raises:
          ValueError: If an argument is missing now, or an optimizer or a task is new.
        """
        if self.record is None or "given" not in self.record:  # a new run, or one of an older version
            return
        before, now = set(self.record["given"]), {name for name, value in given.items() if value}
        if missing := sorted(before - now):
            raise ValueError(f"the run in {self.path} was started from Python with its own {', '.join(missing)}, which "
                             "a file cannot store; call tj.train with the same arguments to resume it")
        if further := sorted((now - before) & {"optimizer", "task"}):
            raise ValueError(f"the run in {self.path} was started without the argument {', '.join(further)}; leave it "
                             "out, or use another workdir")

    def claim(self, contents: Sequence[str], tokenizer: Tokenizer | HuggingFaceTokenizer | None, *,
              base: Mapping[str, Any] | None = None, given: Mapping[str, Any] | None = None) -> None:
        """Writes the record, and the tokenizer if there is one. From then on, the directory belongs
        to this run.

        Args:
          contents: The digests of the data and of the base.
          tokenizer: The tokenizer of the model, or ``None``.
          base: The place that the base was loaded from. ``None`` if there is no base, or its place
            is unknown.
          given: The names of the arguments that a file cannot store, each with True if the caller
            passed it.
        """
        if tokenizer is not None:
            write_whole(self.path / TOKENIZER_FILE, tokenizer.to_bytes())
        names = sorted(name for name, value in (given or {}).items() if value)
        record: Record = {"config": to_dict(self._config), "contents": list(contents),
                          "base": None if base is None else dict(base), "given": names,
                          "directory": current_directory()}
        changes: list[dict[str, Any]] = []
        if self.record is not None:
            record["base"] = self.record.get("base") or record["base"]
            record["given"] = self.record.get("given", names)
            changes = self.record.get("changes", [])
            if "branch" in self.record:
                record["branch"] = self.record["branch"]
        if tokenizer is not None:
            record["tokenizer"] = tokenizer.digest
        if self._sweep is not None:
            record["sweep"] = self._sweep
        if self.changed:
            changes = [*changes, {"after_step": last_step(self.path), "changed": self.changed}]
        if changes:
            record["changes"] = changes
        write_whole(self.path / RECORD, json.dumps(record, indent=1).encode())


def _described(sweep: Mapping[str, Sequence[Any]] | None) -> str:
    """Describes what a workdir holds, for an error message."""
    if sweep is None:
        return "the run of one model"
    return "a sweep over " + ", ".join(f"{name}={','.join(map(str, values))}" for name, values in sweep.items())


def locked(path: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Locks a workdir, so that two runs cannot overwrite each other's files. Creates the directory
    if it does not exist. Of several processes of one run, the first one holds the lock.

    Args:
      path: The path of the workdir.

    Returns:
      A context manager, which releases the lock at its end.

    Raises:
      ValueError: If another run has locked the directory, or it cannot be made.
    """
    return locked_directory(path, "workdir", holds_lock=jax.process_index() == 0)


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Writes a file in one atomic operation, so that other processes never see a part of it."""
    partial = partial_path(path)
    with naming(path):
        partial.write_bytes(content)
        flush(partial)
    partial.replace(path)
    flush(path.parent)
