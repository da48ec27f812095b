"""Data in: rows of every common form, rendered by the model's own chat template, loss on the assistant's turns alone."""

from alignguard.data.batches import Encoded, collate, collator, pad_id, pad_rows, supervised_tokens
from alignguard.data.encoding import Examples, check_fits, encode_example, encode_messages, encode_source, rows_digest
from alignguard.data.rendering import check_system, instructed, render_prompt
from alignguard.data.rows import check_text, conversation, load_conversations, prompts_alone
from alignguard.data.shown import shown_row
from alignguard.data.sources import FIELDS, TURNS, DataSource, Row, Source, as_source, read_jsonl, read_rows, read_text

__all__ = [
    "FIELDS",
    "TURNS",
    "DataSource",
    "Encoded",
    "Examples",
    "Row",
    "Source",
    "as_source",
    "check_fits",
    "check_system",
    "check_text",
    "collate",
    "collator",
    "conversation",
    "encode_example",
    "encode_messages",
    "encode_source",
    "instructed",
    "load_conversations",
    "pad_id",
    "pad_rows",
    "prompts_alone",
    "read_jsonl",
    "read_rows",
    "read_text",
    "render_prompt",
    "rows_digest",
    "shown_row",
    "supervised_tokens",
]
