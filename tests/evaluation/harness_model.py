"""A small random model whose Hugging Face files transformers can read, and what the harness says
about it."""

import functools
import math

import jax

import transformer_jax as tj
from transformer_jax.cli.lm_eval import TASKS

TASK_NAMES = ["tj_cloze", "tj_choice", "tj_arithmetic", "tj_arithmetic_chain", "tj_text"]
LIMIT = 5


@functools.cache
def make_bundle() -> tj.Bundle:
    """Makes the model from a seed; its tokenizer has the form of GPT-2's."""
    import tokenizers

    from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer

    pieces = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ġ", "a"), ("i", "n"), ("e", "r"), ("Ġ", "s"), ("o", "u")]
    names = [*pieces, *("".join(pair) for pair in merges), "<|endoftext|>"]
    made = tokenizers.Tokenizer(tokenizers.models.BPE({name: token for token, name in enumerate(names)}, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    end = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "tokenizer_class": "GPT2Tokenizer"}
    tokenizer = HuggingFaceTokenizer.make(made.to_str(), end, {})
    config = tj.presets.get("gpt2-small").replace(vocab_size=tokenizer.vocab_size, max_len=128, num_layers=1,
                                                  num_heads=2, model_dim=16, init_std=0.4)
    return tj.Bundle(model=tj.Decoder(config, key=jax.random.key(0)), tokenizer=tokenizer, config=config)


def measure(model) -> dict:
    """Runs the local tasks, and returns the answers to each example and the scores of each task."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = lm_eval.simple_evaluate(model=model, tasks=list(TASK_NAMES), task_manager=manager, limit=LIMIT,
                                    log_samples=True, bootstrap_iters=0)
    answers = {name: [sample["resps"] for sample in found["samples"][name]] for name in TASK_NAMES}
    scores = {name: {metric: value for metric, value in found["results"][name].items()
                     if isinstance(value, float) and math.isfinite(value)} for name in TASK_NAMES}
    return {"answers": answers, "scores": scores}
