"""Looking inside: attention maps in numbers, lenses, attributions, interventions, the embedding
space."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.inspection.attribution import Attribution, direct_logit_attribution
    from transformer_jax.inspection.causal import head_ablation_table, next_token_loss, patching_grid, path_effect
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
    from transformer_jax.inspection.reading import inspect_text
    from transformer_jax.inspection.space import (
        PCA,
        analogy,
        nearest,
        pca,
        read_analogies,
        similarity,
        static_embeddings,
    )
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "PCA",
    "Attribution",
    "Inspection",
    "Lens",
    "ablate_head",
    "analogy",
    "diagonal_score",
    "direct_logit_attribution",
    "distance",
    "duplicate_token_score",
    "entropy",
    "flow",
    "head_ablation_table",
    "head_agreement",
    "induction_score",
    "input_gradient",
    "inspect_text",
    "integrated_gradients",
    "knock_out_edge",
    "logit_lens",
    "nearest",
    "next_token_loss",
    "patch",
    "patching_grid",
    "path_effect",
    "pca",
    "previous_token_score",
    "read_analogies",
    "rollout",
    "similarity",
    "sink_mass",
    "static_embeddings",
    "steer",
    "summaries",
    "target_logprobs",
    "together",
    "value_norms",
    "value_weighted",
]
