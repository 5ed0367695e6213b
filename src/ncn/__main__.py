"""`python -m ncn` is the `ncn` command."""

from ncn.cli import main

main()
