"""Trains a model of one layer on addition modulo a prime, and shows that it computes the sums with a
few frequencies: its embeddings turn numbers into waves, whose phases it adds.

python -m experiments.modular_addition

What would refute this: the embeddings are spread over all frequencies, or they are as concentrated
in a model that can only memorize; the model adds without its key frequencies; it does not add
without the others, or as many random ones serve as well; or the answers do not follow when the key
frequencies are turned. The program measures all of this on pairs that are held out of training.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np
from absl import flags

import transformer_jax as tj
from experiments.modular_data import PRIME, Additions, Waves
from experiments.study_training import config_for, train, verdict
from transformer_jax.cli.flags import directory, run
from transformer_jax.inspection import curves, plots
from transformer_jax.training.bundle import Bundle

_WORKDIR = flags.DEFINE_string("workdir", "runs/modular_addition", "The directory for all results.")
_STEPS = flags.DEFINE_integer("steps", 600, "The number of training steps.", lower_bound=20)
_SEED = flags.DEFINE_integer("seed", 0, "The seed of the weights and of the pairs.", lower_bound=0)

SHARE = 0.4  # of the pairs, for training
NUM_DRAWS = 10  # of random frequencies
KEY = 3.0  # a key frequency has so many times the share that it would have if all were equal
TURN = 7  # numbers by which phases are moved
WAVES = Waves()
MODEL = tj.ModelConfig(vocab_size=PRIME + 1, max_len=3, num_layers=1, num_heads=4, model_dim=64, positions="learned",
                       activation="relu", tie_embeddings=False)
OPTIM = tj.config.OptimConfig(peak_lr=5e-3, schedule="constant", warmup_steps=10, beta2=0.98, weight_decay=1.0)


def embeddings_of(bundle: Bundle) -> np.ndarray:
    """Returns the embeddings of the numbers, ``[PRIME, D]``."""
    return np.asarray(bundle.model.embeddings.token[...])[:PRIME]


def accuracy(bundle: Bundle, rows: np.ndarray, vectors_PD: np.ndarray | None = None, *, moved_by: int = 0) -> float:
    """Returns how often the most probable answer is the right one.

    Args:
      bundle: the model.
      rows: pairs with their answers, as ``Additions`` holds them.
      vectors_PD: vectors to use in place of the embeddings of the numbers.
      moved_by: what is added to the right answers, modulo ``PRIME``.

    Returns:
      The share of the pairs.
    """
    table = np.array(bundle.model.embeddings.token[...])
    if vectors_PD is not None:
        table[:PRIME] = vectors_PD
    found = np.asarray(tj.forward(bundle.model, embeddings_BTD=table[rows[:, :-1]])[:, -1].argmax(-1))
    return float((found == (rows[:, -1] + moved_by) % PRIME).mean())


def measure(bundle: Bundle) -> dict[str, np.ndarray]:
    """Measures the shares of all frequencies, and the accuracies."""
    pairs = Additions(bundle.experiment.seed, SHARE)
    return {"shares": WAVES.shares(embeddings_of(bundle)), "training": np.array(accuracy(bundle, pairs.train)),
            "held_out": np.array(accuracy(bundle, pairs.held_out))}


def main() -> None:
    """Trains the model and one that memorizes, draws how the frequencies form, and tries to refute
    that the model adds with them."""
    workdir = directory(_WORKDIR)
    pairs, noise = (Additions(_SEED.value, SHARE, is_random=is_random) for is_random in (False, True))
    run_config, memory_config = (config_for(MODEL, steps=_STEPS.value, seed=_SEED.value, checkpoints=number).replace(
        batch_size=512, optim=OPTIM) for number in (30, 1))
    bundle = train(run_config, pairs.draw, workdir / "run")
    memory = train(memory_config, noise.draw, workdir / "memory")
    found = tj.runs.over_training(workdir / "run", measure)
    shares_K = found.values["shares"][-1]
    keys = [number for number, share in zip(WAVES.frequencies, shares_K, strict=True) if share * len(shares_K) >= KEY]
    draw(workdir, found, keys, WAVES.shares(embeddings_of(memory)))
    print(f"right sums of training pairs {found.values['training'][-1]:.1%}, of held-out pairs "
          f"{found.values['held_out'][-1]:.1%} (guessing {1 / PRIME:.1%})")
    most_of_memory = np.sort(WAVES.shares(embeddings_of(memory)))[::-1][:len(keys)].sum()
    of_keys = float(shares_K[np.array(keys, int) - 1].sum())
    print(f"the key frequencies {keys} have {of_keys:.1%} of the squared norm of the embeddings; the {len(keys)} "
          f"strongest of a model that learned random answers ({accuracy(memory, noise.train):.1%} of them) have "
          f"{most_of_memory:.1%}: {verdict(bool(keys) and of_keys > 1.5 * most_of_memory)}")
    if keys:
        ablate(bundle, pairs.held_out, keys)


def draw(workdir: pathlib.Path, found: tj.runs.OverTraining, keys: list[int], of_memory_K: np.ndarray) -> None:
    """Draws the frequencies at the end, and when they form."""
    plots.save(curves.lines(found.steps, {
        "right sums of training pairs": found.values["training"],
        "right sums of held-out pairs": found.values["held_out"],
        "share of the key frequencies": found.values["shares"][:, np.array(keys, int) - 1].sum(1)}, "step", "",
        title="When does the model learn to add?"), workdir / "onset.png")
    plots.save(curves.lines(WAVES.frequencies, {
        "additions": found.values["shares"][-1], "random answers": of_memory_K},
        "frequency", "share of the squared norm", title="The embeddings of models that learned ..."),
        workdir / "frequencies.png")
    print(f"figures: {workdir / 'onset.png'} and {workdir / 'frequencies.png'}")


def ablate(bundle: Bundle, rows: np.ndarray, keys: list[int]) -> None:
    """Prints the accuracy without the key frequencies, with nothing else, and with other answers
    that turned key frequencies ask for, each beside the same change of random other frequencies."""
    vectors_PD, rng = embeddings_of(bundle), np.random.default_rng(0)
    others = [number for number in WAVES.frequencies if number not in keys]
    drawn = [rng.choice(others, min(len(keys), len(others)), replace=False) for _ in range(NUM_DRAWS)]

    def right(change: Callable[..., np.ndarray], moved_by: int = 0) -> tuple[float, np.ndarray]:
        """Returns the accuracy with changed key frequencies, and with each of the random draws."""
        return (accuracy(bundle, rows, change(keys), moved_by=moved_by),
                np.array([accuracy(bundle, rows, change(each), moved_by=moved_by) for each in drawn]))

    whole = accuracy(bundle, rows)
    removed, without_others = right(lambda chosen: vectors_PD - WAVES.part(vectors_PD, chosen))
    print(f"without the key frequencies {removed:.1%} of the sums are right; without as many random others "
          f"{without_others.mean():.1%} (lowest of {NUM_DRAWS} draws {without_others.min():.1%}): "
          f"{verdict(removed < 0.5 * whole and without_others.min() > 0.9 * whole)}")
    kept, with_others = right(lambda chosen: vectors_PD.mean(0) + WAVES.part(vectors_PD, chosen))
    print(f"with nothing but the key frequencies {kept:.1%}; with nothing but as many random others "
          f"{with_others.mean():.1%} (highest {with_others.max():.1%}): "
          f"{verdict(kept > 0.9 * whole and with_others.max() < 0.5 * whole)}")
    # Both numbers are moved by TURN, so the sum moves by twice as much.
    turned, turned_others = right(lambda chosen: vectors_PD - WAVES.part(vectors_PD, chosen) + WAVES.part(
        vectors_PD, chosen, turned_by=TURN), 2 * TURN)
    print(f"if the key frequencies are turned as if both numbers were larger by {TURN}, {turned:.1%} of the answers "
          f"are larger by {2 * TURN}; if random others are turned {turned_others.mean():.1%} (highest "
          f"{turned_others.max():.1%}): {verdict(turned > 0.9 * whole and turned_others.max() < 0.5 * whole)}")


if __name__ == "__main__":
    run(main)
