"""Writes the tables and quoted outputs of README.md from committed files; ``--check`` only says whether they are up to date.

python benchmarks/tables.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def demo_seeds(result: dict[str, Any]) -> str:
    columns = {
        "seed": "{}",
        "rm_accuracy": "{:.2f}",
        "gold_before": "{:.2f}",
        "gold_after": "{:.2f}",
        "kl": "{:.3f}",
        "distinct": "{:.2f}",
        "length_ratio": "{:.2f}",
        "seconds": "{:.0f}",
    }
    titles = [
        "seed",
        "reward model, held-out accuracy",
        "gold score before",
        "after",
        "KL, nats per token",
        "distinct answers per topic",
        "length ratio",
        "seconds",
    ]
    rows = [[form.format(row[key]) for key, form in columns.items()] for row in result["rows"]]
    means = {key: fmean(row[key] for row in result["rows"]) for key in columns}
    rows.append(["mean", *(form.format(means[key]) for key, form in list(columns.items())[1:])])
    return table(titles, rows) + made_by(result)


def generation_cpu(result: dict[str, Any]) -> str:
    names = {
        "one_by_one": "transformers, one prompt after another",
        "batched": "transformers, batched",
        "engine": "this package's transformers engine",
        "vllm": "vLLM",
    }
    rows = [
        [
            names[row["way"]],
            "1" if row["way"] == "one_by_one" else str(row["batch_size"]),
            f"{row['tokens_per_second']:.0f} ({row['tokens_per_second_min']:.0f} to {row['tokens_per_second_max']:.0f})",
            f"{row['seconds']:.1f}",
            f"{row['peak_rss_mib']:.0f}",
        ]
        for row in result["summary"]
        if row["batch_size"] == result["headline_batch_size"] or row["way"] == "one_by_one"
    ]
    said = (
        f"\n{result['settings']['dtype']}: vLLM makes {result['vllm_over_one_by_one']:.1f} times the tokens of one-by-one "
        f"generation and {result['vllm_over_batched']:.1f} times those of batched generation; {result['greedy_agreement']:.1%} "
        f"of greedy tokens agree, log-probabilities within {result['max_logprob_gap']:.1g} nats.\n"
    )
    titles = ["way", "prompts at a time", "tokens per second, median (range)", "seconds for all", "peak memory, MiB"]
    return table(titles, rows) + said + made_by(result)


def table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def made_by(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return f"\n`{result['command']}`, {result['date']}, {machine['cpu']}, {machine['cores']} cores.\n"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"demo_seeds": demo_seeds, "generation_cpu": generation_cpu}


def filled(text: str) -> str:
    """``text`` with every marked table made anew; a table without a result file stays as it is."""
    for name, render in TABLES.items():
        path = HERE / "results" / f"{name}.json"
        if path.exists():
            body = render(json.loads(path.read_text(encoding="utf-8")))
            pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
            text = re.sub(pattern, lambda m, body=body: m[1] + body + m[2], text, flags=re.DOTALL)
    return re.sub(r"(<!-- file: (\S+) -->\n).*?(<!-- end -->)", _quoted_file, text, flags=re.DOTALL)


def _quoted_file(match: re.Match[str]) -> str:
    path = README.parent / match[2]
    body = f"```\n{path.read_text(encoding='utf-8').rstrip()}\n```\n" if path.exists() else ""
    return match[1] + body + match[3]


def main() -> None:
    text = README.read_text(encoding="utf-8")
    new = filled(text)
    if "--check" in sys.argv:
        sys.exit("README.md is out of date: run python benchmarks/tables.py" if new != text else 0)
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
