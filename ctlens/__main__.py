"""`python -m ctlens` is `ctlens`, and `accelerate launch -m ctlens train` trains with several processes."""

from ctlens.cli import main

main()
