"""The network of the service under test: Python imports this first where PYTHONPATH names its directory.

Names resolve as the tests say, public addresses are servers of the tests, and every look-up and every connection
is written down, so that a test can tell that there was none.
"""

import json
import os
import socket
from pathlib import Path


def rule(directory):
    """`names.json`: name → its answers, one look-up after the other. `routes.json`: "host:port" → port here."""
    names = {name: list(answers) for name, answers in json.loads((directory / "names.json").read_text()).items()}
    routes = json.loads((directory / "routes.json").read_text())
    look_up, connect = socket.getaddrinfo, socket.socket.connect

    def note(**event):
        with (directory / "events").open("a") as events:
            events.write(f"{json.dumps(event)}\n")

    def getaddrinfo(host, port, *arguments, **options):
        note(looked_up=str(host))
        if host not in names:
            return look_up(host, port, *arguments, **options)
        answers = names[host]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [entry for address in found for entry in look_up(address, port, *arguments, **options)]

    def dial(connection, address):
        note(dialled=f"{address[0]}:{address[1]}")
        route = routes.get(f"{address[0]}:{address[1]}")
        return connect(connection, ("127.0.0.1", route) if route else address)

    socket.getaddrinfo, socket.socket.connect = getaddrinfo, dial


if "WEMM_TEST_NETWORK" in os.environ:
    rule(Path(os.environ["WEMM_TEST_NETWORK"]))
