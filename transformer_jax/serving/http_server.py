"""Runs the application until a signal ends it."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Mapping
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from transformer_jax.serving.served_model import ServedModel
from transformer_jax.training.signals import SECONDS_OF_ONE_SIGNAL

_SECONDS_TO_END = 600  # the longest time for a reply
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class _Server(uvicorn.Server):
    """A server that SIGTERM and Ctrl-C end without an error: it takes no new connections, and
    completes the replies that were requested, unless a client does not read its reply. A second
    signal, more than a second later, ends it at once."""

    _first_signal = 0.0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles the signals while the server runs."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Ends the server, or ends it at once the second time."""
        if not self.should_exit:
            self._first_signal = time.monotonic()
        self.should_exit = True
        self.force_exit = time.monotonic() - self._first_signal > SECONDS_OF_ONE_SIGNAL


def serve(app: ASGIApp, models: Mapping[str, ServedModel], *, host: str, port: int) -> None:
    """Serves the application until SIGTERM or Ctrl-C.

    Args:
      app: the application.
      models: the models, for the message.
      host: the address.
      port: the port; 0 lets the system choose one.

    Raises:
      OSError: if the port is not free.
    """
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", lifespan="on", access_log=False,
                            timeout_graceful_shutdown=_SECONDS_TO_END)
    sock = config.bind_socket()
    shown = f"[{host}]" if ":" in host else host
    print(f"Serving {', '.join(models)} at http://{shown}:{sock.getsockname()[1]}", flush=True)
    _Server(config).run(sockets=[sock])
