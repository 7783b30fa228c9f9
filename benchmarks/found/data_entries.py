"""Entries about data files, columns, encodings, and the console."""

# ruff: noqa: RUF001

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

from found.inputs import CHATML, FIXED, PAIRS, accepted, command, entry, expect, rows_file, saved, tokenizer, train
from reinforcepp.data import load_preferences, load_prompts, load_texts
from reinforcepp.errors import ReinforceError
from reinforcepp.types import Preference

Texts = list[tuple[str, str, str]]


def pairs_of(path: Path | str) -> list[Preference]:
    """Return the pairs that training would get from a file, in order of their rows."""
    _, pairs, held_out = load_preferences(str(path), heldout_fraction=0, seed=0)
    return sorted([*pairs, *held_out], key=lambda pair: pair.row)


def texts_of(path: Path | str) -> Texts:
    """Return prompt, chosen and rejected of a file's pairs."""
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs_of(path)]


EXPECTED = [(row["prompt"], row["chosen"], row["rejected"]) for row in PAIRS]


@entry(
    "F13",
    "Chinese pairs without a prompt column, and a repeated sentence",
    "the prompt ends at a sentence; words are Unicode",
)
def texts_without_spaces(folder: Path) -> str:
    from reinforcepp.config.reward_rules import make_rule

    rows = [
        {"chosen": "鱼住在哪里？水里。", "rejected": "鱼住在哪里？树上。"},
        {"chosen": "雪是什么颜色？白色。", "rejected": "雪是什么颜色？黑色。"},
    ]
    found = texts_of(rows_file(folder / "zh.jsonl", rows))
    expect(found == [("鱼住在哪里？", "水里。", "树上。"), ("雪是什么颜色？", "白色。", "黑色。")], found)
    repeated, once = make_rule("repetition")(["", ""], ["今天天气很好。" * 20, "今天天气很好。"])
    expect(repeated < once, (repeated, once))
    (score,) = make_rule("length?min=3&unit=words")([""], ["今天天气很好，我们去公园。"])
    return expect(score == 1, score)


@entry(
    "F15", "CSV: Windows-1252, semicolons, sep= line, spaces before quotes", "read as meant, or the right fix is named"
)
def csv_dialects(folder: Path) -> str:
    def write(name: str, text: str, encoding: str = "utf-8") -> Path:
        (folder / name).write_bytes(text.encode(encoding))
        return folder / name

    head = "prompt{0}chosen{0}rejected\n"
    plain = "".join(f"{p}{{0}}{c}{{0}}{r}\n" for p, c, r in EXPECTED)
    expect(texts_of(write("semi.csv", (head + plain).format(";"))) == EXPECTED, "semicolons")
    expect(texts_of(write("sep.csv", "sep=,\r\n" + (head + plain).format(","))) == EXPECTED, "sep= line")
    commas = "prompt;chosen;rejected\nWhy, then?;Because, well, so.;No, sorry.\nAnd, now?;Go, now.;Stay, now.\n"
    expect(texts_of(write("commas.csv", commas))[0] == ("Why, then?", "Because, well, so.", "No, sorry."), "commas")
    spaced = "prompt, chosen, rejected\n" + "".join(f'"{p}", "{c}", "{r}"\n' for p, c, r in EXPECTED)
    expect(texts_of(write("space.csv", spaced)) == EXPECTED, "spaces before quotes")
    curly = "prompt,chosen,rejected\n" + "".join(f"{p},It’s “{c}”,{r}\n" for p, c, r in EXPECTED)
    path = write("cp1252.csv", curly, "cp1252")
    try:
        return expect(texts_of(path)[0][1] == "It’s “It cooks 5 minutes.”", "cp1252")
    except ReinforceError as error:
        return expect("1252" in str(error), error)


