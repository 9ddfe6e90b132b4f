"""The types that editors and type checkers see behind the public names; tests/test_typing.py has
pyright read it."""
# pyright: reportUnnecessaryTypeIgnoreComment=true

from collections.abc import Iterator
from typing import assert_type

import jax
import numpy as np

import transformer_jax as tj
from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from transformer_jax.runs import Preflight


def bundles() -> None:
    bundle = tj.load("runs/book")
    assert_type(bundle, tj.Bundle)
    assert_type(bundle.model, tj.Decoder | tj.Encoder | tj.EncoderDecoder | tj.RewardModel | tj.Classifier)
    assert_type(bundle.config, tj.ModelConfig)
    assert_type(bundle.tokenizer, tj.Tokenizer | HuggingFaceTokenizer | None)
    assert_type(tj.from_huggingface("gpt2"), tj.Bundle)
    assert_type(tj.save("runs/copy", bundle), None)
    assert_type(tj.to_huggingface(bundle, "exported"), None)


def models(config: tj.ModelConfig, key: jax.Array, tokens_BT: jax.Array) -> None:
    decoder, encoder = tj.Decoder(config, key=key), tj.Encoder(config, key=key)
    pair = tj.EncoderDecoder(config, key=key)
    output = decoder(tokens_BT)
    assert_type(output, tj.Output)
    assert_type(output.logits, jax.Array)
    assert_type(encoder(tokens_BT), tj.Output)
    assert_type(pair(tokens_BT, tokens_BT), tj.Output)
    assert_type(tj.forward(decoder, tokens_BT), jax.Array)
    assert_type(tj.trace(decoder, tokens_BT), tj.Trace | tj.models.PairTrace)
    assert_type(tj.count_parameters(config), int)


def decoding(decoder: tj.Decoder, encoder: tj.Encoder, tokenizer: tj.Tokenizer) -> None:
    generation = tj.generate(decoder, "To be", tokenizer=tokenizer, sampling=tj.Sampling(temperature=0.0))
    assert_type(generation, tj.Generation)
    assert_type(generation.texts, list[str] | None)
    assert_type(tj.stream(decoder, "To be", tokenizer=tokenizer), Iterator[str])
    assert_type(tj.beam_search(decoder, ["To be"], tokenizer=tokenizer), tj.BeamSearch)
    assert_type(tj.score(decoder, "To be", tokenizer=tokenizer), tj.decoding.Score)
    assert_type(tj.fill_mask(encoder, "To <mask>", tokenizer=tokenizer), list[list[list[tj.decoding.Candidate]]])
    assert_type(tj.embed(encoder, "To be", tokenizer=tokenizer), np.ndarray | list[np.ndarray])


def a_loaded_model_needs_no_cast(vectors_ND: np.ndarray) -> None:
    """The family of the model is known only at run time, so the functions check it there."""
    bundle = tj.load("runs/book")
    model, tokenizer = bundle.model, bundle.tokenizer
    assert_type(tj.generate(model, "To be", tokenizer=tokenizer), tj.Generation)
    assert_type(tj.stream(model, "To be", tokenizer=tokenizer), Iterator[str])
    assert_type(tj.beam_search(model, ["To be"], tokenizer=tokenizer), tj.BeamSearch)
    assert_type(tj.score(model, "To be", tokenizer=tokenizer), tj.decoding.Score)
    assert_type(tj.fill_mask(model, "To <mask>", tokenizer=tokenizer), list[list[list[tj.decoding.Candidate]]])
    assert_type(tj.embed(model, "To be", tokenizer=tokenizer), np.ndarray | list[np.ndarray])
    assert_type(tj.similarity(vectors_ND, vectors_ND), jax.Array)
    assert_type(tj.inspect_text(bundle, "To be"), tj.Inspection)
    assert_type(tj.inspect_text(model, "To be", tokenizer), tj.Inspection)
    assert_type(tj.trace(model, "To be", tokenizer=tokenizer), tj.Trace | tj.models.PairTrace)
    assert_type(tj.forward(model, "To be", tokenizer=tokenizer), jax.Array)
    assert_type(tj.prepare_for_decoding(model), tj.Decoder | tj.EncoderDecoder)


def tokenizers(ours: tj.Tokenizer, theirs: HuggingFaceTokenizer) -> list[tj.data.TextTokenizer]:
    return [ours, theirs]


def settings() -> None:
    assert_type(tj.presets.get("gpt2-small"), tj.ModelConfig)
    assert_type(tj.config.ModelConfig(num_layers=2), tj.ModelConfig)
    assert_type(tj.ModelConfig().replace(num_layers=2), tj.ModelConfig)
    assert_type(tj.preflight(tj.ExperimentConfig()), Preflight)
    tj.ModelConfig(num_layer=2)  # pyright: ignore[reportCallIssue]


def training(config: tj.ExperimentConfig) -> None:
    bundle = tj.train("quickstart", texts=["a text"], steps=3)
    assert_type(bundle, tj.Bundle)
    assert_type(tj.evaluate(bundle, "held_out.txt"), dict[str, float])
    assert_type(tj.tasks.make(config), tj.Task)
    assert_type(tj.recipes.get("quickstart"), tj.ExperimentConfig)


def unknown_names() -> None:
    tj.Decodr  # pyright: ignore[reportAttributeAccessIssue]
    tj.training.fitt  # pyright: ignore[reportAttributeAccessIssue]
    tj.nn.Atention  # pyright: ignore[reportAttributeAccessIssue]
    tj.load("runs/book").modle  # pyright: ignore[reportAttributeAccessIssue]
