"""Which installed distribution this package is, and whether another one claims its import name.

We are distributed as `jaxspec-vlm`. `jaxspec` on PyPI is a library for X-ray spectra, whose package has our import
name: pip writes both into one folder without a word, and either then runs with files of the other.
"""

import warnings
from importlib.metadata import Distribution, PackageNotFoundError, distributions, version

NAME = "jaxspec-vlm"
NAMESAKE = "jaxspec"
SUMMARY = "Lossless speculative decoding for vision-language models, in JAX"
"""By which an installation of ours from the time when we were called `jaxspec` is told from theirs; that one does no
harm, since it is nearly always an editable one."""


def installed_version() -> str:
    """Of this package; "0+unknown" in a checkout that is not installed."""
    try:
        return version(NAME)
    except PackageNotFoundError:
        return "0+unknown"


def namesake() -> str | None:
    """A sentence about a distribution called `jaxspec` that is not ours and is installed beside this one; else None."""
    for other in distributions(name=NAMESAKE):
        if not is_ours(other):
            return (
                f"the distribution {NAMESAKE} {other.version} ({other.metadata['Summary']}) is installed here and has "
                f"the same import name as {NAME}, so that each may run files of the other: uninstall both, then "
                f"install {NAME} alone"
            )
    return None


def warn_of_namesakes() -> None:
    if sentence := namesake():
        warnings.warn(sentence, stacklevel=2)


def is_ours(distribution: Distribution) -> bool:
    return distribution.metadata["Summary"] == SUMMARY
