"""A classifier of words from scratch, such as named entity recognition, on a CPU.

python -m experiments.train --config=classify_tokens --config.data.path=entities.jsonl --workdir=runs/entities
python -m experiments.classify --workdir=runs/entities --step=best --text="Anna lives in Rome"

Each line of the file has a list of words and the list of their labels:
{"words": ["Anna", "lives", "in", "Rome"], "labels": ["PER", "O", "O", "LOC"]}. A file in the format
of CoNLL (a word and its label on each line, a blank line between two texts) is read too. To start
from a trained model, use --config=classify_finetuned --config.task=classify_tokens with
--config.data.text_key=words --config.data.label_key=labels.
"""

import dataclasses

import transformer_jax.config as c
from transformer_jax.recipes import classify


def get_config() -> c.ExperimentConfig:
    config = classify.get_config()
    return config.replace(
        task="classify_tokens", model=config.model.replace(classifier=c.ClassifierConfig()),
        data=dataclasses.replace(config.data, text_key="words", label_key="labels"))
