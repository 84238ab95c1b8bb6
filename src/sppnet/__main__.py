"""The command line as ``python -m sppnet``."""

from sppnet.cli.main import main

main()
