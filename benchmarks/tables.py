"""Writes the tables and quoted outputs of README.md and docs/ from committed files; ``--check`` only says if they are current.

python benchmarks/tables.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
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
    }
    titles = [
        "seed",
        "reward model, held-out accuracy",
        "gold score before",
        "after",
        "KL, nats per token",
        "distinct responses per topic",
        "length ratio",
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


def refill_cpu(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        low, high = row["ratio_range"]
        waste = row["wasted_row_steps"]
        ratio = f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"
        rows.append(
            [row["dtype"], str(row["batch_size"]), ratio, f"{waste['refilled']:.0%}", f"{waste['unrefilled']:.0%}"]
        )
    titles = [
        "precision",
        "batch size",
        "relative tokens/CPU second: median (range)",
        "wasted, refilled",
        "wasted, unrefilled",
    ]
    lengths = result["lengths"]
    said = (
        f"\n{lengths['completions']} completions of {lengths['mean']:.0f} tokens on average (median {lengths['median']:.0f}, "
        f"maximum {lengths['max']}). Wasted: row-steps beyond a completion's tokens.\n"
    )
    return table(titles, rows) + said + made_by(result)


def packing(result: dict[str, Any]) -> str:
    seconds = result["seconds"]
    rows = [
        [way, *(f"{share['share'][way]:.0%}" for share in result["padding"]), f"{seconds['relative'][way]:.2f}"]
        for way in seconds["relative"]
    ]
    titles = [
        "micro-batches",
        *(f"padding, {share['lengths']}" for share in result["padding"]),
        "relative time of an update",
    ]
    said = (
        f"\nPairs have {result['padding'][0]['mean']} tokens on average. Packed and padded log-probabilities differ by at most "
        f"{result['equality']['logprobs']:.0e}, gradients by {result['equality']['gradients_relative']:.0e} of the largest one.\n"
    )
    return table(titles, rows) + said + made_by(result)


def time_to_quality(result: dict[str, Any]) -> str:
    rows = []
    for name, own in result["summary"].items():
        times = own.get("times_ours", {"seconds": 1, "tokens": 1})
        rows.append(
            [
                TRAINERS[name],
                f"{result['learning_rates'][name]:g}",
                f"{own['reached']} of {own['seeds']}",
                f"{own['seconds']:.0f}",
                f"{times['seconds']:.2f}",
                f"{own['tokens']:,.0f}",
                f"{times['tokens']:.2f}",
            ]
        )
    titles = ["trainer", "learning rate", "seeds", "seconds", "its time over ours", "tokens", "its tokens over ours"]
    return table(titles, rows) + made_by(result)


def rollout_cpu(result: dict[str, Any]) -> str:
    rows = []
    for precision, name in (("no", "float32"), ("bf16", "bfloat16")):
        if precision not in result:
            continue
        own = result[precision]
        for engine, phases in own["seconds"].items():
            seconds = [f"{phases[phase]:.2f}" for phase in ("generate", "score", "sync")]
            rows.append([name, engine, *seconds, f"{sum(phases.values()):.2f}", f"{own['added_mib'][engine]:.0f}"])
    titles = ["dtype", "engine", "generate, s", "score, s", "sync, s", "together, s", "memory added, MiB"]
    said = "".join(
        f"\n{name}: the phase is {own['transformers_over_vllm']:.2f} times as long with transformers "
        f"({own['transformers_over_vllm_range'][0]:.2f} to {own['transformers_over_vllm_range'][1]:.2f}); vLLM takes "
        f"{own['sync_seconds_per_100m_parameters']:.2f} s to take over 100 million weights, and "
        f"{own['added_beyond_weights_mib']:.0f} MiB beyond the size of its weights. An engine that generated at the "
        f"{own['limit']['operations_per_second'] / 1e9:.0f} GFLOP/s of large matrix products, in "
        f"{own['limit']['generate_seconds']:.2f} s, would make the phase "
        f"{own['limit']['transformers_over_vllm']:.2f} times as fast.\n"
        for precision, name in (("no", "float32"), ("bf16", "bfloat16"))
        if (own := result.get(precision))
    )
    return table(titles, rows) + said + made_by(result)


def demo_engines(result: dict[str, Any]) -> str:
    """Two results of demo_seeds.py, side by side; ``result`` is that of vLLM."""
    other = json.loads((HERE / "results" / "demo_seeds_90_steps.json").read_text(encoding="utf-8"))
    rows = []
    for one in (other, result):
        finals = [row["gold_after"] for row in one["rows"]]
        spread = f"{min(finals):.3f} to {max(finals):.3f}"
        rows.append([one["rollout"], ", ".join(f"{f:.3f}" for f in finals), f"{fmean(finals):.3f}", spread])
    titles = ["engine", "gold score after training, by seed", "mean", "range"]
    return table(titles, rows) + made_by(result)


TRAINERS = {
    "ours": "**this package, REINFORCE++**",
    "ours_vllm": "this package, REINFORCE++, rollouts by vLLM",
    "ours_ppo": "this package, PPO",
    "trl_rloo": "TRL RLOO",
    "trl_grpo": "TRL GRPO",
    "trl_ppo": "TRL PPO (1.12.0), one epoch",
}


PRECISIONS = {
    "bf16": "bfloat16, each in its fastest setting",
    "bf16_masters": "bfloat16 with float32 weights",
    "float32": "float32",
}


def peers_cpu(result: dict[str, Any]) -> str:
    rows = []
    for precision, by_name in result["seconds"].items():
        compared = result if precision == next(iter(result["seconds"])) else result[precision]
        for name, title in TRAINERS.items():
            if name not in by_name:
                continue
            ratios = [
                f"{compared[key][name]['median']:.2f} ({compared[key][name]['min']:.2f} to {compared[key][name]['max']:.2f})"
                if name in compared[key]
                else "1"
                for key in ("speedup", "memory_ratio")
            ]
            rows.append(
                [
                    PRECISIONS[precision],
                    title,
                    f"{by_name[name]['median']:.1f}",
                    ratios[0],
                    f"{result['peak_rss_mib'][precision][name]['median']:.0f}",
                    ratios[1],
                ]
            )
    titles = ["precision", "trainer", "seconds a step", "its time over ours", "peak MiB", "our memory over its"]
    said = "".join(
        f"\n{PRECISIONS[precision].split(',')[0]}: of what the machine's matrix products and memory allow, our step reaches "
        f"{own['step']:.0%} (rollout {own['rollout']:.0%}, scoring {own['score']:.0%}, update {own['update']:.0%}).\n"
        for precision, own in result["limit_fraction"].items()
        if precision != "bf16_masters"  # ours is the same as in bf16
    )
    soundings = [
        f"{TRAINERS[name]} {own['seconds']['autocast']:.1f} s"
        for name, own in result["best_bf16_setting"].items()
        if "seconds" in own
    ]
    if soundings and "bf16_masters" not in result["seconds"]:
        said += (
            f"\nWith float32 weights and autocast, which keeps small updates, one step took: {', '.join(soundings)}.\n"
        )
    for precision, by_name in result["seconds"].items():
        if precision != "bf16_masters":
            least = result["limit_fraction"][precision]["step"] * by_name["ours"]["median"]
            others = ", ".join(
                f"{by_name[name]['median'] / least:.1f} times as fast as {TRAINERS[name].removesuffix(', one epoch')}"
                for name in ("trl_rloo", "trl_grpo", "trl_ppo")
                if name in by_name
            )
            said += (
                f"\n{PRECISIONS[precision].split(',')[0]}: a step at these limits would take {least:.1f} s, {others}.\n"
            )
    earlier = "".join(f"\n`{command}`, before, same file.\n" for command in result.get("earlier_commands", []))
    return table(titles, rows) + said + earlier + made_by(result)


def ablation_cpu(result: dict[str, Any]) -> str:
    rows = [
        [
            row["optimisation"],
            row["phase"],
            f"{row['expected_seconds']:.2f}",
            f"{row['seconds_saved']:.2f} ({min(row['seconds_saved_by_round']):.2f} to "
            f"{max(row['seconds_saved_by_round']):.2f})",
        ]
        for row in result["optimisations"]
    ]
    titles = ["optimisation", "phase", "expected, s", "saved, s: median (range)"]
    said = f"\nWith all of them a step takes {result['step_seconds']:.2f} s.\n"
    return table(titles, rows) + said + made_by(result)


def algorithms(result: dict[str, Any]) -> str:
    """Every estimator beside PPO; a winner is named only where 95 % intervals don't overlap."""
    by_name, grid = result["estimators"], result["sensitivity"]
    names = list(by_name)
    measure = by_name["ppo"]["measure"]

    def pair(get: Callable[[dict[str, Any]], dict[str, float] | None], digits: int) -> Callable[[str], str]:
        return lambda name: plus_minus(get(by_name[name]), digits)

    lines: list[tuple[str, Callable[[str], str], str]] = [
        (
            f"output quality: {measure} score after training",
            pair(lambda own: own["final"][measure], 3),
            apart(by_name, lambda own: own["final"][measure], more_is_better=True),
        ),
        ("KL to the start, nats a token", pair(lambda own: own["final"]["kl"], 3), ""),
        (
            "training speed: seconds a step",
            pair(lambda own: own["step_seconds"], 2),
            apart(by_name, lambda own: own["step_seconds"], more_is_better=False),
        ),
        (
            f"seconds to a {measure} score of {by_name['ppo']['target']:.2f}",
            pair(lambda own: own["to_target"]["seconds"], 0),
            apart(by_name, lambda own: own["to_target"]["seconds"], more_is_better=False),
        ),
        ("sampled tokens to it, thousands", lambda name: thousands(by_name[name]["to_target"]["tokens"]), ""),
        ("stability: worst seed", lambda name: f"{by_name[name]['worst_seed']:.3f}", ""),
        (
            "worst of 9 settings (deviation over them)",
            lambda name: f"{grid[name]['worst']:.3f} ({grid[name]['spread']:.3f})",
            "",
        ),
        (
            "runs that diverged",
            lambda name: str(by_name[name]["diverged"] + sum(cell["diverged"] for cell in grid[name]["cells"])),
            "",
        ),
        (
            "memory: peak MiB",
            pair(lambda own: own["peak_rss_mib"], 0),
            apart(by_name, lambda own: own["peak_rss_mib"], more_is_better=False),
        ),
    ]
    rows = [[title, *(cell(name) for name in names), verdict] for title, cell, verdict in lines]
    titles = ["", *(f"`{name}`" for name in names), "REINFORCE++ against PPO"]
    settings = result["settings"]
    said = (
        f"\n{settings['seeds']} seeds, {settings['max_steps']} steps of {settings['batch_size'] * settings['num_generations']} "
        "completions each, the same prompts, samples and steps for all; ± is the 95 % interval over seeds. The grid: learning "
        "rate times 1/3, 1, 3 and 4, 8, 32 completions a step, one seed each.\n"
    )
    return table(titles, rows) + said + made_by(result)


