"""The page ``docs/huggingface.md`` says what the registered families and the fixtures say."""

import json
import pathlib

from fixture_weights import MODELS, cases

from transformer_jax.interop import FAMILIES

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "huggingface.md"


def rows():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]  # after the header


def test_the_table_is_that_of_the_families_and_fixtures():
    eras, versions = {}, set()
    for case in cases():
        settings = json.loads((MODELS / case / "config.json").read_text())
        era = case.split("-")[1]
        eras.setdefault(settings["model_type"], set()).add(era)
        if era != "published":
            versions.add(settings["transformers_version"])
    for model_type, written, body, tokenizers, fixtures in rows():
        family = FAMILIES[model_type.strip("`")]
        assert (written, body) == (f"`{family.architecture}`", f"`{family.body}`")
        assert set(fixtures.split(", ")) == eras[family.model_type]
        assert all(name.startswith("`") and name.endswith("`") for name in tokenizers.split(", "))
    assert [row[0].strip("`") for row in rows()] == list(FAMILIES)
    assert f"computed with transformers {' or '.join(sorted(versions))}." in PAGE.read_text()
