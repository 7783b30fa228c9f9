"""Load an example of every data format with the functions of every command, and write the results to docs/data_formats.md.

``python benchmarks/data_formats.py [--check]``

Each example states its conversations. A cell of the table says what a command makes of the file; an answer or a prompt that
differs from the stated one is an error.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforcepp.commands.compare.command import chosen_answers, prompts_to_answer
from reinforcepp.commands.lint.check import check_data
from reinforcepp.config import CompareConfig, LintConfig
from reinforcepp.data import load_preferences, load_prompts, load_texts
from reinforcepp.errors import DataError

PAGE = Path(__file__).parent.parent / "docs" / "data_formats.md"
BEGIN, END = "<!-- formats -->\n", "<!-- end -->\n"
TURNS = (("Is the link up?", "Yes, at 1 Gbit/s.", "No idea."), ("Where is the log?", "In /var/log.", "Nowhere."))
"""Question, good answer and bad answer of the two conversations that every example holds."""
SYSTEM = "Be brief."
EARLIER = ("Hello?", "Hi, how can I help?")
CALL = {"name": "read_log", "arguments": {"lines": 1}}
RESULT = '{"line": "up"}'
TOOLS = [{"type": "function", "function": {"name": "read_log", "parameters": {}}}]
SPLIT = {"heldout_fraction": 0.0, "seed": 0}
COMMANDS = ("lint", "sft", "reward", "train", "compare")

Message = tuple[str, str]
Row = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """A format with its example.

    Attributes:
        name: The tool or the dataset, and its name of the format.
        rows: Returns the rows of a conversation.
        system: Whether the conversations have a system message.
        earlier: Whether they have an earlier turn.
        tool: Whether the prompt ends with the result of a tool call.
        prefix: Start of the answers, such as reasoning.
        suffix: Ending of the file's name.
    """

    name: str
    rows: Callable[[str, str, str], Row | list[Row]]
    system: bool = False
    earlier: bool = False
    tool: bool = False
    prefix: str = ""
    suffix: str = ".jsonl"

    def all_rows(self) -> list[Row]:
        """Return the rows of both conversations."""
        found = [self.rows(*turn) for turn in TURNS]
        return [row for each in found for row in (each if isinstance(each, list) else [each])]

    def prompt(self, question: str) -> list[Message]:
        """Return roles and texts of a conversation's prompt."""
        earlier = [("user", EARLIER[0]), ("assistant", EARLIER[1])] if self.earlier else []
        tool = [("assistant", json.dumps(CALL)), ("tool", RESULT)] if self.tool else []
        return [*([("system", SYSTEM)] if self.system else []), *earlier, ("user", question), *tool]


def user(text: Any) -> Row:
    return {"role": "user", "content": text}


def assistant(text: Any) -> Row:
    return {"role": "assistant", "content": text}


def system() -> Row:
    return {"role": "system", "content": SYSTEM}


def human(text: str) -> Row:
    return {"from": "human", "value": text}


def gpt(text: str) -> Row:
    return {"from": "gpt", "value": text}


def text_part(text: str) -> list[Row]:
    return [{"type": "text", "value": text}]


def plain(q: str, good: str, bad: str) -> Row:
    return {"prompt": q, "chosen": good, "rejected": bad}


def labeled(make: Callable[[str, str], Row], label: str = "label") -> Callable[[str, str, str], list[Row]]:
    """Return rows with a single answer each and a label."""
    return lambda q, good, bad: [make(q, good) | {label: True}, make(q, bad) | {label: False}]


def alpaca(q: str, answer: str) -> Row:
    return {"instruction": q, "input": "", "output": answer}


def rated(text: str, score: float) -> Row:
    return {"model": "m", "response": text, "fine-grained_score": score, "overall_score": 2 * score}


