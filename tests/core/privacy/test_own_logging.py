import subprocess
import sys

PROGRAM = """
import logging
from core.privacy.accounting import Event, epsilon
import core.privacy.step
epsilon([Event("gradients", 1.0, 0.1, 10)], 1e-5)
print(logging.getLogger().handlers, logging.getLogger().level)
"""


def test_private_training_and_accounting_leave_the_root_logger_as_it_was():
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert found.stdout == f"[] {30}\n"
