"""Entry point: `phema` and `python -m phema`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        if sys.argv[1:2] == ["track"]:
            from phema.track_options import quick_parse

            parsed = quick_parse(sys.argv[2:])
            if parsed is not None:
                from phema.track_run import run_tracked

                sys.exit(run_tracked(*parsed))
        from phema.app import run
    except KeyboardInterrupt:  # Ctrl-C while Python was still loading
        sys.exit(130)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
