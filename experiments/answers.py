"""What the stages of an assistant share: examples from a file, and answers shown before, while and after it learns."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from tqdm import tqdm

from transformer_jax.config import DataConfig, ExperimentConfig
from transformer_jax.data import Conversation, Tokenizer, encode_prompt
from transformer_jax.decoding.batch import check_family
from transformer_jax.decoding.logits import Sampling
from transformer_jax.decoding.sample import generate
from transformer_jax.models.decoder import Decoder
from transformer_jax.training.bundle import Bundle

_SHOWN = 4


def examples(config: DataConfig, read: Callable[[str], list], what: str) -> tuple[Sequence[Any], Sequence[Any]]:
    """The examples to learn from that a config names, and those held out.

    Args:
      config: of the data.
      read: reads a file of them.
      what: their name for error messages.
    """
    if config.path is None or config.tfds is not None or config.generated is not None:
        raise ValueError(f"say what to learn from: --config.data.path=FILE of {what}")
    found = read(config.path)
    if config.validation_path is not None:
        return found, read(config.validation_path)
    cut = int(len(found) * (1 - config.validation_fraction))
    if not 0 < cut < len(found):
        raise ValueError(f"data.validation_fraction={config.validation_fraction} of {len(found)} {what} leaves a part "
                         "empty; set data.validation_path, or another fraction")
    return found[:cut], found[cut:]


def check_base(base: Bundle) -> None:
    """Raises ValueError for a model that cannot answer: no decoder, or a tokenizer without role tokens."""
    check_family("this stage", base.model, "decoder")
    if base.tokenizer is None:
        raise ValueError("the model to start from comes without a tokenizer; expected the workdir of a training run")
    base.tokenizer.encode_role("user")


def shower(config: ExperimentConfig, tokenizer: Tokenizer, prompts: Iterable[Conversation],
           workdir: pathlib.Path) -> Callable[[Decoder, int], None]:
    """A function of model and step that shows answers to the first few prompts, and keeps them in ``answers/``."""
    encoded = ((prompt, encode_prompt(prompt, tokenizer)) for prompt in prompts)
    room = config.model.max_len - config.sample.max_new_tokens
    shown = list(itertools.islice(((prompt, ids) for prompt, ids in encoded if len(ids) <= room), _SHOWN))
    sampling = Sampling(temperature=config.sample.temperature, top_k=config.sample.top_k)

    def show(model: Decoder, step: int) -> None:
        if not config.sample.every or not shown:
            return
        texts = generate(model, [ids for _, ids in shown], tokenizer=tokenizer, key=jax.random.key(config.seed),
                         max_new_tokens=config.sample.max_new_tokens, sampling=sampling).texts
        lines = [f"{prompt[-1].content}\n  -> {text}" for (prompt, _), text in zip(shown, texts, strict=True)]
        tqdm.write("\n".join([f"--- step {step} ---", *lines, ""]))
        path = workdir / "answers" / f"{step}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*lines, ""]), encoding="utf-8")

    return show
