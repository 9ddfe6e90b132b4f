"""Activations of a corpus equal those of ``tj.trace``, and a stopped collection continues exactly."""

import itertools
import json
import os
import pathlib
import shutil
import tracemalloc

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax import inspection
from transformer_jax.config import MeshConfig
from transformer_jax.files import locked_directory
from transformer_jax.inspection import collecting
from transformer_jax.inspection.reading_activations import _values
from transformer_jax.models.functional import make_model
from transformer_jax.sharding import make_mesh

pytest.importorskip("safetensors")

CONFIG = tj.ModelConfig(vocab_size=23, max_len=16, num_layers=2, num_heads=2, model_dim=16)
LENGTHS = (3, 20, 7, 3, 16, 9, 20, 3, 12, 5)
TEXTS = [np.random.default_rng(number).integers(1, 23, length).tolist() for number, length in enumerate(LENGTHS)]
SITES = ["layers.1.mlp_output", "head_output", "final"]
OPTIONS = {"batch_size": 4, "rows_per_shard": 20}


@pytest.fixture(scope="module")
def model():
    return tj.Decoder(CONFIG, key=jax.random.key(0))


@pytest.fixture(scope="module")
def collected(model, tmp_path_factory):
    before = _values._cache_size()
    found = inspection.collect(model, TEXTS, SITES, tmp_path_factory.mktemp("whole"), **OPTIONS)
    assert _values._cache_size() == before + 1
    return found


def test_the_activations_are_those_of_the_trace_without_padding(model, collected):
    assert len(collected) == sum(map(len, TEXTS))
    assert collected.dims == {"layers.1.mlp_output": 16, "layers.0.head_output": 16, "layers.1.head_output": 16,
                              "final": 16}
    rows = collected[np.arange(len(collected))]
    assert rows["tokens"].tolist() == [token for text in TEXTS for token in text]
    assert rows["texts"].tolist() == [number for number, text in enumerate(TEXTS) for _ in text]
    assert rows["positions"].tolist() == [place for text in TEXTS for place in range(len(text))]
    at = 0
    for text in TEXTS:
        for piece in (text[:16], text[16:]):
            if len(piece) not in (3, 16):  # few lengths, because each is compiled
                at += len(piece)
                continue
            trace = tj.trace(model, np.asarray([piece]))
            for name in collected.dims:
                np.testing.assert_allclose(rows[name][at:at + len(piece)], trace[name][0].reshape(len(piece), -1),
                                           atol=2e-6, err_msg=name)
            at += len(piece)


def test_shards_are_read_across_their_borders_and_shuffled_with_a_state(collected):
    assert len(collected.index["shards"]) > 2
    everything = collected[np.arange(len(collected))]
    order = np.random.default_rng(0).permutation(len(collected))
    for name, values in collected[order].items():
        np.testing.assert_array_equal(values, everything[name][order])
    with pytest.raises(IndexError, match="are not all from 0 to"):
        _ = collected[np.array([len(collected)])]
    batches = collected.batches(8, seed=3)
    next(batches)
    state = batches.get_state()
    expected = [next(batches)["final"] for _ in range(3)]
    again = collected.batches(8, seed=3)
    again.set_state(state)
    np.testing.assert_array_equal([next(again)["final"] for _ in range(3)], expected)
    epoch = [batch["texts"] * 100 + batch["positions"] for batch in collected.batches(1, num_epochs=1)]
    assert len(np.unique(epoch)) == len(collected)