def feedback_loop(result: dict[str, Any]) -> str:
    rows = []
    for line in result["summary"]:
        cells = [
            plus_minus(line[key][selection], 2) if key in line else ""
            for key in ("rm_accuracy", "gold")
            for selection in ("random", "uncertain")
        ]
        rows.append([str(line["round"]), str(line["labels"]), *cells])
    titles = [
        "round",
        "votes",
        "accuracy, random",
        "accuracy, uncertain",
        "gold score, random",
        "gold score, uncertain",
    ]
    last, seeds = result["summary"][-1], len({row["seed"] for row in result["rows"]})
    apart = {key: last[key]["difference"] for key in ("rm_accuracy", "gold")}
    shown = any(abs(value["mean"]) > value["interval"] for value in apart.values())
    ties, votes = Counter[str](), last["labels"] - result["summary"][1]["labels"]
    for row in result["rows"]:
        ties[row["selection"]] += row["ties"] if row["round"] > 1 else 0
    said = (
        f"\nMeans over {seeds} seeds with 95% intervals. After the last round, uncertain minus random is "
        f"{plus_minus(apart['rm_accuracy'], 3)} in accuracy and {plus_minus(apart['gold'], 3)} in the gold score"
        f"{'' if shown else ': no difference shown'}. From round 2, {ties['random'] / votes / seeds:.0%} of the random pairs and "
        f"{ties['uncertain'] / votes / seeds:.0%} of the uncertain ones are ties.\n"
    )
    return table(titles, rows) + said + made_by(result)


