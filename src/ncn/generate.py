"""`from ncn.generate import generate`."""

from ncn.inference.decoding import generate_tokens
from ncn.inference.generate import generate

__all__ = ["generate", "generate_tokens"]
