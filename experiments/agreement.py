"""Trains a masked model and a GPT on generated Portuguese sentences, in which the right noun
decides a word: "Verteu água da jarra para o copo até que ele ficasse cheio". It then shows where
the models read that noun, which heads they need for it, and that they agree by a direction of
gender.

python -m experiments.agreement
python -m experiments.agreement --model=neuralmind/bert-base-portuguese-cased --workdir=runs/agreement_bert

What would refute that a model has learned agreement: fewer than 95 % of the answers about new pairs
of nouns, or about new nouns, are right; the answers do not suffer without the heads that it needs
most on other sentences, or suffer as much without other heads; or adjectives do not change their
gender when the difference between feminine and masculine words is added to a noun and its article,
and do so after random changes, or changes of another noun. The program measures all of this, and
prints "confirmed" or "REFUTED".

The first command trains both models, or loads them if they are trained. The second one asks another
model: --model is a directory or an id of Hugging Face, and may be repeated.
"""

from __future__ import annotations

import pathlib

import numpy as np
from absl import flags

import transformer_jax as tj
from experiments import agreement_study as study
from experiments.study_training import verdict
from transformer_jax import recipes
from transformer_jax.cli import loading
from transformer_jax.cli.flags import directory, run
from transformer_jax.data import AGREEMENT_FAMILIES, agreement_contrasts, generate_agreement
from transformer_jax.inspection import plots
from transformer_jax.inspection.causal import Head
from transformer_jax.runs.training import train
from transformer_jax.training.bundle import Bundle

_WORKDIR = flags.DEFINE_string("workdir", "runs/agreement", "The directory for all results.")
_MODEL = flags.DEFINE_multi_string("model", None, "An encoder or decoder to use instead of training: a workdir, or a "
                                   "directory or id of Hugging Face. May be repeated.")
_NUM = flags.DEFINE_integer("num", 250, "The number of questions of each family and split.", lower_bound=10)

RECIPES = ("agreement_mlm", "agreement_gpt")
SPLITS = {"train": "nouns and pairs of training", "pairs": "pairs never seen", "nouns": "nouns never seen in pairs"}
SHOWN = "Verteu água da jarra para o copo até que ele ficasse"  # cheio
NUM_RANDOM = 10  # draws of as many other heads as are ablated together
LEAST = 0.95  # of the held-out answers must be right


def main() -> None:
    """Trains or loads the models, and prints and draws what they do."""
    workdir = directory(_WORKDIR)
    if _MODEL.value:
        bundles = {pathlib.Path(name).name: loading.load(None, name) for name in _MODEL.value}
    else:
        bundles = {name: train(recipes.get(name), workdir=workdir / name) for name in RECIPES}
    for name, bundle in bundles.items():
        if bundle.config.family not in ("encoder", "decoder") or bundle.tokenizer is None:
            raise ValueError(f"{name} is of family {bundle.config.family!r}; expected a masked language model or a GPT "
                             "with its tokenizer")
    workdir.mkdir(parents=True, exist_ok=True)
    for name, bundle in bundles.items():
        print(f"\n== {name}")
        print_accuracies(bundle, _NUM.value)
        look(bundle, workdir, name)
        for family in AGREEMENT_FAMILIES:
            patch(bundle, family, workdir / f"{name}_{family}_patching.png")
        for family in AGREEMENT_FAMILIES:
            ablate(bundle, family, _NUM.value, workdir / f"{name}_{family}_heads.png")
        turn(bundle, _NUM.value)


def questions_of(bundle: Bundle, split: str, family: str, num: int, seed: int = 1) -> tuple[list[study.Questions], int]:
    """Returns questions that the model can answer, and the number of those that are left out. A
    decoder gets only sentences whose last word is asked for."""
    sentences = generate_agreement(num if bundle.config.family == "encoder" else 2 * num, seed, split=split,
                                   family=family)
    return study.ask(bundle, [one for one in sentences if one.is_last or bundle.config.family == "encoder"])


def print_accuracies(bundle: Bundle, num: int) -> None:
    """Prints how often the model answers right, for each family and split."""
    print(f"""right answers in percent: when the model chooses among all tokens, then among the given alternatives
{'':6}""" + "".join(f"{what:>28}" for what in SPLITS.values()))
    num_left_out = 0
    held_out = {}
    for family in AGREEMENT_FAMILIES:
        cells = []
        for split in SPLITS:
            groups, left_out = questions_of(bundle, split, family, num)
            best, preferred = study.accuracy(bundle, groups)
            num_left_out += left_out
            cells.append(f"{best:7.1%} {preferred:7.1%} of {sum(map(len, groups)):4}")
            if split != "train" and groups:
                held_out[family, split] = best
        print(f"{family:6}" + "".join(f"{cell:>28}" for cell in cells))
    for split in list(SPLITS)[1:]:
        of_families = [held_out[family, split] for family in AGREEMENT_FAMILIES if (family, split) in held_out]
        if of_families:
            print(f"{SPLITS[split]}: the answer is the most probable token for at least {LEAST:.0%} of the questions "
                  f"in {sum(share >= LEAST for share in of_families)} of {len(of_families)} families: "
                  f"{verdict(min(of_families) >= LEAST)}")
    if num_left_out:
        print(f"{num_left_out} questions are left out, because a word is more than one token of this model")


