"""What may be pruned: the Shfl-BW search, and the patterns it is compared with."""

from .pruning import prune
from .result import PruneResult
from .scores import input_norm, score_matrix

__all__ = ["PruneResult", "input_norm", "prune", "score_matrix"]
