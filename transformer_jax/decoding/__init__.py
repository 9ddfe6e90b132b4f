"""Text generation: sampling rules, a compiled decoding loop, streaming, beam search, and scores of
texts."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.decoding.beam import BeamSearch, Hypothesis, beam_search
    from transformer_jax.decoding.classify import Classification, LabelledWord
    from transformer_jax.decoding.embed import similarity
    from transformer_jax.decoding.fill_mask import Candidate
    from transformer_jax.decoding.formulas import greedy, min_p, top_k, top_p, typical_p
    from transformer_jax.decoding.grammar import Grammar
    from transformer_jax.decoding.logits import Sampling
    from transformer_jax.decoding.prepare import round_weights
    from transformer_jax.decoding.processors import (
        Bias,
        FrequencyPenalty,
        MinNewTokens,
        MinP,
        NoRepeatNgram,
        PresencePenalty,
        RepetitionPenalty,
        Temperature,
        TopK,
        TopP,
        TypicalP,
    )
    from transformer_jax.decoding.rules import History
    from transformer_jax.decoding.sample import Generation, generate, stream
    from transformer_jax.decoding.score import Score
    from transformer_jax.decoding.speculative_session import Speculation
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "BeamSearch", "Bias", "Candidate", "Classification", "FrequencyPenalty", "Generation", "Grammar", "History",
    "Hypothesis", "LabelledWord", "MinNewTokens", "MinP", "NoRepeatNgram", "PresencePenalty", "RepetitionPenalty",
    "Sampling", "Score", "Speculation", "Temperature", "TopK", "TopP", "TypicalP", "beam_search", "generate", "greedy",
    "min_p", "round_weights", "similarity", "stream", "top_k", "top_p", "typical_p",
]
