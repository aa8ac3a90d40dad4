"""From a user's call to the engine that runs it, and why that one."""

from flexref.dispatch.attention import AuxOutput, AuxRequest, explain, flex_attention
from flexref.dispatch.varlen import varlen_attention

__all__ = ["AuxOutput", "AuxRequest", "explain", "flex_attention", "varlen_attention"]
