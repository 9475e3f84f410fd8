"""`python -m veneer` is the `veneer` command."""

from veneer.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
