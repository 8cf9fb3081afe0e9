"""Neighbours by squared L2: all keys compared, or those that an index of FAISS proposes."""

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lfm.errors import LfmError
from lfm.retrieval.base import Array, Neighbours

QUERIES = 256  # compared at once
STRETCH = 1 << 15  # keys read at once: with 256 queries 32 MB of distances
GATHERED = 1 << 24  # values of keys that are held to measure distances again, 64 MB


class FaissMissing(LfmError, ImportError):
    """A search by FAISS where that is not installed."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where

    def __str__(self) -> str:
        return (
            f"{self.where}: FAISS is not installed, expected it for this search. "
            "Install the extra 'faiss' (faiss-cpu), or set search to exact."
        )


def check_faiss(where: str) -> None:
    """Raise `FaissMissing` where there is none."""
    if find_spec("faiss") is None:
        raise FaissMissing(where)


class Exact:
    """Compares each query with every key, a stretch of them after the other, on the queries' device."""

    def __init__(self, keys: Array, values: Array) -> None:
        self.keys, self.values = keys, values

    def nearest(self, queries: Float[Tensor, "queries width"], k: int) -> Neighbours:
        """See `Search`. Of keys that are equally far at the edge of the `k`, any may be left out."""
        return _measured(self.keys, self.values, queries, lambda some: self._near(some, k))

    def _near(self, queries: Float[Tensor, "queries width"], k: int) -> Int[Tensor, "queries k"]:
        best = queries.new_empty((len(queries), 0))
        places = best.long()
        centre = _stretch(self.keys, 0, queries).mean(dim=0)  # small numbers lose less when they are subtracted
        around = queries - centre
        for first in range(0, len(self.keys), STRETCH):
            keys = _stretch(self.keys, first, queries) - centre
            far = keys.square().sum(dim=1) - 2 * around @ keys.T  # but for the query's own square
            count = min(k, len(keys))
            if best.shape[1] == k:  # few keys of a later stretch are nearer than what there is
                count = min(count, int((far < best[:, -1:]).sum(dim=1).max()))
            kept = far.topk(count, dim=1, largest=False)
            best, places = torch.cat([best, kept.values], 1), torch.cat([places, kept.indices + first], 1)
            best, order = best.topk(min(k, best.shape[1]), dim=1, largest=False)
            places = places.gather(1, order)
        return places


class Indexed:
    """Compares each query with the keys that an index of FAISS takes for the nearest."""

    def __init__(self, keys: Array, values: Array, index: Any, *, probes: int) -> None:
        self.keys, self.values, self.index = keys, values, index
        if hasattr(index, "nprobe"):
            index.nprobe = probes

    def nearest(self, queries: Float[Tensor, "queries width"], k: int) -> Neighbours:
        """See `Search`; distances are those of the keys themselves, not of the index's codes."""

        def near(some: Float[Tensor, "queries width"]) -> Int[Tensor, "queries k"]:
            asked = np.ascontiguousarray(some.cpu().numpy())
            found: Int[Tensor, "queries k"] = torch.from_numpy(self.index.search(asked, min(k, len(self.keys)))[1])
            return found.to(some.device)

        return _measured(self.keys, self.values, queries, near)


def faiss_index(keys: Array, kind: str, sample: int) -> Any:
    """An index of FAISS over keys.

    Args:
        keys: Of shape (entries, width).
        kind: In the words of FAISS's factory: ``Flat``, ``IVF4096,PQ64np``.
        sample: Of so many keys, from all over, its centroids are learnt.
    """
    import faiss

    index = faiss.index_factory(keys.shape[1], kind)
    step = max(1, len(keys) // sample)
    index.train(np.ascontiguousarray(keys[::step][:sample], dtype=np.float32))
    for first in range(0, len(keys), STRETCH):
        index.add(np.ascontiguousarray(keys[first : first + STRETCH], dtype=np.float32))
    return index


def _stretch(keys: Array, first: int, like: Tensor) -> Float[Tensor, "keys width"]:
    return torch.from_numpy(keys[first : first + STRETCH].astype(np.float32)).to(like.device)


def _measured(keys: Array, values: Array, queries: Tensor, near: Any) -> Neighbours:
    """The neighbours at the places that `near` gives for some queries, a negative one for none; their own distances."""
    found = [_ordered(keys, values, some, near(some)) for some in torch.split(queries.float(), QUERIES)]
    return Neighbours(torch.cat([f.distances for f in found]), torch.cat([f.tokens for f in found]))


def _ordered(keys: Array, values: Array, queries: Tensor, places: Int[Tensor, "queries k"]) -> Neighbours:
    size = max(1, GATHERED // (places.shape[1] * keys.shape[1]))
    known = places.clamp(min=0).cpu().numpy()
    parts = [
        (torch.from_numpy(keys[known[i * size : (i + 1) * size]].astype(np.float32)).to(some.device) - some[:, None])
        .square()
        .sum(dim=-1)
        for i, some in enumerate(torch.split(queries, size))
    ]
    distances, order = torch.cat(parts).masked_fill(places < 0, torch.inf).sort(dim=1, stable=True)
    tokens = torch.from_numpy(values[known].astype(np.int64)).to(queries.device)
    return Neighbours(distances, tokens.gather(1, order))
