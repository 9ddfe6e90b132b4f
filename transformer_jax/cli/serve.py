"""Serves models: a chat page, and an API like OpenAI's.

python -m experiments.serve --workdir=DIR [--port=8000 --max_batch=32 --max_context=1024]
python -m experiments.serve --model=openai-community/gpt2 --host=0.0.0.0 --api_key=SECRET
python -m experiments.serve --workdir=runs/base --workdir=runs/sft --workdir=runs/ppo
python -m experiments.serve --workdir=runs/sft --documents=FOLDER [--encoder=runs/book
--num_passages=3] python -m experiments.serve --workdir=DIR --allow_inspection
[--steering_vectors=vectors.npz]
"""

from __future__ import annotations

import os
import pathlib
import zipfile
from typing import Any

import numpy as np
from absl import flags

from transformer_jax.cli import loading
from transformer_jax.cli.flags import run
from transformer_jax.decoding.logits import Sampling
from transformer_jax.runs.bases import load_base
from transformer_jax.serving.engine import Engine
from transformer_jax.serving.replies import TextRequest
from transformer_jax.tasks.inputs import tokenizer_of
from transformer_jax.tools.passages import Passages

_WORKDIR = flags.DEFINE_multi_string("workdir", [], "The directory of a run; may be repeated, to serve several models.")
_MODEL = flags.DEFINE_multi_string("model", [], "A directory or an id of Hugging Face; may be repeated.")
_STEP = flags.DEFINE_string("step", None, "The step of a checkpoint in --workdir, or 'best'; by default the last.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "The address. Others than this computer's own need an API key.")
_PORT = flags.DEFINE_integer("port", 8000, "The port; 0 takes a free one.", lower_bound=0, upper_bound=65535)
_API_KEY = flags.DEFINE_string("api_key", None, "The key that requests must send; by default that of the environment "
                               "variable TRANSFORMER_JAX_API_KEY, which other users of the computer cannot see.")
_MAX_BATCH = flags.DEFINE_integer("max_batch", 32, "The largest number of texts that are generated at a time.",
                                  lower_bound=1)
_MAX_CONTEXT = flags.DEFINE_integer("max_context", None, "The largest number of tokens of a prompt with its reply; by "
                                    "default that of the model.", lower_bound=2)
_QUEUE_LIMIT = flags.DEFINE_integer("queue_limit", 256, "The largest number of texts that wait for the others.",
                                    lower_bound=1)
_DOCUMENTS = flags.DEFINE_string("documents", None, "A folder of texts: passages that fit a question are put before it "
                                 "in the prompt of a chat, and the response lists them.")
_ENCODER = flags.DEFINE_string("encoder", None, "With --documents: searches by the embeddings of this model instead of "
                               "by words.")
_NUM_PASSAGES = flags.DEFINE_integer("num_passages", 3, "With --documents: the largest number of passages.",
                                     lower_bound=1)
_ALLOW_INSPECTION = flags.DEFINE_boolean("allow_inspection", False, "Requests may read attention, logit lens and "
                                         "residual streams of their texts, add steering vectors, and ablate heads.")
_STEERING_VECTORS = flags.DEFINE_string("steering_vectors", None, "With --allow_inspection: a file .npz with vectors "
                                        "as wide as the model, which requests name.")


def _main() -> None:
    try:
        from transformer_jax.serving.app import Limits, make_app
        from transformer_jax.serving.http_server import LOOPBACK, serve
    except ImportError as error:
        raise ImportError('serving needs: pip install "transformer_jax[serve]"') from error
    api_key = _API_KEY.value if _API_KEY.value is not None else os.environ.get("TRANSFORMER_JAX_API_KEY")
    is_local = _HOST.value in LOOPBACK
    if not api_key and (api_key is not None or not is_local):
        raise ValueError(f"--host={_HOST.value} can be reached from other computers, so it needs a key: set the "
                         "environment variable TRANSFORMER_JAX_API_KEY" if api_key is None else
                         "the API key is empty; set one, or leave --api_key out")
    models = _models()
    hosts = (*LOOPBACK, "[::1]") if is_local else ()
    serve(make_app(models, Limits(api_key=api_key, hosts=hosts)), models, host=_HOST.value, port=_PORT.value)


def _models() -> dict[str, Any]:
    """Loads the models, each under the last part of its path, or the whole path if two would have
    the same name."""
    from transformer_jax.serving.served_model import ServedModel

    if not _WORKDIR.value and not _MODEL.value:
        loading.check(None, None)
    documents, vectors = _documents(), _vectors()
    sources = [(workdir, None) for workdir in _WORKDIR.value] + [(None, model) for model in _MODEL.value]
    twice = next((source for place, source in enumerate(sources) if source in sources[:place]), None)
    if twice is not None:
        raise ValueError(f"{loading.name(*twice)} is given twice; name each model once")
    models: dict[str, ServedModel] = {}
    for workdir, model in sources:
        bundle = loading.load(workdir, model, step=_STEP.value)
        source = loading.name(workdir, model)
        name = pathlib.Path(source).resolve().name if pathlib.Path(source).is_dir() else source
        name = source if name in models else name
        tokenizer = tokenizer_of(bundle)
        engine = None
        if bundle.config.role == "decoder":
            engine = Engine(bundle.model, tokenizer=tokenizer, max_batch=_MAX_BATCH.value,
                            max_context=_MAX_CONTEXT.value, queue_limit=_QUEUE_LIMIT.value)
            # A short request compiles the programs for a few requests before the first one comes.
            engine.submit(TextRequest([0] * min(20, engine.max_context - 1), 1, Sampling(temperature=0))).result()
        fitting = {key: vector for key, vector in vectors.items() if vector.shape == (bundle.config.model_dim,)}
        if len(fitting) < len(vectors):
            raise ValueError(f"{_STEERING_VECTORS.value} has vectors of other shapes than [{bundle.config.model_dim}], "
                             f"the width of {source}: {', '.join(vectors.keys() - fitting.keys())}")
        models[name] = ServedModel(name, bundle.model, tokenizer, engine, _ALLOW_INSPECTION.value, fitting, documents,
                                   _NUM_PASSAGES.value)
    return models


def _documents() -> Any:
    """Reads and indexes the documents; returns None without any."""
    if _DOCUMENTS.value is None:
        if _ENCODER.value is not None:
            raise ValueError("--encoder searches documents, so it needs --documents")
        return None
    encoder = None if _ENCODER.value is None else load_base(_ENCODER.value)
    return Passages.read(_DOCUMENTS.value, encoder=encoder)


def _vectors() -> dict[str, np.ndarray]:
    """Reads the steering vectors."""
    path = _STEERING_VECTORS.value
    if path is None:
        return {}
    if not _ALLOW_INSPECTION.value:
        raise ValueError("--steering_vectors needs --allow_inspection")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: np.asarray(file[name], np.float32) for name in file.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"--steering_vectors={path} is not a file .npz with arrays of numbers: {error}") from error


def main() -> None:
    """Runs ``transformer-jax serve``."""
    run(_main)


if __name__ == "__main__":
    main()