EARLIER_MESSAGES = [user(EARLIER[0]), assistant(EARLIER[1])]
FORMATS = (
    Format("TRL: preference, standard", plain),
    Format("TRL: preference, implicit prompt", lambda q, a, b: {"chosen": f"{q} {a}", "rejected": f"{q} {b}"}),
    Format(
        "TRL: preference, conversational",
        lambda q, a, b: {
            "prompt": [system(), user(q)],
            "chosen": [assistant(a)],
            "rejected": [assistant(b)],
        },
        system=True,
    ),
    Format(
        "TRL: preference, conversational, implicit prompt",
        lambda q, a, b: {
            "chosen": [*EARLIER_MESSAGES, user(q), assistant(a)],
            "rejected": [*EARLIER_MESSAGES, user(q), assistant(b)],
        },
        earlier=True,
    ),
    Format(
        "TRL: unpaired preference", labeled(lambda q, answer: {"prompt": q, "completion": answer}), suffix=".jsonl.gz"
    ),
    Format(
        "TRL: unpaired preference, conversational",
        labeled(lambda q, answer: {"prompt": [user(q)], "completion": [assistant(answer)]}),
    ),
    Format("TRL: prompt-completion", lambda q, a, b: {"prompt": q, "completion": a}),
    Format(
        "TRL: prompt-completion, conversational",
        lambda q, a, b: {"prompt": [system(), user(q)], "completion": [assistant(a)]},
        system=True,
    ),
    Format("TRL: prompt-only", lambda q, a, b: {"prompt": [user(q)]}),
    Format("TRL: language modeling", lambda q, a, b: {"text": f"{q} {a}"}),
    Format(
        "TRL and OpenAI: conversations",
        lambda q, a, b: {"messages": [system(), *EARLIER_MESSAGES, user(q), assistant(a)]},
        system=True,
        earlier=True,
    ),
    Format(
        "TRL and OpenAI: tool calls",
        lambda q, a, b: {
            "messages": [
                user(q),
                {**assistant(None), "tool_calls": [{"type": "function", "function": CALL}]},
                {"role": "tool", "name": "read_log", "content": RESULT},
                assistant(a),
            ],
            "tools": TOOLS,
        },
        tool=True,
    ),
    Format("TRL: stepwise supervision", lambda q, a, b: {"prompt": q, "completions": [b, a], "labels": [False, True]}),
    Format(
        "TRL: images",
        lambda q, a, b: {
            "images": ["1.jpg"],
            "prompt": [user(q)],
            "chosen": [assistant(a)],
            "rejected": [assistant(b)],
        },
    ),
    Format(
        "OpenAI: preference",
        lambda q, a, b: {
            "input": {"messages": [system(), user(q)], "tools": TOOLS, "parallel_tool_calls": True},
            "preferred_output": [assistant(a)],
            "non_preferred_output": [assistant(b)],
        },
        system=True,
    ),
    Format(
        "LLaMA-Factory: Alpaca",
        lambda q, a, b: {**alpaca(q, a), "system": SYSTEM, "history": [[*EARLIER]]},
        system=True,
        earlier=True,
        suffix=".json",
    ),
    Format(
        "LLaMA-Factory: Alpaca, preference",
        lambda q, a, b: {"instruction": q.split()[0], "input": q.split(" ", 1)[1], "chosen": a, "rejected": b},
        suffix=".json",
    ),
    Format("LLaMA-Factory: Alpaca, KTO", labeled(alpaca, "kto_tag"), suffix=".json"),
    Format(
        "LLaMA-Factory: ShareGPT",
        lambda q, a, b: {
            "conversations": [
                human(q),
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": RESULT},
                gpt(a),
            ],
            "system": SYSTEM,
            "tools": json.dumps(TOOLS),
        },
        system=True,
        tool=True,
        suffix=".json",
    ),
    Format(
        "LLaMA-Factory: ShareGPT, preference",
        lambda q, a, b: {
            "conversations": [human(EARLIER[0]), gpt(EARLIER[1]), human(q)],
            "chosen": gpt(a),
            "rejected": gpt(b),
        },
        earlier=True,
        suffix=".json",
    ),
    Format("LLaMA-Factory: ShareGPT, KTO", labeled(lambda q, answer: {"messages": [user(q), assistant(answer)]})),
    Format(
        "LLaMA-Factory v1: SFT with reasoning",
        lambda q, a, b: {
            "messages": [user(text_part(q)), assistant([{"type": "reasoning", "value": "Look."}, *text_part(a)])]
        },
        prefix="<think>\nLook.\n</think>\n\n",
    ),
    Format(
        "LLaMA-Factory v1: DPO",
        lambda q, a, b: {
            "chosen_messages": [user(text_part(q)), assistant(text_part(a))],
            "rejected_messages": [user(text_part(q)), assistant(text_part(b))],
        },
    ),
    Format(
        "LLaMA-Factory: images",
        lambda q, a, b: {"messages": [user(f"<image>{q}"), assistant(a)], "images": ["1.jpg"]},
        suffix=".json",
    ),
    Format(
        "ShareGPT with other names of roles",
        lambda q, a, b: {
            "conversations": [{"from": "SYSTEM", "value": SYSTEM}, {"from": "Human", "value": q}],
            "chosen": {"from": "Assistant", "value": a},
            "rejected": {"from": "ChatGPT", "value": b},
        },
        system=True,
    ),
    Format(
        "Argilla: UltraFeedback binarized preferences",
        lambda q, a, b: {
            "instruction": q,
            "chosen_response": a,
            "rejected_response": b,
            "chosen_avg_rating": 4.5,
            "rejected_avg_rating": 2.0,
        },
    ),
    Format(
        "Argilla: cleaned, with ratings",
        lambda q, a, b: {
            "prompt": q,
            "chosen": [user(q), assistant(a)],
            "chosen-rating": 5.0,
            "rejected": [user(q), assistant(b)],
            "rejected-rating": 2.0,
        },
    ),
    Format(
        "Argilla: records",
        lambda q, a, b: {
            "fields": {"prompt": q, "response1": a, "response2": b},
            "responses": {"preference": [{"value": "response1"}]},
        },
    ),
    Format(
        "UltraFeedback",
        lambda q, a, b: {"source": "s", "instruction": q, "completions": [rated(b, 1.5), rated(a, 4.25)]},
    ),
    Format(
        "UltraFeedback binarized",
        lambda q, a, b: {
            "prompt": q,
            "chosen": [user(q), assistant(a)],
            "rejected": [user(q), assistant(b)],
            "messages": [user(q), assistant(a)],
            "score_chosen": 8.5,
        },
        suffix=".jsonl.zst",
    ),
    Format(
        "distilabel",
        lambda q, a, b: {"instruction": q, "generations": [b, a, "Perhaps."], "ratings": [1, 5, 3]},
    ),
    Format(
        "Anthropic: hh-rlhf",
        lambda q, a, b: {
            name: f"\n\nHuman: {EARLIER[0]}\n\nAssistant: {EARLIER[1]}\n\nHuman: {q}\n\nAssistant: {answer}"
            for name, answer in (("chosen", a), ("rejected", b))
        },
        earlier=True,
    ),
    Format(
        "Intel: Orca DPO pairs",
        lambda q, a, b: {"system": SYSTEM, "question": q, "chosen": a, "rejected": b},
        system=True,
    ),
    Format(
        "OpenRLHF: prompts",
        lambda q, a, b: {"context_messages": [user(q)], "label": "7"},
    ),
    Format(
        "verl",
        lambda q, a, b: {
            "data_source": "s",
            "prompt": [user(q)],
            "reward_model": {"style": "rule", "ground_truth": "7"},
        },
        suffix=".parquet",
    ),
    Format(
        "PKU-SafeRLHF",
        lambda q, a, b: {"prompt": q, "response_0": b, "response_1": a, "better_response_id": 1},
    ),
    Format(
        "Stanford Human Preferences",
        lambda q, a, b: {"history": q, "human_ref_A": b, "human_ref_B": a, "labels": 0},
    ),
    Format(
        "NVIDIA: HelpSteer3",
        lambda q, a, b: {"context": [user(q)], "response1": a, "response2": b, "overall_preference": -2},
    ),
    Format(
        "LMSYS: Chatbot Arena",
        lambda q, a, b: {
            "winner": "model_b",
            "conversation_a": [user(q), assistant(b)],
            "conversation_b": [user(q), assistant(a)],
        },
    ),
    Format(
        "Nectar",
        lambda q, a, b: {
            "prompt": f"\n\nHuman: {q}\n\nAssistant: ",
            "answers": [{"answer": a, "rank": 1.0}, {"answer": b, "rank": 7.0}],
        },
    ),
    Format("CSV", plain, suffix=".csv"),
)


