"""Scores of predicted labels: accuracy, balanced accuracy and F1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def label_scores(confusion_CC: Float[np.ndarray, "C C"], labels: Sequence[str]) -> dict[str, float]:
    """Computes scores from a confusion matrix.

    Args:
      confusion_CC: the number of examples whose true label is the row and whose predicted label is
        the column.
      labels: the names of the labels.

    Returns:
      ``accuracy``; ``balanced_accuracy``, the mean of the recall of each label; ``macro_f1``, the
      mean of the F1 of each label; and ``f1_LABEL`` for each label. All are in [0, 1]. A label that
      is neither true nor predicted for any example is left out of the means, and so is a label
      that is never true out of the balanced accuracy.
    """
    confusion_CC = np.asarray(confusion_CC, np.float64)
    hits_C, true_C, predicted_C = np.diagonal(confusion_CC), confusion_CC.sum(1), confusion_CC.sum(0)
    f1_C = 2 * hits_C / np.maximum(true_C + predicted_C, 1)
    recalls = hits_C[true_C > 0] / true_C[true_C > 0]
    return {"accuracy": float(hits_C.sum() / confusion_CC.sum()), "balanced_accuracy": float(recalls.mean()),
            "macro_f1": float(f1_C[true_C + predicted_C > 0].mean()),
            **{f"f1_{label}": float(f1) for label, f1 in zip(labels, f1_C, strict=True)}}