def look(bundle: Bundle, workdir: pathlib.Path, name: str) -> None:
    """Draws the attention of every head on one sentence, and writes the page with all maps."""
    is_encoder = bundle.config.family == "encoder"
    text = f"{SHOWN} {bundle.tokenizer.mask_token}" if is_encoder else SHOWN
    inspected = tj.inspect_text(bundle, text)
    plots.save(inspected.plot(), workdir / f"{name}_attention.png")
    inspected.to_html(workdir / f"{name}_attention.html", title=text)
    print(f"attention to \"{text}\": {workdir / f'{name}_attention.png'} and .html")


def patch(bundle: Bundle, family: str, path: pathlib.Path) -> None:
    """Prints and draws which vectors of the residual stream carry the answer of a family."""
    drawn = agreement_contrasts(4 * study.ROWS, 0, family)
    pairs = [pair for pair in drawn if pair[0].referent_at == drawn[0][0].referent_at][:study.ROWS]
    clean, corrupted = (max(study.ask(bundle, side)[0], key=len, default=None) for side in zip(*pairs, strict=True))
    if clean is None or corrupted is None or len(clean) != len(pairs) or clean.tokens_BT.shape != (
            corrupted.tokens_BT.shape):
        print(f"{family}: no patching, because the sentences differ in length in tokens of this model")
        return
    effects_LT = study.patching(bundle, clean, corrupted)
    first, second = (side.tokens_BT[0] for side in (clean, corrupted))
    labels = [piece if piece == other else f"{piece} |{other}" for piece, other in zip(
        bundle.tokenizer.pieces(first), bundle.tokenizer.pieces(second), strict=True)]
    plots.save(plots.patching_effects(effects_LT, labels, "part of the answer that comes back"), path)
    print(f"{family}: where the answer is decided ({path}); the strongest places of the stream that enters each layer")
    for layer, effects_T in enumerate(effects_LT):
        best = [place for place in np.argsort(-effects_T)[:4] if effects_T[place] > 0.05]
        print(f"  layer {layer}: " + ", ".join(f"{labels[place].strip()} {effects_T[place]:.2f}" for place in best))


def ablate(bundle: Bundle, family: str, num: int, path: pathlib.Path) -> None:
    """Finds the heads that the model needs most on sentences of training, and prints the accuracy
    on held-out sentences without them, and without as many other heads."""
    searched = max(study.ask(bundle, [one for one in generate_agreement(4 * study.ROWS, 0, family=family)
                                      if one.is_last])[0], key=len, default=None)
    groups = [one for split in ("pairs", "nouns") for one in questions_of(bundle, split, family, num)[0]
              if one.sentences[0].is_last]
    if searched is None or not groups:
        print(f"{family}: no ablation, because the answers are more than one token of this model")
        return
    effects_LN = study.head_effects(bundle, searched)
    if effects_LN.size < 2:
        print(f"{family}: no ablation, because it needs at least 2 heads; this model has {effects_LN.size}")
        return
    plots.save(plots.layer_head_summary(effects_LN, "change of the logit difference without the head"), path)
    found = study.needed_heads(bundle, searched, effects_LN.size // 2)
    others = [head for head in np.ndindex(effects_LN.shape) if head not in found]

    def right(heads: list[Head]) -> float:
        return float(study.accuracy(bundle, groups, study.without(bundle, searched, heads) if heads else None)[1])

    rng = np.random.default_rng(0)
    draws = [right([others[place] for place in rng.choice(len(others), len(found), replace=False)])
             for _ in range(NUM_RANDOM)]
    whole, rest = right([]), right(found)
    print(f"{family}: right against the alternatives {whole:.1%}; without the heads "
          f"{' '.join(f'{layer}.{head}' for layer, head in found)} {rest:.1%}; without {len(found)} other "
          f"heads {np.mean(draws):.1%} (lowest of {NUM_RANDOM} draws {min(draws):.1%}): "
          f"{verdict(rest < whole - 0.05 and rest < min(draws))}")


def turn(bundle: Bundle, num: int) -> None:
    """Prints how often adjectives of the family "part" change their gender when the direction of
    gender, found on sentences of training, is added to the noun, and when others are."""
    sentences = [[one for one in generate_agreement(2 * num, 1, split=split, family="part") if one.is_last]
                 for split in ("train", "nouns")]
    searched, held_out = (max(study.ask(bundle, each)[0], key=len, default=None) for each in sentences)
    if searched is None or held_out is None or study.noun_phrase(bundle, held_out) is None:
        print("part: no direction of gender, because words are more than one token of this model")
        return
    direction_2D = study.gender_direction(bundle, searched)
    noun, other = (study.noun_phrase(bundle, held_out, of_referent=is_it) for is_it in (True, False))
    found, elsewhere = (study.turned(bundle, held_out, places, direction_2D) for places in (noun, other))
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(NUM_RANDOM, *direction_2D.shape))
    drawn *= np.linalg.norm(direction_2D, axis=-1, keepdims=True) / np.linalg.norm(drawn, axis=-1, keepdims=True)
    draws = [study.turned(bundle, held_out, noun, each) for each in drawn]
    print(f"part: the direction of gender, added to a noun and its article, changes the gender of {found:.1%} of the "
          f"adjectives; at the other noun {elsewhere:.1%}; random directions {np.mean(draws):.1%} (highest of "
          f"{NUM_RANDOM} draws {max(draws):.1%}): {verdict(found > 0.8 and max(*draws, elsewhere) < 0.2)}")


if __name__ == "__main__":
    run(main)
