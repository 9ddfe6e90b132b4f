"""Damages every region of every file of a bundle and of a run. The result must be exactly right or
one clear line."""

import contextlib
import shutil
import warnings

import campaign
import numpy as np
import pytest
from damage import copied, damage, one_file

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


def test_damage_to_checkpoints(run, tmp_path):
    whole, loaded, _ = run

    def case(rng):
        copied(whole / "run", tmp_path / "run")
        for _ in range(int(rng.integers(1, 3))):
            damage(one_file(tmp_path / "run" / "checkpoints", rng), rng)
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
        copied(whole / "run", tmp_path / "run")
        place = tmp_path / "run" if rng.random() < 0.3 else tmp_path / "run" / ["run.json", "metrics.jsonl", "data",
                                                                              "tokenizer.model"][int(rng.integers(4))]
        damage(place if place.is_file() else one_file(place, rng), rng)
        with warnings.catch_warnings(), campaign.refusals(str(tmp_path)):
            warnings.simplefilter("ignore")
            bundle = train(tmp_path / "run", whole / "text.txt")
        assert tree_digest(bundle.model) == end
        steps = [line["step"] for line in tj.training.read_metrics(tmp_path / "run" / "metrics.jsonl")]
        assert STEPS in steps
        return True

    campaign.run_cases("damage to a run that goes on", case)
