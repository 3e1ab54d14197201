"""`accelerate launch -m pskd_timm train RECIPE`: the same as the console script `pskd-timm`."""

import sys

from pskd_timm.cli import main

sys.exit(main())
