"""Measures flexref beside torch in the same run. `python -m bench.run`."""
