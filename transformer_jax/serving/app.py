"""The API over HTTP: routes, keys, limits and errors in the shapes of the OpenAI API."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import pathlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from absl import logging
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from transformer_jax.serving import inspecting
from transformer_jax.serving.completions import Completion, event, parse
from transformer_jax.serving.engine import ClosedError, QueueFullError
from transformer_jax.serving.fields import ApiError, Fields, read_body
from transformer_jax.serving.metrics import Metrics
from transformer_jax.serving.replies import Reply
from transformer_jax.serving.responses import ChoiceStream, choice, inspected
from transformer_jax.serving.served_model import ServedModel, find

_PAGE = pathlib.Path(__file__).with_name("chat.html")
# The page runs its own script and style, and talks to this server only.
_PAGE_POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
                "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
_SECONDS_BETWEEN_CHECKS = 1.0  # whether a client that waits is still there
_AT_ONCE = {"/v1/embeddings": inspecting.embeddings, "/v1/score": inspecting.scores,
            "/v1/translate": inspecting.translations, "/v1/fill-mask": inspecting.masks,
            "/v1/attention": inspecting.attention, "/tokenize": inspecting.tokens}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the server accepts.

    Attributes:
      api_key: the key that requests must have, or ``None``.
      hosts: the values that the header ``Host`` may have, without the port; empty for any. On the
        loopback address, this keeps pages of other sites from reading answers.
      body_bytes: the largest size of a request.
      seconds: the longest time for a reply.
      body_seconds: the longest time until a request has arrived.
    """

    api_key: str | None = None
    hosts: tuple[str, ...] = ()
    body_bytes: int = 4 << 20
    seconds: float = 600.0
    body_seconds: float = 60.0


def make_app(models: Mapping[str, ServedModel], limits: Limits = Limits()) -> Starlette:
    """Makes the application.

    Args:
      models: the models by their names; the first one answers requests that name none.
      limits: what the server accepts.

    Returns:
      The application, for any ASGI server. When it ends, it completes the replies that were
      requested.
    """
    server = _Server(models, limits)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        for served in models.values():
            if served.engine is not None:
                await run_in_threadpool(served.engine.close)

    def route(path: str, method: str, answer: Callable[[Request], Awaitable[Response]], *,
              is_open: bool = False) -> Route:
        async def respond(request: Request) -> Response:
            return await server.respond(path, request, answer, is_open)
        return Route(path, respond, methods=[method])

    routes = [route(path, "POST", server.at_once(function)) for path, function in _AT_ONCE.items()]
    routes += [route("/v1/completions", "POST", server.completion(is_chat=False)),
               route("/v1/chat/completions", "POST", server.completion(is_chat=True)),
               route("/v1/models", "GET", server.models), route("/v1/models/{model:path}", "GET", server.model),
               route("/metrics", "GET", server.metrics), route("/health", "GET", server.health, is_open=True),
               route("/", "GET", server.page, is_open=True)]

    async def unknown(request: Request, error: Any) -> Response:
        status = error.status_code
        reason = {404: "there is no such route", 405: "the route needs another method"}.get(status, error.detail)
        return _error(ApiError(f"{request.method} {request.url.path}: {reason}", status=status))

    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: unknown, 405: unknown})


