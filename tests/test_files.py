"""An error of writing names the file, also where Python leaves the name out, as on a full disk."""

import errno
import os

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import transformer_jax as tj
from transformer_jax.data import token_file
from transformer_jax.files import naming
from transformer_jax.interop import tensors
from transformer_jax.runs import workdir

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full(*_):
    raise FULL


def test_only_errors_without_a_file_name_get_one(tmp_path):
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/a'"), naming(tmp_path / "a"):
        full()
    with pytest.raises(FileNotFoundError, match="none'"), naming(tmp_path / "a"):
        (tmp_path / "none").read_bytes()
    with pytest.raises(OSError, match="^timed out$"), naming(tmp_path / "a"):
        raise TimeoutError("timed out")


def test_token_files_and_files_of_runs(tmp_path, monkeypatch):
    tokenizer = tj.Tokenizer.train(["the cat"], kind="char")
    monkeypatch.setattr(token_file.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        token_file.TokenFile.build(["the cat"], tokenizer, tmp_path)
    assert raised.value.filename.startswith(f"{tmp_path}/tokens-") and list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/run.json'"):
        workdir.write_whole(tmp_path / "run.json", b"{}")


def test_tensors(tmp_path, monkeypatch):
    def failing(*_, **__):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.numpy, "save_file", failing)
    with pytest.raises(ValueError, match=f"{tmp_path}/model.safetensors cannot be written: .*No space left on device"):
        tensors.write(tmp_path, [("w", (2,), np.dtype("float32"), lambda: np.zeros(2, np.float32))])
