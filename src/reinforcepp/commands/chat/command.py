"""The command ``chat``: read lines and respond to each, or run its command, until the user quits."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import FrameType

from reinforcepp.commands.chat.conversation import Conversation
from reinforcepp.commands.chat.preferences import PreferenceFile
from reinforcepp.commands.generate import format_reward, load_engine, load_reward, sampling_of, show_growing
from reinforcepp.config import ChatConfig
from reinforcepp.config.judge_spec import is_judge
from reinforcepp.errors import ConfigError, DataError, ModelError, RewardError, RolloutError, nearest
from reinforcepp.models.loading import context_length, load_config, load_tokenizer
from reinforcepp.models.precision import inference_dtype
from reinforcepp.models.remote_code import allow_remote_code
from reinforcepp.models.tokenization import encode_prompt
from reinforcepp.monitoring.signals import handle_signals
from reinforcepp.monitoring.turns import turn_lines
from reinforcepp.rewards.functions import RewardFunction, score_with
from reinforcepp.rewards.trained import check_reward_folder
from reinforcepp.rollout.engine import RolloutEngine
from reinforcepp.rollout.selection import choose_engine
from reinforcepp.runtime.terminal import echo, print_output
from reinforcepp.types import Prompt

INTERRUPTED = 130
# The context of a model can be a million tokens, and the engine would reserve memory for all of them.
USUAL_LENGTH = 4096
HELP = """/regenerate     generate another response to the last question
/prefer [N]     record that the last response, or response N, is better than the other one
/system [TEXT]  set the system message, or remove it
/reset          clear the conversation, except for the system message
/help           list the commands
/quit           quit, like Ctrl-D (Ctrl-C only stops a response)
//...           send a message that begins with a single /"""


def run_chat(config: ChatConfig) -> int:
    """Chat until the input ends, and return the exit code.

    Raises:
        ReinforceError: If the model, the reward model or the file of preferences can't be used.
    """
    preferences = PreferenceFile(config.preferences)
    if config.reward_model is not None and not is_judge(config.reward_model):
        check_reward_folder(config.reward_model)
    if config.trust_remote_code:
        allow_remote_code(config.model)
    model_config = load_config(config.model)
    length = _length(config, context_length(model_config))
    dtype = inference_dtype(config.dtype, model_config.dtype)
    choice = choose_engine(config.engine, model_config, dtype)
    tokenizer = load_tokenizer(config.model)
    reward = load_reward(config.reward_model) if config.reward_model is not None else None
    conversation = Conversation(tokenizer, length - config.max_new_tokens, config.system)
    engine = load_engine(config, choice, dtype, tokenizer, length)
    chat = _Chat(config, engine, reward, conversation, preferences)
    try:
        return chat.talk()
    finally:
        engine.close()


def _length(config: ChatConfig, context: int | None) -> int:
    """Return the maximum number of tokens of the conversation and the response together."""
    if config.max_length is not None and context is not None and config.max_length > context:
        raise ConfigError(f"max_length: {config.max_length} exceeds the model's context of {context} tokens. Lower it.")
    length = config.max_length or min(context or USUAL_LENGTH, USUAL_LENGTH)
    if length <= config.max_new_tokens:
        raise ConfigError(
            f"max_new_tokens: {config.max_new_tokens} leaves no room for a question in the {length} tokens of the "
            "conversation. Lower it."
        )
    return length


