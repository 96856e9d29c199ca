"""``python -m hpdm``."""

from hpdm.cli import main

main()
