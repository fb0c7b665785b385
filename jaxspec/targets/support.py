"""The README's table of supported targets, from the registry.

python -m jaxspec.targets.support README.md      # writes the table anew
"""

import sys
from pathlib import Path

from jaxspec.targets.registry import FAMILIES, Family

BEGIN = "<!-- targets: written by `python -m jaxspec.targets.support README.md` -->"
END = "<!-- end of targets -->"
COLUMNS = ("target", "images", "several images", "video", "drafters tested", "float32 logits equal to", "last checked")


def table() -> str:
    """Markdown, one row per family."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(cells(name, family) for name, family in FAMILIES.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cells(model_type: str, family: Family) -> tuple[str, ...]:
    return (
        f"{family.title} (`{model_type}`)",
        "yes" if family.images else "no",
        "yes" if family.images else "no",  # several: no family is limited to one
        "yes" if family.video else "no",
        family.drafters,
        f"`{family.architecture}` within {family.tolerance:.0e} relative".replace("e-0", "e-"),
        family.checked,
    )


def with_table(text: str) -> str:
    """`text` with the table between its two markers. Raises ValueError where a marker is missing or there twice."""
    for marker in (BEGIN, END):
        if text.count(marker) != 1:
            raise ValueError(f"the text must have {marker!r} once, it has it {text.count(marker)} times")
    before, rest = text.split(BEGIN)
    if END not in rest:
        raise ValueError(f"{END!r} must come after {BEGIN!r}")
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def main(path: str) -> None:
    file = Path(path)
    file.write_text(with_table(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m jaxspec.targets.support README.md")
    main(sys.argv[1])
