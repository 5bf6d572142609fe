"""What may be pruned: the Shfl-BW search, and the patterns it is compared with."""

from .baselines import Baseline, block_wise, n_m, n_m_in_vectors, unstructured, vector_wise
from .model import prune_model, share_budget
from .pruning import prune
from .result import PruneResult
from .schedule import cubic_sparsity, update_mask
from .scores import input_norm, score_matrix

__all__ = [
    "Baseline",
    "PruneResult",
    "block_wise",
    "cubic_sparsity",
    "input_norm",
    "n_m",
    "n_m_in_vectors",
    "prune",
    "prune_model",
    "score_matrix",
    "share_budget",
    "unstructured",
    "update_mask",
    "vector_wise",
]