@dataclass
class _Chat:
    """A running chat, and the functions of its commands."""

    config: ChatConfig
    engine: RolloutEngine
    reward: RewardFunction | None
    conversation: Conversation
    preferences: PreferenceFile

    def talk(self) -> int:
        """Read lines and respond until the user quits; return the exit code."""
        on_terminal = sys.stdin.isatty()
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # A byte that isn't UTF-8 must not end the conversation.
        if on_terminal:
            echo(f"Chatting with {self.config.model}. To list the commands, type /help. To quit, press Ctrl-D.")
            if self.conversation.system:
                for line in turn_lines([{"role": "system", "content": self.conversation.system}]):
                    echo(line, "dim")
        while True:
            try:
                line = _read_line(on_terminal)
            except EOFError:
                if on_terminal:
                    print_output("")  # The prompt of the shell needs a new line.
                return 0
            except KeyboardInterrupt:
                if not on_terminal:
                    return INTERRUPTED
                echo("\nTo quit, press Ctrl-D or type /quit.")
                continue
            if line in ("/quit", "/exit"):
                return 0
            try:
                self._do(line)
            except (DataError, ModelError, RewardError, RolloutError) as error:
                echo(str(error), "yellow")
            except OSError as error:
                if not error.strerror:
                    raise
                echo(f"{self.preferences.path}: can't write ({error.strerror}). Nothing was added.", "yellow")

    def _do(self, line: str) -> None:
        """Run the command in a line, or respond to the line; ignore an empty line."""
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].partition(" ")
            commands: dict[str, Callable[[str], None]] = {
                "regenerate": self._regenerate,
                "prefer": self._prefer,
                "system": self._system,
                "reset": self._reset,
                "help": self._help,
            }
            if name not in commands:
                known = [f"/{command}" for command in (*commands, "quit")]
                raise DataError(
                    f"Command /{name} not found.{nearest(f'/{name}', known)} To list the commands, type /help."
                )
            commands[name](rest.strip())
        elif line:
            self._answer(lambda: self.conversation.ask(line.removeprefix("/") if line[0] == "/" else line))

    def _answer(self, ask: Callable[[], Prompt]) -> None:
        """Respond to the prompt that ``ask`` returns, and print the response with its reward."""
        before = self.conversation.skipped_turns
        prompt = ask()
        if (more := self.conversation.skipped_turns - before) > 0:
            turns = "turn" if more == 1 else "turns"
            echo(f"Skipped the oldest {more} {turns} of the conversation (the context is full).", "yellow")
        with _stop_on_interrupt() as stopped, closing(self.engine.stream(prompt, sampling_of(self.config))) as growing:
            completion = show_growing(growing, stopped)
            was_stopped = stopped()
        number = self.conversation.answered(completion)
        notes = [f"response {number}"] if number > 1 else []
        if self.reward is not None:
            try:
                (score,) = score_with([self.reward], [completion]).total
                notes.append("no score" if score is None else format_reward(score))
            except KeyboardInterrupt:  # A judge can take long.
                notes.append("not scored")
        if completion.finish_reason == "length":
            notes.append("stopped" if was_stopped else f"truncated after {self.config.max_new_tokens} tokens")
        if notes:
            echo(f"({', '.join(notes)})", "dim")

    def _regenerate(self, _: str) -> None:
        if self.config.temperature == 0:
            raise DataError("/regenerate: at temperature 0 every response is the same. Restart with --temperature 0.7.")
        self._answer(self.conversation.ask_again)

    def _prefer(self, rest: str) -> None:
        if rest and not (rest.isascii() and rest.isdigit()):
            raise DataError(f"/prefer: {rest!r} isn't the number of a response. Type /prefer or /prefer N.")
        better, worse = self.conversation.prefer(int(rest) if rest else None, self._save)
        echo(f"Saved to {self.preferences.path}: response {better} is better than response {worse}.", "green")

    def _save(self, prompt: Prompt, chosen: str, rejected: str) -> None:
        """Append a pair, unless training would read another prompt than the one that was answered."""
        if self.preferences.is_csv and tuple(encode_prompt(self.conversation.tokenizer, prompt.text)) != prompt.ids:
            raise DataError(
                f"/prefer: {self.preferences.path} can't hold the earlier turns or the system message, because a CSV file has no "
                "messages. Use /reset before a question, or restart with --preferences FILE.jsonl."
            )
        self.preferences.append(prompt, chosen, rejected)

    def _system(self, rest: str) -> None:
        self.conversation.system = rest or None
        echo("Set the system message for the next responses." if rest else "Removed the system message.")

    def _help(self, _: str) -> None:
        for line in HELP.splitlines():
            echo(line)

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        echo("Cleared the conversation.")


def _read_line(on_terminal: bool) -> str:
    if on_terminal:
        import readline  # noqa: F401  (It adds history and editing to input().)

        return input("> " if sys.stdout.isatty() else "").strip()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.strip()


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed in this block.

    A second Ctrl-C ends the program, because a response can hang before its first token.
    """
    interrupts: list[int] = []

    def record(number: int, frame: FrameType | None) -> None:
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(number)

    with handle_signals(record, signal.SIGINT):
        yield lambda: bool(interrupts)
