"""A server on a real socket, for clients that need one."""

import contextlib
import threading
import time
from collections.abc import Iterator

from gptoss_jax.server.app import create_app
from gptoss_jax.server.lifecycle import Server, bind
from gptoss_jax.server.service import Service


@contextlib.contextmanager
def live_server(service: Service) -> Iterator[str]:
    """Serves until the end of the block; yields the server's address."""
    bound = bind("127.0.0.1", 0)
    server = Server(create_app(service))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server does not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        bound.close()
