"""Sampling from decoders: pure logit processors, a compiled token loop, streaming, scoring."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.decoding.beam import BeamSearch, Hypothesis, beam_search
    from transformer_jax.decoding.embed import similarity
    from transformer_jax.decoding.fill_mask import Candidate
    from transformer_jax.decoding.logits import Sampling, greedy, min_p, top_k, top_p, typical_p
    from transformer_jax.decoding.sample import Generation, generate, stream
    from transformer_jax.decoding.score import Score
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "BeamSearch", "Candidate", "Generation", "Hypothesis", "Sampling", "Score", "beam_search", "generate", "greedy",
    "min_p", "similarity", "stream", "top_k", "top_p", "typical_p",
]
