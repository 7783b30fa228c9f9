"""``python -m reinforcepp`` is the ``reinforcepp`` command."""

import sys

from reinforcepp.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
