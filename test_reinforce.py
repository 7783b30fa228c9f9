"""Try a trained model, and compare vLLM with transformers.

python test_reinforce.py --mode compare_performance | test_generation | test_vllm ...
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

    from reinforcepp.commands.engine_benchmark.cli import main

    sys.exit(main())
