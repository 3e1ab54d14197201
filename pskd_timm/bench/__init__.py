"""What this machine does: ratios of interleaved measurements made here, not promises."""

import time
from importlib import import_module

QUICK_PARTS = ("step", "data", "store", "metrics", "start")
PARTS = (*QUICK_PARTS, "translation", "detection")


def bench(parts=QUICK_PARTS, say=print, keep=None, **options) -> dict[str, list[dict]]:
    """Measure the named `parts`, printing each figure once measured; `options` go to the parts that know them.

    `keep` is called after each part with what has been measured so far.
    """
    found = {}
    for name in parts:
        began = time.perf_counter()
        # Imported where it is needed: a part starts processes that would import the others too.
        part = import_module(f".{name}", __name__)
        say(f"\n{name}: {part.TITLE}")
        chosen = {key: value for key, value in options.items() if key in part.OPTIONS and value is not None}
        found[name] = part.measure(say, **chosen)
        if keep:
            keep(found)
        say(f"({time.perf_counter() - began:.0f} s)")
    return found
