"""`python -m ctlens.cli` is `ctlens`."""

from ctlens.cli import main

main()
