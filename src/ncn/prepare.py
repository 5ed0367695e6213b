"""`from ncn.prepare import prepare`."""

from ncn.data.prepare import prepare

__all__ = ["prepare"]
