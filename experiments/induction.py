"""Trains a model of two layers on random sequences that repeat, and shows when its induction heads
form and that the model needs them.

python -m experiments.induction

What would refute that induction heads do the task: the loss of repeated tokens falls at another time
than the heads form; it does not rise when the heads are removed; or it rises as much without other
heads. The program measures all three.
"""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import transformer_jax as tj
from experiments.circuit_data import LENGTH, LONGEST, NUM_TOKENS, draw_repeating
from experiments.study_training import DrawnBatches, config_for, train
from transformer_jax import inspection
from transformer_jax.cli.flags import directory, run
from transformer_jax.inspection import curves, plots
from transformer_jax.ops.losses import cross_entropy
from transformer_jax.training.bundle import Bundle

_WORKDIR = flags.DEFINE_string("workdir", "runs/induction", "The directory for all results.")
_STEPS = flags.DEFINE_integer("steps", 400, "The number of training steps.", lower_bound=20)
_SEED = flags.DEFINE_integer("seed", 0, "The seed of the weights and of the sequences.", lower_bound=0)

MODEL = tj.ModelConfig(vocab_size=NUM_TOKENS, max_len=LENGTH, num_layers=2, num_heads=4, model_dim=64,
                       positions="learned", tie_embeddings=False)


TEST = draw_repeating(np.random.default_rng(12345), 64)


def repeated_loss(logits_BTV: jax.Array) -> jax.Array:
    """Returns the mean loss of the tokens that repeat earlier ones in every sequence."""
    return cross_entropy(logits_BTV, jnp.asarray(TEST[:, 1:]))[:, LONGEST:].mean()


def measure(bundle: Bundle) -> dict[str, np.ndarray]:
    """Measures the scores of all heads, and the loss of repeated tokens."""
    trace = tj.trace(bundle.model, TEST[:, :-1])
    scores = inspection.summaries(trace, TEST[:, :-1])
    loss = repeated_loss(tj.forward(bundle.model, TEST[:, :-1]))
    return {"induction": scores["induction"], "previous_token": scores["previous_token"], "loss": loss}


def loss_without(bundle: Bundle, heads: list[tuple[int, int]]) -> float:
    """Returns the loss of repeated tokens without heads."""
    edits = inspection.together(*(inspection.ablate_head(*head) for head in heads))
    return float(repeated_loss(tj.forward(bundle.model, TEST[:, :-1], intervene=edits)))


def main() -> None:
    """Trains the model, measures all its checkpoints, and removes heads."""
    workdir = directory(_WORKDIR)
    config = config_for(MODEL, steps=_STEPS.value, seed=_SEED.value, checkpoints=20)
    bundle = train(config, draw_repeating, workdir / "run")
    found = tj.runs.over_training(workdir / "run", measure)
    figure = curves.lines(found.steps, {
        "loss of repeated tokens (nats)": found.values["loss"],
        "largest induction score of layer 1": found.values["induction"][:, 1].max(-1),
        "largest previous-token score of layer 0": found.values["previous_token"][:, 0].max(-1)}, "step", "",
        title="When do the induction heads form?")
    plots.save(figure, workdir / "onset.png")
    plots.save(found.plot("induction"), workdir / "induction.png")
    rise = np.diff(found.values["induction"][:, 1].max(-1)).argmax()
    fall = np.diff(found.values["loss"]).argmin()
    print(f"the induction score rises fastest between the steps {found.steps[rise]} and {found.steps[rise + 1]}, the "
          f"loss falls fastest between {found.steps[fall]} and {found.steps[fall + 1]} ({workdir / 'onset.png'})")
    confirm(bundle, found)
    takeover(config, workdir, found)


def confirm(bundle: Bundle, found: tj.runs.OverTraining) -> None:
    """Prints the loss without the induction heads, without the previous-token heads, and without
    other heads."""
    induction, previous = (found.values[name][-1] for name in ("induction", "previous_token"))
    heads = [(1, int(head)) for head in np.flatnonzero(induction[1] > 0.4)] or [(1, int(induction[1].argmax()))]
    order = previous[0].argsort()[::-1]
    first, both = [(0, int(order[0]))], [(0, int(head)) for head in order[:2]]
    others = [(1, head) for head in range(MODEL.num_heads) if (1, head) not in heads]
    print(f"loss of repeated tokens {float(found.values['loss'][-1]):.3f} (random guessing {np.log(NUM_TOKENS):.3f})")
    print(f"without the induction heads {_names(heads)}: {loss_without(bundle, heads):.3f}")
    print(f"without the strongest previous-token head {_names(first)}: {loss_without(bundle, first):.3f}; without two, "
          f"{_names(both)}: {loss_without(bundle, both):.3f}")
    print("without each other head of layer 1: " + (", ".join(
        f"{_names([head])} {loss_without(bundle, [head]):.3f}" for head in others) or "there is none"))
    blind = tj.trace(bundle.model, TEST[:, :-1], intervene=inspection.together(*(
        inspection.ablate_head(*head) for head in both)))
    after = np.asarray(inspection.summaries(blind, TEST[:, :-1])["induction"][1])
    print(f"induction scores of layer 1: {np.round(induction[1], 2)}; without {_names(both)}: {np.round(after, 2)}")


def takeover(config: tj.ExperimentConfig, workdir: pathlib.Path, found: tj.runs.OverTraining) -> None:
    """Trains a branch of the run in which the strongest induction head never works, and prints
    whether another head takes its place."""
    head = int(found.values["induction"][-1, 1].argmax())
    changed = config.replace(loss=tj.config.LossConfig(ablated_heads=(f"1.{head}",)))
    branch = tj.runs.branch(workdir / "run", workdir / "branch", step=0, config=changed,
                            data=DrawnBatches(draw_repeating, config.batch_size, config.seed))
    values = measure(branch)
    scores = np.where(np.arange(MODEL.num_heads) == head, np.nan, values["induction"][1])
    print(f"a branch from step 0 without the head 1.{head} ends with a loss of {float(values['loss']):.3f}; there the "
          f"head 1.{int(np.nanargmax(scores))} has an induction score of {np.nanmax(scores):.2f}, and in the run "
          f"{found.values['induction'][-1, 1, int(np.nanargmax(scores))]:.2f}")


def _names(heads: list[tuple[int, int]]) -> str:
    """Writes heads as layer.head."""
    return " ".join(f"{layer}.{head}" for layer, head in heads)


if __name__ == "__main__":
    run(main)
