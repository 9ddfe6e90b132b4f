"""Continues a prompt with a trained model.

python -m experiments.generate --workdir=DIR --prompt="ROMEO:" [--max_new_tokens=300 --temperature=0.8 --top_k=40 ...]
python -m experiments.generate --model=openai-community/gpt2 --prompt="The house" [--temperature=0 ...]
python -m experiments.generate --workdir=DIR --step=best --chat --prompt="What is the capital of Brazil?"
python -m experiments.generate --workdir=DIR --chat --documents=FOLDER --prompt="..."     answers from own documents
python -m experiments.generate --workdir=DIR --prompt="..." --choice=yes --choice=no      or --regex, --json_schema
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any, cast

import jax
from absl import flags

import transformer_jax as tj
from transformer_jax.cli import loading
from transformer_jax.cli.flags import run
from transformer_jax.files import read_file
from transformer_jax.runs.bases import load_base
from transformer_jax.tasks.inputs import tokenizer_of
from transformer_jax.training.bundle import Bundle

_WORKDIR = flags.DEFINE_string("workdir", None, "The directory of a run, which transformer-jax train wrote.")
_MODEL = flags.DEFINE_string("model", None, "Instead of --workdir: a directory or id of Hugging Face, or a GGUF file.")
_STEP = flags.DEFINE_string("step", None, "The step of a checkpoint in --workdir, or 'best'; by default the last.")
_PROMPT = flags.DEFINE_string("prompt", "", "The text to continue; if it is empty, the model begins a new text.")
_CHAT = flags.DEFINE_boolean("chat", False, "Answer the prompt, with a model that transformer-jax sft trained.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 200, "The largest number of tokens to add.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "The sampling temperature; 0 takes the most probable token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among the k most probable tokens; 0 means among all tokens.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample among the most probable tokens that together reach this probability.")
_MIN_P = flags.DEFINE_float("min_p", 0.0, "Sample among tokens with at least this fraction of the largest probability.")
_REPETITION_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0,
                                         "A value above 1 makes repeated tokens less probable.")
_SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same text.", lower_bound=-2**31, upper_bound=2**32 - 1)
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "The number of continuations.")
_STOP = flags.DEFINE_multi_string("stop", [], "A string at which the text ends; may be repeated.")
_STREAM = flags.DEFINE_boolean("stream", False, "Print the text while it is generated.")

_JSON_SCHEMA = flags.DEFINE_string("json_schema", None, "A file with a JSON schema; the text is a value of it.")
_REGEX = flags.DEFINE_string("regex", None, "A regular expression that matches the whole text.")
_CHOICE = flags.DEFINE_multi_string("choice", [], "A text that may be written; may be repeated, for several.")
_DOCUMENTS = flags.DEFINE_string("documents", None,
                                 "With --chat: a folder of texts, in which passages for the prompt are searched.")
_NUM_PASSAGES = flags.DEFINE_integer("num_passages", 3, "The largest number of passages.", lower_bound=1)
_ENCODER = flags.DEFINE_string("encoder", None, "Searches by the embeddings of this model instead of by words.")
_CALCULATOR = flags.DEFINE_boolean("calculator", False,
                                   "Compute what the model writes between << and =, as in GSM8K.")


def _main() -> None:
    sampling = tj.Sampling(temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value, min_p=_MIN_P.value,
                           repetition_penalty=_REPETITION_PENALTY.value)
    if _STREAM.value and _NUM_SAMPLES.value > 1:
        raise ValueError(f"--stream can print one text only, but --num_samples={_NUM_SAMPLES.value}; leave one of "
                         "them out")
    if _DOCUMENTS.value is not None and not _CHAT.value:
        raise ValueError("--documents puts passages into a question, so it needs --chat")
    if _CALCULATOR.value and (_STREAM.value or _NUM_SAMPLES.value > 1 or _STOP.value or _grammar() is not None):
        raise ValueError("--calculator writes one whole text; leave out --stream, --num_samples, --stop and grammars")
    bundle = loading.load(_WORKDIR.value, _MODEL.value, step=_STEP.value)
    if bundle.config.role != "decoder" or bundle.tokenizer is None:
        raise ValueError(f"{loading.name(_WORKDIR.value, _MODEL.value)} is not a language model with its tokenizer")
    prompt = _chat_prompt(bundle) if _CHAT.value else _PROMPT.value
    prefix = f"{_PROMPT.value}\n" if _CHAT.value else _PROMPT.value
    if _CALCULATOR.value:
        answer = tj.tools.answer_with_calculator(
            bundle.model, prompt, tokenizer=bundle.tokenizer, key=jax.random.key(_SEED.value), sampling=sampling,
            max_new_tokens=_MAX_NEW_TOKENS.value)
        print(prefix + answer.text)
        return
    arguments: dict[str, Any] = dict(tokenizer=bundle.tokenizer, key=jax.random.key(_SEED.value), sampling=sampling,
                     max_new_tokens=_MAX_NEW_TOKENS.value, stop=_STOP.value, slide=True, grammar=_grammar())
    if _STREAM.value:
        sys.stdout.write(prefix)
        for piece in tj.stream(bundle.model, prompt, **arguments):
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()
        return
    result = tj.generate(bundle.model, cast(Any, [prompt]), num_samples=_NUM_SAMPLES.value,
                         **arguments)
    for index, text in enumerate(result.texts or []):
        if index:
            print("-" * 40)
        print(prefix + text)


def _chat_prompt(bundle: Bundle) -> list[int]:
    """Returns the tokens of the prompt as a message of the user. With ``--documents`` it holds the
    passages found for it, which are listed on the screen."""
    tokenizer = tokenizer_of(bundle)
    if _DOCUMENTS.value is None:
        return tj.data.encode_prompt(_PROMPT.value, tokenizer)
    encoder = None if _ENCODER.value is None else load_base(_ENCODER.value)
    passages = tj.tools.Passages.read(_DOCUMENTS.value, encoder=encoder).find(_PROMPT.value, _NUM_PASSAGES.value)
    messages, used = tj.tools.with_passages(_PROMPT.value, passages, tokenizer,
                                            bundle.config.max_len - _MAX_NEW_TOKENS.value)
    for number, passage in enumerate(used, start=1):
        print(f"[{number}] {passage.describe()}")
    if not used:
        print(f"no passage of {_DOCUMENTS.value} is used: "
              f"{'there is no room for one' if passages else 'none has a word of the prompt'}")
    return tj.data.encode_prompt(messages, tokenizer)


def _grammar() -> tj.Grammar | None:
    """Returns the grammar that the flags describe, or ``None``."""
    given = [flag.name for flag in (_JSON_SCHEMA, _REGEX, _CHOICE) if flag.value]
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} exclude each other; pass one of them")
    if _JSON_SCHEMA.value is not None:
        return tj.Grammar.json_schema(read_file(pathlib.Path(_JSON_SCHEMA.value)).decode("utf-8"))
    if _REGEX.value is not None:
        return tj.Grammar.regex(_REGEX.value)
    return tj.Grammar.choice(_CHOICE.value) if _CHOICE.value else None


def main() -> None:
    """Runs ``transformer-jax generate``."""
    run(_main)


if __name__ == "__main__":
    main()
