"""Scores of translations: sacreBLEU, chrF, and the tokenised, lower-cased BLEU of the Multi30k
literature."""

from collections.abc import Sequence


def scores(hypotheses: Sequence[str], references: Sequence[str], *, language: str) -> dict[str, float | str]:
    """Scores a corpus of translations against one reference each.

    Tokenised BLEU is what `multi-bleu.perl` computes, without smoothing, of both sides prepared as
    the Multi30k task prepared its own: in small letters, then Moses' `normalize-punctuation.perl`,
    then its `tokenizer.perl`, which gives the published `.lc.norm.tok` files line by line. It
    compares with published numbers of that kind only.

    Args:
        hypotheses: Translations, as a reader sees them: not tokenised, with capitals.
        references: What they should be.
        language: The language of both, such as "de", by which Moses tokenises.

    Returns:
        From 0 to 100: `bleu` (sacreBLEU, cased, 13a), `chrf` (chrF2) and `tokenised_bleu`; with
        each, under its name and `_signature`, how it was computed.

    Raises:
        ImportError: sacrebleu or sacremoses is not installed.
        ValueError: no translation, not as many references, or a language that Moses does not know.

    Source: Papineni et al. 2002, "BLEU"; Popović 2015, "chrF"; Post 2018, "A Call for Clarity in
    Reporting BLEU Scores"; the repository multi30k/dataset, `scripts/task1-tokenize.sh`.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError('scoring translations needs: pip install "transformer_jax[eval]"') from error
    if len(hypotheses) != len(references) or not hypotheses:
        raise ValueError(
            f"{len(hypotheses):,} translations and {len(references):,} references; expected as many of both, at least 1"
        )
    hypotheses, references = list(hypotheses), list(references)
    bleu, chrf = sacrebleu.BLEU(), sacrebleu.CHRF()
    # `force` only silences the remark that the text is tokenised, which here it should be.
    multi_bleu = sacrebleu.BLEU(tokenize="none", smooth_method="none", force=True)
    tokenised = [moses_tokenised(texts, language) for texts in (hypotheses, references)]
    results = {}
    for name, metric, (translations, correct) in (
        ("bleu", bleu, (hypotheses, references)),
        ("chrf", chrf, (hypotheses, references)),
        ("tokenised_bleu", multi_bleu, tokenised),
    ):
        results[name] = metric.corpus_score(translations, [correct]).score
        results[f"{name}_signature"] = str(metric.get_signature())
    results["tokenised_bleu_signature"] = _moses_signature(language) + "|" + results["tokenised_bleu_signature"]
    return results


def moses_tokenised(texts: Sequence[str], language: str) -> list[str]:
    """Returns texts in small letters, their punctuation normalised and their tokens parted by
    spaces, as Moses does.

    In German, English, Spanish and French that is what Moses' own scripts give; in other languages
    sacremoses leaves stops beside quotation marks where they are.

    Raises:
        ImportError: sacremoses is not installed.
        ValueError: a language that Moses does not know.
    """
    try:
        import sacremoses
        from sacremoses.corpus import NonbreakingPrefixes
    except ImportError as error:
        raise ImportError('tokenising as Moses does needs: pip install "transformer_jax[eval]"') from error
    known = sorted(set(NonbreakingPrefixes().available_langs.values()))
    if language not in known:  # sacremoses would take English
        raise ValueError(f"Moses does not know the language {language!r}; expected one of {', '.join(known)}")
    normaliser = sacremoses.MosesPunctNormalizer(language, perl_parity=True)
    tokeniser = sacremoses.MosesTokenizer(language)
    # Perl's normaliser sees the line end too: only so a full stop leaves the quotation at the end
    # of a German line.
    lines = (normaliser.normalize(f"{text.lower()}\n") for text in texts)
    return [tokeniser.tokenize(line, return_str=True) for line in lines]


def _moses_signature(language: str) -> str:
    import sacremoses

    return f"lower-cased|normalize-punctuation.{language}|tokenizer.{language}|sacremoses:{sacremoses.__version__}"
