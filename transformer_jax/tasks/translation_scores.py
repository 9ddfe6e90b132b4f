"""Scores of translations: sacreBLEU, chrF, and the tokenised, lower-cased BLEU that papers on
Multi30k report."""

from collections.abc import Sequence


def scores(hypotheses: Sequence[str], references: Sequence[str], *, language: str) -> dict[str, float | str]:
    """Scores a corpus of translations, with one reference for each translation.

    Tokenised BLEU is computed as ``multi-bleu.perl`` computes it, without smoothing. Translations
    and references are prepared as in the Multi30k task: they are lower-cased, then Moses'
    ``normalize-punctuation.perl`` and ``tokenizer.perl`` process them. For the references of
    Multi30k this gives the published ``.lc.norm.tok`` files, line by line. Compare tokenised BLEU
    only with published numbers that were computed in the same way.

    Args:
      hypotheses: The translations as plain text: cased and not tokenised.
      references: The reference translations.
      language: The language of both, such as ``"de"``, whose rules Moses applies.

    Returns:
      ``bleu`` (sacreBLEU, cased, 13a), ``chrf`` (chrF2) and ``tokenised_bleu``, from 0 to 100, and
      the signature of each, such as ``bleu_signature``, which says how it was computed.

    Raises:
      ImportError: If sacrebleu or sacremoses is not installed.
      ValueError: If there are no translations, the number of references is different, or Moses does
        not know the language.

    Source: Papineni et al. 2002, "BLEU"; Popović 2015, "chrF"; Post 2018, "A Call for Clarity in
    Reporting BLEU Scores"; the repository multi30k/dataset, ``scripts/task1-tokenize.sh``.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError('scoring translations needs: pip install "transformer_jax[eval]"') from error
    if len(hypotheses) != len(references) or not hypotheses:
        raise ValueError(
            f"{len(hypotheses):,} translations and {len(references):,} references; expected equal numbers, at least 1"
        )
    hypotheses, references = list(hypotheses), list(references)
    bleu, chrf = sacrebleu.BLEU(), sacrebleu.CHRF()
    # ``force`` only disables the warning that the text is tokenised, which is intended here.
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
    """Lower-cases texts, normalises their punctuation and separates their tokens by spaces, as
    Moses does.

    For German, English, Spanish and French the result equals that of Moses' own scripts. For other
    languages, sacremoses does not move a full stop that stands next to a quotation mark.

    Args:
      texts: The texts.
      language: The language of the texts, such as ``"de"``.

    Returns:
      The processed texts.

    Raises:
      ImportError: If sacremoses is not installed.
      ValueError: If Moses does not know the language.
    """
    try:
        import sacremoses
        from sacremoses.corpus import NonbreakingPrefixes
    except ImportError as error:
        raise ImportError('tokenising as Moses does needs: pip install "transformer_jax[eval]"') from error
    known = sorted(set(NonbreakingPrefixes().available_langs.values()))
    if language not in known:  # otherwise sacremoses would silently use English
        raise ValueError(f"Moses does not know the language {language!r}; expected one of {', '.join(known)}")
    normaliser = sacremoses.MosesPunctNormalizer(language, perl_parity=True)
    tokeniser = sacremoses.MosesTokenizer(language)
    # Moses' Perl script reads each line with its line end. Without the line end, a full stop at the
    # end of a German line would stay inside the quotation marks.
    lines = (normaliser.normalize(f"{text.lower()}\n") for text in texts)
    return [str(tokeniser.tokenize(line, return_str=True)) for line in lines]


def _moses_signature(language: str) -> str:
    """Returns how the text was prepared for tokenised BLEU, in the format of sacreBLEU's
    signatures."""
    import sacremoses

    return f"lower-cased|normalize-punctuation.{language}|tokenizer.{language}|sacremoses:{sacremoses.__version__}"