def plus_minus(value: dict[str, float] | None, digits: int) -> str:
    return "not reached by all" if value is None else f"{value['mean']:.{digits}f} ± {value['interval']:.{digits}f}"


def thousands(value: dict[str, float] | None) -> str:
    return plus_minus(value and {key: number / 1000 for key, number in value.items()}, 0)


def apart(
    by_name: dict[str, Any], get: Callable[[dict[str, Any]], dict[str, float] | None], *, more_is_better: bool
) -> str:
    """Which of the two is ahead, if their intervals don't overlap."""
    ours, theirs = get(by_name["reinforce_plus_plus"]), get(by_name["ppo"])
    if ours is None or theirs is None:
        return "PPO ahead" if ours is None and theirs else "REINFORCE++ ahead" if ours else ""
    gap = ours["mean"] - theirs["mean"]
    if abs(gap) <= ours["interval"] + theirs["interval"]:
        return "no difference shown"
    ratio = max(ours["mean"], theirs["mean"]) / min(ours["mean"], theirs["mean"])
    winner = "REINFORCE++" if (gap > 0) == more_is_better else "PPO"
    return f"{winner} ahead, {ratio:.2f} times"


def profile_cpu(result: dict[str, Any]) -> str:
    before, after = result["before"], result["after"]
    rows = [
        [f"**{phase}**", f"{before['phases'][f'time/{phase}']:.2f}", f"{after['phases'][f'time/{phase}']:.2f}"]
        for phase in ("rollout", "score", "update")
    ]
    rows.append(["**step**", *(f"{when['phases']['step_time']:.2f}" for when in (before, after))])
    names = sorted(before["groups"], key=lambda name: -after["groups"].get(name, 0.0))
    rows += [[name, f"{before['groups'][name]:.2f}", f"{after['groups'].get(name, 0.0):.2f}"] for name in names]
    return table(["", "before, s", "after, s"], rows) + made_by(result)


def kill(result: dict[str, Any]) -> str:
    names = {"policy": "policy", "reward": "reward model"}
    rows = []
    for kind, name in names.items():
        own = result[kind]
        kills = [kill for row in own["rows"] for kill in row["kills"] if kill["killed"]]
        writing = sum("write" in kill for kill in kills)
        rows.append([name, str(own["points"]), str(len(kills)), str(writing), str(own["identical"])])
    titles = [
        "training",
        "runs disturbed",
        "kills that met a running training",
        "of these, while writing",
        "byte-identical",
    ]
    return table(titles, rows) + made_by(result)


def label_load(result: dict[str, Any]) -> str:
    names = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}
    columns = ("clients", "votes", "kills", "lost", "doubled")
    rows = [[names[row["store"]], *(f"{row[key]:,}" for key in columns)] for row in result["rows"]]
    return table(["database", "clients", "votes", "kills of the server", "lost", "doubled"], rows) + made_by(result)


def fuzz(result: dict[str, Any]) -> str:
    columns = ("cases", "results", "named_errors", "hangs")
    rows = [[kind, *(f"{own[column]:,}" for column in columns)] for kind, own in result["kinds"].items()]
    rows.append(["all", *(f"{result[column]:,}" for column in columns)])
    said = f"\nTracebacks: {result['tracebacks']}.\n"
    return table(["kind of input", "cases", "correct results", "named errors", "hangs"], rows) + said + made_by(result)


def soak(result: dict[str, Any]) -> str:
    rss, disk = result["rss_mib"], result["disk_mib"]
    rows = [
        ["resident memory, MiB", f"{rss['settled']:.0f}", f"{rss['end']:.0f}"],
        ["open files", "", f"{result['fd_growth']:+.0f}"],
        ["run folder, MiB", f"{disk['settled']:.0f}", f"{disk['end']:.0f}"],
    ]
    said = (
        f"\n{result['steps']} steps. From step 51 on memory changes by {result['rss_slope_mib_per_100_steps']:+.2f} MiB per "
        "100 steps.\n"
    )
    return table(["", "after 50 steps", "at the end"], rows) + said + made_by(result)


