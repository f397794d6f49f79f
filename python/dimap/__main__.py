"""`python -m dimap` is the command `dimap`."""

from .cli import main

main()
