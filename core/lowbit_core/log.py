"""One logging format for all programs: plain lines on stderr, so that stdout stays for results."""

import logging
import sys

FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


def configure_logging(level: str = "INFO") -> None:
    """Send the `lowbit` loggers to stderr at `level`; other libraries stay at WARNING."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT, datefmt="%H:%M:%S"))
    logger = logging.getLogger("lowbit")
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False


def get_logger(name: str) -> logging.Logger:
    """A logger below `lowbit`, named for the program (`lowbit.quantize`, `lowbit.serve`, …)."""
    return logging.getLogger(f"lowbit.{name}")
