"""What a request can be refused for, each with the status that HTTP has for it."""

from __future__ import annotations

from sppnet.errors import SppnetError


class Refused(SppnetError):
    """A request that is answered with an error.

    Parameters
    ----------
    status : int
        Of HTTP: 4xx or 5xx.
    found, expected : str
        What was found in place of what was expected; both may be shown to whoever asks.

    Attributes
    ----------
    status, found, expected
        As given.
    """

    def __init__(self, status: int, found: str, expected: str) -> None:
        super().__init__(f"found {found}, expected {expected}")
        self.status, self.found, self.expected = status, found, expected

    def __reduce__(self) -> tuple[type[Refused], tuple[int, str, str]]:
        """Take it to another process as what it is to whoever asks."""
        return Refused, (self.status, self.found, self.expected)


class Busy(Refused):
    """More is waiting than the server will hold: to be asked again later."""

    def __init__(self, waiting: int) -> None:
        super().__init__(429, f"{waiting} requests waiting", "fewer: try again in a moment")


class Gone(Refused):
    """Something that was asked for is not there, or not any more."""

    def __init__(self, kind: str, expected: str) -> None:
        super().__init__(404, f"no such {kind}", expected)
