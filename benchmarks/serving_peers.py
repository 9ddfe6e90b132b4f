"""Compares servers under the same load and with the same weights: this library's, ``transformers serve``
with continuous batching, and the server of llama-cpp-python.

python -m benchmarks.serving_peers [--shape=shakespeare|gpt2-small] [--requests=32] [--new_tokens=64] [--rounds=3]
    [--peers_python=/path/to/another/bin/python] [--gguf=model.gguf]

All answer greedily in float32, over HTTP, through ``/v1/chat/completions``. In each round the servers run
one after the other, and each answers the requests one at a time and then together. A peer that is not
installed beside ``--peers_python`` is left out, with the reason. All servers have the same random weights,
or with ``--gguf`` those of a file, which ``transformers serve`` cannot read. llama-cpp-python computes with a
cache of float16, and its server answers one request after the other. (The package gguf writes its file.)
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import jax
from absl import app, flags

import transformer_jax as tj
from benchmarks.peers.engines import write_gguf
from transformer_jax.interop.huggingface import to_huggingface

_SHAPE = flags.DEFINE_enum("shape", "shakespeare", ["shakespeare", "gpt2-small"],
                           "The shape of the model, without --gguf.")
_GGUF = flags.DEFINE_string("gguf", None, "A file of llama.cpp whose model all servers have.")
_REQUESTS = flags.DEFINE_integer("requests", 32, "The number of requests.", lower_bound=1)
_PROMPT_CHARACTERS = flags.DEFINE_integer("prompt_characters", 32, "The length of a prompt.", lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 64, "The length of a reply.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "The number of rounds; the median is reported.", lower_bound=1)
_PEERS_PYTHON = flags.DEFINE_string("peers_python", sys.executable, "The interpreter that has the peers.")

_SECONDS_TO_START, _WARM_UPS = 300, 4
_NUMBERS = itertools.count(1000)  # no prompt is sent twice, because servers keep the beginnings of prompts
_END, _MERGE = "<|endoftext|>", ("\u0100", "\u0100")  # U+0100 stands for the byte 0
_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclasses.dataclass(frozen=True)
class Server:
    """How to start a server.

    Attributes:
      name: its name in the results.
      command: the command, in which ``PORT`` stands for the port.
      model: the name of the model in requests.
      module: a package that its interpreter must have.
      executable: a file that must exist, if the command is a script.
    """

    name: str
    command: tuple[str, ...]
    model: str
    module: str | None = None
    executable: pathlib.Path | None = None

    def missing(self, python: str) -> str | None:
        """Returns why the server cannot be started, or ``None``."""
        if self.executable is not None and not self.executable.exists():
            return f"{self.executable} does not exist"
        found = None if self.module is None else subprocess.run([python, "-c", f"import {self.module}"], check=False,
                                                                capture_output=True, text=True)
        if found is not None and found.returncode:
            return (found.stderr.strip().splitlines() or [f"{self.module} cannot be imported"])[-1]
        return None


def token_names() -> list[str]:
    """Returns the tokens: the end of a text, every byte, and the only pair that is merged. A file of llama.cpp
    must have one; this one, of two zero bytes, occurs in no text."""
    import tokenizers

    return [_END, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "".join(_MERGE)]


def add_tokenizer(writer: Any, vocab_size: int) -> None:
    """Adds the tokenizer and the chat template to a file of llama.cpp.

    Args:
      writer: The ``gguf.GGUFWriter``.
      vocab_size: The size of the vocabulary of the model. Tokens beyond those of the tokenizer are unused.
    """
    import gguf

    names = token_names()
    unused = [f"[unused{number}]" for number in range(len(names), vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*names, *unused])
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(names) - 1),
                            *[gguf.TokenType.UNUSED] * len(unused)])
    writer.add_token_merges([" ".join(_MERGE)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(_TEMPLATE)


def write_model(directory: pathlib.Path, shape: str) -> None:
    """Writes a model with random weights, and a tokenizer whose tokens are bytes, in the format of Hugging
    Face."""
    import tokenizers

    from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer

    names = token_names()
    made = tokenizers.Tokenizer(tokenizers.models.BPE({name: token for token, name in enumerate(names)}, [_MERGE]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([_END])
    tokenizer = HuggingFaceTokenizer.make(made.to_str(), {"eos_token": _END, "bos_token": _END,
                                                          "chat_template": _TEMPLATE}, {})
    config = tj.presets.get("gpt2-small") if shape == "gpt2-small" else tj.presets.get("gpt2-small").replace(
        vocab_size=tokenizer.vocab_size, max_len=256, num_layers=4, num_heads=4, num_kv_heads=4, model_dim=128,
        head_dim=32, mlp_dim=512)
    to_huggingface(tj.Bundle(tj.Decoder(config, key=jax.random.key(0)), tokenizer, config), directory)
    settings = directory / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": _TEMPLATE}))


def servers(model: pathlib.Path, gguf: str | None, python: str) -> list[Server]:
    """Returns the servers to compare."""
    script = pathlib.Path(python).with_name("transformers")
    ours = str(model) if gguf is None else gguf
    found = [Server("transformer_jax", (sys.executable, "-m", "transformer_jax.cli", "serve", f"--model={ours}",
                                        "--port=PORT"), "")]
    if gguf is None:
        found.append(Server("transformers serve", (
            str(script), "serve", "--continuous-batching", "--device", "cpu", "--dtype", "float32",
            "--host", "127.0.0.1", "--port", "PORT"), str(model),
            "transformers, torch, fastapi, uvicorn, openai", script))
    file = gguf or str(model / "model.gguf")
    found.append(Server("llama_cpp.server", (python, "-m", "llama_cpp.server", "--model", file, "--port", "PORT"),
                        file, "llama_cpp.server"))
    return found


@contextlib.contextmanager
def running(server: Server) -> Iterator[str]:
    """Starts a server, waits until it answers, yields its address, and ends it."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [part.replace("PORT", str(port)) for part in server.command]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            end = time.monotonic() + _SECONDS_TO_START
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"{server.name} did not start: {log.read().decode(errors='replace')[-2000:]}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def measure(address: str, server: Server, *, together: bool) -> dict[str, float]:
    """Sends the requests together or one after the other, and returns tokens per second and the median
    seconds of a request."""
    def ask(_: int) -> tuple[int, float]:
        begin = time.perf_counter()
        text = (f"{next(_NUMBERS)} the quick brown fox jumps over the lazy dog " * 20)[:_PROMPT_CHARACTERS.value]
        body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "temperature": 0, "stream": False,
                                "max_tokens": _NEW_TOKENS.value} | ({"model": server.model} if server.model else {})
        request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{server.name} answered {error.code}: {error.read().decode()[:2000]}") from error
        return answer["usage"]["completion_tokens"], time.perf_counter() - begin

    number = _REQUESTS.value if together else max(2, _REQUESTS.value // 8)
    begin = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(number if together else 1) as pool:
        tokens, seconds = zip(*pool.map(ask, range(number)), strict=True)
    return {"tokens/s": sum(tokens) / (time.perf_counter() - begin), "s a request": statistics.median(seconds)}


def main(_: list[str]) -> None:
    python = _PEERS_PYTHON.value
    with tempfile.TemporaryDirectory() as directory:
        model = pathlib.Path(directory) / "model"
        if _GGUF.value is None:
            write_model(model, _SHAPE.value)
            if importlib.util.find_spec("gguf") is not None:
                vocab_size = tj.from_huggingface(model).config.vocab_size
                write_gguf(str(model), model / "model.gguf", "F32", lambda writer: add_tokenizer(writer, vocab_size))
        results: dict[tuple[str, bool], list[dict[str, float]]] = {}
        compared = servers(model, _GGUF.value, python)
        skipped = {server.name: reason for server in compared if (reason := server.missing(python)) is not None}
        for name, reason in skipped.items():
            print(f"{name}: skipped, because {reason}")
        for _round in range(_ROUNDS.value):
            for server in compared:
                if server.name not in skipped:
                    with running(server) as address:
                        for together in (False, True):
                            for _warm_up in range(_WARM_UPS):  # compile for all sizes of the batch
                                measure(address, server, together=together)
                            results.setdefault((server.name, together), []).append(
                                measure(address, server, together=together))
    for (name, together), found in results.items():
        median = {unit: statistics.median(each[unit] for each in found) for unit in found[0]}
        print(f"{name}, {f'{_REQUESTS.value} together' if together else 'one at a time'}: " +
              ", ".join(f"{value:.3g} {unit}" for unit, value in median.items()))


if __name__ == "__main__":
    app.run(main)
