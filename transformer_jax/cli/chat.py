"""Talks with a model in the terminal, in several turns.

python -m experiments.chat --workdir=DIR [--system="Be brief." --temperature=0.8 --top_k=40 ...]
python -m experiments.chat --model=ID_OR_DIRECTORY

Ctrl-C ends a reply, /new begins another conversation, and Ctrl-D or /quit ends the program.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
from absl import flags

import transformer_jax as tj
from transformer_jax.cli import loading
from transformer_jax.cli.flags import run
from transformer_jax.data.conversations import Message, answer_end_ids
from transformer_jax.serving.engine import Engine
from transformer_jax.serving.replies import TextRequest
from transformer_jax.tasks.inputs import tokenizer_of

_WORKDIR = flags.DEFINE_string("workdir", None, "The directory of a run, such as one of transformer-jax sft.")
_MODEL = flags.DEFINE_string("model", None, "Instead of --workdir: a directory or an id of Hugging Face.")
_STEP = flags.DEFINE_string("step", None, "The step of a checkpoint in --workdir, or 'best'; by default the last.")
_SYSTEM = flags.DEFINE_string("system", "", "Instructions to the model, before the first message.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 200, "The largest number of tokens of a reply.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "The sampling temperature; 0 takes the most probable token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among the k most probable tokens; 0 means among all tokens.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample among the most probable tokens that together reach this probability.")
_SEED = flags.DEFINE_integer("seed", 0, "The same seed and messages give the same replies.", lower_bound=0,
                             upper_bound=2**32 - 1)


def _main() -> None:
    sampling = tj.Sampling(temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value)
    bundle = loading.load(_WORKDIR.value, _MODEL.value, step=_STEP.value)
    tokenizer = tokenizer_of(bundle)
    start = [Message("system", _SYSTEM.value)] if _SYSTEM.value.strip() else []
    tj.data.encode_prompt([*start, Message("user", "a")], tokenizer)  # raises an error without a format for chats
    engine = Engine(bundle.model, tokenizer=tokenizer, max_batch=1)
    messages, key = list(start), jax.random.key(_SEED.value)
    while (text := _read()) not in (None, "/quit"):
        if text == "/new":
            messages = list(start)
        elif text:
            key, reply_key = jax.random.split(key)
            asked = [*messages, Message("user", text)]
            prompt = tj.data.encode_prompt(asked, tokenizer)
            room = engine.max_context - len(prompt)
            if room < 1:
                print(f"The conversation has {len(prompt)} tokens, and the model reads {engine.max_context}: write "
                      "/new to begin another one.")
                continue
            said = _reply(engine, TextRequest(prompt, min(_MAX_NEW_TOKENS.value, room), sampling, reply_key,
                                              end_ids=answer_end_ids(tokenizer)))
            messages = [*asked, Message("assistant", said)] if said.strip() else messages


def _read() -> str | None:
    """Reads a message; returns None at the end of the input."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _reply(engine: Engine, request: Any) -> str:
    """Prints a reply while it is generated, and returns its text. Ctrl-C ends it."""
    reply = engine.submit(request)
    try:
        for piece in reply.pieces():
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        reply.cancel()
    print()
    return reply.new.text


def main() -> None:
    """Runs ``transformer-jax chat``."""
    run(_main)


if __name__ == "__main__":
    main()
