"""Other libraries without the advice that they log about what jaxspec does on purpose."""

import contextlib
import logging
from collections.abc import Generator


@contextlib.contextmanager
def quiet(library: str, level: int = logging.ERROR) -> Generator[None]:
    """Only errors from the logger of that name, such as "transformers", within the block; with `level`, only worse."""
    logger = logging.getLogger(library)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def without_torch_advice() -> None:
    """From now on transformers does not advise to install PyTorch when it is imported, whoever imports it: jaxspec
    takes processors and configs from there, never a model. Nothing else that it logs is left out."""
    logging.getLogger("transformers").addFilter(is_no_torch_advice)


def is_no_torch_advice(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("PyTorch was not found")
