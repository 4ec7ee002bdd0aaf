"""A real server over a real socket, in this process, for tests."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

from gptoss_jax.server import lifecycle
from gptoss_jax.server.app import create_app
from gptoss_jax.server.service import Service


@contextlib.contextmanager
def live_server(service: Service) -> Iterator[str]:
    """Serves on a free port; gives the server's address, such as `http://127.0.0.1:41231`."""
    bound = lifecycle.bind("127.0.0.1", 0)
    # A reader that stops is noticed after little data.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    server = lifecycle.Server(create_app(service))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Waits until a condition holds; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
