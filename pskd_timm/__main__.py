"""`accelerate launch -m pskd_timm train RECIPE`: the same as the console script `pskd-timm`."""

import signal
import sys


def main() -> int:
    """Run the command line; until it stands, and once it has ended, Ctrl-C ends the program without a traceback."""
    wanted = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a parent may have it ignored
    if wanted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from pskd_timm.cli import main

    if wanted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main()
    if wanted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return code


if __name__ == "__main__":
    sys.exit(main())