def test_a_killed_collection_continues_and_ends_with_the_same_files(model, collected, tmp_path, monkeypatch):
    write, count = collecting.write_shard, itertools.count()

    def killed(*args):
        if next(count) == 2:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(collecting, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        inspection.collect(model, TEXTS, SITES, tmp_path, **OPTIONS)
    monkeypatch.setattr(collecting, "write_shard", write)
    with pytest.raises(ValueError, match="was stopped before its end"):
        inspection.Activations(tmp_path)
    kept = (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns
    found = inspection.collect(model, TEXTS, SITES, tmp_path, **OPTIONS)
    assert (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == kept
    assert found.contents == collected.contents
    found.verify()
    with pytest.raises(ValueError, match="of other texts"):
        inspection.collect(model, [[1, 2], *TEXTS[1:]], SITES, tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="of fewer texts"):
        inspection.collect(model, [*TEXTS, [3], [4], [5]], SITES, tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="of another model, or of other sites"):
        inspection.collect(model, TEXTS, "final", tmp_path, **OPTIONS)
    shard = tmp_path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="has changed since it was written"):
        found.verify()


def test_two_programs_do_not_write_to_one_directory(model, tmp_path):
    with locked_directory(tmp_path), pytest.raises(ValueError, match=f"another run is using {tmp_path}; wait until"):
        inspection.collect(model, TEXTS, SITES, tmp_path, **OPTIONS)
    inspection.collect(model, TEXTS, SITES, tmp_path, **OPTIONS)


@pytest.mark.parametrize(("change", "message"), [
    (lambda index: index["shards"][0].update(file="../shard-00000.safetensors"), "expected a name inside its"),
    (lambda index: index["shards"][0].update(rows=-1), "has a shard of -1 rows"),
    (lambda index: index["shards"][0].update(rows=7), "has other arrays than index.json says"),
    (lambda index: index.update(dtype="float8"), "cannot be read as a shard of activations"),
    (lambda index: index["dims"].update(final=2), "has other arrays than index.json says"),
    (lambda index: index["dims"].pop("final"), "has other arrays than index.json says"),
    (lambda index: index.update(shards=3), "index.json: shards is 3; expected a list"),
    (lambda index: index["shards"].pop(), "but the directory has"),
    (lambda index: index["shards"].reverse(), "but the directory has"),
    (lambda index: index["shards"].append(index["shards"][0]), "but the directory has"),
    (lambda index: index.update(shards=[]), "but the directory has"),
])
def test_a_damaged_index_is_refused(collected, tmp_path, change, message):
    directory = pathlib.Path(shutil.copytree(collected.directory, tmp_path / "copy"))
    index = json.loads((directory / "index.json").read_text())
    change(index)
    (directory / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        inspection.Activations(directory)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, (2).to_bytes(8, "little") + b"[]", None, "cut",
                                     (40_000).to_bytes(8, "little") + b"[" * 40_001,
                                     (12).to_bytes(8, "little") + b'{"final": 3}' + bytes(9)])
def test_a_damaged_shard_is_refused(collected, tmp_path, content):
    directory = pathlib.Path(shutil.copytree(collected.directory, tmp_path / "copy"))
    path = directory / "shard-00000.safetensors"
    if content is None:
        path.unlink()
        os.mkfifo(path)  # must not be waited for
    else:
        path.write_bytes(path.read_bytes()[:-8] if content == "cut" else content)
    with pytest.raises(ValueError, match=f"^{path} (cannot be read as a shard|has other arrays)"):
        inspection.Activations(directory)


def test_without_a_disk_the_same_tokens_come_and_the_position_can_be_restored(model, collected):
    def make():
        return inspection.ActivationBatches(model, TEXTS, SITES, batch_size=8, buffer_size=64, model_batch_size=4)

    batches = make()
    ours = [next(batches) for _ in range(40)]
    everything = collected[np.arange(len(collected))]
    place = {(text, position): row for row, (text, position) in enumerate(
        zip(everything["texts"].tolist(), everything["positions"].tolist(), strict=True))}
    for batch in ours:
        rows = [place[key] for key in zip(batch["texts"].tolist(), batch["positions"].tolist(), strict=True)]
        for name, values in batch.items():
            np.testing.assert_allclose(values, everything[name][rows], atol=2e-6)
    assert {key for batch in ours for key in zip(batch["texts"].tolist(), batch["positions"].tolist(),
                                                 strict=True)} == set(place)
    other = make()
    for _ in range(11):
        next(other)
    state = other.get_state()
    other = make()
    other.set_state(state)
    np.testing.assert_array_equal(next(other)["final"], ours[11]["final"])


def test_memory_does_not_grow_with_the_corpus(model, tmp_path):
    class Many:
        def __init__(self, count):
            self.count = count

        def __iter__(self):
            return (TEXTS[number % len(TEXTS)] for number in range(self.count))

    def peak(count):
        tracemalloc.start()
        found = inspection.collect(model, Many(count), "neurons", tmp_path / str(count), batch_size=16,
                                   rows_per_shard=500)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most, len(found) * 2 * 64 * 4

    peak(16)  # compiles
    few, (many, size) = peak(100)[0], peak(800)
    assert size > 3_500_000 and many < 1.2 * few and many < size / 3


def test_bfloat16_and_several_devices(model, collected, tmp_path):
    found = inspection.collect(model, TEXTS, "final", tmp_path, dtype="bfloat16", batch_size=8,
                               mesh=make_mesh(MeshConfig(data=4, tensor=2)))
    rows = np.arange(len(found))
    assert found[rows]["final"].dtype == "bfloat16"
    np.testing.assert_allclose(found[rows]["final"].astype(np.float32), collected[rows]["final"], rtol=1e-2, atol=1e-2)


def test_the_source_and_the_target_of_a_translator(tmp_path):
    translator = make_model(CONFIG.replace(family="encoder_decoder", positions="sinusoidal"), key=jax.random.key(0))
    pairs = [([3, 4, 5], [1, 6]), ([7, 8], [1, 9, 10, 11])]
    starts = translator.config.start_ids
    sources = inspection.collect(translator, pairs, "layers.0.encoder_mlp_input", tmp_path / "sources")
    assert sources[np.arange(5)]["tokens"].tolist() == [3, 4, 5, 7, 8]
    targets = inspection.collect(translator, pairs, "layers.1.cross_head_output", tmp_path / "targets")
    trace = tj.trace(translator, np.array([[7, 8]]), np.array([[*starts, 1, 9, 10, 11]]))
    np.testing.assert_allclose(targets[np.arange(len(targets))]["layers.1.cross_head_output"][2 + len(starts):],
                               trace["layers.1.cross_head_output"][0].reshape(4 + len(starts), -1), atol=2e-6)
    with pytest.raises(ValueError, match="collect them in two calls"):
        inspection.collect(translator, pairs, ["encoder_neurons", "neurons"], tmp_path / "both")


@pytest.mark.parametrize(("change", "message"), [
    ({"sites": "layers.0.mlp_outptu"}, "did you mean 'layers.0.mlp_output'"), ({"sites": []}, "sites is empty"),
    ({"sites": "layers.0.pattern"}, "is not a value that the model has for each token"),
    ({"texts": "text"}, "pass a list of texts"), ({"texts": iter([[1]])}, "can be read several times"),
    ({"texts": ["text"]}, "there is no tokenizer"), ({"texts": []}, "there are no texts"),
    ({"dtype": "float16"}, "dtype='float16' is not one of"), ({"batch_size": 0}, "batch_size=0 must be"),
])
def test_wrong_arguments_are_refused(model, tmp_path, change, message):
    given = {"texts": TEXTS, "sites": "final", "directory": tmp_path / "new"} | change
    with pytest.raises(ValueError, match=message):
        inspection.collect(model, **given)
