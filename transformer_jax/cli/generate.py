"""Continues a prompt with a trained model.

python -m experiments.generate --workdir=DIR --prompt="ROMEO:" [--max_new_tokens=300 --temperature=0.8 --top_k=40 ...]
python -m experiments.generate --model=openai-community/gpt2 --prompt="The house" [--temperature=0 ...]
python -m experiments.generate --workdir=DIR --step=best --chat --prompt="What is the capital of Brazil?"
"""

from __future__ import annotations

import sys

import jax
from absl import flags

import transformer_jax as tj
from transformer_jax.cli import loading
from transformer_jax.cli.flags import run

_WORKDIR = flags.DEFINE_string("workdir", None, "A directory that transformer-jax train wrote.")
_MODEL = flags.DEFINE_string("model", None, "Instead: a directory, or an id, of a model of Hugging Face.")
_STEP = flags.DEFINE_string("step", None, "A step kept there, or 'best'; by default the last.")
_PROMPT = flags.DEFINE_string("prompt", "", "The text to continue; empty: the beginning of a text.")
_CHAT = flags.DEFINE_boolean("chat", False, "Answer the prompt, as a model from experiments.sft does.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 200, "Most tokens to add.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw among the k most probable tokens; 0: all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw among the most probable tokens that reach this probability.")
_MIN_P = flags.DEFINE_float("min_p", 0.0, "Draw among tokens this fraction as probable as the most probable.")
_REPETITION_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "Above 1: makes seen tokens less probable.")
_SEED = flags.DEFINE_integer("seed", 0, "The same seed draws the same text.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "How many continuations.")
_STOP = flags.DEFINE_multi_string("stop", [], "A string that ends the text; may be repeated.")
_STREAM = flags.DEFINE_boolean("stream", False, "Print the text as it comes.")


def _main() -> None:
    sampling = tj.Sampling(temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value, min_p=_MIN_P.value,
                           repetition_penalty=_REPETITION_PENALTY.value)
    if _STREAM.value and _NUM_SAMPLES.value > 1:
        raise ValueError("--stream prints one text: leave out --num_samples")
    bundle = loading.load(_WORKDIR.value, _MODEL.value, step=_STEP.value)
    if bundle.config.family != "decoder" or bundle.tokenizer is None:
        raise ValueError(f"{loading.name(_WORKDIR.value, _MODEL.value)} holds no language model with its tokenizer")
    prompt = tj.data.encode_prompt(_PROMPT.value, bundle.tokenizer) if _CHAT.value else _PROMPT.value
    shown = f"{_PROMPT.value}\n" if _CHAT.value else _PROMPT.value
    arguments = dict(tokenizer=bundle.tokenizer, key=jax.random.key(_SEED.value), sampling=sampling,
                     max_new_tokens=_MAX_NEW_TOKENS.value, stop=_STOP.value, slide=True)
    if _STREAM.value:
        sys.stdout.write(shown)
        for piece in tj.stream(bundle.model, prompt, **arguments):
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()
        return
    result = tj.generate(bundle.model, [prompt], num_samples=_NUM_SAMPLES.value, **arguments)
    for index, text in enumerate(result.texts):
        if index:
            print("-" * 40)
        print(shown + text)


def main() -> None:
    """``transformer-jax generate``."""
    run(_main)


if __name__ == "__main__":
    main()
