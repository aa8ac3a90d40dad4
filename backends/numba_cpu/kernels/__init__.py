"""Kernel sources: real Numba files with named holes, and the few machine operations that Numba has no word for."""
