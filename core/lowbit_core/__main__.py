"""`python -m lowbit_core COMMAND FLAGS` is `lowbit COMMAND FLAGS`: what starts ranks starts."""

import sys

from lowbit_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
