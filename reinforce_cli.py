"""The documented interface, mapped onto the ``reinforcepp`` command.

python reinforce_cli.py --mode train_sft | train_reward | train_rlhf | generate ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from reinforcepp.commands.legacy_cli import main

if __name__ == "__main__":
    sys.exit(main())
