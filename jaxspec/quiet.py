"""Other libraries without the advice that they log about what jaxspec does on purpose."""

import contextlib
import logging


@contextlib.contextmanager
def quiet(library: str, level: int = logging.ERROR):
    """Only errors from the logger of that name, such as "transformers", within the block; with `level`, only worse."""
    logger = logging.getLogger(library)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
