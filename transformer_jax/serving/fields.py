"""The fields of a request's JSON body, and the errors of the API."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from typing import Any

from transformer_jax.settings import shown


class ApiError(Exception):
    """An error in the form that the OpenAI API returns.

    Attributes:
      status: the status code of the HTTP response.
      code: a short name of the error, or ``None``.
      param: the field of the request that is wrong, or ``None``.
    """

    _TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}  # noqa: RUF012

    def __init__(self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """Returns the JSON body of the response."""
        kind = self._TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


async def read_body(stream: AsyncIterator[bytes], most_bytes: int, seconds: float) -> bytes:
    """Reads the body of a request.

    Raises:
      ApiError: if the body is too large, or has not arrived in time.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in stream:
                body += part
                if len(body) > most_bytes:
                    raise ApiError(f"the body has more than {most_bytes} bytes", status=413, code="request_too_large")
    except TimeoutError:
        raise ApiError(f"the body did not arrive within {seconds:g} s", status=408, code="timeout") from None
    return bytes(body)


class Fields:
    """Reads fields with checks. A field that is null has its default value."""

    def __init__(self, body: Any):
        """Takes the parsed body.

        Raises:
          ApiError: if it is not a JSON object.
        """
        if not isinstance(body, Mapping):
            raise ApiError(f"the body is {_kind(body)}; expected a JSON object")
        self._body = body

    def get(self, name: str, default: Any = None) -> Any:
        """Returns the value of a field without a check."""
        value = self._body.get(name)
        return default if value is None else value

    def number(self, name: str, default: float, least: float = -math.inf, most: float = math.inf) -> float:
        """Returns a number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise ApiError(f"{name}={shown(value)} must be a number{_range(least, most)}", param=name)
        return value

    def whole(self, name: str, default: Any, least: float = -math.inf, most: float = math.inf) -> Any:
        """Returns a whole number; the default may be None."""
        value = self.get(name, default)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not default and not (is_whole and least <= value <= most):
            raise ApiError(f"{name}={shown(value)} must be a whole number{_range(least, most)}", param=name)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """Returns true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ApiError(f"{name}={shown(value)} must be true or false", param=name)
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """Returns a string."""
        value = self.get(name, default)
        if not isinstance(value, str):
            raise ApiError(f"{name} is missing; expected a string" if value is None else
                           f"{name}={shown(value)} must be a string", param=name)
        return value

    def texts(self, name: str, most: int | None = None) -> list[str]:
        """Returns a list of strings, from a string or a list; without the field, an empty list."""
        value = self.get(name, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
            raise ApiError(f"{name}={shown(value)} must be a string or a list of strings", param=name)
        if most is not None and len(values) > most:
            raise ApiError(f"{name} has {len(values)} entries; at most {most} are allowed", param=name)
        return values

    def refuse(self, **reasons: str) -> None:
        """Raises ApiError if one of these fields has a value, for its reason."""
        for name, reason in reasons.items():
            if self.get(name):
                raise ApiError(f"{name} is not supported: {reason}", code="unsupported_parameter", param=name)


def _range(least: float, most: float) -> str:
    """Formats a range of numbers."""
    if math.isinf(least):
        return "" if math.isinf(most) else f", at most {most:g}"
    return f", at least {least:g}" if math.isinf(most) else f" from {least:g} to {most:g}"


def _kind(value: Any) -> str:
    """Names the type of a JSON value."""
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), "another value")
