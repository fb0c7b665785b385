"""`python -m jaxspec {generate,bench,distill,export,prepare} --help`."""

from jaxspec.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
