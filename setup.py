"""Packaging of shflnb: what it is called, what it needs, and which extras there are.

Ranges stand here; the exact versions that `make demo` and `make test` install stand in `constraints.txt`.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "shflnb/_version.py").read_text(encoding="utf-8")).group(1)

BASE = [
    # numba-cuda 0.30.4 (extras cu12, cu13) calls np.row_stack, which NumPy 2.5 removed.
    "numpy>=2.0,<2.5",
    "scipy>=1.13",
    "numba>=0.61",
    "ml_dtypes>=0.4",
    "safetensors>=0.4.3",
    "typer>=0.16",
    "rich>=13",
    "platformdirs>=4",
    "filelock>=3.12",
    "threadpoolctl>=3.2",
]

# The makers of CUDA wheels build none for macOS, so there the GPU extras are empty instead of impossible to install.
NOT_MACOS = ' ; sys_platform != "darwin"'
# numba-cuda is in maintenance: a new minor version is taken up on purpose, not by chance.
NUMBA_CUDA = ["numba-cuda>=0.30.4,<0.31", "cuda-core>=1.0,<2"]
CU12 = [
    *NUMBA_CUDA,
    "cuda-bindings>=12.9.1,<13",
    "nvidia-cuda-nvcc-cu12>=12.3,<13",
    "nvidia-cuda-runtime-cu12>=12.3,<13",
    "nvidia-cuda-nvrtc-cu12>=12.3,<13",
    "nvidia-nvjitlink-cu12>=12.3,<13",
]
# What writes or assembles code stays at 13.0: a driver refuses PTX that is newer than itself, and 13.0 is the oldest
# CUDA 13 driver. The two disassemblers only read code; their first CUDA 13 wheels are of 13.2.
CU13 = [
    *NUMBA_CUDA,
    "cuda-bindings>=13.0,<14",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-nvrtc==13.0.*",
    "nvidia-nvjitlink==13.0.*",
    "nvidia-cuda-cuobjdump>=13.2,<14",
    "nvidia-cuda-nvdisasm>=13.2,<14",
]
TORCH = ["torch>=2.6"]
PLOTS = ["matplotlib>=3.9"]
DEMO = ["scikit-learn>=1.5"]
EXTRAS = {
    "torch": TORCH,
    "cu12": [requirement + NOT_MACOS for requirement in CU12],
    "cu13": [requirement + NOT_MACOS for requirement in CU13],
    "plots": PLOTS,
    "demo": DEMO,
    "dev": ["ruff>=0.9", "mypy>=1.14", "pre-commit>=4"],
}
EXTRAS["test"] = [
    "pytest>=8",
    "pytest-benchmark>=5",
    "hypothesis>=6.100",
    *TORCH,
    *PLOTS,
    *DEMO,
    *EXTRAS["cu13"],
]

setup(
    name="shflnb",
    version=VERSION,
    description="Prune neural-network weights to the Shfl-BW pattern and run them faster than dense, from pure Python",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="shflnb contributors",
    license="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Environment :: GPU :: NVIDIA CUDA",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["shflnb", "shflnb.*"]),
    package_data={"shflnb": ["py.typed", "tuning/data/*.json"]},
    install_requires=BASE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["shflnb = shflnb.cli:main"]},
    zip_safe=False,
)
