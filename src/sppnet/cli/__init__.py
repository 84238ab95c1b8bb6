"""The command line: where everything meets."""

from sppnet.cli.main import main

__all__ = ["main"]
