"""Entry point: `phema` and `python -m phema`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        from phema.app import run
    except KeyboardInterrupt:  # Ctrl-C while Python was still loading
        sys.exit(130)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
