"""The page on request fields speaks of every field there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from serving.api.schemas import ChatRequest, CompletionRequest, Generation

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "api.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("schema", [ChatRequest, CompletionRequest])
def test_every_field_is_on_the_page(schema: type[Generation]) -> None:
    named = set(re.findall(r"`([a-z_]+)[^`]*`", PAGE))
    assert set(schema.model_fields) <= named


@pytest.mark.parametrize("schema", [ChatRequest, CompletionRequest])
def test_a_field_is_where_it_belongs(schema: type[Generation]) -> None:
    ignored = PAGE.partition("## Accepted without effect")[2].partition("## Refused")[0]
    refused = PAGE.partition("## Refused by name")[2]
    assert {f for f in schema.ignored if f"`{f}`" not in ignored} == set()
    # `echo` is chat's alone to refuse.
    assert {f for f in schema.unsupported - {"echo"} if f"`{f}" not in refused} == set()
