"""Fills the disk after any number of bytes: the program ends with one clear line, earlier files
stay intact, and with free space the same call reaches exactly the right result."""

import contextlib
import shutil
import subprocess

import campaign
import jax
import pytest
from imported import imported
from test_campaign_damage import TEXT, config

import transformer_jax as tj
from transformer_jax import inspection
from transformer_jax.config import SparseAutoencoderConfig
from transformer_jax.data.token_file import TokenFile
from transformer_jax.interop import to_sentence_transformers
from transformer_jax.sharding import make_mesh
from transformer_jax.training.checkpoint import Checkpoints
from transformer_jax.training.leaves import tree_digest

pytestmark = campaign.MARKS

STEPS = 6
SIZE = 4 << 20


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A file system of 4 MiB, where this machine lets the test mount one."""
    place = tmp_path_factory.mktemp("disk")
    with contextlib.suppress(FileNotFoundError):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)], capture_output=True)
        if done.returncode == 0:
            yield place
            subprocess.run(["umount", "--lazy", str(place)], check=True)
            return
    pytest.skip("mounting a small tmpfs is not permitted here")


@contextlib.contextmanager
def full_after(disk, num_bytes):
    """Fills a disk until only this number of bytes is free."""
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    ballast = disk / "ballast"
    free = shutil.disk_usage(disk).free
    ballast.write_bytes(bytes(max(free - num_bytes, 0)))
    yield
    ballast.unlink()


def is_right_line(error, disk):
    assert campaign.is_clear(error) and "No space left on device" in str(error), campaign.shown(error)
    assert str(disk) in str(error) or str(disk) in str(getattr(error, "filename", "")), error


def test_runs_on_a_full_disk(disk, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)

    def train(workdir):
        return tj.train(config(STEPS), data=str(tmp_path / "text.txt"), workdir=workdir,
                        mesh=make_mesh(devices=jax.devices()[:1]))

    end = tree_digest(train(tmp_path / "whole").model)

    def case(rng):
        room = int(rng.integers(0, 1 << 18)) if rng.random() < 0.5 else int(rng.integers(0, 3 << 19))
        with full_after(disk, room):
            try:
                bundle = train(disk / "run")
                assert tree_digest(bundle.model) == end
            except (ValueError, OSError) as error:
                is_right_line(error, disk)
            reader = Checkpoints(disk / "run" / "checkpoints", read_only=True)
            for step in reader.steps():
                assert reader.restore({}, step=step).step == step
        assert tree_digest(train(disk / "run").model) == end
        return True

    campaign.run_cases("runs on a full disk", case)


def test_saving_on_a_full_disk_raises(disk, tmp_path):
    tokenizer = tj.Tokenizer.train([TEXT], kind="char")
    shape = tj.ModelConfig(vocab_size=tokenizer.vocab_size, max_len=16, num_layers=2, num_heads=2, model_dim=32)
    model = jax.jit(lambda key: tj.Decoder(shape, key=key))(jax.random.key(0))
    bundle = tj.Bundle(model=model, tokenizer=tokenizer, config=shape, step=1)

    def save():
        tj.save(disk / "saved", bundle)
        assert tree_digest(tj.load(disk / "saved").model) == tree_digest(model)

    def export():
        tj.to_huggingface(bundle, disk / "exported")
        found = tj.from_huggingface(disk / "exported")
        assert tree_digest(found.model) == tree_digest(model) and found.tokenizer.digest == tokenizer.digest

    def tokens():
        found = TokenFile.build([TEXT * 40], tokenizer, disk / "cache")
        assert tokenizer.decode(found.tokens[1:]) == TEXT * 40

    def activations():
        found = inspection.collect(model, [tokenizer.encode(TEXT)] * 4, ["layers.1.mlp_output", "final"],
                                   disk / "activations", batch_size=4, rows_per_shard=64)
        found.verify()

    autoencoder = tj.features.SparseAutoencoder(SparseAutoencoderConfig(
        site="layers.0.mlp_output", input_dim=32, num_features=128, k=4), key=jax.random.key(0))

    def features():
        tj.features.to_saelens(disk / "features", autoencoder)
        assert tree_digest(tj.features.from_saelens(disk / "features").model) == tree_digest(autoencoder)

    encoder = imported("bert", str(tmp_path))[1]

    def sentences():
        to_sentence_transformers(encoder, disk / "sentences")
        assert tree_digest(tj.from_huggingface(disk / "sentences").model) == tree_digest(encoder.model)

    def case(rng):
        writes = (save, export, tokens, activations, features, sentences)
        write = writes[int(rng.integers(len(writes)))]
        with full_after(disk, int(rng.integers(0, 1 << 17))):
            try:
                write()
            except (ValueError, OSError) as error:
                is_right_line(error, disk)
        write()
        return True

    campaign.run_cases("what is written at once on a full disk", case, least=20)
