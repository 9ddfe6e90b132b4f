"""Models in GGUF files give the logits that transformers computes from the same files, and blocks
the numbers of the package gguf (``make_gguf.py`` made the fixtures)."""

import pathlib
import shutil
import struct
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.interop.gguf_blocks import FORMATS
from transformer_jax.interop.gguf_file import read_gguf
from transformer_jax.runs.bases import load_base

FOLDER = pathlib.Path(__file__).parent / "fixtures" / "gguf"
NAMES = ("llama", "qwen2", "gpt2")
TOKENS = [[5, 1, 63, 20, 20, 7, 33, 2]]  # those of make_gguf.py


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_blocks_have_the_numbers_of_gguf(name):
    stored = np.load(FOLDER / "blocks.npz")
    form = next(form for form in FORMATS.values() if form.name == name)
    numbers = form.read(stored[f"{name} blocks"])
    assert numbers.dtype == np.float32 and numbers.shape[1] == form.size
    np.testing.assert_array_equal(numbers, stored[f"{name} numbers"])


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name, tmp_path):
    bundle = load_base(FOLDER / f"{name}.gguf")
    logits = np.asarray(tj.forward(bundle.model, jnp.asarray(TOKENS)))
    np.testing.assert_allclose(logits, np.load(FOLDER / "logits.npz")[name], rtol=2e-4, atol=2e-4)
    # The same weights from safetensors give the same bits.
    tj.to_huggingface(bundle, tmp_path)
    again = tj.from_huggingface(tmp_path)
    np.testing.assert_array_equal(np.asarray(tj.forward(again.model, jnp.asarray(TOKENS))), logits)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_equals_that_of_the_package_gguf(name):
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    expected = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
                for tensor in gguf.GGUFReader(FOLDER / f"{name}.gguf").tensors}
    _, tensors = read_gguf(FOLDER / f"{name}.gguf")
    assert {tensor.name for tensor in tensors} == expected.keys()
    for tensor in tensors:
        np.testing.assert_array_equal(np.asarray(tensor.values()[...], np.float32), expected[tensor.name])
        np.testing.assert_array_equal(np.asarray(tensor.values()[3:5], np.float32), expected[tensor.name][3:5])


def test_the_tokenizer_is_made_from_the_metadata():
    pytest.importorskip("tokenizers", reason="needs the extra hf")
    tokenizer = tj.from_gguf(FOLDER / "gpt2.gguf").tokenizer
    assert tokenizer.encode("theB") == [62, 0] and tokenizer.decode([62, 0]) == "theB"
    assert tokenizer.end_ids == (63,)


def changed(tmp_path, name, old, new):
    """Writes the file of llama with other bytes of the same length."""
    content = (FOLDER / "llama.gguf").read_bytes()
    assert old in content and len(old) == len(new)
    path = tmp_path / f"{name}.gguf"
    path.write_bytes(content.replace(old, new, 1))
    return path


def test_damaged_and_unknown_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        tj.from_gguf(tmp_path / "absent.gguf")
    whole = (FOLDER / "llama.gguf").read_bytes()
    for size, message in ((2, "is not a GGUF file"), (300, "inside its header"), (len(whole) - 40, "ends at byte")):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=message):
            tj.from_gguf(tmp_path / "cut.gguf")
    with pytest.raises(ValueError, match="version 9 of GGUF; expected one of 2, 3"):
        tj.from_gguf(changed(tmp_path, "version", b"GGUF\x03", b"GGUF\x09"))
    with pytest.raises(ValueError, match="architecture 'mamba'; expected one of llama, qwen2, gpt2"):
        tj.from_gguf(changed(tmp_path, "kind", struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 5) + b"mamba"))
    with pytest.raises(ValueError, match=r"left over: blk\.0\.attn_x"):
        tj.from_gguf(changed(tmp_path, "tensor", b"blk.0.attn_q", b"blk.0.attn_x"))
    # An enormous length must not use up memory.
    with pytest.raises(ValueError, match="inside its header"):
        tj.from_gguf(changed(tmp_path, "long", struct.pack("<Q", 20) + b"general.architecture",
                             struct.pack("<Q", 2**60) + b"general.architecture"))
    with pytest.raises(ValueError, match="formats Q5_K, which cannot be read"):
        token_table = b"token_embd.weight" + struct.pack("<IQQ", 2, 32, 64)
        tj.from_gguf(changed(tmp_path, "format", token_table + struct.pack("<I", 8),
                             token_table + struct.pack("<I", 13)))


@pytest.mark.parametrize(("entries", "tensors", "message"), [
    ([(b"a", 4, b"1234"), (b"a", 4, b"1234")], [], "has the metadata 'a' twice"),
    ([(b"a", 9, struct.pack("<IQ", 9, 1) * 40)], [], "lists nested more than 8 deep"),
    ([(b"a", 9, struct.pack("<IQ", 8, 2**60))], [], "a list of 1152921504606846976 strings exceeds it"),
    ([(b"a", 9, struct.pack("<IQ", 4, 2**60))], [], "inside its header"),
    ([(b"a", 99, b"")], [], "metadata of the unknown type 99"),
    ([(b"general.alignment", 4, bytes(4))], [], "general.alignment=0"),
    ([], [(b"x", (32, 2**40, 0), 0, 0)], r"'x' has the shape \[0, 1099511627776, 32\]"),
    ([], [(b"x", (32, 2**60, 2**60), 0, 0)], "'x' ends at byte"),
    ([], [(b"x", (32,), 0, 2**63)], "'x' ends at byte"),
    ([], [(b"x", (1,) * 5, 0, 0)], "has 5 axes; expected at most 4"),
    ([], [], "architecture null"),
])
def test_hostile_headers_are_refused(entries, tensors, message, tmp_path):
    def named(name):
        return struct.pack("<Q", len(name)) + name

    content = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries))
    content += b"".join(named(name) + struct.pack("<I", kind) + value for name, kind, value in entries)
    content += b"".join(named(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
                        for name, shape, kind, offset in tensors)
    (tmp_path / "hostile.gguf").write_bytes(content + bytes(64))
    with pytest.raises(ValueError, match=message) as raised:
        tj.from_gguf(tmp_path / "hostile.gguf")
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("counts", [(2**60, 0), (0, 2**60), (2**64 - 1, 2**64 - 1)])
def test_enormous_counts_are_refused(counts, tmp_path):
    whole = (FOLDER / "llama.gguf").read_bytes()
    (tmp_path / "counts.gguf").write_bytes(whole[:8] + struct.pack("<QQ", *counts) + whole[24:])
    with pytest.raises(ValueError, match="counts.gguf"):
        tj.from_gguf(tmp_path / "counts.gguf")


def test_a_tokenizer_that_cannot_be_made_is_left_out_with_the_reason(tmp_path):
    path = changed(tmp_path, "pieces", b"tokenizer.ggml.pre", b"tokenizer.ggml.prf")
    shutil.copy(path, tmp_path / "renamed.gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tj.from_gguf(tmp_path / "renamed.gguf").tokenizer is not None  # without a name, GPT-2's pattern
    path = changed(tmp_path, "unknown", struct.pack("<Q", 5) + b"qwen2", struct.pack("<Q", 5) + b"gwen2")
    with pytest.warns(UserWarning, match="loaded without a tokenizer: tokenizer.ggml.pre='gwen2'"):
        assert tj.from_gguf(path).tokenizer is None
