"""`python -m jaxspec {generate,bench} --help`."""

import os

# transformers announces at import that torch and torchvision are missing; jaxspec needs neither.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from jaxspec.cli import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
