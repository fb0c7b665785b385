"""The methods of drafting. A method is one file here and one line in this table."""

from jaxspec.drafters.contract import Method
from jaxspec.drafters.eagle import EAGLE2, EAGLEVLM
from jaxspec.drafters.specvlm import SPECVLM
from jaxspec.drafters.vispec import VISPEC

METHODS: dict[str, Method] = {
    "eagle2": EAGLE2,
    "vispec": VISPEC,
    "eaglevlm": EAGLEVLM,
    "specvlm": SPECVLM,
}


def method_of(raw: dict) -> str:
    """The name of the method whose config.json this is: `jaxspec.method` where we wrote it; else ViSpec's files are
    known by their `num_q`. Raises ValueError for a method that is not known."""
    name = raw.get("jaxspec", {}).get("method") or ("vispec" if raw.get("num_q") else "eagle2")
    if name not in METHODS:
        raise ValueError(f"drafter method {name!r} is not known; known: {', '.join(METHODS)}")
    return name