def reward_real(result: dict[str, Any]) -> str:
    accuracy = result["accuracy"]
    interval = f"{accuracy['low']:.2f} to {accuracy['high']:.2f}"
    row = [result["pairs"], f"{accuracy['value']:.2f}", interval, f"{result['longer_wins']:.2f}", result["epochs"]]
    titles = ["held-out pairs", "accuracy", "95% interval", "length-only baseline", "epochs"]
    return table(titles, [[str(cell) for cell in row]]) + made_by(result)


def doctor(result: dict[str, Any]) -> str:
    rows = []
    for row in result["faulty"]:
        fault = ", ".join(f"{name} {value}" for name, value in row["fault"].items() if value is not True)
        others = [f"`{name}`" for name in row["findings"] if name != row["rule"]]
        rows.append(
            [f"`{row['rule']}`", fault.replace("_", " "), "yes" if row["found"] else "**no**", ", ".join(others)]
        )
    said = (
        f"\n{result['found']} of {result['injected']} faults found; {result['false_alarms']} findings in "
        f"{result['healthy_runs']} sound runs of {result['steps']} steps.\n"
    )
    return table(["fault", "put in by", "found", "also found"], rows) + said + made_by(result)


def planner(result: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{own['estimated']:.0f}",
            f"{own['measured']:.0f}",
            f"{own['error']:+.1%}",
            f"{own['error_above_libraries']:+.1%}",
            own["peak_phase"],
            f"{own['time_ratio']:.2f}",
        ]
        for name, own in result["configurations"].items()
    ]
    titles = [
        "configuration",
        "estimated, MiB",
        "measured",
        "error",
        "error above libraries",
        "largest phase",
        "estimated over measured time",
    ]
    fit, libraries = result["allocator"], result["libraries"]["measured"]
    said = (
        f"\nThe largest error is {result['largest_error']:.1%}, above libraries {result['largest_error_above_libraries']:.1%}. "
        f"Libraries take {libraries['transformers']:.0f} MiB, with vLLM {libraries['vllm']:.0f} MiB. The allocator's share, "
        f"fitted on {', '.join(fit['fitted'])}: {', '.join(f'{share:.2f}' for share in fit['fitted'].values())}; the planner "
        f"takes {fit['in_planner']:.2f}. Estimated times are {result['time_ratio_range'][0]:.2f} to "
        f"{result['time_ratio_range'][1]:.2f} times the measured ones, {result['median_time_ratio']:.2f} in the median.\n"
    )
    return table(titles, rows) + said + made_by(result)


def families(result: dict[str, Any]) -> str:
    """Verbs across; where one doesn't run, a number stands for the sentence that is said."""
    told: list[str] = []

    def cell(engines: dict[str, str]) -> str:
        marks = []
        for engine, said in engines.items():
            if said == "passed":
                marks.append(engine)
            else:
                told.append(said) if said not in told else None
                marks.append(f"{engine}: ({told.index(said) + 1})")
        return ", ".join(marks)

    found = result["families"]
    verbs = list(next(iter(found.values())))
    rows = [[family, *(cell(verbs_of[verb]) for verb in verbs)] for family, verbs_of in found.items()]
    notes = "".join(f"\n({number}) {sentence}\n" for number, sentence in enumerate(told, 1))
    return table(["family", *verbs], rows) + notes + made_by(result)


def lora_memory(result: dict[str, Any]) -> str:
    found = result["configurations"]
    whole = found["all weights"]["measured_above_libraries"]
    rows = [
        [
            name,
            f"{row['measured']:.0f}",
            f"{row['measured_above_libraries']:.0f}",
            f"{row['measured_above_libraries'] / whole:.2f}",
            *(
                [f"{row['estimated']:.0f}", f"{row['estimated'] / row['measured'] - 1:+.1%}"]
                if "copied" not in name
                else ["", ""]
            ),
        ]
        for name, row in found.items()
    ]
    titles = ["training", "peak, MiB", "above libraries", "of all weights'", "estimated by the planner", "error"]
    said = (
        f"\nA Llama shape of {result['float32_weights'] / 4 * (1 << 20) / 1e6:.0f} million weights. Sharing the reference "
        f"saves {result['saved_by_sharing_the_reference']:.0f} MiB; one copy of the weights is "
        f"{result['float32_weights']:.0f} MiB.\n"
    )
    return table(titles, rows) + said + made_by(result)


def streaming(result: dict[str, Any]) -> str:
    rows = [
        [name, f"{row['file_mib']:,}", str(row["peak_mib"]), f"{row['seconds_to_the_first_step']:.0f}"]
        for name, row in result["runs"].items()
    ]
    titles = ["training", "file, MiB", "peak memory of the process, MiB", "seconds to the first step"]
    said = f"\nThe largest file has {result['rows']:,} pairs. The model is `builtin:tiny`.\n"
    return table(titles, rows) + said + made_by(result)


def equality(result: dict[str, Any]) -> str:
    def largest(own: dict[str, Any], gap: str, *, resumed: bool) -> str:
        found = [row[gap] for name, row in own["scenarios"].items() if name.endswith("goes on") == resumed]
        return f"{max(found):.0e}" if found else ""

    gaps = ("max_advantage_gap", "max_advantage_gap_of_run", "max_weight_gap")
    rows = [
        [own["backend"], str(own["processes"])]
        + [largest(own, gap, resumed=False) for gap in gaps]
        + [largest(own, "max_weight_gap", resumed=True)]
        for own in result["rows"]
    ]
    titles = ["backend", "processes", "advantages of the same batch", "advantages, whole run"]
    titles += [f"weights after {result['steps']} steps", "weights of runs that went on"]
    names = [name for name in result["rows"][0]["scenarios"] if not name.endswith("goes on")]
    said = (
        f"\nLargest absolute differences over {len(names)} trainings ({', '.join(names)}), at learning rate "
        f"{result['learning_rate']:g}.\n"
    )
    return table(titles, rows) + said + made_by(result)


