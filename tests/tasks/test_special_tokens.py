"""Tokenizers of Hugging Face without tokens that ours have: padding (GPT-2, Llama, Mistral), a
start (T5, Marian), an end, a mask."""

import json

import jax
import numpy as np
import pytest

from transformer_jax.alignment.dpo import response_logprobs
from transformer_jax.alignment.rankings import Rankings
from transformer_jax.alignment.reward import reward_loss
from transformer_jax.config import ModelConfig
from transformer_jax.data import (
    Comparison,
    LineRows,
    Masking,
    Message,
    PackedConversations,
    PackedPairs,
    encode_conversation,
)
from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from transformer_jax.data.packing import padding_id
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.heads import RewardModel

tokenizers = pytest.importorskip("tokenizers")
NAMES = {"eos_token": "<|endoftext|>", "bos_token": "<s>", "pad_token": "<pad>", "mask_token": "<mask>"}
COMPARISONS = [Comparison("why?", ["so", "I do not know"]), Comparison("who?", ["I", "you", "he or she"])]


@pytest.fixture(scope="module")
def make():
    """``make("eos", "pad")``: a tokenizer that has these special tokens; the vocabulary is always
    the same."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(["why? so I do not know"], tokenizers.trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(NAMES.values())))
    text = made.to_str()
    assert json.loads(text)["model"]["vocab"]["<pad>"] == 2
    return lambda *roles: HuggingFaceTokenizer.make(text, {f"{role}_token": NAMES[f"{role}_token"] for role in roles},
                                                    {})


@pytest.fixture(scope="module")
def decoder():
    config = ModelConfig(vocab_size=280, max_len=64, num_layers=1, num_heads=2, model_dim=16, init_std=0.3)
    return jax.jit(lambda key: Decoder(config, key=key))(jax.random.key(0))


def test_padding_content_does_not_change_the_loss(make, decoder):
    """GPT-2 has only `eos`. The losses are the same if the tokenizer has a separate padding
    token."""
    model = RewardModel.of(decoder, key=jax.random.key(1))
    measure = jax.jit(lambda model, batch: (reward_loss(model, batch)[0], response_logprobs(model.trunk, batch)))
    found = []
    for roles in (("eos",), ("eos", "pad"), ("eos", "bos"), ("eos", "bos", "pad")):
        rankings = Rankings.build(COMPARISONS, make(*roles), 64)
        padding = rankings.tokens_NKT[rankings.segment_ids_NKT == 0]
        assert (padding == (2 if "pad" in roles else 0)).all() and padding.size
        found.append(measure(model, rankings[np.arange(2)]))
    for without, with_padding in (found[:2], found[2:]):
        np.testing.assert_allclose(without[0], with_padding[0], rtol=1e-6)
        np.testing.assert_allclose(without[1], with_padding[1], rtol=1e-6)
    assert abs(float(found[0][0] - found[2][0])) > 1e-3, "a text that begins otherwise has another score"


def test_conversations_of_a_tokenizer_with_an_end_alone(make):
    tokenizer = make("eos")
    conversation = (Message("user", "why?"), Message("assistant", "so"))
    ids, is_learned = encode_conversation(conversation, tokenizer)
    learned = [token for token, is_one in zip(ids, is_learned, strict=True) if is_one]
    assert ids[0] == tokenizer.eos_id and learned == [*tokenizer.encode("so"), tokenizer.eos_id]
    assert PackedConversations.build([conversation], tokenizer, 40).is_learned.sum() == len(learned)


@pytest.mark.parametrize("roles", [(), ("bos",), ("pad", "mask")])
def test_an_end_cannot_be_done_without(make, roles):
    tokenizer = make(*roles)
    with pytest.raises(ValueError, match="neither a chat template nor a token that ends a text"):
        encode_conversation([Message("user", "why?"), Message("assistant", "so")], tokenizer)
    with pytest.raises(ValueError, match="comparison 1: .*a token that ends a text"):
        Rankings.build(COMPARISONS, tokenizer, 64)
    with pytest.raises(ValueError, match=r"translation needs special tokens .* does not have: </s> \(eos_id\)"):
        PackedPairs.build([("why?", "so")], tokenizer, 16, 16)
    with pytest.raises(ValueError, match=r"translation needs a token that starts a target, <s> \(bos_id\)"):
        PackedPairs.build([("why?", "so")], make("eos"), 16, 16)


def test_masked_language_modelling_needs_a_mask_and_no_padding(make):
    tokenizer = make("eos", "bos", "mask")
    rows = LineRows.build(["why?"], tokenizer, 16)
    assert (rows.tokens[rows.segment_ids == 0] == padding_id(tokenizer)).all()
    batch = Masking.of(tokenizer)(rows[[0]], np.random.default_rng(0))
    assert batch["masked_weights"].sum() == 1
    with pytest.raises(ValueError, match=r"masked language modelling needs .* <mask> or \[MASK\] \(mask_id\)"):
        Masking.of(make("eos", "bos"))
