"""``python -m extfs.cli``."""

from extfs.cli import main

main()
