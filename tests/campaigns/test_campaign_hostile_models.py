"""Hugging Face directories that are damaged or made to do harm: they are read correctly, or one
clear line names the file. No file outside of the directory is read, and no array of an absurd size
is made."""

import json
import resource
import warnings

import campaign
import jax
import numpy as np
import pytest
from damage import copied, damage, hostile_json, hostile_tensors
from imported import KINDS, TEXTS, imported

import transformer_jax as tj

pytestmark = campaign.MARKS

@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A good directory of each kind."""
    place = tmp_path_factory.mktemp("good")
    return {kind: imported(kind, str(place))[0] for kind in KINDS}


def hostile_index(rng: np.random.Generator) -> str:
    names = ["../secret.safetensors", "/etc/passwd", "model.safetensors", "a\0b", "", ".", "x/../../y", 3, None]
    entries = {f"t{number}": names[int(rng.integers(len(names)))] for number in range(int(rng.integers(1, 4)))}
    return json.dumps({"weight_map": entries})


def loaded(directory):
    """Reads the directory and allows the error about tensors that do not fit, which has one line
    for each of them."""
    try:
        return tj.from_huggingface(directory)
    except ValueError as error:
        if str(error).startswith("the tensors in "):
            raise ValueError(" ".join(str(error).split())) from error
        raise


def test_hostile_directories(directories, tmp_path):
    def case(rng):
        kind = sorted(directories)[int(rng.integers(len(directories)))]
        copied(directories[kind], tmp_path / "model")
        files = sorted((tmp_path / "model").iterdir())
        path = files[int(rng.integers(len(files)))]
        way = rng.random()
        if way < 0.1:
            (tmp_path / "model" / "model.safetensors.index.json").write_text(hostile_index(rng))
            if rng.random() < 0.5:
                (tmp_path / "model" / "model.safetensors").unlink()
        elif way < 0.75 and path.suffix == ".json":
            path.write_text(hostile_json(path.read_text(), rng))
        elif way < 0.85 and path.suffix == ".safetensors":
            path.write_bytes(hostile_tensors(path.read_bytes(), rng))
        else:
            damage(path, rng)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            with warnings.catch_warnings(), campaign.refusals(str(tmp_path)):
                warnings.simplefilter("ignore")
                bundle = loaded(tmp_path / "model")
                jax.block_until_ready(jax.tree.leaves(bundle.model))
            if bundle.tokenizer is not None:
                bundle.tokenizer.encode_source(TEXTS[0])
        finally:
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert grown < 1 << 20, f"{grown >> 10} MiB of memory"
        return True

    campaign.run_cases("hostile directories", case, least=30)