@entry("F16", "a prompts file with U+2028, NEL and form feeds", "lines end at line feeds only")
def line_ends(folder: Path) -> str:
    base = saved(folder / "m")
    (folder / "p.txt").write_text("one\u2028still one\ntwo\x0cstill two\nthree\x85too\nfour\n", encoding="utf-8")
    asked = ("--prompts_file", folder / "p.txt", "--output", folder / "out.jsonl", "--max_new_tokens", 2)
    accepted(command("generate", "--model", base, "--engine", "transformers", *asked))
    lines = (folder / "out.jsonl").read_text(encoding="utf-8").split("\n")
    return expect(len([line for line in lines if line]) == 4, lines)


@entry("F17", "a console in cp1252, and undecodable bytes in arguments", "characters are replaced; no traceback")
def consoles(folder: Path) -> str:
    rows = [row | {"prompt": row["prompt"] + " 水 → ✓"} for row in PAIRS]
    data = rows_file(folder / "d.jsonl", rows)
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    words: list[str | bytes] = [sys.executable, "-m", "reinforcepp", "lint", str(data), "--fail_on", "never"]
    for command_line in (words, [*words[:4], b"nothing-\xff.csv"]):
        ran = subprocess.run(command_line, capture_output=True, env=environment, check=False)
        expect(b"Traceback" not in ran.stderr and ran.returncode in (0, 2), ran.stderr.decode(errors="replace"))
    return FIXED


@entry(
    "F18", "columns system, input, history, label; prompts that are dialogues", "used as meant, and unused ones listed"
)
def columns_with_a_meaning(folder: Path) -> str:
    def only(**row: object) -> Preference:
        rows = [{"chosen": "Yes.", "rejected": "No."} | row | {"chosen": f"Yes {i}."} for i in range(3)]
        return pairs_of(rows_file(folder / "c.jsonl", rows))[0]

    expect("a pirate" in only(system="Talk like a pirate.", question="Why?").prompt, "system")
    asked = only(instruction="Sum up.", input="A long text.", history=[["Hello?", "Hi there."]])
    expect("A long text." in asked.prompt and "Hi there." in asked.prompt, asked.prompt)
    dialogue = only(prompt="\n\nHuman: Why?\n\nAssistant:")
    expect("Human:" not in dialogue.prompt, dialogue.prompt)
    labels = [{"prompt": f"Q{i}?", "completion": f"A{i}", "label": i % 2 == 0} for i in range(6)]
    _, rows, _ = load_texts(str(rows_file(folder / "kto.jsonl", labels)), heldout_fraction=0, seed=0)
    expect(sorted(row.completion for row in rows) == ["A0", "A2", "A4"], "false labels are trained on")
    data, _, _ = load_preferences(
        str(rows_file(folder / "u.jsonl", [r | {"odd": 1} for r in PAIRS])), heldout_fraction=0, seed=0
    )
    return expect("odd" in data.summary(), data.summary())


@entry(
    "F19b", "~, gz, JSON objects, OpenAI and LLaMA-Factory formats, split files", "read, or refused with the right fix"
)
def shapes_of_files(folder: Path) -> str:
    rows_file(folder / "p.jsonl")
    (folder / "p.jsonl.gz").write_bytes(gzip.compress((folder / "p.jsonl").read_bytes()))
    expect(texts_of(folder / "p.jsonl.gz") == EXPECTED, "gz")
    (folder / "object.json").write_text(json.dumps({"version": 2, "data": PAIRS}))
    expect(texts_of(folder / "object.json") == EXPECTED, "object")
    home, os.environ["HOME"] = os.environ.get("HOME", ""), str(folder)
    try:
        expect(texts_of("~/p.jsonl") == EXPECTED, "~")
    finally:
        os.environ["HOME"] = home
    user = lambda p: [{"role": "user", "content": p}]  # noqa: E731
    answer = lambda a: [{"role": "assistant", "content": a}]  # noqa: E731
    part = lambda r, t: {"role": r, "content": [{"type": "text", "value": t}], "loss_weight": 1.0}  # noqa: E731
    shapes: dict[str, list[dict[str, object]]] = {
        "openai": [
            {"input": {"messages": user(p)}, "preferred_output": answer(c), "non_preferred_output": answer(r)}
            for p, c, r in EXPECTED
        ],
        "factory": [
            {
                "chosen_messages": [part("user", p), part("assistant", c)],
                "rejected_messages": [part("user", p), part("assistant", r)],
            }
            for p, c, r in EXPECTED
        ],
        "roles": [
            {
                k: [{"role": "Human", "content": p}, {"role": "Assistant", "content": a}]
                for k, a in (("chosen", c), ("rejected", r))
            }
            for p, c, r in EXPECTED
        ],
        "lists": [{"prompt": [p], "chosen": [c], "rejected": [r]} for p, c, r in EXPECTED],
    }
    for name, rows in shapes.items():
        expect(texts_of(rows_file(folder / f"{name}.jsonl", rows)) == EXPECTED, name)
    (folder / "repo" / "data").mkdir(parents=True)
    rows_file(folder / "repo" / "data" / "train-00000-of-00001.jsonl", PAIRS[:6])
    rows_file(folder / "repo" / "data" / "test-00000-of-00001.jsonl", PAIRS[6:])
    return expect(texts_of(folder / "repo") == EXPECTED[:6], "test rows are trained on")


