"""`workbench demo`: the desks for a room, from one loaded model."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from typing import Any

from workbench.cli.saying import count


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser of `workbench`; it keeps no runs, so `common` is not for it."""
    room = commands.add_parser("demo", help="serve the desks to a room from one loaded model")
    room.add_argument("desks", nargs="*", metavar="DESK", help="such as steering (default: every desk)")
    room.add_argument("--model", default="organism", help="organism, tiny:FAMILY, a folder or a hub name")
    room.add_argument("--host", default="127.0.0.1", help="the address to serve at (default: this machine alone)")
    room.add_argument("--port", type=int, default=8866, help="0: any that is free (default: %(default)s)")
    room.add_argument("--visitors", type=count, default=20, metavar="N", help="seats (default: %(default)s)")
    room.set_defaults(action=demo)


def demo(arguments: argparse.Namespace) -> int:
    """Load the model, serve the desks until interrupted, and say where."""
    from workbench.room.serving import Room, chosen, is_loopback, open_port, serve
    from workbench.subject import Subject

    kinds = chosen(arguments.desks)
    opened = open_port(arguments.host, arguments.port)  # a port in use is told before the model is loaded
    if not is_loopback(arguments.host):
        print(
            f"workbench: {arguments.host} can be reached from other machines, without a password or encryption. "
            "Visitors can't run code or read files, but everybody who reaches this port can use the model.",
            file=sys.stderr,
        )
    room = Room(Subject.open(arguments.model), kinds, arguments.visitors)
    for name, why in room.missing.items():
        print(f"no {name} desk for this model: {why}")
    host, port = opened.getsockname()[:2]
    print(f"the room is open: http://{f'[{host}]' if ':' in host else host}:{port}   (Ctrl-C closes it)", flush=True)
    with suppress(KeyboardInterrupt):
        serve(room, opened)
    print("the room is closed")
    return 0
