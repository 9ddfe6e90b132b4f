"""Model families: each model is a pytree of weights, and calling it is a pure function."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.models.classifier import ClassificationHead, Classifier, pool
    from transformer_jax.models.decoder import Decoder
    from transformer_jax.models.encoder import Encoder
    from transformer_jax.models.encoder_decoder import EncoderDecoder, Memory
    from transformer_jax.models.functional import count_parameters, forward, make_model, trace
    from transformer_jax.models.gradients import site_gradients
    from transformer_jax.models.heads import MaskedTokenHead, RewardModel
    from transformer_jax.models.output import Output, PairTrace, Trace
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "ClassificationHead", "Classifier", "Decoder", "Encoder", "EncoderDecoder", "MaskedTokenHead", "Memory", "Output",
    "PairTrace", "RewardModel", "Trace", "count_parameters", "forward", "make_model", "pool", "site_gradients",
    "trace",
]
