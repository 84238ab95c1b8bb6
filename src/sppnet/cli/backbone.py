"""The command on backbones: a timm network becomes a file that all else works with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import sppnet.cli.console as console
import sppnet.cli.options as opt
from sppnet.errors import SppnetError, check_extra

backbone = typer.Typer(no_args_is_help=True, help="Make backbones: networks as files.")

_NAME = "Name of a timm model, such as resnet18."
_WEIGHTS = "Weights: a file of the whole network, or random; default: those of an installed package."
_PRETRAINED = "Take the weights of timm's hub: from its cache, or by a download."


@backbone.callback()
def _group() -> None:
    """Make backbones: networks as files."""


@backbone.command()
def make(
    name: Annotated[str, typer.Argument(metavar="NAME", help=_NAME)],
    out: Annotated[Path, typer.Option(help="File to write (.onnx).")],
    weights: Annotated[str | None, opt.network(help=_WEIGHTS)] = None,
    pretrained: Annotated[bool, opt.network("--pretrained", help=_PRETRAINED)] = False,
) -> None:
    """Make a backbone of a timm network, for --backbone FILE. It needs PyTorch."""
    from sppnet.storage import check_suffix, check_writable

    check_suffix(out, ".onnx")
    if pretrained and weights is not None:
        raise SppnetError(f"found --pretrained and --weights {weights}, expected one of them")
    check_writable(out)
    check_extra("torch", "making a backbone")

    console.note("loading PyTorch takes some seconds")

    from sppnet.features.making import make_backbone

    made = make_backbone(name, "pretrained" if pretrained else weights, track=console.track)
    made.save(out)
    facts = made.facts
    stages = ", ".join(f"{stage} of {count} channels" for stage, count in facts.channels.items())
    print(f"{out}: {facts.name}, stages {stages}; output strides {', '.join(map(str, facts.strides))}")
    print(f"weights: {facts.source}" + (f", licence {facts.licence}" if facts.licence else ""))
