"""Reading and checking preference and prompt data; a file's mistakes come out as one-sentence ``DataError``s."""

from reinforcepp.data._table import Skipped
from reinforcepp.data.preferences import PreferenceData, load_preferences, read_preferences
from reinforcepp.data.prompts import PromptData, PromptRow, load_prompts, prompt_rows, read_prompt_lines, read_prompts
from reinforcepp.data.sources import DataFiles, resolve_data
from reinforcepp.data.split import split_by_prompt

__all__ = [
    "DataFiles",
    "PreferenceData",
    "PromptData",
    "PromptRow",
    "Skipped",
    "load_preferences",
    "load_prompts",
    "prompt_rows",
    "read_preferences",
    "read_prompt_lines",
    "read_prompts",
    "resolve_data",
    "split_by_prompt",
]
