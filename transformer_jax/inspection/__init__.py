"""Tools for interpretability: attention scores, lenses, attributions, interventions, and the
embedding space."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.inspection import circuits
    from transformer_jax.inspection.activations import Activations
    from transformer_jax.inspection.attribution import Attribution, direct_logit_attribution
    from transformer_jax.inspection.causal import head_ablation_table, mean_token_loss, patching_grid, path_effect
    from transformer_jax.inspection.collecting import ActivationBatches, collect
    from transformer_jax.inspection.erasure import Eraser, erase, leace
    from transformer_jax.inspection.inspection import Inspection
    from transformer_jax.inspection.interventions import ablate_head, knock_out_edge, patch, steer, together
    from transformer_jax.inspection.lens import (
        Lens,
        input_gradient,
        integrated_gradients,
        logit_lens,
        target_logprobs,
        value_norms,
        value_weighted,
    )
    from transformer_jax.inspection.maps import (
        diagonal_score,
        distance,
        duplicate_token_score,
        entropy,
        head_agreement,
        induction_score,
        previous_token_score,
        sink_mass,
        summaries,
    )
    from transformer_jax.inspection.mixing import flow, rollout
    from transformer_jax.inspection.probes import Probed, probe, wilson_interval
    from transformer_jax.inspection.reading import inspect_text
    from transformer_jax.inspection.resemblance import cka, layer_similarity, procrustes
    from transformer_jax.inspection.space import (
        PCA,
        analogy,
        nearest,
        pca,
        read_analogies,
        similarity,
        static_embeddings,
    )
    from transformer_jax.inspection.steering import DoseResponse, dose_response, mean_difference
    from transformer_jax.inspection.translators import Translators, jacobian_lens, translation_losses
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "PCA",
    "ActivationBatches",
    "Activations",
    "Attribution",
    "DoseResponse",
    "Eraser",
    "Inspection",
    "Lens",
    "Probed",
    "Translators",
    "ablate_head",
    "analogy",
    "circuits",
    "cka",
    "collect",
    "diagonal_score",
    "direct_logit_attribution",
    "distance",
    "dose_response",
    "duplicate_token_score",
    "entropy",
    "erase",
    "flow",
    "head_ablation_table",
    "head_agreement",
    "induction_score",
    "input_gradient",
    "inspect_text",
    "integrated_gradients",
    "jacobian_lens",
    "knock_out_edge",
    "layer_similarity",
    "leace",
    "logit_lens",
    "mean_difference",
    "mean_token_loss",
    "nearest",
    "patch",
    "patching_grid",
    "path_effect",
    "pca",
    "previous_token_score",
    "probe",
    "procrustes",
    "read_analogies",
    "rollout",
    "similarity",
    "sink_mass",
    "static_embeddings",
    "steer",
    "summaries",
    "target_logprobs",
    "together",
    "translation_losses",
    "value_norms",
    "value_weighted",
    "wilson_interval",
]