STRUCK = {"cut": "the cable is pulled out", "lose": "packets are lost"}


def partition_torchrun(result: dict[str, Any]) -> str:
    rows = [
        [STRUCK[row["strike"]], row["who"], f"{row['told']:.1f}", f"{row['ended']:.1f}"]
        for row in result["rows"]
        if row["scenario"] == "torchrun"
    ]
    said = f"\nWith `--watchdog_seconds {result['watchdog_seconds']}`; two machines, network namespaces.\n"
    return table(["network", "process", "tells so after, s", "has ended after, s"], rows) + said + made_by(result)


def partition_ray(result: dict[str, Any]) -> str:
    parted = {"ray node": "a machine of the pool, of two", "ray head": "the head, with the only worker"}
    rows = [
        [
            parted[row["scenario"]],
            STRUCK[row["strike"]],
            *(f"{row[what]:.0f}" if what in row else "" for what in ("goes_on", "told", "ended")),
        ]
        for row in result["rows"]
        if row["scenario"] in parted
    ]
    titles = ["parted from the trainer", "network", "next step after, s", "tells so after, s", "has ended after, s"]
    return table(titles, rows) + made_by(result)


def ray_kill(result: dict[str, Any]) -> str:
    rows = [
        [
            name,
            *(str(result[name][key]) for key in ("prompts", "answered_once", "actors_killed", "given_out_again")),
            f"{result[name]['reward_first']:.3f} -> {result[name]['reward_last']:.3f}",
            f"`{result[name]['weights']}`",
        ]
        for name in ("undisturbed", "disturbed")
    ]
    titles = [
        "run",
        "prompts",
        "answered once",
        "workers killed",
        "prompts given out again",
        "reward",
        "weights in the end",
    ]
    return table(titles, rows) + made_by(result)


def staleness(result: dict[str, Any]) -> str:
    time, learning = result["time"], result["learning"]
    rows = []
    for own in time["rows"]:
        same = (row for row in learning["rows"] if row["staleness"] == own["staleness"])
        finals = [row["gold_after"] for row in same if own["engine"] == "transformers"]
        seconds = own["seconds"]
        phases = [f"{seconds[name]:.2f}" for name in ("rollout", "score", "update", "step_time")]
        rows.append([f"`{own['engine']}`", str(own["staleness"]), *phases, f"{fmean(finals):.3f}" if finals else ""])
    titles = [
        "engine",
        "staleness",
        "waiting for completions, s",
        "score, s",
        "update, s",
        "step, s",
        "gold score after",
    ]
    ratios = " and ".join(f"{ratio:.2f} with `{engine}`" for engine, ratio in time["step_over_step_ahead"].items())
    after, course = (
        f"{gap['mean']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})"
        for gap in (learning["gold_after_difference"], learning["course_difference"])
    )
    seeds = len({row["seed"] for row in learning["rows"]})
    said = (
        f"\nA step without staleness takes as much time as one with it, times {ratios}: medians of "
        f"{len(time['rows'][0]['step_by_round'])} rounds, on two cores, of which without staleness one waits for the other. "
        f"The gold scores are those of the demo's training, {seeds} seeds: with staleness 1 the last one differs by {after}, "
        f"the mean over the course by {course} (95 % intervals, pairs of the same seed).\n"
    )
    return table(titles, rows) + said + made_by(time) + made_by(learning)


def scaling_steps(result: dict[str, Any]) -> str:
    step = result["step"]
    rows = []
    for name, own in step["checked"].items():
        phases = [f"{own['predicted'][phase]:.2f} / {own['measured'][phase]:.2f}" for phase in own["measured"]]
        rows.append([name, *phases, f"{own['step']['error']:+.0%}"])
    for worst, title in (("median", "median error"), ("worst", "worst error")):
        own = step["errors"]["checked"]
        rows.append([f"**{title}**", *(f"{own[phase][worst]:.0%}" for phase in (*_PHASES, "step"))])
    own = step["errors"]["fitted"]
    rows.append(["median (worst) of those fitted on"] + [f"{e['median']:.0%} ({e['worst']:.0%})" for e in own.values()])
    constants, rates = step["constants"], step["rates"]
    said = (
        f"\nSeconds of the processor, predicted / measured. The rates are {rates['operations'] / 1e9:.0f} GFLOP/s and "
        f"{rates['bytes'] / 1e9:.0f} GB/s. Fitted on {len(step['fitted'])} other trainings: passes reach "
        f"{constants['products']:.0%} of the products, decoding {constants['decoding']:.0%} of them and "
        f"{constants['reading']:.0%} of reading; a call takes {1e6 * constants['call']:.0f} µs in decoding, "
        f"{1e6 * constants['pass_call']:.0f} µs in a pass. "
        f"The planner's rounded constants: step {step['errors_of_planner']['step']['median']:.0%} in the median, "
        f"{step['errors_of_planner']['step']['worst']:.0%} at worst.\n"
    )
    return table(["training", *_PHASES, "step"], rows) + said + made_by(result)


