"""Attention variants to import instead of writing: `masks` for mask_mod, `score_mods` for score_mod."""
