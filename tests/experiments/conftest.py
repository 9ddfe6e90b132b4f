"""Programs run as a user runs them: in this process (quick), or in one of their own (signals, exit
status, caches)."""

import dataclasses
import os
import pathlib
import runpy
import signal
import subprocess
import sys

import jax
import pytest
from absl import app, flags

import transformer_jax as tj
from transformer_jax.config import ExperimentConfig
from transformer_jax.models.functional import make_model
from transformer_jax.settings import from_dict
from transformer_jax.training.checkpoint import Checkpoints
from transformer_jax.training.leaves import tree_digest
from transformer_jax.training.loggers import JsonlLogger
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.state import abstract_state

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a program ended."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error; everything else on stderr is a progress bar or nothing."""
        assert self.status == 2, self
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and self.err.endswith(f"{lines[0]}\n") and "Traceback" not in self.err, self.err
        return lines[0]


@pytest.fixture
def program(monkeypatch, capfd):
    """``program("train", "--workdir=x", ...)`` runs ``python -m experiments.train`` here."""

    def run(name: str, *arguments: object) -> Ended:
        app.define_help_flags()
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capfd.readouterr()
        try:
            runpy.run_module(f"experiments.{name}", run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
        finally:
            for flag in list(flags.FLAGS):  # those of the program, which the next one may define anew
                home = flags.FLAGS.find_module_defining_flag(flag)
                if home == name or home.startswith("transformer_jax.cli") or flag.split(".")[0] == "config":
                    delattr(flags.FLAGS, flag)
            for module in [module for module in sys.modules if module.startswith("transformer_jax.cli")]:
                del sys.modules[module]
        return Ended(status, *capfd.readouterr())

    return run


@pytest.fixture
def stop_at(monkeypatch):
    """``stop_at(step)`` sends SIGTERM to the run when it logs this step."""
    write = JsonlLogger.write

    def arm(step: int) -> None:
        def write_and_stop(self, at, values):
            write(self, at, values)
            if at == step and "loss" in values:
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(JsonlLogger, "write", write_and_stop)

    return arm


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder, and how the programs that wrote into it ended."""
    return tmp_path_factory.mktemp("runs"), {}


@pytest.fixture(scope="session")
def gpt(tmp_path_factory):
    """A saved decoder, not trained."""
    workdir = tmp_path_factory.mktemp("gpt")
    tokenizer = tj.Tokenizer.train(["the king"], kind="char")
    config = tj.ModelConfig(vocab_size=tokenizer.vocab_size, max_len=8, num_layers=1, num_heads=1, model_dim=8)
    model = jax.jit(lambda key: tj.Decoder(config, key=key))(jax.random.key(0))
    tj.save(workdir, tj.Bundle(model=model, tokenizer=tokenizer, config=config))
    return workdir


@pytest.fixture(scope="session")
def final_digest():
    """``final_digest(workdir)`` of the last step's parameters, optimizer state, step and key."""
    def digest(workdir: pathlib.Path) -> str:
        checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
        config = from_dict(ExperimentConfig, checkpoints.restore({}).metadata["config"])
        restored = checkpoints.restore(abstract_state(lambda key: make_model(config.model, key=key),
                                                      make_optimizer(config.optim, config.steps)))
        assert restored.step == int(restored.state.step) == config.steps
        return tree_digest(restored.state)

    return digest


@pytest.fixture(scope="session")
def wmt14(tmp_path_factory):
    """Replaces the TFDS data set "wmt14_translate/de-en" by a small one with the same name, and
    returns the pairs (English, German) of its splits."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="TFDS data sets need: pip install tensorflow-datasets")
    from tensorflow_datasets.core import registered
    from tensorflow_datasets.core.utils import file_utils

    pairs = [(f"the {n} old cats want {n + 1} lamps", f"die {n} alten Katzen wollen {n + 1} Lampen")
             for n in range(120)]
    splits = {"train": pairs[:60], "validation": pairs[100:]}
    with registered.skip_registration():  # otherwise the name is already registered
        class Wmt14Translate(tfds.core.GeneratorBasedBuilder):
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="de-en", version="1.0.0")]  # noqa: RUF012
            name = "wmt14_translate"

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.Translation(languages=["de", "en"]))

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(pairs) for split, pairs in splits.items()}

            def _generate_examples(self, pairs):
                for index, (english, german) in enumerate(pairs):
                    yield index, {"en": english, "de": german}

    directory = tmp_path_factory.mktemp("tfds")
    Wmt14Translate(data_dir=directory, config="de-en", file_format="array_record").download_and_prepare()
    file_utils.add_data_dir(directory)
    yield splits
    file_utils.clear_registered_data_dirs()


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """``start("train", ...)`` starts the program in a process of its own, with one device and a
    private home."""
    home = tmp_path_factory.mktemp("home")
    environment = os.environ | {"XDG_CACHE_HOME": str(home), "JAX_PLATFORMS": "cpu",
                                "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def run(name: str, *arguments: object, **variables: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-m", f"experiments.{name}", *map(str, arguments)], cwd=REPOSITORY,
                                env=environment | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    run.home = home
    return run
