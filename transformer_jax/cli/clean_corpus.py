"""Cleans a corpus: removes exact duplicates, texts of low quality and near duplicates.

transformer-jax clean-corpus --data=FILE_OR_GLOB --output=DIR
transformer-jax clean-corpus --data=FILE_OR_GLOB --output=DIR --good=FILE --bad=FILE

The documents that are kept are in DIR/corpus.jsonl, which --config.data.path can name, and the
counts are in DIR/report.json. The quality filter learns from examples of good and bad texts, and is
left out without them. The same command continues a cleaning that was stopped.
"""

from __future__ import annotations

import signal

from absl import flags

from transformer_jax.cli.flags import directory, required, run
from transformer_jax.data import Cleaning, clean_corpus, read_documents
from transformer_jax.runs.workdir import locked
from transformer_jax.training.errors import Interrupted
from transformer_jax.training.signals import recorded_signals

_DATA = flags.DEFINE_string("data", None, "A text file, a directory, a glob, or JSONL, possibly compressed with gzip.")
_OUTPUT = flags.DEFINE_string("output", None, "The directory for the cleaned corpus and the report.")
_GOOD = flags.DEFINE_string("good", None, "Examples of good texts, in the same form as --data.")
_BAD = flags.DEFINE_string("bad", None, "Examples of bad texts, in the same form as --data.")
_THRESHOLD = flags.DEFINE_float("threshold", 0.8,
                                "Documents with at least this Jaccard similarity are near duplicates.")
_TEXT_KEY = flags.DEFINE_string("text_key", "text", "The key of the text in JSON objects.")
_SEED = flags.DEFINE_integer("seed", 0, "The same seed keeps the same documents.", lower_bound=0)


class _Stopped(Interrupted):
    """A signal stopped the cleaning. All decisions so far are in its files."""

    def __init__(self, signum: int, output: str):
        Exception.__init__(self, f"{signal.Signals(signum).name}: the work so far is kept in {output}")
        self.signum = signum


def main() -> None:
    """Runs ``transformer-jax clean-corpus``."""
    run(_clean)


def _clean() -> None:
    cleaning = Cleaning(required(_DATA), _GOOD.value, _BAD.value, _THRESHOLD.value, _TEXT_KEY.value, _SEED.value)
    output = directory(_OUTPUT)
    for path in filter(None, (cleaning.data, cleaning.good, cleaning.bad)):
        read_documents(path, key=cleaning.text_key)  # a missing file is found before the directory is created
    with locked(output), recorded_signals() as received:
        def stop_if_signalled() -> None:
            if received:
                raise _Stopped(received[0], str(output))

        report = clean_corpus(cleaning, output, stop_if_signalled)
    print(report)
    print(f"done; next: transformer-jax train --config=shakespeare_char --config.data.path={output}/corpus.jsonl "
          "--workdir=...")


if __name__ == "__main__":
    main()
