"""Other libraries without the advice that they log about what jaxspec does on purpose."""

import contextlib
import logging


@contextlib.contextmanager
def quiet(library: str):
    """Only errors from the logger of that name, such as "transformers", within the block."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
