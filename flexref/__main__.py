"""`python -m flexref demo | doctor | show FILE:FUNCTION`."""
from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": "run every variant on a real text, time it, check it, draw it",
    "doctor": "say which backends can run here, and what would mend the others",
    "show": "print a mod's program, its derivative, its source in every language, each backend's verdict",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0 only if all went well."""
    parser = argparse.ArgumentParser(prog="python -m flexref", description="FlexAttention with its meaning written down.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        # a command's module is imported only when it is the one asked for
        if name in arguments[:1]:
            importlib.import_module(f"flexref.cli.{name}").add_arguments(sub)
    options = parser.parse_args(arguments)
    try:
        status = importlib.import_module(f"flexref.cli.{options.command}").run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # whoever read has read enough, as `| head` does; what Python would still write at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


if __name__ == "__main__":
    sys.exit(main())
