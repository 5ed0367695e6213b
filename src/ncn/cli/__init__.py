"""The `ncn` command: thin verbs over the modules. Nothing heavy is imported before a verb needs it."""

from ncn.cli import prepare, train, generate, look, diagnose, demo, ab, report, scaling, steer, domains, adapt  # noqa: F401, I001  (each adds its verbs, in this order)
from ncn.cli.app import app, main

__all__ = ["app", "main"]
