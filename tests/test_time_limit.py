"""A test that hangs ends its process at the limit, whatever handlers of signals it has installed."""

import subprocess
import sys
from pathlib import Path

HANGING = """
import os, signal, time
from jaxspec.stopping import CatchSignals

def test_hangs():
    with CatchSignals() as signals:  # as training does
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received
        time.sleep(300)
"""
ROOT = Path(__file__).parents[1]


def test_a_hanging_test_ends_its_process(tmp_path):
    path = tmp_path / "test_hanging.py"
    path.write_text(HANGING)
    settings = ["-c", str(ROOT / "pyproject.toml"), "-n", "0", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=1"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *settings, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "Timeout (0:00:01)!" in done.stderr and "test_hangs" in done.stderr
