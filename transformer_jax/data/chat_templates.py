"""Chat templates of Hugging Face models.

A template writes a conversation as text. This module encodes that text, and finds the tokens that
the assistant says.
"""

import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer

# These private characters occur in no text.
_MARK = "\U0010fff0\U0010fff1"  # marks where the content of a message begins or ends
_PLACEHOLDER = "\U0010fff2{}\U0010fff3"  # replaces the name of a special token in a message
_BLOCK = "\U0010fff4\U0010fff5"  # encloses the text that a template marks as the assistant's
_MIN_SHARED_CHARS = 6  # of the end of a prompt, to find its place in the conversation
_SEARCHED_CHARS = 60  # before the content of a message, to find that place
_ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")


class ChatTemplate:
    """The Jinja template of a model, which writes a conversation in the format that the model was
    trained on.

    Templates are programs, so they run in Jinja's sandbox. They do not get today's date, so that
    the same conversation has the same tokens every day. If a message contains the name of a special
    token, the name is encoded as ordinary text.

    Raises:
      ImportError: If jinja2 is not installed.
      ValueError: If the source is not a valid Jinja template.
    """

    def __init__(self, source: str, tokenizer: HuggingFaceTokenizer, special_tokens: Mapping[str, str]):
        """Compiles a template.

        Args:
          source: The source of the template.
          tokenizer: The tokenizer that encodes the text of the template.
          special_tokens: The names of the special tokens, by the variable that the template uses,
            such as ``"eos_token"``.
        """
        import tokenizers

        self._template, self._error = _compiled(source)
        self._names = dict(special_tokens)
        written = cast(str, tokenizer.files["tokenizer.json"])
        self._tokenizer, self._literal = (tokenizers.Tokenizer.from_str(written) for _ in range(2))
        for tokenizer_copy in (self._tokenizer, self._literal):
            tokenizer_copy.no_truncation()
            tokenizer_copy.no_padding()
        self._literal.encode_special_tokens = True
        self._special = sorted((entry.content for entry in self._tokenizer.get_added_tokens_decoder().values()
                                if entry.special), key=len, reverse=True)
        pattern = "|".join(map(re.escape, self._special)) or "(?!)"
        self._special_pattern, self._turn_end = re.compile(pattern), re.compile(rf"\s*(?:{pattern})")

    def encode(self, messages: Sequence[Any]) -> tuple[list[int], list[bool]]:
        """Encodes a conversation.

        Args:
          messages: Objects with ``role``, ``content`` and ``is_learned``; see
            ``transformer_jax.data.Message``.

        Returns:
          The token ids, and for each token whether the model learns it. The learned tokens of a
          turn start where the assistant begins to speak, and end with the special token that ends
          the turn. If the template marks the assistant's text with ``{% generation %}``, these
          marks are used.

        Raises:
          ValueError: If the template refuses the conversation, or if the assistant's text cannot be
            found in its output.
        """
        template_inputs = self._template_messages(messages)
        text, blocks = self._render(template_inputs)
        turns = [number for number, message in enumerate(messages) if message.role == "assistant"]
        if len(blocks) == len(turns):
            spans = [block for block, turn in zip(blocks, turns, strict=True) if messages[turn].is_learned]
        else:
            spans = [self._span(template_inputs, turn, text) for turn in turns if messages[turn].is_learned]
        ids, offsets = self._tokens(text)
        learned = [any(begin < last and end > first for first, last in spans) for begin, end in offsets]
        return ids, learned

    def encode_prompt(self, messages: Sequence[Any]) -> list[int]:
        """Encodes a conversation that the assistant is to continue.

        Args:
          messages: The same as for ``encode``.

        Returns:
          The token ids.

        Raises:
          ValueError: If the template refuses the conversation.
        """
        return self._tokens(self._render(self._template_messages(messages), add_generation_prompt=True)[0])[0]

    @functools.cached_property
    def turn_end_ids(self) -> tuple[int, ...]:
        """The special token that ends a turn of the assistant, if the template writes one."""
        example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            text, _ = self._render(example)
            start, end = self._span(example, 1, text)
        except ValueError:
            return ()
        found = self._special_pattern.search(text[start:end])
        return () if found is None else (cast(int, self._tokenizer.token_to_id(found[0])),)

    def _template_messages(self, messages: Sequence[Any]) -> list[dict[str, str]]:
        """Returns the messages for the template, with placeholders for the names of special
        tokens."""
        return [{"role": message.role, "content": self._special_pattern.sub(
            lambda found: _PLACEHOLDER.format(self._special.index(found[0])), message.content)} for message in messages]

    def _render(self, template_inputs: list[dict[str, str]],
                add_generation_prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """Returns the text of the template, and the spans that ``{% generation %}`` encloses, in
        characters."""
        try:
            text = self._template.render(messages=template_inputs, tools=None, documents=None, **self._names,
                                         add_generation_prompt=add_generation_prompt)
        except (self._error, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"the model's chat template refuses the conversation: {error}") from error
        places = [found.start() - number for number, found in enumerate(re.finditer(f"[{_BLOCK}]", text))]
        return re.sub(f"[{_BLOCK}]", "", text), list(zip(places[::2], places[1::2], strict=True))

    def _span(self, template_inputs: list[dict[str, str]], turn: int, text: str) -> tuple[int, int]:
        """Returns the span, in characters, from the start of the assistant's text to the end of its
        turn."""
        content = template_inputs[turn]["content"]

        def text_around_mark(marked: str) -> tuple[str, str]:
            changed = [*template_inputs[:turn], {"role": "assistant", "content": marked}, *template_inputs[turn + 1:]]
            before, mark, after = self._render(changed)[0].partition(_MARK)
            if not mark or _MARK in after:
                raise ValueError("the model's chat template does not write the assistant's message exactly once and "
                                 f"unchanged: {content[:40]!r}; mark it in the template with {{% generation %}}")
            return before, after

        start, end = len(text_around_mark(_MARK + content)[0]), len(text) - len(text_around_mark(content + _MARK)[1])
        try:
            before = self._render(template_inputs[:turn], add_generation_prompt=True)[0]
        except ValueError:  # some templates refuse a part of a conversation
            before = ""
        # The header that the template writes before the assistant's text is not learned, but a
        # space that some templates write after the header is. Some templates move the system's text
        # to the last turn. Therefore only the end of the prompt is searched in the conversation.
        common, place = max((_common_ending(text[max(0, at - _SEARCHED_CHARS):at], before[-_SEARCHED_CHARS:]), at)
                            for at in range(max(0, start - _SEARCHED_CHARS), start + 1))
        start = place if common >= min(_MIN_SHARED_CHARS, len(before)) else start
        turn_end = self._turn_end.match(text, end)
        return start, turn_end.end() if turn_end else end

    def _tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the token ids of the template's text, and the span of each token, in
        characters."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        place = 0
        for number, part in enumerate(re.split(_PLACEHOLDER.format(r"(\d+)"), text)):
            shift = place
            if number % 2:
                place += len(_PLACEHOLDER.format(part))
                found = self._literal.encode(self._special[int(part)], add_special_tokens=False)
                offsets += [(shift, place)] * len(found.ids)
            else:
                place += len(part)
                found = self._tokenizer.encode(part, add_special_tokens=False)
                offsets += [(begin + shift, end + shift) for begin, end in found.offsets]
            ids += found.ids
        return ids, offsets


def with_chat_template(tokenizer: HuggingFaceTokenizer, source: str) -> HuggingFaceTokenizer:
    """Returns the tokenizer with the chat template of its model.

    Args:
      tokenizer: The tokenizer.
      source: The content of ``chat_template.jinja``. It takes precedence over a template in the
        settings of the tokenizer.

    Returns:
      A new tokenizer.
    """
    stored = json.loads(tokenizer.to_bytes()) | {"chat_template": source}
    return HuggingFaceTokenizer(json.dumps(stored, ensure_ascii=False, sort_keys=True).encode())


@functools.lru_cache(maxsize=4)  # so that a template is compiled once for all conversations
def chat_template_of(tokenizer: Any) -> ChatTemplate | None:
    """Returns the chat template in the files of a tokenizer.

    Args:
      tokenizer: Any tokenizer; only tokenizers from Hugging Face can have a template.

    Returns:
      The template, or None if there is none.

    Raises:
      ImportError: If jinja2 is not installed.
      ValueError: If the template is not valid.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return None
    files = tokenizer.files
    settings = json.loads(files["tokenizer_config.json"])
    source = files.get("chat_template.jinja", settings.get("chat_template"))
    if isinstance(source, list):  # before version 5, transformers wrote several templates with names
        named = [entry for entry in source if isinstance(entry, dict) and entry.get("name") == "default"]
        source = named[0].get("template") if named else None
    if source is None:
        return None
    if not isinstance(source, str):
        raise ValueError(f"the model's chat template is a {type(source).__name__}; expected a text")
    names = {f"{role}_token": settings.get(f"{role}_token") for role in _ROLES}
    names = {role: name.get("content") if isinstance(name, Mapping) else name for role, name in names.items()}
    return ChatTemplate(source, tokenizer, {role: name for role, name in names.items() if name is not None})


def _common_ending(one: str, other: str) -> int:
    """Returns the length of the longest ending that two texts share."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _compiled(source: str) -> tuple[Any, type[Exception]]:
    """Compiles a template. Returns it with the class of the errors that templates raise."""
    try:
        import jinja2
        from jinja2 import ext, nodes, parser, sandbox
    except ImportError as error:
        raise ImportError('reading a chat template needs: pip install "transformer_jax[hf]"') from error

    class Generation(ext.Extension):
        """Implements ``{% generation %}`` ... ``{% endgeneration %}`` around the assistant's
        text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: parser.Parser) -> list[nodes.Node]:
            next(parser.stream)
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in _BLOCK)
            return [begin, *body, end]

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        return environment.from_string(source), jinja2.TemplateError
    except jinja2.TemplateError as error:
        raise ValueError(f"the model's chat template is not a valid Jinja template: {error}") from error
