"""Evidence for environments, tools, filters and estimators, into benchmarks/results/environments.json.

python benchmarks/environments.py --parts tool reasoning masks filters --work FOLDER --model FOLDER --tokenizers FOLDER

tool        the built-in model on questions about facts that only a lookup tool knows, with the tool and without
reasoning   a pretrained model (``--model``) on a task of reasoning-gym; needs the package
masks       tokens of episodes on real chat templates: those in the folders of ``--tokenizers``, and that of ``--model``
filters     dynamic sampling, masking, negative-token filtering and FlashREINFORCE against plain REINFORCE++

Each part is written when it is finished, and the other parts of the file stay. ``--work`` keeps what is done, so that a stopped
measurement continues.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from results import FOLDER, made, write_result

PARTS = ("tool", "reasoning", "masks", "filters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--work", type=Path, default=Path("runs/environments"))
    parser.add_argument("--model", help="folder of a pretrained chat model, for reasoning and masks")
    parser.add_argument("--tokenizers", type=Path, help="folder with a folder per tokenizer, for masks")
    parser.add_argument("--minutes", type=float, default=110, help="time of the training of the part reasoning")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    for part in arguments.parts:
        write_part(part, measured(part, arguments))


def measured(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the result of a part."""
    work = arguments.work / part
    if part == "tool":
        from environments_tool import tool

        return tool(work, arguments.processes)
    if part == "reasoning":
        from environments_reasoning import reasoning

        return reasoning(arguments.model, work, arguments.minutes)
    if part == "masks":
        from environments_masks import masks

        folders = {folder.name: folder for folder in sorted(arguments.tokenizers.iterdir()) if folder.is_dir()}
        return masks(folders | ({"model": Path(arguments.model)} if arguments.model else {}))
    from environments_filters import filters

    return filters(work, arguments.processes)


def write_part(part: str, result: dict[str, Any]) -> None:
    """Replace a part of the result file; it keeps the command, date and machine that made it."""
    path = FOLDER / "environments.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    parts = {name: found["parts"][name] for name in PARTS if name in found.get("parts", {})}
    write_result("environments", {"parts": {**parts, part: {**made(), **result}}})


if __name__ == "__main__":
    main()
