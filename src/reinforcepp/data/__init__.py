"""Read and check preference, prompt and SFT data. A problem of a file is raised as a one-line ``DataError``."""

from reinforcepp.data.columns import ColumnNames, SftColumnNames
from reinforcepp.data.loaded import PreferenceData, PromptData, PromptRow, SftRow, TextData
from reinforcepp.data.loading import (
    load_preferences,
    load_prompts,
    load_texts,
    prompt_rows,
    read_preferences,
    read_prompts,
    read_texts,
)
from reinforcepp.data.messages import EXTRA_FIELDS, conversation_text
from reinforcepp.data.prompt_lines import read_prompt_lines
from reinforcepp.data.prompt_stream import StreamRows
from reinforcepp.data.readers import count
from reinforcepp.data.rows import (
    Row,
    Skipped,
    contradictions_in,
    filter_rows,
    normalize,
    split_by_prompt,
    text_digest,
    words,
)
from reinforcepp.data.sources import (
    DataFiles,
    DataSource,
    GivenRows,
    RowSource,
    check_dataset,
    is_data_file,
    resolve_data,
)
from reinforcepp.data.streaming import DiskRows
from reinforcepp.data.table import Table, read_table
from reinforcepp.data.unpaired import UNPAIRED

__all__ = [
    "EXTRA_FIELDS",
    "UNPAIRED",
    "ColumnNames",
    "DataFiles",
    "DataSource",
    "DiskRows",
    "GivenRows",
    "PreferenceData",
    "PromptData",
    "PromptRow",
    "Row",
    "RowSource",
    "SftColumnNames",
    "SftRow",
    "Skipped",
    "StreamRows",
    "Table",
    "TextData",
    "check_dataset",
    "contradictions_in",
    "conversation_text",
    "count",
    "filter_rows",
    "is_data_file",
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
    "text_digest",
    "words",
]
