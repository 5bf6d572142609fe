"""What pytest needs to run the benchmarks: they are programs of this folder and import each other by name."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
