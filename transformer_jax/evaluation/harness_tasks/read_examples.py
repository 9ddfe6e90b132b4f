"""Reads the examples of the tasks in this folder, wherever the harness is started from."""

import json
import pathlib

import datasets  # pyright: ignore[reportMissingImports]


def read_examples(file: str, shown: int = 0, **metadata):
    """Reads a JSONL file beside this one.

    Args:
      file: the name of the file.
      shown: the number of first examples that prompts show to the model; the others are measured.
      **metadata: what the harness passes to every reader; ignored.

    Returns:
      The splits ``shown`` (if there is one) and ``test``.
    """
    del metadata
    lines = (pathlib.Path(__file__).parent / file).read_text("utf-8").splitlines()
    examples = [json.loads(line) for line in lines]
    splits = {"test": datasets.Dataset.from_list(examples[shown:])}
    return splits | ({"shown": datasets.Dataset.from_list(examples[:shown])} if shown else {})