_PHASES = ("rollout", "scoring", "update")


def scaling_projections(result: dict[str, Any]) -> str:
    rows = []
    phases = ("rollout", "waiting", "scoring", "update", "exchange", "sync")
    for name, own in result["projections"].items():
        last = own["scales"][-1]
        fits = "fits" if own["fits"] else "**does not fit**"
        seconds = [f"{last['seconds'][phase]:.1f}" for phase in phases]
        gained = f"{last['speedup']:.1f} of {last['devices'] / own['scales'][0]['devices']:g}"
        rate = f"{last['tokens_per_second']:,.0f}"
        rows.append([name, *seconds, f"{last['step']:.1f}", rate, gained, f"{own['memory_gib']:.0f} GiB, {fits}"])
    titles = ["training", *phases, "step, s", "tokens/s", "speed-up against one machine", "memory of a GPU"]
    return table(titles, rows) + made_by(result)


def scaling_pool(result: dict[str, Any]) -> str:
    rows = [
        [
            f"{own['workers']:,}",
            str(own["pieces"]),
            f"{own['failures_per_hour']:g}",
            f"{own['tokens_per_second']:,.0f}",
            f"{own['share_of_ideal']:.0%}",
            f"{own['lost']:,}",
            f"{own['again_share']:.2%}",
            f"{own['scheduler_microseconds_per_prompt']:.1f}",
            f"{own['scheduler_share_of_time']:.2%}",
            f"{own['ray_share_of_time']:.1%}",
        ]
        for own in result["pool"]["rows"]
        if own["workers"] > 1 or own["failures_per_hour"] == 0
    ]
    titles = ["workers", "pieces each", "failures an hour, each", "tokens/s", "of ideal", "lost", "prompts done again"]
    titles += ["scheduler, µs a prompt", "scheduler, of the time", "Ray's calls, of the time"]
    settings = result["pool"]["settings"]
    said = (
        f"\n{settings['steps']} steps each. A lost worker is replaced after {settings['seconds_lost']:.0f} s. "
        f"Workers' speeds differ by {settings['spread']:.0%}.\n"
    )
    return table(titles, rows) + said + made_by(result)


def defaults(result: dict[str, Any]) -> str:
    """Trainings of every model with the defaults, and with other learning rates, warmups and score heads."""
    rows = []
    for own in result["rows"]:
        rate = f"{own['learning_rate']:g}" + (" (default)" if own["default"] else "")
        accuracy = ""
        if own["training"] == "policy":
            course = f"KL {own['max_kl']:.3f}, reward {own['reward_first']:.2f} -> {own['reward_last']:.2f}"
        elif own["training"] == "sft":
            course = f"loss {own['max_loss']:.2f}, held-out {own['heldout_before']:.2f} -> {own['heldout_after']:.2f}"
        else:
            course = f"loss {own['max_loss']:.2f}"
            known = own["heldout_accuracy"] is not None
            accuracy = f"{own['heldout_accuracy']:.2f} ({own['length_accuracy']:.2f})" if known else ""
            accuracy += f", {own['heldout_pairs']} pairs" if known else ""
        outcome = "**diverged**" if own["diverged"] else "trained"
        warmup, head = f"{own['warmup_ratio']:g}", own["head"] or "-"
        training = own["training"] + (" (LoRA)" if own.get("lora") else "")
        steps = str(own["steps"])
        rows.append([training, own["model"], own["data"], rate, warmup, head, steps, course, accuracy, outcome])
    titles = ["training", "model", "data", "peak learning rate", "warmup", "head's deviation", "steps"]
    titles += ["largest loss or KL", "held-out accuracy (longer answer)", "outcome"]
    return table(titles, rows) + made_by(result)


def default_rates(_: dict[str, Any]) -> str:
    """The defaults themselves, as the package has them."""
    sys.path.insert(0, str(HERE.parent / "src"))
    from reinforcepp.config.learning_rates import DEFAULT_LEARNING_RATES

    def size(parameters: float) -> str:
        return "any larger" if parameters == float("inf") else f"up to {parameters / 1e6:,.0f} million"

    rows = [
        [f"`{training}`", size(rates.parameters), f"{rates.full:g}", f"{rates.lora:g}"]
        for training, sizes in (("reward", "reward"), ("sft", "sft"), ("train", "policy"))
        for rates in DEFAULT_LEARNING_RATES[sizes]
    ]
    return table(["command", "parameters", "full training", "LoRA"], rows)


def code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def trl_names(_: dict[str, Any]) -> str:
    """TRL's settings, as the package converts them."""
    rows = [
        [code(name for name in rule.names if name in live), code(rule.settings), rule.mapping]
        for rule, live in _trl_rules()
        if rule.settings
    ]
    return table(["TRL", "here", "conversion"], rows)


def trl_no_effect(_: dict[str, Any]) -> str:
    """TRL's settings without effect, by reason."""
    reasons: dict[str, list[str]] = {}
    for rule, live in _trl_rules():
        if rule.mapping.startswith("no effect"):
            reasons.setdefault(rule.mapping.removeprefix("no effect, because "), []).extend(live)
    return table(["TRL", "reason"], [[code(names), reason] for reason, names in reasons.items()])


def trl_unsupported(_: dict[str, Any]) -> str:
    """TRL's settings that must be off, and what to do instead."""
    rows = [
        [code(names), *rule.mapping.removeprefix("only ").split(". ", 1)]
        for rule, names in _trl_rules()
        if rule.mapping.startswith("only ")
    ]
    return table(["TRL", "accepted", "instead"], rows)


