"""The `ncn` command: thin verbs over the modules. Nothing heavy is imported before a verb needs it."""

from ncn.cli import models, demo, ab, report  # noqa: F401, I001  (each adds its verbs, in the order of the help)
from ncn.cli.app import app, main

__all__ = ["app", "main"]