# --- what the commands make of an example --------------------------------------------------------------------------------


def write(example: Format, folder: Path) -> Path:
    """Write the file of an example."""
    rows, path = example.all_rows(), folder / f"data{example.suffix}"
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if example.suffix == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(text.getvalue(), encoding="utf-8")
    elif example.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif example.suffix.endswith(".zst"):
        import pyarrow

        path.write_bytes(pyarrow.Codec("zstd").compress(lines, asbytes=True))
    else:
        whole = json.dumps(rows).encode() if example.suffix == ".json" else lines
        path.write_bytes(gzip.compress(whole) if example.suffix.endswith(".gz") else whole)
    return path


def cells(example: Format, folder: Path) -> dict[str, str]:
    """Return what each command makes of an example.

    Raises:
        AssertionError: A command reads another prompt or another answer than the example states.
    """
    path = write(example, folder)
    readers: Mapping[str, Callable[[Format, Path], str]] = {
        "lint": _lint,
        "sft": _sft,
        "reward": _reward,
        "train": _train,
        "compare": _compare,
    }
    found = {}
    for command in COMMANDS:
        try:
            found[command] = readers[command](example, path)
        except DataError as error:
            found[command] = _refusal(error)
    return found


def _lint(example: Format, path: Path) -> str:
    report = check_data(LintConfig(data=str(path)))
    (file,) = report.files
    if file.usable == 0:
        (first, *_) = (finding for finding in report.findings if finding.severity == "error")
        return _refusal(first.message)
    assert file.usable == len(TURNS), report
    return f"{file.noun}s"


