"""Packing: several short examples share a row, and segment ids tell them apart."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int, Int32

_OPEN_ROWS = 64  # rows that may still get examples; the limit bounds time and memory for a large corpus


class _HasSpecialTokens(Protocol):
    """A tokenizer whose special tokens may be None."""

    @property
    def pad_id(self) -> int | None: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def mask_id(self) -> int | None: ...


def padding_id(tokenizer: _HasSpecialTokens) -> int:
    """Returns the token that fills the positions of a row that hold no text.

    Many decoders (GPT-2, Llama, Mistral) have no padding token. Segment ids mask these positions in
    attention and in the loss, so any token can be used; then this is ``eos_id`` or 0.

    Args:
      tokenizer: The tokenizer.

    Returns:
      The token id.
    """
    return next((token for token in (tokenizer.pad_id, tokenizer.eos_id) if token is not None), 0)


def needed_ids(tokenizer: _HasSpecialTokens, purpose: str, **names: str) -> list[int]:
    """Returns special tokens that are required.

    Args:
      tokenizer: The tokenizer that has the tokens.
      purpose: What they are needed for, for the error message.
      **names: The attributes to return, in order, each with a usual name of the token.

    Returns:
      The token ids.

    Raises:
      ValueError: If the tokenizer does not have one of the tokens.
    """
    found = {name: getattr(tokenizer, name) for name in names}
    missing = [f"{usual} ({name})" for name, usual in names.items() if found[name] is None]
    if missing:
        raise ValueError(f"{purpose} needs special tokens that this tokenizer does not have: {', '.join(missing)}; "
                         "name them in tokenizer_config.json, or use a tokenizer that has them")
    return list(found.values())


def pack(lengths_NK: Int[np.ndarray, "N K"],
         capacities_K: Sequence[int] | Int[np.ndarray, " K"]) -> Int32[np.ndarray, " N"]:
    """Assigns each example to the first open row that has room for it.

    Args:
      lengths_NK: The number of tokens of each of N examples on each of K sides, such as source and
        target. All sides of an example go to the same row.
      capacities_K: The number of tokens in a row, for each side.

    Returns:
      The row of each example, int32 [N]. Rows are numbered from 0 without gaps.

    Raises:
      ValueError: If an example is longer than a row.
    """
    lengths_NK, capacities_K = np.asarray(lengths_NK), np.asarray(capacities_K)
    if (lengths_NK > capacities_K).any():
        longest = int(np.flatnonzero((lengths_NK > capacities_K).any(1))[0])
        raise ValueError(f"example {longest} has {lengths_NK[longest].tolist()} tokens, more than the "
                         f"{capacities_K.tolist()} of a row")
    rows_N = np.zeros(len(lengths_NK), np.int32)
    room_RK = np.zeros((0, len(capacities_K)), np.int64)
    numbers_R = np.zeros(0, np.int32)
    num_rows = 0
    for index, lengths_K in enumerate(lengths_NK):
        fits_R = np.flatnonzero((room_RK >= lengths_K).all(1))
        if fits_R.size:
            place = fits_R[0]
        else:
            if len(numbers_R) == _OPEN_ROWS:  # the fullest row is closed
                closed = room_RK.sum(1).argmin()
                room_RK, numbers_R = np.delete(room_RK, closed, axis=0), np.delete(numbers_R, closed)
            room_RK, numbers_R = np.vstack([room_RK, capacities_K]), np.append(numbers_R, np.int32(num_rows))
            num_rows += 1
            place = len(numbers_R) - 1
        room_RK[place] -= lengths_K
        rows_N[index] = numbers_R[place]
    return rows_N


def pack_rows(examples: Sequence[Int[np.ndarray, "C length"]],
              length: int) -> tuple[Int32[np.ndarray, "C R T"], Int32[np.ndarray, "R T"]]:
    """Copies examples into rows, which ``pack`` assigns.

    Args:
      examples: Arrays [C, n], with C values for each of n positions; n is at most ``length``.
      length: T, the number of positions in a row.

    Returns:
      The rows, int32 [C, R, T], and segment ids, int32 [R, T]: 1, 2, ... for the examples of a row.
      Positions without an example are 0.
    """
    rows_N = pack(np.array([example.shape[1:] for example in examples]), [length])
    values_CRT = np.zeros((len(examples[0]), rows_N.max() + 1, length), np.int32)
    segment_ids_RT = np.zeros(values_CRT.shape[1:], np.int32)
    ends_R, counts_R = np.zeros((2, len(segment_ids_RT)), int)
    for example, row in zip(examples, rows_N, strict=True):
        place = slice(ends_R[row], ends_R[row] + example.shape[1])
        counts_R[row] += 1
        values_CRT[:, row, place] = example
        segment_ids_RT[row, place] = counts_R[row]
        ends_R[row] = place.stop
    return values_CRT, segment_ids_RT
