"""`python -m jaxspec {generate,bench,distill,train,export,prepare} --help`; installed, `jaxspec` is the same."""

from jaxspec.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
