"""What the docs say of strategies is what the plan and the tests say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_generated_parts_of_the_docs_are_current() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs" / "make.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"run `python docs/make.py`\n{done.stderr}"