def _trl_rules() -> list[tuple[Any, list[str]]]:
    """Each rule with the names that a training accepts through it; old names of ours are no names of TRL."""
    sys.path.insert(0, str(HERE.parent / "src"))
    from reinforcepp.config import ReinforceConfig, RewardModelConfig, SftConfig
    from reinforcepp.config.aliases import aliases_of
    from reinforcepp.config.trl_names import RULES
    from reinforcepp.run_dir import RENAMED_SETTINGS

    known = {name for config in (ReinforceConfig, RewardModelConfig, SftConfig) for name in aliases_of(config)}
    rules = [(rule, [name for name in rule.names if name in known - {*RENAMED_SETTINGS}]) for rule in RULES]
    return [(rule, names) for rule, names in rules if names]


def openrlhf_names(_: dict[str, Any]) -> str:
    """OpenRLHF's flags and their counterparts."""
    return _foreign("OPENRLHF")


def verl_names(_: dict[str, Any]) -> str:
    """Verl's settings and their counterparts."""
    return _foreign("VERL")


def _foreign(project: str) -> str:
    sys.path.insert(0, str(HERE.parent / "src"))
    from reinforcepp.config import foreign_names

    names: dict[Any, list[str]] = {}
    for name, foreign in getattr(foreign_names, project).items():
        names.setdefault((foreign.setting, foreign.note, tuple(foreign.values.items())), []).append(name)
    rows = [
        [
            code(theirs),
            code([setting]) if setting else "none",
            note or ", ".join(f"{old} is {new}" for old, new in values),
        ]
        for (setting, note, values), theirs in names.items()
    ]
    return table([{"OPENRLHF": "OpenRLHF", "VERL": "verl"}[project], "here", "conversion"], rows)


def _default_settings(config: str, *columns: str) -> Callable[[dict[str, Any]], str]:
    """Return a function that lists the defaults of ``config``, those that differ first."""

    def render(_: dict[str, Any]) -> str:
        sys.path.insert(0, str(HERE))
        import default_settings

        config_class = getattr(default_settings, config)
        listed = sorted(default_settings.rows(config_class), key=lambda row: not row.differs)
        rows = [
            [code([row.setting]), row.ours, *(row.theirs.get(name, "-") for name in columns), row.reason(config_class)]
            for row in listed
        ]
        return table(["setting", "here", *columns, "reason"], rows)

    return render


def real_model(result: dict[str, Any]) -> str:
    low, high = result["reward_accuracy_interval"]
    rows = [
        ["reward model, held-out accuracy", f"{result['reward_accuracy']:.2f} ({low:.2f} to {high:.2f})"],
        [
            "held-out pairs, accuracy of choosing the longer answer",
            f"{result['heldout_pairs']}, {result['length_accuracy']:.2f}",
        ],
        ["largest loss of the reward models", f"{result['max_reward_loss']:.2f}"],
        ["policy steps, seconds each", f"{result['steps']}, {result['seconds_per_step']:.0f}"],
        ["peak memory, planned", f"{result['peak_gib']:.1f} GiB, {result['planned_gib']:.1f} GiB"],
        ["decoding, share of the memory bandwidth", f"{result['decode_bandwidth_fraction']:.0%}"],
    ]
    return table([f"`{result['model']}`", "measured"], rows) + made_by(result)


def trl_compat(result: dict[str, Any]) -> str:
    levels = list(result["counts"])
    parts: dict[str, Counter[str]] = {}
    for row in result["rows"]:
        parts.setdefault(row["part"], Counter())[row["level"]] += 1
    parts["all"] = sum(parts.values(), Counter())
    rows = [[part, str(counts.total()), *(str(counts[level]) for level in levels)] for part, counts in parts.items()]
    return table(["part", "behaviors", *levels], rows) + made_by(result)


def trl_compat_changes(result: dict[str, Any]) -> str:
    """Behaviors whose code changes, and those that are impossible, with reasons."""
    changed = [row for row in result["rows"] if row["level"] != "unchanged"]
    changed.sort(key=lambda row: list(result["counts"]).index(row["level"]))
    rows = [[f"`{row['behavior']}`", row["level"], row["change"].replace("|", "\\|")] for row in changed]
    return table(["behavior", "level", "change or reason"], rows)


def security(result: dict[str, Any]) -> str:
    """Show one row per test, with the outcomes of the first of its variants."""
    variants: dict[str, list[dict[str, str]]] = {}
    for row in result["rows"]:
        variants.setdefault(row["test"].removeprefix("tests/security/").partition("[")[0], []).append(row)
    rows = []
    for test, (first, *others) in variants.items():
        more = f" ({len(others) + 1} variants)" if others else ""
        outcomes = (textwrap.shorten(first[when], 90, placeholder=" ...") for when in ("before", "after"))
        rows.append([first["id"], first["attack"] + more, *outcomes, f"`{test}`"])
    rows = [[cell.replace("|", r"\|").replace("<", "&lt;").replace("*", r"\*") for cell in row] for row in rows]
    return table(["id", "attack", "before", "now", "test in tests/security"], rows) + made_by(result)


def hardware(result: dict[str, Any]) -> str:
    def row(planned: dict[str, Any]) -> list[str]:
        gpus = f"{planned['gpus']} x " if planned["gpus"] > 1 else ""
        memory = f"{planned['peak_gib']:.1f} of {planned['memory_gib']:.0f} GiB"
        seconds = f"{planned['seconds_per_step']:.0f}" if planned["fits"] else ""
        return [
            planned["model"],
            planned["way"],
            gpus + planned["device"],
            memory,
            "yes" if planned["fits"] else "no",
            seconds,
        ]

    titles = ["model", "trained", "GPU", "peak memory of a GPU", "fits", "seconds/step"]
    return table(titles, [row(planned) for planned in result["rows"]]) + made_by(result)


