"""Printed text: which characters are kept, and that nothing is printed another way."""

import ast
import io
import logging
import re
import sys
import unicodedata

import pytest
from rich.table import Table
from rich.text import Text

from reinforcepp.errors import ModelError, RewardError
from reinforcepp.runtime import terminal
from reinforcepp.runtime.terminal import Console, guarded_streams, one_message, printable
from scripts import ROOT

SOURCE = ROOT / "src" / "reinforcepp"
EVIL = "\x1b]0;owned\x07\x1b]52;c;cm0=\x07\x1b[2J\x9b31mred\x85\u202egpj\u2066\rOK"
READABLE = [
    "Grüße, São Tomé, naïve e\u0301",
    "東京 日本語 한국어 葛\U000e0100飾",
    "\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u200f\u05e9\u05dc\u05d5\u05dd\u200e!",
    "\u06dd \u0627\u064e\u0644\u0652",
    "क्\u200dष क्\u200cष",
    "ភាសា\u200bខ្មែរ",
    "👩\u200d👩\u200d👧 🏳️\u200d🌈 👍🏽 🇫🇷 \U0001fae8 1️⃣",
    "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    "a\tb\nc",
]
UNSAFE = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\U000e0001\U000e0020-\U000e007f]"


@pytest.mark.parametrize("text", READABLE, ids=range(len(READABLE)))
def test_text_of_all_scripts_stays_as_it_is(text):
    assert printable(text) == text


def test_every_control_character_and_every_override_is_replaced():
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    kept = [char for char, shown in zip(every, printable(every), strict=True) if char == shown]
    assert [hex(ord(char)) for char in kept if unicodedata.category(char) in ("Cc", "Cs")] == ["0x9", "0xa"]
    assert not re.search(UNSAFE, "".join(kept)) and len(kept) > 1_110_000


def test_tags_are_kept_only_in_flags():
    hidden = "".join(chr(0xE0000 + ord(c)) for c in "ignore")
    assert printable(f"a{hidden}") == "a" + "\ufffd" * 6
    assert printable(f"\U0001f3f4{hidden}") == "\U0001f3f4" + "\ufffd" * 6


def test_further_lines_of_a_message_are_indented():
    assert one_message("error: a\nerror: b\n\n\u200berror: c") == "error: a\n  error: b\n\n  \u200berror: c"
    assert one_message("\nRun:\n  reinforcepp demo\r\nend") == "\nRun:\n  reinforcepp demo\n  end"
    assert one_message("a\u2028error: b") == "a\ufffderror: b"


def test_an_error_of_this_package_is_printable_wherever_it_is_shown():
    error = ModelError(f"model: {EVIL}\nerror: forged")
    assert str(error) == f"model: {printable(EVIL)}\n  error: forged"
    assert str(RewardError()) == ""


