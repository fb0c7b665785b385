"""The methods of drafting. A method is one file here and one line in this table."""

from jaxspec.drafters.contract import Method
from jaxspec.drafters.eagle import EAGLE2
from jaxspec.drafters.lookup import LOOKUP
from jaxspec.drafters.medusa import MEDUSA
from jaxspec.drafters.vispec import VISPEC

METHODS: dict[str, Method] = {
    "eagle2": EAGLE2,
    "vispec": VISPEC,
    "medusa": MEDUSA,
    "lookup": LOOKUP,
}


def method_of(raw: dict) -> str:
    """The name of the method whose config.json this is: `jaxspec.method` where we wrote it; else ViSpec's files are
    known by their `num_q`, Medusa's by their `medusa_num_heads`. Raises ValueError for a method that is not known."""
    name = raw.get("jaxspec", {}).get("method")
    if not name:
        name = "medusa" if "medusa_num_heads" in raw else "vispec" if raw.get("num_q") else "eagle2"
    if name not in METHODS:
        raise ValueError(f"drafter method {name!r} is not known; known: {', '.join(METHODS)}")
    return name
