"""Attention variants to import instead of writing: `masks` for mask_mod, `score_mods` for score_mod."""
from flexref.variants import masks, score_mods

__all__ = ["masks", "score_mods"]
