"""Every script in benchmarks/, those for machines that CI has not among them."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_every_script_finds_what_it_imports() -> None:
    names = sorted(file.stem for file in BENCHMARKS.glob("*.py"))
    assert "step_cuda" in names
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\nimport {', '.join(names)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
