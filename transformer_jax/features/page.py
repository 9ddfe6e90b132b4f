"""Features in one self-contained HTML page."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from transformer_jax.inspection.viewer import filled
from transformer_jax.settings import checked_path

if TYPE_CHECKING:
    from transformer_jax.features.examples import Feature, FeatureReport


def page(report: FeatureReport, path: str | pathlib.Path | None = None) -> str:
    """Makes the page of a report.

    Args:
      report: What ``examine`` returned.
      path: The file to write; ``None`` writes none.

    Returns:
      The page in ASCII. Values are rounded to four digits.
    """
    densities = report.densities[report.densities > 0]
    counts, borders = np.histogram(np.log10(densities), 24) if len(densities) else (np.zeros(1), np.zeros(2))
    data = {"title": report.title, "tokens": report.num_tokens, "count": len(report.densities),
            "dead": int((report.densities == 0).sum()),
            "densities": {"counts": counts.tolist(), "from": float(borders[0]), "to": float(borders[-1])},
            "features": [_feature(each) for each in report.features]}
    text = filled(pathlib.Path(__file__).with_name("page.html"), report.title, data)
    if path is not None:
        checked_path("path", path).write_text(text, encoding="ascii")
    return text


def _feature(feature: Feature) -> dict[str, Any]:
    """Returns the data of one feature for the page's script."""
    from transformer_jax.features.examples import histogram_borders

    filled_bins = np.flatnonzero(feature.histogram)
    first, last = (int(filled_bins[0]), int(filled_bins[-1]) + 1) if len(filled_bins) else (0, 1)
    borders = histogram_borders()
    return {"number": feature.number, "density": feature.density,
            "histogram": {"counts": feature.histogram[first:last].tolist(), "from": float(borders[first]),
                          "to": float(borders[last])},
            "raised": _rounded(feature.raised), "lowered": _rounded(feature.lowered),
            "examples": [{"tokens": each.tokens, "values": [float(f"{value:.4g}") for value in each.values],
                          "text": each.text, "start": each.start} for each in feature.examples]}


def _rounded(effects: list[tuple[str, float]] | None) -> list[tuple[str, float]] | None:
    """Rounds the effects on logits."""
    return None if effects is None else [(token, float(f"{value:.4g}")) for token, value in effects]
