"""Counts the programs that are compiled."""

import contextlib

import jax


@contextlib.contextmanager
def count_compiles():
    """Yields a list with one entry for each program that is compiled in the block."""
    compiles = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compiles.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiles
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
