"""`python -m raytx`."""

from raytx.cli import main

main()
