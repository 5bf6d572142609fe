"""What a packed matrix is: the canonical form, the ways in and out, kernel layouts and files. NumPy and SciPy only."""

from .io import load, save
from .layout import KernelLayout, from_mma, from_wgmma, to_mma, to_wgmma
from .pack import pack
from .permutation import (
    apply_permutation,
    check_permutation,
    compose_permutations,
    identity_permutation,
    invert_permutation,
    undo_permutation,
)
from .shflbw import TILE_K_CHOICES, V_CHOICES, ShflBWMatrix, check_block

__all__ = [
    "TILE_K_CHOICES",
    "V_CHOICES",
    "KernelLayout",
    "ShflBWMatrix",
    "apply_permutation",
    "check_block",
    "check_permutation",
    "compose_permutations",
    "from_mma",
    "from_wgmma",
    "identity_permutation",
    "invert_permutation",
    "load",
    "pack",
    "save",
    "to_mma",
    "to_wgmma",
    "undo_permutation",
]
