"""What this machine does: ratios of interleaved measurements made here, not promises."""

import time

from . import data, metrics, start, step, store

PARTS = {"step": step, "data": data, "store": store, "metrics": metrics, "start": start}


def bench(parts=tuple(PARTS), say=print, **options) -> dict[str, list[dict]]:
    """Measure the named `parts`, telling each figure as it is known; `options` go to the parts that know them."""
    found = {}
    for name in parts:
        began = time.perf_counter()
        say(f"\n{name}: {PARTS[name].TITLE}")
        chosen = {key: value for key, value in options.items() if key in PARTS[name].OPTIONS and value is not None}
        found[name] = PARTS[name].measure(say, **chosen)
        say(f"({time.perf_counter() - began:.0f} s)")
    return found
