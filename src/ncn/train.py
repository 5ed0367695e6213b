"""`from ncn.train import train`."""

from ncn.training.train import train

__all__ = ["train"]
