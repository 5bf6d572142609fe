"""What `prune` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import host_array
from ..errors import MissingDependencyError

__all__ = ["PruneResult"]


@dataclass(frozen=True)
class PruneResult:
    """A pruned weight and how it was chosen.

    Attributes
    ----------
    weight : array (m, k)
        The weight with pruned values set to zero, rows in the original order; same kind, dtype and device as the input.
    mask : bool array (m, k)
        True where a weight stays; same kind and device as `weight`.
    row_perm : int32 NumPy array (m,)
        Packed row i is row `row_perm[i]` of `weight`; rows g*v .. g*v+v-1 form group g.
    counts : int64 NumPy array (groups,)
        Kept columns per group.
    retained : float
        Kept score / all score (1.0 if all scores are zero).
    block : (v, tile_k)
    search, score, quality : str
        How it was found.
    """

    weight: Any
    mask: Any
    row_perm: np.ndarray
    counts: np.ndarray
    retained: float
    block: tuple[int, int]
    search: str = "refined"
    score: str = "magnitude"
    quality: str = "default"

    @property
    def shape(self) -> tuple[int, int]:
        """(m, k)"""
        return (int(self.mask.shape[0]), int(self.mask.shape[1]))

    @property
    def density(self) -> float:
        """Kept weights / all weights."""
        m, k = self.shape
        v = self.block[0]
        rows = np.minimum(v, m - v * np.arange(len(self.counts)))
        return float((self.counts * rows).sum()) / max(1, m * k)

    def pack(self) -> Any:
        """The pruned weight as a `ShflBWMatrix`, with the groups that the search found."""
        from ..formats import pack

        return pack(self.weight, block=self.block, row_perm=self.row_perm, mask=self.mask)

    def summary(self) -> str:
        """A few lines of text: shape, density, retained score, lengths of the groups."""
        m, k = self.shape
        c = self.counts if len(self.counts) else np.zeros(1, dtype=np.int64)
        v, tile_k = self.block
        kept, padding = int(c.sum()), int((-c % tile_k).sum())
        return "\n".join(
            (
                f"{m} x {k}, block {v} x {tile_k}, search {self.search} ({self.quality}), score {self.score}",
                f"kept {self.density:.2%} of the weights and {self.retained:.2%} of the score",
                f"{len(self.counts)} groups; kept columns: least {c.min()}, median {int(np.median(c))}, most {c.max()}",
                f"padding to tile_k = {tile_k}: {padding} columns ({padding / max(1, kept):.1%})",
            )
        )

    def plot(self, path: str | None = None) -> Any:
        """Draw the mask in the original row order and in the packed order, and the lengths of the groups.

        Returns the matplotlib figure; with `path` also saves it. Raises `MissingDependencyError` without matplotlib.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingDependencyError("plot() needs matplotlib; pip install 'shflnb[plots]'") from error
        mask = host_array(self.mask)
        figure = Figure(figsize=(13, 5), layout="constrained")
        before, after, lengths = figure.subplots(1, 3)
        before.imshow(mask, cmap="gray_r", aspect="auto", interpolation="antialiased")
        before.set(title="kept weights, rows as given", xlabel="column", ylabel="row")
        after.imshow(mask[self.row_perm], cmap="gray_r", aspect="auto", interpolation="antialiased")
        after.set(title="rows in packed order", xlabel="column", ylabel="packed row")
        lengths.bar(np.arange(len(self.counts)), self.counts, width=1.0)
        lengths.set(title=f"{self.retained:.1%} of the score kept", xlabel="group", ylabel="kept columns")
        if path is not None:
            figure.savefig(path)
        return figure
