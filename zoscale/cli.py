"""The command line: `zoscale train ...`."""

import sys
from collections.abc import Sequence

from zoscale.config import ConfigError, exit_with, parse_or_exit

_USAGE = """usage: zoscale COMMAND ...

commands:
  train    train as configured; `zoscale train --help` documents every option
"""


def train(argv: Sequence[str] | None = None, *, command: str = "zoscale train") -> int:
    """Train as the command line says; 0 when done, 2 for a mistake of the user."""
    from zoscale.methods import DEFAULTS, TABLES

    config = parse_or_exit(sys.argv[1:] if argv is None else argv, TABLES, DEFAULTS, command=command)
    from zoscale.run import run

    try:
        run(config)
    except ConfigError as error:
        exit_with(error, command)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        return train(arguments[1:])
    if arguments[:1] in (["--help"], ["-h"]):
        print(_USAGE, end="")
        return 0
    got = f"got {arguments[0]!r}" if arguments else "got nothing"
    print(f"zoscale: error: expected a command (train), {got}: see zoscale --help", file=sys.stderr)
    return 2
