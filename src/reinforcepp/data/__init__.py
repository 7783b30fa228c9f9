"""Reading and checking preference and prompt data; a file's mistakes come out as one-sentence ``DataError``s."""

from reinforcepp.data._columns import ColumnNames
from reinforcepp.data._messages import conversation_text
from reinforcepp.data._table import Row, Skipped, Table, filter_rows, normalize, read_table, words
from reinforcepp.data._text import count
from reinforcepp.data.preferences import PreferenceData, contradictions_in, load_preferences, read_preferences
from reinforcepp.data.prompts import PromptData, PromptRow, load_prompts, prompt_rows, read_prompt_lines, read_prompts
from reinforcepp.data.row_store import DiskRows
from reinforcepp.data.sources import DataFiles, resolve_data
from reinforcepp.data.split import split_by_prompt
from reinforcepp.data.texts import SftRow, TextData, load_texts, read_texts

__all__ = [
    "ColumnNames",
    "DataFiles",
    "DiskRows",
    "PreferenceData",
    "PromptData",
    "PromptRow",
    "Row",
    "SftRow",
    "Skipped",
    "Table",
    "TextData",
    "contradictions_in",
    "conversation_text",
    "count",
    "filter_rows",
    "load_preferences",
    "load_prompts",
    "load_texts",
    "normalize",
    "prompt_rows",
    "read_preferences",
    "read_prompt_lines",
    "read_prompts",
    "read_table",
    "read_texts",
    "resolve_data",
    "split_by_prompt",
    "words",
]