@entry("K-B", "system and multi-turn prompts of chat models", "the ids of apply_chat_template in training")
def conversations(folder: Path) -> str:
    tok = tokenizer(CHATML, special=("<|im_start|>", "<|im_end|>"))
    turns = [("system", "Be brief."), ("user", "Hello."), ("assistant", "Hi."), ("user", "Why?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    accepted(train(saved(folder / "m", tok), folder, data=rows_file(folder / "c.jsonl", [{"prompt": messages}] * 2)))
    expected = tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    return expect(first_prompt_ids(folder) == list(expected), (first_prompt_ids(folder), expected))


def first_prompt_ids(folder: Path) -> list[int]:
    """Return the prompt ids that the trainer of a run would use, from its own loading of the data."""
    from reinforcepp.models.loading import load_tokenizer
    from reinforcepp.models.tokenization import encode_prompts

    _, rows, _ = load_prompts(str(folder / "c.jsonl"), heldout_fraction=0, seed=0)
    (prompt, *_), _ = encode_prompts(load_tokenizer(str(folder / "m")), rows, max_prompt_length=256)
    return list(prompt.ids)


@entry("K-G", "an Alpaca file with instruction and input", "both are in the prompt; columns can be joined")
def joined_columns(folder: Path) -> str:
    rows = [{"instruction": f"Sum up {i}.", "input": f"Text {i}.", "chosen": "A", "rejected": "B"} for i in range(4)]
    path = rows_file(folder / "a.jsonl", rows)
    expect(all("Text" in pair.prompt for pair in pairs_of(path)), pairs_of(path)[0])
    joined = ("--prompt_column", "instruction+input", "--fail_on", "never")
    return accepted(command("lint", path, *joined))


@entry("K-11", "prompts of 200 tokens and pairs of 700", "the default lengths keep them")
def default_lengths(folder: Path) -> str:
    from reinforcepp.config import ReinforceConfig, RewardModelConfig

    prompt, both = ReinforceConfig.max_prompt_length, RewardModelConfig.max_length
    expect(both is None or both >= 1024, f"max_length {both}")
    return expect(prompt is None or prompt >= 256, f"max_prompt_length {prompt}")


@entry("K-12", "one odd row among many", "the row is skipped and reported")
def odd_rows(folder: Path) -> str:
    rows: list[dict[str, object]] = [dict(row) | {"prompt": f"{row['prompt']} {i}"} for i in range(20) for row in PAIRS]
    rows[10]["chosen"] = True
    path = rows_file(folder / "o.jsonl", rows)
    data, _, _ = load_preferences(str(path), heldout_fraction=0, seed=0)
    expect(len(data.pairs) == len(rows) - 1 and "kipped" in data.summary(), data.summary())
    return accepted(command("lint", path, "--fail_on", "never"))
