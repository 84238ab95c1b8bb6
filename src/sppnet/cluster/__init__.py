"""Past one machine: the work of the other rooms, done by the machines of a Ray cluster."""

from sppnet.cluster.cluster import Cluster

__all__ = ["Cluster"]
