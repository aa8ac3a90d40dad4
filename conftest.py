"""The conformance suite's options and matrix, for every way of calling pytest."""

pytest_plugins = ["flexref.conformance.plugin"]
