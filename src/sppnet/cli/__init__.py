"""The command line: where everything meets."""

from sppnet.cli.program import main

__all__ = ["main"]
