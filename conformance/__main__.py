"""`python -m flexref.conformance --backend NAME`: run the suite on a backend and print the matrix.

Exits with 0 only if no test failed and something was compared for every backend that was named.
"""

from __future__ import annotations

import argparse
import sys

import pytest


def main(arguments: list[str] | None = None) -> int:
    """Run the suite; arguments that are not the suite's own go to pytest."""
    parser = argparse.ArgumentParser(prog="python -m flexref.conformance", description=__doc__)
    parser.add_argument(
        "--backend",
        action="append",
        default=[],
        help="a name, or the dotted path of a module; default: all found",
    )
    parser.add_argument(
        "--profile", choices=("quick", "full"), default="quick", help="25 or 250 examples a property"
    )
    parser.add_argument("--json", metavar="PATH", help="write the matrix as JSON")
    own, others = parser.parse_known_args(arguments)
    options = ["-p", "flexref.conformance.plugin", "--pyargs", "flexref.conformance", "-q", "--tb=short"]
    options += [f"--backend={name}" for name in own.backend] + [f"--conformance-profile={own.profile}"]
    options += [f"--conformance-json={own.json}"] if own.json else []
    return int(pytest.main([*options, *others]))


if __name__ == "__main__":
    sys.exit(main())
