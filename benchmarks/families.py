"""Which verb runs with which family of models and which engine: tiny models with random weights, every verb for real.

    python benchmarks/families.py [--families gpt2 llama ...]

"passed", or the sentence that the user is told instead. tests/models/test_families.py does the same and holds the table.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from results import write_result

from reinforcepp.commands import cli
from reinforcepp.files import write_json

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import tiny

FAMILIES = ("gpt2", *tiny.FAMILIES)
PASSED = "passed"
PAIRS = """prompt,chosen,rejected
How do I see my routes?,Run ip route and read the default line.,Reboot it.
Which process listens on port 80?,Run ss -ltnp and look for :80.,Nobody knows.
Why can't this host resolve names?,Compare dig with dig @1.1.1.1.,Buy a new router.
Is the gateway up?,Ping it three times and read the loss.,"Certainly, why not."
"""
LENGTHS = ["--max_prompt_length", "40", "--max_new_tokens", "8"]
TRAIN = [*LENGTHS, "--max_steps", "2", "--batch_size", "4", "--save_every", "1", "--keep_last", "2", "--judge", "none"]


def outcomes(family: str, folder: Path) -> dict[str, dict[str, str]]:
    """What each verb says with a model of ``family``: verb -> engine -> "passed" or why not."""
    base, data = str(tiny.save(folder / "base", family)), str(folder / "pairs.csv")
    Path(data).write_text(PAIRS, encoding="utf-8")
    reward = ["--reward_model", str(folder / "rm")]
    told: dict[str, dict[str, str]] = {}

    def run(verb: str, engine: str, *arguments: str) -> None:
        told.setdefault(verb, {})[engine] = said(list(arguments))

    trained, adapted = str(folder / "transformers"), str(folder / "lora-transformers")

    run("reward", "transformers", "reward", "--model", base, "--data", data, "--output_dir", str(folder / "rm"))
    for engine in ("transformers", "vllm"):
        out = str(folder / engine)
        train = ["train", "--model", base, "--data", data, *reward, *TRAIN, "--rollout", engine]
        run("train", engine, *train, "--output_dir", out)
        resumed = ["--output_dir", str(folder / f"{engine}-2"), "--resume", f"{out}/checkpoints/step-000001"]
        if told["train"][engine] == PASSED:
            run("resume", engine, *train, *resumed)
        else:  # there is nothing to go on from
            told.setdefault("resume", {})[engine] = told["train"][engine]
        run("train, LoRA", engine, *train, "--use_peft", "--output_dir", str(folder / f"lora-{engine}"))
        prompt = ["--prompt", "Is the gateway up?", *LENGTHS, "--engine", engine]
        run("generate", engine, "generate", "--model", trained, *prompt)
    asked = ["--data", data, *LENGTHS, "--output_dir", str(folder / "comparison"), "--judge", str(folder / "rm")]
    asked += ["--engine", "transformers"]
    run("compare", "transformers", "compare", base, trained, *asked)
    run("export", "transformers", "export", adapted, "--output_dir", str(folder / "plain"))
    return told


def said(arguments: list[str]) -> str:
    """``passed``, or what a command of reinforcepp says instead of success."""
    gc.freeze()  # vLLM collects garbage again and again, among a million objects that stay, until it thaws them at its end
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(arguments)
    return PASSED if code == 0 else last_error(errors.getvalue())


def last_error(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    return lines[-1].removeprefix("error: ") if lines else text.strip().splitlines()[-1]


def table(families: list[str]) -> Iterator[tuple[str, dict[str, dict[str, str]]]]:
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            yield family, outcomes(family, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--output", help="write there instead of benchmarks/results/families.json")
    arguments = parser.parse_args()
    families = arguments.families
    found = {}
    for family, told in table(families):
        found[family] = told
        print(family, told, flush=True)
    if arguments.output:
        write_json(Path(arguments.output), {"families": found})
    elif families == list(FAMILIES):
        write_result(
            "families", {"meaning": "family -> verb -> engine -> passed, or what is said instead", "families": found}
        )


if __name__ == "__main__":
    main()
