"""Try every kind of fault that was found on real models and data, through the real commands or the public API.

Writes results/found.json with one row per entry: ``id``, ``verdict`` (``fixed``: the input works; ``refused``: it ends with one
clear sentence; ``open``: neither), the input, the right behavior, and for open entries what happened.

python benchmarks/found.py [--only ID ...]
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from pathlib import Path

from results import write_result

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Run the checks and write their verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="Another file for the result")
    parser.add_argument("--only", nargs="+", help="Ids of the entries to try; writes no result")
    asked = parser.parse_args()
    import torch
    from found import data_entries, model_entries, python_entries, template_entries
    from found.inputs import ENTRIES, Entry

    del data_entries, model_entries, python_entries, template_entries  # importing them registers their entries
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)

    def verdict(entry: Entry) -> dict[str, str]:
        row = {"id": entry.id, "verdict": "open", "input": entry.given, "right": entry.right}
        with tempfile.TemporaryDirectory() as folder:
            try:
                row["verdict"] = entry.check(Path(folder))
            except Exception as error:
                row["problem"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".replace(
                    folder, "FOLDER"
                )
        return row

    rows = []
    for entry in sorted(ENTRIES, key=lambda entry: entry.id):
        if asked.only and entry.id not in asked.only:
            continue
        start = time.perf_counter()
        rows.append(verdict(entry))
        print(
            f"{entry.id:5} {rows[-1]['verdict']:8} {time.perf_counter() - start:5.1f} s  {rows[-1].get('problem', '')}",
            flush=True,
        )
    if not asked.only:
        counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in ("fixed", "refused", "open")}
        result = {"counts": counts, "rows": rows}
        if asked.output is None:
            write_result("found", result)
        else:
            asked.output.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
