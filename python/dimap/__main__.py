"""The command `dimap`, also as `python -m dimap`."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    """Run the command line; Ctrl-C while it is loaded ends without a traceback."""
    try:
        from .cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    except ImportError:
        from ._installed import stranger

        if told := stranger(Path(__file__).parent):
            sys.exit(f"dimap: error: {told}")
        raise
    run()


if __name__ == "__main__":
    main()
