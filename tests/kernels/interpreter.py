"""Suites in Triton's interpreter: TRITON_INTERPRET must be set before Triton is imported, so each has a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def interpreted(*suites: str) -> subprocess.CompletedProcess[str]:
    """Run suites of this folder in the interpreter, up to the first failure."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            *(str(HERE / suite) for suite in suites),
        ],
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
