"""The published formats of demonstrations, prompts and comparisons.

They are read from objects of JSON files, or from dicts.
"""

import dataclasses
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformer_jax.data.conversations import Message, as_prompt
from transformer_jax.data.message_forms import check_unread, messages_of
from transformer_jax.data.records import found_keys, read_records, text_of, texts_of
from transformer_jax.json_files import located

Example = TypeVar("Example")

DEMONSTRATIONS = (
    "`messages` (or `conversations`, as ShareGPT has them); `prompt` and `response` or `completion`; `instruction`, "
    "optionally `input`, and `output`; or `question`, optionally `context`, and `answers`"
)
COMPARISONS = "`chosen` and `rejected`, or `responses`, together with the prompt"
_CONVERSATIONS = ("messages", "conversations")
_PROMPTS = (*_CONVERSATIONS, "prompt", "instruction", "question")
_ANSWERS = ("response", "completion", "output", "answer", "answers")
_SYSTEM = ("system", "system_prompt", "system_message")
_TURN = re.compile(r"\n\n(Human|Assistant): ?")  # the format of Anthropic's HH-RLHF


def read_demonstrations(path: str | Path) -> list[tuple[Message, ...]]:
    """Reads conversations to learn from.

    Each object has one of these forms:

    * ``messages``: a list of objects with ``role`` and ``content``. The last message is from the
      assistant. A message of the assistant with ``"weight": 0`` is part of the text, but is not
      learned.
    * ``conversations`` (ShareGPT): the same with ``from`` ("human", "gpt", "system" ...) and
      ``value``.
    * ``prompt`` and ``response``, or ``completion`` as in TRL: texts or lists of messages. The
      assistant's messages in the prompt are not learned.
    * ``instruction``, ``input`` and ``output`` (Alpaca): the user's message is the instruction; if
      the input is not empty, a blank line and the input follow.
    * ``question``, ``context`` and ``answers`` (FaQuAD, SQuAD): the user's message is the context,
      a blank line and the question. The assistant gives the first answer. The answers are a list of
      texts, or the list under ``text`` in an object. The questions may also be inside an object
      with ``data``, ``paragraphs`` and ``qas``, as in the published files of SQuAD.

    A text under ``system`` or ``system_prompt`` in the object becomes the first message. The keys
    ``answer``, ``output``, ``response`` ... for the assistant's text can be combined with any of
    these prompts.

    Args:
      path: A file with one JSON object on each line, or with a list of objects, possibly compressed
        with gzip.

    Returns:
      One conversation for each object.

    Raises:
      ValueError: If an object is not valid: bad JSON, a different form, an unknown role, an empty
        message, tool calls, a conversation that does not end with the assistant, or nothing to
        learn. The message gives the file and the number of the line or object.
    """
    return read_examples(path, demonstration_of)


def read_examples(path: str | Path, read: Callable[[Mapping[str, Any]], Example]) -> list[Example]:
    """Returns what ``read`` makes of every object of a file. If ``read`` raises ValueError, the
    file and the number of the line or object are added to the message."""
    examples = []
    for where, record in read_records(path):
        for place, part in _parts(record, where):
            with located(place):
                examples.append(read(part))
    return examples


