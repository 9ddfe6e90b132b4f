"""Damages every region of every file of a bundle and of a run. The result must be exactly right or
one clear line."""

import contextlib
import json
import pathlib
import shutil
import warnings

import campaign
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import CheckpointConfig, DataConfig, ExperimentConfig, SampleConfig
from transformer_jax.sharding import make_mesh
from transformer_jax.training.leaves import tree_digest

pytestmark = campaign.MARKS

TEXT = "the king said to his men that night we would come home\n" * 8
SHAPE = tj.ModelConfig(max_len=16, num_layers=1, num_heads=2, model_dim=16)
STEPS = 6


def config(steps):
    return ExperimentConfig(steps=steps, batch_size=4, log_every=1, model=SHAPE, sample=SampleConfig(every=0),
                            checkpoint=CheckpointConfig(every=2, keep=2),
                            data=DataConfig(tokenizer=tj.config.TokenizerConfig(kind="char")))


def train(workdir, texts):
    import jax

    return tj.train(config(STEPS), data=str(texts), workdir=workdir, mesh=make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was stopped at step 4 of 6, its text, and the digests of its present and of its
    final state."""
    place = tmp_path_factory.mktemp("whole")
    (place / "text.txt").write_text(TEXT)

    class Stopped(Exception):
        pass

    def stop(loop):
        if loop.step == 5:
            raise Stopped

    import jax

    with contextlib.suppress(Stopped):
        tj.train(config(STEPS), data=str(place / "text.txt"), workdir=place / "run", hooks=[stop],
                 mesh=make_mesh(devices=jax.devices()[:1]))
    loaded = {step: tree_digest(tj.load(place / "run", step=step).model) for step in (2, 4)}
    end = tree_digest(train(place / "again", place / "text.txt").model)
    return place, loaded, end


def damaged(content: bytes, rng: np.random.Generator) -> bytes | None:
    """A damaged version of a file; `None` for no file."""
    at = int(rng.integers(max(len(content), 1)))
    bit = int(rng.integers(8))
    length = int(rng.integers(1, 1 + max(1, len(content) // 8)))
    return [
        lambda: content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1:] if content else b"x",
        lambda: content[:at], lambda: content[:at] + b"\0" * length + content[at + length:],
        lambda: content[:at] + rng.bytes(length) + content[at:], lambda: content[:at] + content[at + length:],
        lambda: b"\0" * len(content), lambda: None, lambda: rng.bytes(len(content)), lambda: content + content,
        lambda: b"[" * 100_000, lambda: _other_type(content, rng),
    ][int(rng.integers(11))]()


def _other_type(content: bytes, rng: np.random.Generator) -> bytes:
    """Replaces one value in JSON by a value of another type; other files are returned without a
    change."""
    try:
        value = json.loads(content)
    except ValueError:
        return content
    place = value
    while isinstance(place, (dict, list)) and place:
        key = list(place)[int(rng.integers(len(place)))] if isinstance(place, dict) else int(rng.integers(len(place)))
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.4:
            place[key] = [None, -1, 10**30, 10**400, 1e308, "x", [], {}, True, [[]], {"a": {}}][int(rng.integers(11))]
            break
        place = place[key]
    return json.dumps(value).encode()


def one_file(directory: pathlib.Path, rng: np.random.Generator) -> pathlib.Path:
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != ".lock")
    return files[int(rng.integers(len(files)))]


def test_damage_to_checkpoints(run, tmp_path):
    whole, loaded, _ = run

    def case(rng):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(whole / "run", tmp_path / "run")
        for _ in range(int(rng.integers(1, 3))):
            path = one_file(tmp_path / "run" / "checkpoints", rng)
            content = damaged(path.read_bytes(), rng)
            path.unlink() if content is None else path.write_bytes(content)
        with warnings.catch_warnings(), campaign.refusals(str(tmp_path)):
            warnings.simplefilter("ignore")
            bundle = tj.load(tmp_path / "run")
        assert tree_digest(bundle.model) == loaded[bundle.step]
        assert bundle.tokenizer.decode(bundle.tokenizer.encode(TEXT)) == TEXT and bundle.config.num_layers == 1
        return True

    campaign.run_cases("damage to checkpoints", case, least=40)


def test_every_region_of_every_file_of_a_checkpoint(run, tmp_path):
    """Flips one bit in each region; every change must be detected."""
    whole, loaded, _ = run
    shutil.copytree(whole / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    files = sorted(path for path in (tmp_path / "run" / "checkpoints" / "4").rglob("*") if path.is_file())
    regions = [(path, start) for path in files for start in range(0, path.stat().st_size, 64)]
    numbers = iter(np.random.default_rng(campaign.SEED).permutation(len(regions)))

    def case(rng):
        path, start = regions[next(numbers)]
        content = path.read_bytes()
        at = min(start + int(rng.integers(64)), len(content) - 1)
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << int(rng.integers(8)))]) + content[at + 1:])
        try:
            with pytest.raises(ValueError, match="4 is damaged") as raised:
                tj.load(tmp_path / "run")
            assert "\n" not in str(raised.value)
        finally:
            path.write_bytes(content)
        return False

    campaign.run_cases(f"one bit in each of {len(regions)} regions", case, least=60, most=len(regions))
    assert tree_digest(tj.load(tmp_path / "run").model) == loaded[4]


def test_damage_to_a_run_that_goes_on(run, tmp_path):
    whole, _, end = run

    def case(rng):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(whole / "run", tmp_path / "run")
        place = tmp_path / "run" if rng.random() < 0.3 else tmp_path / "run" / ["run.json", "metrics.jsonl", "data",
                                                                              "tokenizer.model"][int(rng.integers(4))]
        path = place if place.is_file() else one_file(place, rng)
        content = damaged(path.read_bytes(), rng)
        path.unlink() if content is None else path.write_bytes(content)
        with warnings.catch_warnings(), campaign.refusals(str(tmp_path)):
            warnings.simplefilter("ignore")
            bundle = train(tmp_path / "run", whole / "text.txt")
        assert tree_digest(bundle.model) == end
        steps = [line["step"] for line in tj.training.read_metrics(tmp_path / "run" / "metrics.jsonl")]
        assert STEPS in steps
        return True

    campaign.run_cases("damage to a run that goes on", case)
