"""Calls that may hang, each in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


async def in_thread(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Runs `function` in a thread of its own, which nobody waits for once the caller gave up: in a pool a call that
    hangs would take a worker from the others and keep the program from ending."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future = loop.create_future()
    context = contextvars.copy_context()

    def deliver(result: Any, error: BaseException | None) -> None:
        if not outcome.done():
            outcome.set_result((result, error))

    def run() -> None:
        result: Any = None
        error: BaseException | None = None
        try:
            result = context.run(function, *args, **kwargs)
        except SystemExit as raised:
            # a tool that runs what a policy wrote may exit: out of a task it would end the whole program
            error = RuntimeError(f"it called exit({raised.code!r})")
        except BaseException as raised:
            error = raised
        # The loop is closed where the search was cancelled meanwhile.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(deliver, result, error)

    threading.Thread(target=run, name="treegrpo-call", daemon=True).start()
    result, error = await outcome
    if error is not None:
        raise error
    return result