def _parts(record: Mapping[str, Any], where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the questions of the published files of SQuAD, each with its place and its context.

    There an object has articles under ``data``, an article has ``paragraphs``, and a paragraph has
    its ``context`` and questions under ``qas``. Any other record is its only part.
    """
    inside = {"data": ("paragraphs", "qas"), "paragraphs": ("qas",), "qas": ("question",)}
    key = next((key for key, wanted in inside.items() if isinstance(parts := record.get(key), list) and parts and all(
        isinstance(part, Mapping) and not part.keys().isdisjoint(wanted) for part in parts)), None)
    if key is None:
        yield where, record
        return
    for index, part in enumerate(record[key]):
        place = f"{where}, {key}[{index}]"
        if key == "qas":
            yield place, {"context": record.get("context"), **part}
        else:
            yield from _parts(part, place)


def demonstration_of(record: Mapping[str, Any]) -> tuple[Message, ...]:
    """Converts a record in one of the forms of ``read_demonstrations`` to a conversation that ends
    with the assistant. Raises ValueError if the record is not valid."""
    key = _first(record, _CONVERSATIONS)
    if key is None:
        if isinstance(record.get("label"), bool):
            raise ValueError("`label` marks answers as good or bad, and a bad answer must not be learned: "
                             "remove the records with bad answers, and the label")
        prompt = [dataclasses.replace(message, is_learned=False) if message.role == "assistant" else message
                  for message in _asked(record)]
        messages = (*prompt, *_answer(record))
    else:
        messages = _with_system(record, messages_of(record, key))
    if messages[-1].role != "assistant":
        raise ValueError(f"the last message is the {messages[-1].role}'s; a demonstration ends with the assistant")
    if not any(message.role == "assistant" and message.is_learned for message in messages):
        raise ValueError("every message of the assistant has weight 0, so there is nothing to learn")
    return messages


def question_of(record: Mapping[str, Any]) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """Converts a record in one of the forms of ``read_demonstrations`` to a prompt and all its right
    answers, which are several in SQuAD. Raises ValueError if the record is not valid."""
    *prompt, answer = demonstration_of(record)
    key = _first(record, ("answers", "answer"))
    return tuple(prompt), (answer.content,) if key is None else tuple(_all_answers(record, key))


def prompt_of(record: Mapping[str, Any]) -> tuple[Message, ...]:
    """Converts a record in one of the forms of ``read_demonstrations`` or ``read_comparisons`` to a
    prompt, without the answer. Raises ValueError if the record is not valid."""
    return ranked_of(record)[0] if _first(record, ("chosen", "rejected")) else _asked(record)


def _asked(record: Mapping[str, Any]) -> tuple[Message, ...]:
    """Returns the prompt of a record in one of the forms of ``read_demonstrations``."""
    key = _first(record, _PROMPTS)
    if key in _CONVERSATIONS or (key is not None and isinstance(record[key], list)):
        messages = messages_of(record, key)
        return as_prompt(_with_system(record, messages[:-1] if messages[-1].role == "assistant" and key != "prompt"
                                      else messages))
    check_unread(record)
    if key == "prompt":
        parts = [text_of(record, "prompt")]
    elif key == "instruction":
        further = [text_of(record, key) for key in ("input", "context") if record.get(key) is not None]
        parts = [text_of(record, "instruction"), *further]
    elif key == "question":
        parts = ["" if record.get("context") is None else text_of(record, "context"), text_of(record, "question")]
    else:
        raise ValueError(f"{found_keys(record)}; expected {DEMONSTRATIONS}")
    asked = as_prompt("\n\n".join(part for part in parts if part.strip()))
    return as_prompt(_with_system(record, asked))


def ranked_of(record: Mapping[str, Any]) -> tuple[tuple[Message, ...], tuple[str, ...], tuple[int, ...] | None]:
    """Converts a record in one of the forms of ``read_comparisons`` to the prompt, the answers with
    the best one first, and their ranks or None. Raises ValueError if the record is not valid."""
    if _first(record, ("chosen", "rejected")) is None:
        return _asked(record), *_ordered(record)
    has_prompt = _first(record, _PROMPTS) is not None
    sides: list[Any] = [record.get(key) for key in ("chosen", "rejected")]
    if all(isinstance(side, Mapping) for side in sides):  # a single message instead of a list
        sides = [[side] for side in sides]
        record = {**record, "chosen": sides[0], "rejected": sides[1]}
    if has_prompt and not all(isinstance(side, list) for side in sides):
        return _asked(record), (text_of(record, "chosen"), text_of(record, "rejected")), None
    if all(isinstance(side, list) for side in sides):
        chosen, rejected = messages_of(record, "chosen"), messages_of(record, "rejected")
    elif all(isinstance(side, str) and side.startswith("\n\nHuman:") for side in sides):
        chosen, rejected = _turns(sides[0]), _turns(sides[1])
    else:
        raise ValueError(f"{found_keys(record)}; expected a prompt, or whole conversations under `chosen` and "
                         "`rejected`: lists of messages, or texts of which each turn begins with a blank line and "
                         "'Human:' or 'Assistant:'")
    common = next((place for place, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other),
                  min(len(chosen), len(rejected)))
    for key, side in (("chosen", chosen), ("rejected", rejected)):
        rest = [message.role for message in side[common:]]
        if rest != ["assistant"]:
            raise ValueError(f"in {key!r}, the roles of the messages that differ from the other answer are "
                             f"{rest or 'none'}; expected that only the last message differs, and that its role is "
                             "assistant")
    prompt = _with_system(record, chosen[:common]) if common else ()
    if has_prompt:
        asked = _asked(record)
        if prompt and prompt[-len(asked):] != asked:
            raise ValueError("the prompt is not what the messages of `chosen` and `rejected` begin with")
        prompt = prompt or asked
    return as_prompt(prompt), (chosen[-1].content, rejected[-1].content), None


def _with_system(record: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Puts the system's text of the record, if there is one, before the messages."""
    key = _first(record, _SYSTEM)
    if key is None or (isinstance(record[key], str) and not record[key].strip()):
        return messages
    system = text_of(record, key)
    if messages and messages[0].role == "system":
        if messages[0].content == system:
            return messages
        raise ValueError(f"the record has a `{key}` text, but its messages begin with a different one; remove "
                         "one of them")
    return (Message("system", system), *messages)


def _answer(record: Mapping[str, Any]) -> tuple[Message, ...]:
    """Returns the messages of the assistant's answer in a record."""
    found = [key for key in _ANSWERS if record.get(key) is not None]
    if len(found) > 1:
        raise ValueError(f"{' and '.join(map(repr, found))} could both be the answer; remove one of them")
    usual = "response" if "prompt" in record else "output" if "instruction" in record else "answers"
    key = found[0] if found else usual
    if key in ("response", "completion") and isinstance(record.get(key), list):
        return messages_of(record, key)
    return (Message("assistant", _first_answer(record, key) if key in ("answer", "answers") else text_of(record, key)),)


def _first_answer(record: Mapping[str, Any], key: str) -> str:
    """Returns the first of the texts of ``answers`` or ``answer``."""
    return _all_answers(record, key)[0]


def _all_answers(record: Mapping[str, Any], key: str) -> list[str]:
    """Returns the texts of ``answers`` or ``answer``, which have several published forms."""
    answers = record.get(key)
    if isinstance(answers, list) and answers and all(isinstance(answer, Mapping) for answer in answers):
        return [text for answer in answers for text in _all_answers({key: answer}, key)]
    if isinstance(answers, Mapping):  # SQuAD also stores `answer_start` in this object
        record, key, answers = answers, "text", answers.get("text")
    if isinstance(answers, str):
        return [answers]
    if answers == []:
        raise ValueError("the question has no answer, as in SQuAD 2.0, so there is nothing to learn: remove it")
    return texts_of(record, key)


def _turns(text: str) -> tuple[Message, ...]:
    """Splits a text in the format of HH-RLHF into messages."""
    _, *parts = _TURN.split(text)
    roles = ("user" if name == "Human" else "assistant" for name in parts[::2])
    return tuple(Message(role, content.strip()) for role, content in zip(roles, parts[1::2], strict=True))


def _ordered(record: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Returns ``responses`` with the best one first, and their ranks if the record has any."""
    if record.get("responses") is None:
        raise ValueError(f"no list of texts under the key 'responses'; {found_keys(record)}; expected {COMPARISONS}")
    responses, ranks = texts_of(record, "responses"), record.get("ranks")
    if ranks is None and record.get("scores") is not None:
        raise ValueError("`scores` are not read, so that the order of the responses would count instead: give `ranks`, "
                         "of which 1 is the best, or put the best response first and remove the scores")
    if ranks is None:
        return tuple(responses), None
    if not isinstance(ranks, list) or not all(type(rank) is int for rank in ranks) or len(ranks) != len(responses):
        raise ValueError(f"ranks {reprlib.repr(ranks)} are not {len(responses)} integers, one for each response")
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    return tuple(responses[place] for place in order), tuple(ranks[place] for place in order)


def _first(record: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """Returns the first key that has a value. Some files write null for empty columns."""
    return next((key for key in keys if record.get(key) is not None), None)
