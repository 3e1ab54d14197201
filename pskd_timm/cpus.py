"""How many processor cores this process may use, and how workers on them start."""

import sys

# How a loader's workers start. Where Python's default is its fork server (on Linux from 3.14 on, and before in the runs of a
# comparison, which came from one) each would import everything anew in every epoch, and outlive a run that is killed: torch's
# workers notice that their parent has gone, and the server never goes while they are there.
WORKERS_START = "fork" if sys.platform == "linux" else None


def num_cpus() -> int:
    """Cores that affinity, control groups (containers, batch systems) and LOKY_MAX_CPU_COUNT leave to this process."""
    import joblib

    return joblib.cpu_count()
