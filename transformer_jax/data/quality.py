"""A classifier of the quality of texts, which is trained on good and on bad examples.

It follows the filter of GPT-3's training data (Brown et al. 2020, appendix A): a logistic
regression on hashed words, and a random rule that also keeps some texts with low scores.
"""

import functools
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from transformer_jax.data.text import check_texts
from transformer_jax.data.token_file import renamed_when_complete

PARETO_SHAPE = 9.0
_NUM_FEATURES = 1 << 18
_INVERSE_REGULARISATION = 10.0  # of 1, 10 and 100, the one with the best log loss on held-out sentences


class QualityClassifier:
    """Estimates from its words how much a text resembles good texts.

    A text is represented by the counts of its words, hashed into 2**18 features and divided by
    their L2 norm. Naive Bayes, as in ``tj.alignment.BagOfWords``, gives nearly every text of more
    than a few sentences a probability of 0 or 1, so that the random rule would have nothing to
    decide; logistic regression does not.

    Attributes:
      weights_V: The weight of each feature, float64 [2**18].
      bias: The log odds of a text without words.

    Raises:
      ImportError: If scikit-learn is not installed.
    """

    def __init__(self, weights_V: np.ndarray, bias: float):
        self.weights_V, self.bias = weights_V, bias
        self._features = _features()

    @classmethod
    def train(cls, good: Iterable[str], bad: Iterable[str]) -> "QualityClassifier":
        """Trains a classifier. The same examples give the same classifier.

        Args:
          good: Texts that should get a high score.
          bad: Texts that should get a low score.

        Returns:
          The classifier.

        Raises:
          ValueError: If there are no good or no bad texts, or an entry is not a text.
          ImportError: If scikit-learn is not installed.
        """
        good, bad = check_texts(good, "good text"), check_texts(bad, "bad text")
        features = _features().transform(good + bad)
        from sklearn.linear_model import LogisticRegression  # pyright: ignore[reportMissingImports]

        labels = np.arange(len(good) + len(bad)) < len(good)
        model = LogisticRegression(C=_INVERSE_REGULARISATION, solver="liblinear", random_state=0)
        model.fit(features, labels)
        return cls(np.ravel(model.coef_), float(np.ravel(model.intercept_)[0]))

    def __call__(self, texts: Iterable[str]) -> np.ndarray:
        """Scores texts.

        Args:
          texts: The texts.

        Returns:
          The probability that each text is good, float64 [number of texts].
        """
        logits = self._features.transform(list(texts)) @ self.weights_V + self.bias
        return np.exp(-np.logaddexp(0, -logits))

    def save(self, path: str | Path) -> None:
        """Writes the classifier to a file.

        Args:
          path: The file, in NumPy's format ``.npz``.
        """
        with renamed_when_complete(Path(path)) as stream:
            np.savez(stream, weights=self.weights_V, bias=self.bias)

    @classmethod
    def load(cls, path: str | Path) -> "QualityClassifier":
        """Reads a classifier that ``save`` wrote.

        Args:
          path: The file.

        Returns:
          The classifier.

        Raises:
          ValueError: If the file is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(arrays["weights"], float(arrays["bias"]))
        except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a classifier that QualityClassifier.save wrote: {error}") from error


def is_kept(score: float, number: int, seed: int = 0) -> bool:
    """Decides by a random draw whether a text is kept.

    The text is kept if a draw from the Pareto (Lomax) distribution with shape 9 is larger than
    1 - score, which has the probability (2 - score)**-9: always with a score of 1, in 1 of 38 cases
    with 0.5, and in 1 of 512 cases with 0.

    Args:
      score: The probability that the text is good.
      number: The number of the text. The draw depends only on it and on the seed.
      seed: The seed.

    Returns:
      Whether the text is kept.
    """
    return bool(np.random.default_rng((seed, number)).pareto(PARETO_SHAPE) > 1 - score)


@functools.cache
def _features():
    """Returns the function from texts to features. Raises ImportError without scikit-learn."""
    try:
        from sklearn.feature_extraction.text import HashingVectorizer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("the quality classifier needs: pip install 'transformer_jax[corpus]'") from error
    return HashingVectorizer(n_features=_NUM_FEATURES, alternate_sign=False, norm="l2")
