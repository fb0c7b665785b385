"""What else runs on the machine: CPU time that a virtual machine's host gave to others, which spoils a measurement."""

import os
import time
from pathlib import Path

PROC_STAT = Path("/proc/stat")


def stolen_seconds() -> float:
    """CPU seconds since boot, all cores together, for which this machine was ready to run but its host was not.

    The field `steal` of Linux' /proc/stat (proc(5)), in steps of a clock tick, mostly 10 ms. 0.0 elsewhere.
    """
    if not PROC_STAT.exists():
        return 0.0
    fields = PROC_STAT.read_text().splitlines()[0].split()  # cpu user nice system idle iowait irq softirq steal ..
    return int(fields[8]) / os.sysconf("SC_CLK_TCK") if len(fields) > 8 else 0.0


class StolenShare:
    """`StolenShare()()`: the share of all cores' time that the host took since the object was made, from 0 to 1."""

    def __init__(self) -> None:
        self.stolen, self.clock = stolen_seconds(), time.perf_counter()

    def __call__(self) -> float:
        return (stolen_seconds() - self.stolen) / (time.perf_counter() - self.clock) / (os.cpu_count() or 1)
