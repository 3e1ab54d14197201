"""How many processor cores this process may use."""


def num_cpus() -> int:
    """Cores that affinity, control groups (containers, batch systems) and LOKY_MAX_CPU_COUNT leave to this process."""
    import joblib

    return joblib.cpu_count()