def environments_tool(result: dict[str, Any]) -> str:
    part = result["parts"].get("tool")
    if part is None:
        return ""

    def shown(value: dict[str, float]) -> str:
        mean, low, high = (round(value[name], 2) + 0.0 for name in ("mean", "low", "high"))  # no -0.00
        return f"{mean:.2f} ({low:.2f} to {high:.2f})"

    rows = [
        [name, shown(part[key]["gold_before"]), shown(part[key]["gold_after"])]
        for name, key in (("with the tool", "with_tool"), ("without it", "without_tool"))
    ]
    rows.append(["difference", "", shown(part["gold_difference"])])
    titles = ["answers", "score before training, mean (95% interval)", "after training"]
    seeds = len(part["rows"]) // 2
    return table(titles, rows) + f"\n{part['steps']} steps, {seeds} seeds.\n" + made_by(part)


def environments_masks(result: dict[str, Any]) -> str:
    part = result["parts"].get("masks")
    if part is None:
        return ""
    titles = ["chat template", "sampled tokens", "masked tokens", "mismatched tokens", "lost if encoded again"]
    keys = ("sampled", "masked", "mismatched", "lost_if_encoded_again")
    rows = [[f"`{row['template']}`", *(f"{row[key]:,}" for key in keys)] for row in part["rows"]]
    return table(titles, rows) + f"\n{part['episodes']} episodes of {part['turns']} turns each.\n" + made_by(part)


def table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def made_by(result: dict[str, Any]) -> str:
    machine = result["machine"]
    cores = f"{machine['cores']} core" + ("s" if machine["cores"] > 1 else "")
    return f"\n`{result['command']}`, {result['date']}, {machine['cpu']}, {cores}.\n"


TABLES: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "demo_seeds": (demo_seeds, "demo_seeds"),
    "generation_cpu": (generation_cpu, "generation_cpu"),
    "rollout_cpu": (rollout_cpu, "rollout_cpu"),
    "refill_cpu": (refill_cpu, "refill_cpu"),
    "packing": (packing, "packing"),
    "time_to_quality": (time_to_quality, "time_to_quality"),
    "ablation_cpu": (ablation_cpu, "ablation_cpu"),
    "peers_cpu": (peers_cpu, "peers_cpu"),
    "algorithms": (algorithms, "algorithms"),
    "profile_cpu": (profile_cpu, "profile_cpu"),
    "kill": (kill, "kill"),
    "fuzz": (fuzz, "fuzz"),
    "label_load": (label_load, "label_load"),
    "soak": (soak, "soak"),
    "planner": (planner, "planner"),
    "doctor": (doctor, "doctor"),
    "reward_real": (reward_real, "reward_real"),
    "families": (families, "families"),
    "lora_memory": (lora_memory, "lora_memory"),
    "streaming": (streaming, "streaming"),
    "equality": (equality, "equality"),
    "ray_kill": (ray_kill, "ray_kill"),
    "partition_torchrun": (partition_torchrun, "partition"),
    "partition_ray": (partition_ray, "partition"),
    "async": (staleness, "async"),
    "scaling_steps": (scaling_steps, "scaling"),
    "scaling_projections": (scaling_projections, "scaling"),
    "scaling_pool": (scaling_pool, "scaling"),
    "demo_engines": (demo_engines, "demo_seeds_vllm"),
    "defaults": (defaults, "defaults"),
    "default_rates": (default_rates, "defaults"),
    "policy_defaults": (_default_settings("ReinforceConfig", "TRL GRPO", "TRL RLOO", "OpenRLHF"), "defaults"),
    "reward_defaults": (_default_settings("RewardModelConfig", "TRL", "OpenRLHF"), "defaults"),
    "sft_defaults": (_default_settings("SftConfig", "TRL", "OpenRLHF"), "defaults"),
    "trl_names": (trl_names, "defaults"),
    "trl_no_effect": (trl_no_effect, "defaults"),
    "trl_unsupported": (trl_unsupported, "defaults"),
    "openrlhf_names": (openrlhf_names, "defaults"),
    "verl_names": (verl_names, "defaults"),
    "real_model": (real_model, "real_model"),
    "trl_compat": (trl_compat, "trl_compat"),
    "trl_compat_changes": (trl_compat_changes, "trl_compat"),
    "security": (security, "security"),
    "hardware": (hardware, "hardware"),
    "feedback_loop": (feedback_loop, "feedback_loop"),
    "environments_tool": (environments_tool, "environments"),
    "environments_masks": (environments_masks, "environments"),
}
"""For each table, what makes it and from which result file."""
PAGES = (README, *sorted((README.parent / "docs").glob("*.md")))


def filled(text: str) -> str:
    """``text`` with every marked table made anew; a table without a result file stays as it is."""
    for name, (render, source) in TABLES.items():
        path = HERE / "results" / f"{source}.json"
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
    old = {path: path.read_text(encoding="utf-8") for path in PAGES}
    stale = {path: filled(text) for path, text in old.items() if filled(text) != text}
    if "--check" in sys.argv:
        names = ", ".join(path.name for path in stale)
        sys.exit(f"{names} out of date: run python benchmarks/tables.py" if stale else 0)
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
