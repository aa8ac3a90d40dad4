"""Kernel sources, and what they call."""
