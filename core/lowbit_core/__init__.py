"""What the programs share: errors, logging, the command line, the checkpoint manifest and evaluation items."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lowbit")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0+unknown"
