"""The options from which several commands make an embedder, and the embedder of a command's options."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppnet.cli.console import integers, name_list

if TYPE_CHECKING:
    from sppnet.retrieval.embedder import Embedder

BackboneName = Annotated[str, typer.Option("--backbone", help="timm model name.")]
Stages = Annotated[str, typer.Option(help="Stages that feed the pyramid: 1 to 5, head.")]
Stride = Annotated[int, typer.Option(help="Largest stride of the backbone: 32, or 16 for finer maps.")]
Scales = Annotated[
    str, typer.Option(help="Shorter sides in pixels, by commas; each box takes the one that suits it.")
]
Levels = Annotated[str, typer.Option(help="Pyramid levels, by commas.")]
Mode = Annotated[str, typer.Option(help="What is kept of a bin: max or average.")]
View = Annotated[str, typer.Option(help="full: the whole image; crop: its centre; warp: pressed square.")]
Flip = Annotated[bool, typer.Option(help="Average with the flipped image, turned back; takes twice as long.")]
Power = Annotated[float, typer.Option(help="Numbers are raised to it before the norm; 1 leaves them.")]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]

BACKBONE, STAGES = "tf_efficientnet_lite0", "head"
STRIDE, SCALES, LEVELS = 32, "224", "3,2,1"


def embedder_of(context: typer.Context, **others: Any) -> Embedder:
    """Return the embedder of a command's options, which have the names of its settings.

    Parameters
    ----------
    context : typer.Context
        The command's own.
    others
        Settings that take the place of options.
    """
    from sppnet.retrieval.embedder import Embedder

    given = context.params
    known = inspect.signature(Embedder).parameters.keys() & given.keys()
    settings = {name: given[name] for name in known} | {
        "output_stride": given["stride"],
        "stages": tuple(name_list(given["stages"])),
        "levels": integers("--levels", given["levels"]),
    }
    if "scales" not in others:
        settings["scales"] = integers("--scales", given["scales"])
    return Embedder(**settings | others)
