"""How long the soak is and which seed it has: CHAOS_MINUTES and CHAOS_SEED."""

import os
import random

MINUTES = float(os.environ.get("CHAOS_MINUTES") or 0)
SEED = int(os.environ.get("CHAOS_SEED", "") or random.randrange(1 << 32))