class _Server:
    """The answers to the routes."""

    def __init__(self, models: Mapping[str, ServedModel], limits: Limits):
        self._models, self._limits, self._metrics = models, limits, Metrics(models)

    async def respond(self, path: str, request: Request, answer: Callable[[Request], Awaitable[Response]],
                      is_open: bool) -> Response:
        """Checks a request, answers it, and converts errors to responses."""
        begin = time.perf_counter()
        try:
            self._check_host(request)
            if not is_open:
                self._check_key(request)
            response = await answer(request)
        except ApiError as error:
            response = _error(error)
        except QueueFullError as error:
            response = _error(ApiError(str(error), status=429, code="queue_full"))
            response.headers["Retry-After"] = "1"
        except ClosedError as error:
            response = _error(ApiError(str(error), status=503, code="closing"))
        except ClientDisconnect:
            response = Response(status_code=499)
        except (ValueError, ImportError) as error:
            response = _error(ApiError(str(error)))
        except Exception as error:  # a mistake in this library; the client gets JSON, and the log the stack trace
            logging.exception("%s failed", path)
            response = _error(ApiError(f"the server failed: {type(error).__name__}", status=500))
        self._metrics.observe(path, response.status_code, time.perf_counter() - begin)
        return response

    def _check_host(self, request: Request) -> None:
        host = request.headers.get("host", "").rpartition(":")[0] or request.headers.get("host", "")
        if self._limits.hosts and host not in self._limits.hosts:
            raise ApiError(f"the host {host!r} is not this server", status=403)

    def _check_key(self, request: Request) -> None:
        key = self._limits.api_key
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            raise ApiError("the API key is missing or wrong; send the header Authorization: Bearer KEY", status=401,
                           code="invalid_api_key")

    async def _fields(self, request: Request) -> Fields:
        """Reads the JSON body."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind != "application/json":  # other types could be sent by pages of other sites
            raise ApiError(f"the content type is {kind!r}; send application/json", status=415)
        body = await read_body(request.stream(), self._limits.body_bytes, self._limits.body_seconds)
        try:
            return Fields(json.loads(body))
        except (ValueError, RecursionError) as error:
            raise ApiError(f"the body is not valid JSON: {error}") from error

    def at_once(self, function: Callable[[ServedModel, Fields], dict[str, Any]]) -> Any:
        """Makes the answer of a route that needs one call of the model, in a thread of its own."""
        async def answer(request: Request) -> Response:
            fields = await self._fields(request)
            served = find(self._models, fields.get("model"))
            return JSONResponse(await run_in_threadpool(function, served, fields))
        return answer

    def completion(self, *, is_chat: bool) -> Any:
        """Makes the answer of a route that generates texts."""
        async def answer(request: Request) -> Response:
            fields = await self._fields(request)
            # In a thread, because a long prompt or a large grammar takes time.
            completion = await run_in_threadpool(parse, find(self._models, fields.get("model")), fields,
                                                 is_chat=is_chat)
            changed = asyncio.Event()
            replies = _submit(completion, changed)
            if completion.streams:
                return StreamingResponse(self._events(completion, replies, changed), media_type="text/event-stream",
                                         headers={"Cache-Control": "no-store"})
            return await self._whole(request, completion, replies, changed)
        return answer

    async def _whole(self, request: Request, completion: Completion, replies: list[Reply],
                     changed: asyncio.Event) -> Response:
        """Waits for all texts, unless the client goes away."""
        deadline = time.monotonic() + self._limits.seconds
        try:
            while not all(reply.is_done for reply in replies):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), _SECONDS_BETWEEN_CHECKS)
                changed.clear()
                if await request.is_disconnected():
                    raise ClientDisconnect
                self._check_time(deadline)
            _raise_errors(replies)
        finally:
            for reply in replies:
                reply.cancel()
        def choices() -> list[dict[str, Any]]:
            return [choice(completion, index, reply) for index, reply in enumerate(replies)]

        made = choices() if completion.wanted is None else await run_in_threadpool(choices)
        return JSONResponse(completion.envelope(made) | {"usage": completion.usage(replies)})

    async def _events(self, completion: Completion, replies: list[Reply],
                      changed: asyncio.Event) -> AsyncIterator[str]:
        """Yields the parts of a stream as server-sent events. If the client goes away, the
        generator is closed, which cancels the replies."""
        deadline = time.monotonic() + self._limits.seconds
        streams = [ChoiceStream(completion, index, reply) for index, reply in enumerate(replies)]
        begin, is_first = time.perf_counter(), True
        try:
            if completion.passages:
                yield event(completion.envelope([], is_chunk=True) | {"passages": completion.described_passages()})
            while not all(stream.is_finished for stream in streams):
                await asyncio.wait_for(changed.wait(), max(deadline - time.monotonic(), 0.0))
                changed.clear()
                _raise_errors(replies)
                parts = [part for stream in streams if not stream.is_finished for part in stream.parts()]
                if parts and is_first:
                    self._metrics.first_token(time.perf_counter() - begin)
                    is_first = False
                if parts:
                    yield "".join(map(completion.event, parts))
            for index, reply in enumerate(replies) if completion.wanted is not None else ():
                found = await run_in_threadpool(inspected, completion, index, reply)
                yield event(completion.envelope([streams[index].empty_part() | found], is_chunk=True))
            if completion.includes_usage:
                yield event(completion.envelope([], is_chunk=True) | {"usage": completion.usage(replies)})
            yield "data: [DONE]\n\n"
        except TimeoutError:
            yield event(ApiError("the reply took too long", status=504, code="timeout").body())
        except (ApiError, ValueError) as error:
            yield event((error if isinstance(error, ApiError) else ApiError(str(error), status=500)).body())
        finally:
            for reply in replies:
                reply.cancel()

    def _check_time(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise ApiError(f"the reply took more than {self._limits.seconds:g} s", status=504, code="timeout")

    async def models(self, request: Request) -> Response:
        """Answers ``/v1/models``."""
        return JSONResponse({"object": "list", "data": [each.description() for each in self._models.values()]})

    async def model(self, request: Request) -> Response:
        """Answers ``/v1/models/NAME``."""
        return JSONResponse(find(self._models, request.path_params["model"]).description())

    async def health(self, request: Request) -> Response:
        """Answers ``/health``."""
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """Answers ``/metrics``."""
        body, content_type = self._metrics.text()
        return Response(body, headers={"Content-Type": content_type})

    async def page(self, request: Request) -> Response:
        """Answers ``/`` with the chat page."""
        return HTMLResponse(_PAGE.read_text("utf-8"), headers={"Content-Security-Policy": _PAGE_POLICY})


def _submit(completion: Completion, changed: asyncio.Event) -> list[Reply]:
    """Submits all texts of a request, or none."""
    loop, engine = asyncio.get_running_loop(), completion.served.generator()

    def listener() -> None:
        if not changed.is_set():  # otherwise the loop has yet to see the last change
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(changed.set)

    replies: list[Reply] = []
    try:
        for request in completion.requests:
            replies.append(engine.submit(request, listener))
    except BaseException:
        for reply in replies:
            reply.cancel()
        raise
    return replies


def _raise_errors(replies: list[Reply]) -> None:
    """Raises the error of the first reply that has failed."""
    for reply in replies:
        if reply.error is not None:
            raise ApiError(f"the text could not be generated: {reply.error}", status=500) from reply.error


def _error(error: ApiError) -> JSONResponse:
    """Makes the response for an error."""
    return JSONResponse(error.body(), status_code=error.status)