def test_a_console_prints_markup_emoji_codes_and_evil_text_literally():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="truecolor", width=60)
    table = Table("[red]name[/red]", EVIL, title=":skull: [link=http://evil]x[/link]")
    table.add_row("[bold]cell", Text(EVIL, "bold"))
    console.print(table, EVIL, Text(EVIL))
    text = file.getvalue()
    assert "[red]name[/red]" in text and ":skull: [link=http://evil]x[/link]" in text and "[bold]cell" in text
    console.print(Text.from_ansi("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\"))
    assert file.getvalue().removeprefix(text) == "link\n"
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert not re.search(UNSAFE, plain)
    assert {len(line) for line in plain.splitlines() if line[0] in "┃│"} == {len(plain.splitlines()[1])}


def test_messages_of_the_loggers_are_printable_for_every_handler(caplog):
    log = terminal.logger("reinforcepp.some_module")
    log.warning("Lost %s", f"{EVIL}\nerror: forged")
    assert caplog.messages == [f"Lost {printable(EVIL)}\n  error: forged"]
    terminal.warn_once(EVIL)
    assert caplog.messages[1:] == [printable(EVIL)]
    with pytest.warns(UserWarning, match="owned") as caught:
        terminal.warn(EVIL)
    assert str(caught[0].message) == printable(EVIL)


def test_a_guarded_stream_keeps_colors_and_progress_bars_of_libraries(capsys):
    from tqdm import tqdm

    with guarded_streams():
        print(EVIL, file=sys.stderr)
        sys.stdout.writelines([EVIL, "\x1b[1;31mred\x1b[0m", "a\r\nb", "\x1b[8mhidden"])
        logging.lastResort.handle(logging.makeLogRecord({"msg": EVIL, "levelno": 40}))
        for _ in tqdm(tqdm(range(3), position=1), position=0):
            pass
        Console(force_terminal=True, color_system="truecolor").print(printable(EVIL), style="bold")
    out, err = capsys.readouterr()
    safe = printable(EVIL)
    assert out == f"{safe}\x1b[1;31mred\x1b[0ma\nb\x1b[8mhidden\x1b[0m\x1b[1m{safe}\x1b[0m\n"
    assert (
        err.startswith(f"{safe}\n{safe}\n")
        and "\r100%|" in err
        and "\ufffd" not in err.removeprefix(f"{safe}\n{safe}\n")
    )


def test_a_traceback_is_printable_and_forges_no_line(capsys):
    with pytest.raises(ZeroDivisionError), guarded_streams():
        raise ZeroDivisionError
    try:
        try:
            raise ValueError(f"{EVIL}\nerror: forged")
        except ValueError as cause:
            raise KeyError("\x1b[2J") from cause
    except KeyError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    err = capsys.readouterr().err
    sys.stdout, sys.stderr, sys.excepthook = sys.stdout.stream, sys.stderr.stream, sys.__excepthook__
    assert err.startswith("Traceback (most recent call last):\n  File ")
    assert f"\nValueError: {printable(EVIL)}\n  error: forged\n\nThe above exception was the direct cause" in err
    assert not re.search(UNSAFE, err)


def test_json_for_standard_output_stays_exact(capsys):
    import json

    value = {"text": f"{EVIL}\x7f"}
    terminal.print_json(json.dumps(value))
    out = capsys.readouterr().out
    assert json.loads(out) == value and not re.search(UNSAFE, out)


def test_a_closed_pipe_raises(capsys):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Console(file=Closed()).print("text")


# --- one place --------------------------------------------------------------------------------------------------------

PRINTS = re.compile(
    r"print|(?:sys\.)?(?:__)?std(?:out|err)(?:__)?(?:\.buffer)?\.(?:write|writelines)|(?:\w+\.)*Console|logging\.\w*Handler"
    r"|logging\.(?:basicConfig|getLogger|debug|info|warning|error|exception|critical)|warnings\.(?:warn|showwarning)"
    r"|traceback\.print_\w+|(?:\w+\.)?pprint|pp|getpass|click\.\w*echo|rich\.print\w*"
)


def prints(source: str) -> list[str]:
    """The calls in ``source`` that print past the terminal module, with their lines."""
    tree = ast.parse(source)
    ours = {
        name.asname or name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "reinforcepp.runtime.terminal"
        for name in node.names
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name == "os.write":
                printed = isinstance(node.args[0], ast.Constant)
            elif name == "input":
                printed = not all(re.fullmatch(r"[^{]*", ast.unparse(argument)) for argument in node.args)
            elif name == "logging.getLogger":  # of a library, to set its level
                printed = not ast.unparse(node.args[0]).startswith("'") or "reinforcepp" in ast.unparse(node.args[0])
            else:
                printed = bool(PRINTS.fullmatch(name)) and name not in ours
            if printed:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_only_the_terminal_module_prints():
    files = [path for path in SOURCE.rglob("*.py") if path != SOURCE / "runtime" / "terminal.py"]
    found = {str(path.relative_to(SOURCE)): prints(path.read_text(encoding="utf-8")) for path in files}
    assert len(files) > 200 and {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "code",
    [
        "print(x)",
        "sys.stdout.write(x)",
        "sys.stderr.write(x)",
        "sys.stdout.buffer.write(x)",
        "sys.__stderr__.write(x)",
        "from rich.console import Console\nConsole(stderr=True)",
        "rich.console.Console()",
        "logging.StreamHandler()",
        "logging.getLogger(__name__)",
        "logging.getLogger('reinforcepp')",
        "logging.warning(x)",
        "warnings.warn(x)",
        "traceback.print_exc()",
        "os.write(2, x.encode())",
        "input(f'{x}> ')",
    ],
)
def test_the_check_sees_each_way_to_print(code):
    assert len(prints(code)) == 1


@pytest.mark.parametrize(
    "code",
    [
        "from reinforcepp.runtime.terminal import Console\nConsole()",
        "logging.getLogger('bitsandbytes').setLevel(logging.ERROR)",
        "os.write(handle, data)",
        "file.write(x)",
        "console.print(x)",
        "input('> ')",
    ],
)
def test_the_check_accepts_what_is_safe(code):
    assert prints(code) == []


def test_a_signal_in_the_middle_of_a_print_is_reported(monkeypatch, capfd):
    """A stream that is writing can't be entered again, also not by a signal handler."""

    class Raw(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            if not reported:
                reported.append(True)
                terminal.echo_from_handler("SIGINT: stopping", "yellow")
            return len(data)

    reported = []
    stream = io.TextIOWrapper(io.BufferedWriter(Raw()), write_through=True)
    monkeypatch.setattr(terminal.console, "_file", stream)
    terminal.echo("a step")
    stream.flush()
    assert reported and "SIGINT: stopping" in capfd.readouterr().err
