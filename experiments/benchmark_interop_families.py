"""Imported encoders and encoder-decoders beside transformers.

``python -m experiments.benchmark_interop_families --task=encode``: hidden states of 64 texts of 128 tokens, a model of
RoBERTa-base's shape; ``--task=beam``: 32 tokens of 16 sources by a model of BART-base's shape, beam 4. Both read one
directory of random float32 weights, each side in its own process (extra ``bench``); sides take turns, and what they
answer is compared.
"""

from __future__ import annotations

import json
import tempfile

import numpy as np
from absl import flags

from experiments import cli
from experiments.timing import OtherProcess, take_turns

_TASK = flags.DEFINE_enum("task", "encode", ("encode", "beam"), "What is measured.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each side, after one to warm up.")
_COMPILE = flags.DEFINE_bool("compile", False, "torch.compile too.")

_TEXTS, _TEXT_LEN = 64, 128
_SOURCES, _SOURCE_LEN, _NUM_NEW, _BEAM = 16, 32, 32, 4


def ours(pipe, directory: str, task: str, tokens: np.ndarray) -> None:
    """Answers every message with what it computed."""
    import jax

    from transformer_jax import beam_search, runtime
    from transformer_jax.interop.huggingface import from_huggingface

    runtime.keep_freed_memory()
    model = from_huggingface(directory).model
    encode = jax.jit(lambda model, tokens: model(tokens).hidden)
    while True:
        pipe.recv()
        if task == "encode":
            pipe.send(np.asarray(encode(model, tokens)))
        else:
            pipe.send(beam_search(model, tokens.tolist(), beam_size=_BEAM, length_penalty=1.0, penalty="length",
                                  max_new_tokens=_NUM_NEW, end_ids=[2]).tokens)


def theirs(pipe, directory: str, task: str, tokens: np.ndarray, compiled: bool) -> None:
    """As :func:`ours`, by transformers; ``compiled`` by ``torch.compile``."""
    import torch
    import transformers

    tokens = torch.from_numpy(tokens).long()
    if task == "encode":
        model = transformers.AutoModel.from_pretrained(directory).eval()
        model = torch.compile(model) if compiled else model
    else:
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory).eval()
        model.generation_config.forced_eos_token_id = None
        if compiled:
            model.forward = torch.compile(model.forward)
    with torch.no_grad():
        while True:
            pipe.recv()
            if task == "encode":
                pipe.send(model(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state.numpy())
            else:
                options = {"cache_implementation": "static"} if compiled else {}
                found = model.generate(tokens, attention_mask=torch.ones_like(tokens), num_beams=_BEAM, do_sample=False,
                                       max_new_tokens=_NUM_NEW, length_penalty=1.0, **options)
                pipe.send([row[1:] for row in found.tolist()])


def write_model(directory: str, task: str) -> int:
    """Random weights in files of Hugging Face's; returns the size of the vocabulary."""
    import jax

    import transformer_jax as tj
    from transformer_jax.interop.huggingface import to_huggingface

    if task == "encode":
        config = tj.presets.get("roberta-base").replace(position_offset=2)
    else:
        config = tj.ModelConfig(
            family="encoder_decoder", vocab_size=50_265, max_len=1024, num_layers=6, num_heads=12, model_dim=768,
            norm_position="post", activation="gelu", positions="learned", position_offset=2, use_embedding_norm=True,
            use_output_bias=True, init_std=0.05, start_ids=(2,))
    model = jax.jit(lambda key: tj.models.functional.make_model(config, key=key))(jax.random.key(0))
    to_huggingface(tj.Bundle(model, None, config), directory)
    return config.vocab_size


def main() -> None:
    """Prints a line of JSON."""
    task = _TASK.value
    shape = (_TEXTS, _TEXT_LEN) if task == "encode" else (_SOURCES, _SOURCE_LEN)
    with tempfile.TemporaryDirectory() as directory:
        vocab_size = write_model(directory, task)
        tokens = np.random.default_rng(0).integers(4, vocab_size, shape)
        sides = {"transformer_jax": OtherProcess(ours, directory, task, tokens),
                 "transformers": OtherProcess(theirs, directory, task, tokens, False)}
        if _COMPILE.value:
            sides["transformers, compiled"] = OtherProcess(theirs, directory, task, tokens, True)
        answers = {name: side() for name, side in sides.items()}
        seconds = take_turns(sides, _ROUNDS.value)
        for side in sides.values():
            side.close()
    first = answers.pop("transformer_jax")
    if task == "encode":
        agreement = {name: float(np.abs(first - other).max()) for name, other in answers.items()}
    else:
        agreement = {name: float(np.mean([a == b for a, b in zip(first, other, strict=True)]))
                     for name, other in answers.items()}
    best = min(value for name, value in seconds.items() if name != "transformer_jax")
    print(json.dumps({"benchmark": task, "seconds": seconds, "ratio": best / seconds["transformer_jax"],
                      "largest difference" if task == "encode" else "equal sources": agreement}))


if __name__ == "__main__":
    cli.run(main)
