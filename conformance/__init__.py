"""The suite that holds any backend to the reference; it knows no backend by name.

Shapes, modules and how to run it: README.md. `python -m flexref.conformance --backend NAME`.
"""
