"""One word, two senses: tells "banco" (bank) from "banco" (bench) by the vectors of three models.

python -m experiments.banco --data=contos.txt --workdir=runs/banco

It trains an ELMo and a masked language model on the text, and prints one table: static vectors,
ELMo and the masked model. The same command resumes.
"""

from __future__ import annotations

import json

from absl import flags

import transformer_jax as tj
from experiments.road_plan import with_steps
from experiments.word_senses import senses
from transformer_jax import recipes
from transformer_jax.cli.flags import directory, required, run

_DATA = flags.DEFINE_string("data", None, "The Portuguese text to train on, as in --config.data.path.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/banco", "The directory for both runs and the table.")
_STEPS = flags.DEFINE_integer("steps", 1000, "Steps of training of each model.", lower_bound=1)

WORD = "banco"
BANK = ("o diretor do banco assinou as letras", "depositou o dinheiro no banco", "as ações do banco subiram de preço",
        "o banco emprestou o capital ao comendador", "foi ao banco receber os juros", "o banco faliu e perdeu tudo")
BENCH = ("sentou-se no banco do jardim", "o velho dormia no banco da praça", "ergueu-se do banco e saiu da igreja",
         "estavam sentados em um banco de pau", "deixou o chapéu no banco ao lado", "caiu do banco e feriu a perna")


def main() -> None:
    """Trains both models and prints the table."""
    workdir, path = directory(_WORKDIR), required(_DATA)
    models = {name: tj.train(with_steps(recipes.get(recipe), _STEPS.value), path, workdir=workdir / name)
              for name, recipe in (("elmo", "road_elmo"), ("masked", "book_mlm"))}
    rows = {"static vectors (the embeddings of ELMo)": (models["elmo"], 0),
            "ELMo, last layer": (models["elmo"], -1), "masked model, last layer": (models["masked"], -1)}
    found = {name: senses(tj.embed(bundle.model, [*BANK, *BENCH], tokenizer=bundle.tokenizer, word=WORD, layer=layer),
                          [0] * len(BANK) + [1] * len(BENCH)) for name, (bundle, layer) in rows.items()}
    lines = ["| vectors | cosine within a sense | cosine between the senses | nearest sentence has the same sense |",
             "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {row['within']:.3f} | {row['between']:.3f} | {row['nearest']:.0%} |"
              for name, row in found.items()]
    (workdir / "table.md").write_text("\n".join(lines) + "\n")
    (workdir / "results.json").write_text(json.dumps(found, indent=1))
    print("\n".join(lines))


if __name__ == "__main__":
    run(main)
