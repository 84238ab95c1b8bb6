"""The program: its commands and its errors.

Heavy modules are imported inside the commands, so that ``sppnet --help`` answers at once.
"""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import sppnet.cli.options as opt
from sppnet import compiling
from sppnet.cli.backbone import backbone
from sppnet.cli.classify import classify
from sppnet.cli.console import note
from sppnet.cli.dataset import dataset
from sppnet.cli.detect import detect
from sppnet.cli.embed import embed
from sppnet.cli.evaluate import evaluate, score
from sppnet.cli.info import info
from sppnet.cli.plan import plan
from sppnet.cli.protocol import protocol
from sppnet.cli.run import run
from sppnet.cli.search import index, search
from sppnet.cli.serve import serve
from sppnet.cli.single import export, propose
from sppnet.errors import SppnetError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
detect.command()(run)
detect.command()(evaluate)
detect.command()(score)
app.add_typer(detect, name="detect")
app.add_typer(classify, name="classify")
app.add_typer(dataset, name="dataset")
app.command()(embed)
app.command()(index)
app.command()(search)
app.command()(serve)
app.command()(propose)
app.command()(export)
app.command()(info)
app.command()(plan)
app.add_typer(backbone, name="backbone")
app.add_typer(protocol, name="protocol")

_VERBOSE = "--verbose"
_WHENCE = "Show where an error comes from; also after a command."
# Typer tells only this child of it to the world.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def _version(asked: bool) -> None:
    if asked:
        from sppnet import __version__

        print(f"sppnet {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option(_VERBOSE, help=_WHENCE)] = False,
) -> None:
    """Spatial pyramid pooling: classifiers, detectors and vectors from one pass over images of any size."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture; made if it is missing.")] = Path("out"),
    device: opt.Device = "cpu",
) -> None:
    """Detect cows in the photo that comes with sppnet, with the detector that comes with it."""
    from sppnet.photos import demo_photo

    run("animals", [str(demo_photo())], out, device=device)
    print(
        "\nNext: your own photos      sppnet detect run animals PHOTO... --out found"
        "\n      your own classes     sppnet detect train DATA --out my.safetensors"
        "\n      how good it is       sppnet detect evaluate my.safetensors DATA --split val --out report"
    )


def main() -> None:
    """Run the command line.

    What the user can mend, in the options or the data, is one line on stderr and exit status 2; status 1 says
    that the work was done, but for images that could not be read. Any other exception is a bug, and shows its
    traceback.
    """
    arguments = [text for text in sys.argv[1:] if text != _VERBOSE]
    verbose = len(arguments) < len(sys.argv) - 1
    compiling.announce = note
    for stream in (sys.stdout, sys.stderr):
        # Names that a terminal cannot show, or that are no text, are shown by their codes.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show
            status = app(arguments, prog_name="sppnet", standalone_mode=False)
    except (SppnetError, OSError) as error:
        if verbose:
            raise
        _fail(str(error), 2)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # It has shown the help.
            raise SystemExit(2) from None
        _fail(_usage(error), 2)
    if status == 130:  # what Typer makes of Ctrl-C
        _fail("interrupted", 130)
    raise SystemExit(status or 0)


def _show(message: Warning | str, category: type[Warning], *place: Any, **others: Any) -> None:
    """Print what a user is warned of as a note; other warnings are for developers, who see them in tests."""
    if issubclass(category, UserWarning):
        note(str(message))


def _usage(error: Any) -> str:
    """Say in one line what is wrong with the options, and whose help lists them."""
    command = "sppnet" if error.ctx is None else error.ctx.command_path
    return f"{error.format_message().replace('Value error, ', '').rstrip('.')}; see {command} --help"


def _fail(message: str, status: int) -> NoReturn:
    print(f"sppnet: {message}", file=sys.stderr)
    raise SystemExit(status)
