"""Small models with random weights, and a server of them in a thread of the test's process."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import threading
import time

import jax
import pytest

import transformer_jax as tj
from transformer_jax.serving import Engine
from transformer_jax.serving.served_model import ServedModel

TEXT = ["the quick brown fox jumps over the lazy dog, and then <it> sleeps! áé 2+2=4?\n"]
TOKENIZER = tj.Tokenizer.train(TEXT * 3, kind="char", chat=False)
SHAPE = dict(vocab_size=TOKENIZER.vocab_size, num_heads=2, model_dim=32, init_std=0.3)


def import_httpx():
    """Imports httpx, which the openai client installs; its version 3 installs httpx2 instead."""
    return pytest.importorskip("httpx2" if importlib.util.find_spec("httpx2") else "httpx")


def make_decoder(**changes) -> tj.Decoder:
    return tj.Decoder(tj.ModelConfig(**(SHAPE | dict(max_len=256, num_layers=1) | changes)), key=jax.random.key(0))


def make_served(name: str = "tiny", *, model=None, **options) -> ServedModel:
    model = make_decoder() if model is None else model
    engine = Engine(model, tokenizer=TOKENIZER, **options) if model.config.role == "decoder" else None
    return ServedModel(name, model, TOKENIZER, engine)


@contextlib.contextmanager
def served(models: dict[str, ServedModel], **limits):
    """Serves the models on a free port; yields the address."""
    import uvicorn

    from transformer_jax.serving.app import Limits, make_app

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(make_app(models, Limits(**limits)), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
