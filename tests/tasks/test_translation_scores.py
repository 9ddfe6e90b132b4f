import collections
import gzip
import math
import random
import sys

import pytest
import sacrebleu

from transformer_jax.tasks.translation_scores import moses_tokenised, scores

REFERENCES = ["Ein Hund rennt über die grüne Wiese.", "Zwei Männer sitzen auf einer Bank.",
              "Es regnet seit 3,5 Stunden!"]
HYPOTHESES = ["Ein Hund läuft über die Wiese.", "Zwei Männer sitzen auf der Bank.", "es regnet seit 3,5 Stunden!"]


def plain_bleu(hypotheses: list[str], references: list[str]) -> float:
    """BLEU of tokens separated by spaces, by the formula of Papineni et al. 2002, section 2.3,
    without smoothing."""
    matches, totals = [0] * 4, [0] * 4
    hypotheses, references = ([text.split() for text in texts] for texts in (hypotheses, references))
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        for n in range(1, 5):
            counts, allowed = (collections.Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
                               for tokens in (hypothesis, reference))
            matches[n - 1] += sum(min(count, allowed[gram]) for gram, count in counts.items())
            totals[n - 1] += sum(counts.values())
    if not all(matches):
        return 0.0
    length, reference_length = sum(map(len, hypotheses)), sum(map(len, references))
    log_precision = sum(math.log(match / total) for match, total in zip(matches, totals, strict=True)) / 4
    return 100 * math.exp(log_precision + min(0, 1 - reference_length / length))


def test_a_score_worked_out_by_hand():
    # Matches of 1 to 4 tokens: 4 of 5, 3 of 4, 2 of 3, 1 of 2, whose product is 1/5; both have 5
    # tokens.
    result = scores(["a b c d e"], ["a b c d f"], language="en")
    assert result["bleu"] == pytest.approx(100 * 0.2**0.25, abs=1e-9)
    assert result["tokenised_bleu"] == pytest.approx(100 * 0.2**0.25, abs=1e-9)
    # All match, but 4 tokens stand for 5: exp(1 - 5/4).
    assert scores(["a b c d"], ["a b c d f"], language="en")["bleu"] == pytest.approx(100 * math.exp(-0.25), abs=1e-9)


def test_perfect_translations():
    result = scores(REFERENCES, REFERENCES, language="de")
    assert [result[name] for name in ("bleu", "chrf", "tokenised_bleu")] == [pytest.approx(100)] * 3


def test_sacrebleu_and_chrf_are_what_sacrebleu_says():
    result = scores(HYPOTHESES, REFERENCES, language="de")
    assert result["bleu"] == sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score
    assert result["chrf"] == sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES]).score
    version = sacrebleu.__version__
    assert result["bleu_signature"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{version}"
    assert result["chrf_signature"] == f"nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{version}"
    assert result["tokenised_bleu_signature"].startswith(
        "lower-cased|normalize-punctuation.de|tokenizer.de|sacremoses:")
    assert result["tokenised_bleu_signature"].endswith(f"tok:none|smooth:none|version:{version}")


def test_tokenised_bleu_is_the_formula_on_the_tokens():
    tokenised = [moses_tokenised(texts, "de") for texts in (HYPOTHESES, REFERENCES)]
    result = scores(HYPOTHESES, REFERENCES, language="de")
    assert result["tokenised_bleu"] == pytest.approx(plain_bleu(*tokenised), abs=1e-9)
    assert abs(result["tokenised_bleu"] - result["bleu"]) > 0.1


def test_tokenised_bleu_ignores_capitals_and_kinds_of_quotation_marks():
    result = scores(["ein Mann sagt \"ja\" zu ihr"], ["Ein Mann sagt „Ja“ zu ihr"], language="de")
    assert result["tokenised_bleu"] == pytest.approx(100) and result["bleu"] < 60


def test_tokenised_bleu_is_not_smoothed():
    result = scores(["a b c x e f g"], ["a b c d e f g"], language="en")
    assert result["tokenised_bleu"] == 0 < result["bleu"]


@pytest.mark.parametrize(("language", "text", "tokens"), [
    # What Moses' lowercase.perl, normalize-punctuation.perl and tokenizer.perl print.
    ("de", "Er sagte: „Nein.“", "er sagte : &quot; nein &quot; ."),
    ("de", "Ein Mann (links) hat's am 3. Mai gesehen.", "ein mann ( links ) hat &apos; s am 3. mai gesehen ."),
    ("de", "Ein 3,5-Liter-Motor & mehr ...", "ein 3,5-liter-motor &amp; mehr ..."),
    ("en", "He said \"no\", didn't he?", "he said &quot; no , &quot; didn &apos;t he ?"),
    ("fr", "L'homme dit « non » à l\u2019œuvre.", "l&apos; homme dit &quot; non &quot; à l &quot; œuvre ."),
])
def test_tokens_are_those_of_moses(language, text, tokens):
    assert moses_tokenised([text], language)[0].split() == tokens.split()


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match="2 translations and 1 references; expected equal numbers"):
        scores(["a", "b"], ["a"], language="en")
    with pytest.raises(ValueError, match="0 translations and 0 references"):
        scores([], [], language="en")
    with pytest.raises(ValueError, match="does not know the language 'xx'; expected one of .*de, .*en, "):
        scores(["a"], ["a"], language="xx")
    for package in ("sacrebleu", "sacremoses"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ImportError, match=r'needs: pip install "transformer_jax\[eval\]"'):
                scores(["a"], ["a"], language="en")


# The numbers of tokens that the README of the repository multi30k/dataset gives.
@pytest.mark.parametrize(("split", "language", "num_tokens"), [
    ("test_2016_flickr", "de", 12_103), ("test_2016_flickr", "en", 12_968), ("test_2016_flickr", "fr", 13_988),
    ("val", "de", 12_828), ("val", "en", 13_308), ("val", "fr", 14_381),
])
def test_multi30k_has_the_published_tokens(corpora, split, language, num_tokens):
    with gzip.open(corpora / "multi30k" / f"{split}.{language}.gz", "rt", encoding="utf-8") as stream:
        lines = stream.read().split("\n")[:-1]
    assert sum(len(line.split()) for line in moses_tokenised(lines, language)) == num_tokens


def test_scores_of_damaged_references(corpora):
    with gzip.open(corpora / "multi30k" / "test_2016_flickr.de.gz", "rt", encoding="utf-8") as stream:
        references = stream.read().split("\n")[:-1]
    rng = random.Random(0)
    hypotheses = [" ".join(word for word in line.split() if rng.random() < 0.9) for line in references]
    result = scores(hypotheses, references, language="de")
    tokenised = [moses_tokenised(texts, "de") for texts in (hypotheses, references)]
    assert result["tokenised_bleu"] == pytest.approx(plain_bleu(*tokenised), abs=1e-9)
    assert result["bleu"] == sacrebleu.corpus_bleu(hypotheses, [references]).score