def _sft(example: Format, path: Path) -> str:
    data, rows, _ = load_texts(path, **SPLIT)
    if all(row.question is None for row in rows):
        _equal([row.completion for row in rows], [f"{q} {a}" for q, a, _ in TURNS])
        return "whole texts"
    _equal([_messages(row.conversation) for row in rows], [example.prompt(q) for q, _, _ in TURNS])
    _equal([row.completion.strip() for row in rows], [example.prefix + a for _, a, _ in TURNS])
    if any("false" in each.reason for each in data.skipped):
        return "good answers"
    return "last answers" if any("last answers" in note for note in data.notes) else "answers"


def _reward(example: Format, path: Path) -> str:
    loaded = [load_preferences(path, **SPLIT, streaming=streaming) for streaming in (False, True)]
    data, pairs, _ = loaded[0]
    assert list(pairs) == list(loaded[1][1]), "--streaming differs"
    _equal([_messages(pair.conversation) for pair in pairs], [example.prompt(q) for q, _, _ in TURNS])
    _equal([(pair.chosen.strip(), pair.rejected.strip()) for pair in pairs], [(a, b) for _, a, b in TURNS])
    assert all(bool(pair.chat_template_kwargs) == _has_tools(example) for pair in pairs)
    if any("paired per prompt" in note for note in data.notes):
        return "pairs per prompt"
    return "best and worst" if any("best and the worst" in note for note in data.notes) else "pairs"


def _train(example: Format, path: Path) -> str:
    loaded = [load_prompts(path, **SPLIT, streaming=streaming) for streaming in (False, True)]
    rows = loaded[0][1]
    assert list(rows) == list(loaded[1][1]), "--streaming differs"
    _equal([_messages(row.conversation) for row in rows], [example.prompt(q) for q, _, _ in TURNS])
    assert all(bool(row.chat_template_kwargs) == _has_tools(example) for row in rows)
    return "prompts"


def _compare(example: Format, path: Path) -> str:
    config = CompareConfig(data=str(path), judge="judge", heldout_fraction=0)
    prompts = prompts_to_answer(config)
    _equal([_messages(row.conversation) for row in prompts], [example.prompt(q) for q, _, _ in TURNS])
    answers = [answer.response.strip() for answer in chosen_answers(config, prompts)]
    _equal(answers, [example.prefix + a for _, a, _ in TURNS] if answers else [])
    return "prompts, good answers" if answers else "prompts"


def _has_tools(example: Format) -> bool:
    row = example.all_rows()[0]
    return "tools" in row or "tools" in (row.get("input") or {})


def _messages(conversation: str | Sequence[Mapping[str, Any]]) -> list[Message]:
    if isinstance(conversation, str):
        return [("user", " ".join(conversation.split()))]
    return [(each["role"], _shown(each)) for each in conversation]


def _shown(message: Mapping[str, Any]) -> str:
    (call, *_) = message.get("tool_calls") or [None]
    return json.dumps(call["function"]) if call else str(message["content"]).strip()


def _equal(found: object, expected: object) -> None:
    assert found == expected, f"{found} instead of {expected}"


def _refusal(error: object) -> str:
    reasons = {
        "only text is supported": "refused: images",
        "image data": "refused: images",
        "has no column 'prompt'": "no prompt",
        "has no column 'chosen'": "no pairs",
        "has no column 'text'": "no answers",
    }
    for part, reason in reasons.items():
        if part in str(error):
            return reason
    raise AssertionError(f"an error without a reason in the table: {error}")


# --- the page ------------------------------------------------------------------------------------------------------------


def page(text: str) -> str:
    """Return the page with the table and the examples made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + generated() + END + after


def generated() -> str:
    """Return the table and the examples."""
    lines = [f"| format | {' | '.join(f'`{command}`' for command in COMMANDS)} |", "|---" * (len(COMMANDS) + 1) + "|"]
    for example in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            found = cells(example, Path(folder))
        lines.append(f"| {example.name} | {' | '.join(found.values())} |")
    examples = [f"{example.name} (`{example.suffix}`):\n\n```json\n{_example(example)}\n```\n" for example in FORMATS]
    return "\n".join([*lines, "\n## Examples\n", *examples])


def _example(example: Format) -> str:
    rows = example.rows(*TURNS[0])
    first = rows[0] if isinstance(rows, list) else rows
    return "{" + ",\n ".join(f"{json.dumps(name)}: {json.dumps(cell)}" for name, cell in first.items()) + "}"


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    made = page(text)
    if "--check" not in sys.argv:
        PAGE.write_text(made, encoding="utf-8")
    elif made != text:
        print(f"{PAGE} isn't current. Run python benchmarks/data_formats.py.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
