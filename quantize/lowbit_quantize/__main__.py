"""`python -m lowbit_quantize FLAGS` is `lowbit quantize FLAGS`: what torchrun starts."""

import sys

from lowbit_core.cli import main

if __name__ == "__main__":
    sys.exit(main(["quantize", *sys.argv[1:]]))
