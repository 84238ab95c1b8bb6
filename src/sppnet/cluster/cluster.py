"""A Ray cluster as a runner of work: what threads do on one machine, its workers do on many."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from sppnet.cluster.connection import LOCAL, check_nodes, connect, cores
from sppnet.cluster.rounds import Rounds
from sppnet.errors import SppnetError
from sppnet.parallel import TOGETHER, Item, Result, Work
from sppnet.remote import address_of


class Cluster:
    """Workers on one machine or many, one core each, that take images in small blocks through Ray Data.

    Whatever takes ``cluster=`` gives equal results with any number of workers. What a worker had in hand when
    it died, alone or with its machine, is done by another.

    Parameters
    ----------
    address : str
        ``"local"`` begins a cluster of this machine's cores that lasts as long as this object is open; else
        ``HOST:PORT`` of one that ``ray start --head`` began, or ``"auto"`` for that of this machine. Where
        this process has joined one already, by ``ray.init``, that is taken.
    workers : int, optional
        How many work at once; by default as many as there are cores.

    Raises
    ------
    SppnetError
        If Ray is not installed, nothing answers at the address, or there are fewer cores than workers.

    Examples
    --------
    ::

        with Cluster("local", workers=2) as cluster:
            embed("photos", "photos.safetensors", cluster=cluster)
    """

    def __init__(self, address: str = LOCAL, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise SppnetError(f"found {workers} workers, expected at least 1")
        self.address = address
        self._leave = connect(address, workers)
        there = cores()
        if there < (workers or 1):
            self.close()
            raise SppnetError(f"{address}: found {there} cores, expected {workers or 1}, one for each worker")
        self.workers = workers or there

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster; one that was begun here ends."""
        if self._leave:
            import ray

            ray.shutdown()
            self._leave = False

    def stream(
        self, work: Work[Item, Result], items: Iterable[Item], together: int = TOGETHER
    ) -> Iterator[Result]:
        """Yield the result of each item, in their order, as `sppnet.parallel.Runner` says.

        Parameters
        ----------
        work : Work
            What is done with each; it goes to the workers by pickle.
        items : iterable
            All are taken at once. A `Path`, a tuple that begins with one, or those in the attribute ``files``
            of an item must be seen by all machines.
        together : int
            How many a worker takes at a time, at most.

        Raises
        ------
        SppnetError
            Before any work, if versions differ between machines or one does not see a path. At its place, if
            three workers died of an item, one after the other.
        """
        given = list(items)
        if not given:
            return iter(())
        check_nodes(_samples(given))
        if len(given) < self.workers:
            found = f"found {self.workers} workers for {len(given)} pieces of work"
            warnings.warn(f"{found}: as many work", stacklevel=2)
        return Rounds(work, given, self.workers, together).results()


def _samples(items: Iterable[object]) -> list[Path]:
    """Return one file of each folder that items lie in."""
    folders: dict[Path, Path] = {}
    for item in items:
        first = item[0] if isinstance(item, tuple) and item else item
        for path in getattr(item, "files", (first,)):
            if isinstance(path, Path) and address_of(path) is None:
                folders.setdefault(path.absolute().parent, path.absolute())
    return list(folders.values())
