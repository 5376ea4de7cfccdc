"""One real server on a small T5 with an adapter: mixed requests answered as each alone, clear words for the rest."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast, T5Config

from adapters.prompts import Renderer
from tests.fakes import error_body
from tests.live_server import LiveServer, live_server
from tests.tiny_base import save_adapter, save_random_seq2seq

SEED = 20261122
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["<pad>", "</s>", "<unk>", *(f"▁{a}{b}" for a in "bdfglmnprst" for b in "aeiou"), *LETTERS, "▁", ".", "?"]
pytestmark = pytest.mark.timeout(300)


def sentence_tokenizer() -> PreTrainedTokenizerFast:
    """As T5's: pieces with ▁, no line break, </s> after each text, no chat template."""
    made = Tokenizer(
        models.Unigram([(word, -float(len(WORDS[0])) if i > 2 else 0.0) for i, word in enumerate(WORDS)], 2)
    )
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = T5Config(
        vocab_size=128,
        d_model=48,
        d_kv=16,
        d_ff=80,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    folder = save_random_seq2seq(config, tmp_path_factory.mktemp("t5"), 5)
    sentence_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # the byte tokenizer's, saved before
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_adapter(base, tmp_path_factory.mktemp("lora") / "a", 1, targets=("q", "v", "wo"), seq2seq=True)
    tuned = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), folder).eval()
    prompt = Renderer(base).encode("ba lo mi")
    row = {"prompt": prompt, "expected": greedy(tuned, prompt, 6), "tolerance": 0.01}
    (folder / "golden_rows.json").write_text(json.dumps([row]))
    return folder


@pytest.fixture(scope="module")
def server(base: Path, adapter: Path) -> Iterator[LiveServer]:
    with live_server(base, "--dtype", "float32", "--max-rows", "6", "--max-model-len", "64") as made:
        for command in (
            ("adapters", "publish", "sum", str(adapter), "--json"),
            ("promote", "sum@1", "--force", "--reason", "fixture", "--json"),
        ):
            done = made.cli(*command)
            assert done.returncode == 0, done.stderr
        yield made


def greedy(model: Any, ids: list[int], count: int, **more: Any) -> list[int]:
    """The reference's tokens, without the start and the end."""
    settings = {"do_sample": False, "num_beams": 1, **more}
    with torch.inference_mode():
        (out,) = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=count, **settings).tolist()
    return [token for token in out[1:] if token != 1]


def test_a_mixed_batch_answers_as_each_adapter_alone(server: LiveServer, base: Path, adapter: Path) -> None:
    """24 requests, base and adapter, raw and chat, with and without a ban on repeated runs, eight at a time."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    renderer = Renderer(base)
    plain = AutoModelForSeq2SeqLM.from_pretrained(base).eval()
    tuned = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), adapter).eval()
    asked = []
    for i in range(24):
        text = " ".join("".join(rng.choices(LETTERS, k=3)) for _ in range(rng.randint(1, 8)))
        asked.append((["base", "sum"][i % 2], text, i % 3 == 0, 3 if i % 4 < 2 else 0))

    def ask(one: tuple[str, str, bool, int]) -> dict[str, Any]:
        model, text, chat, ngram = one
        body = {"model": model, "max_tokens": 20, "temperature": 0, "no_repeat_ngram_size": ngram}
        prompt: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        with server.client() as client:
            answer = client.post("/v1/chat/completions" if chat else "/v1/completions", json={**body, **prompt})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, asked))
    for (model, text, chat, ngram), answer in zip(asked, answers, strict=True):
        more = {"no_repeat_ngram_size": ngram} if ngram else {}
        ids = greedy(plain if model == "base" else tuned, renderer.encode(text), 20, **more)
        (choice,) = answer["choices"]
        assert (choice["message"]["content"] if chat else choice["text"]) == renderer.decode(ids), (model, text, ngram)
        assert answer["model"] == ("base" if model == "base" else "sum@1")
        assert answer["usage"]["prompt_tokens"] == len(renderer.encode(text))


def test_a_beam_search_answers_as_transformers_does_and_says_what_it_cannot(
    server: LiveServer, base: Path, adapter: Path
) -> None:
    renderer = Renderer(base)
    tuned = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), adapter).eval()
    body: dict[str, Any] = {"model": "sum", "prompt": "ta te ti", "max_tokens": 10, "num_beams": 4}
    with server.client() as client:
        answer = client.post("/v1/completions", json={**body, "length_penalty": 0.6, "early_stopping": True})
        ids = greedy(tuned, renderer.encode("ta te ti"), 10, num_beams=4, length_penalty=0.6, early_stopping=True)
        assert answer.json()["choices"][0]["text"] == renderer.decode(ids)
        for more, param in (
            ({"n": 2}, "n"),
            ({"temperature": 0.5}, "temperature"),
            ({"top_p": 0.5}, "top_p"),
            ({"top_k": 3}, "top_k"),
            ({"min_p": 0.1}, "min_p"),
            ({"logprobs": 1}, "logprobs"),
            ({"num_beams": 64}, "num_beams"),
        ):
            refused = client.post("/v1/completions", json={**body, **more})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_golden_rows_are_replayed_before_anybody_is_answered(
    server: LiveServer, base: Path, adapter: Path, tmp_path: Path
) -> None:
    odd = Path(shutil.copytree(adapter, tmp_path / "odd"))
    (row,) = json.loads((odd / "golden_rows.json").read_text())
    row["expected"][-1] = (row["expected"][-1] + 1) % 128
    (odd / "golden_rows.json").write_text(json.dumps([row]))
    done = server.cli("adapters", "publish", "odd", str(odd), "--json")
    assert done.returncode == 0, done.stderr
    body = {"prompt": "ba lo mi", "max_tokens": 6, "temperature": 0}
    with server.client() as client:
        refused = client.post("/v1/completions", json={"model": "odd@1", **body})
        assert (refused.status_code, error_body(refused)["code"]) == (503, "adapter_quarantined"), refused.text
        assert "golden_mismatch" in error_body(refused)["message"]
        good = client.post("/v1/completions", json={"model": "sum", **body})
        assert good.status_code == 200, good.text


def test_the_openai_sdk_streams_and_counts(server: LiveServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60)
    settings: dict[str, Any] = {"model": "sum", "temperature": 0, "max_tokens": 12}
    messages: list[Any] = [{"role": "user", "content": "la lo"}]
    whole = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=2, **settings)
    parts = [
        c.choices[0].delta.content or ""
        for c in client.chat.completions.create(messages=messages, stream=True, **settings)
    ]
    assert "".join(parts) == whole.choices[0].message.content
    raw = client.completions.create(prompt=["la", "lo"], n=2, logprobs=1, **settings)
    assert [c.index for c in raw.choices] == [0, 1, 2, 3]
    assert raw.choices[0].text == raw.choices[1].text


REFUSED: list[tuple[str, dict[str, Any], str, str, str]] = [
    ("completions", {"echo": True}, "echo", "unsupported_parameter", "leave echo out"),
    ("completions", {"echo": True, "logprobs": 1, "max_tokens": 0}, "echo", "unsupported_parameter", "leave echo out"),
    ("completions", {"stop": ["x", "\n"]}, "stop", "unsupported_parameter", "leave it out"),
    ("completions", {"prompt": "ba " * 80}, "prompt", "context_length_exceeded", "encoder reads at most 64"),
    ("completions", {"max_tokens": 100}, "max_tokens", "invalid_value", "lower max_tokens"),
    ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format.type",
     "unsupported_parameter", "leave it out"),
    ("chat/completions", {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools",
     "unsupported_parameter", "leave it out"),
    ("chat/completions", {"continue_final_message": True}, "continue_final_message", "unsupported_parameter",
     "leave continue_final_message out"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "more", "param", "code", "words"), REFUSED)
def test_what_an_encoder_decoder_cannot_do_is_said_with_what_to_do(
    server: LiveServer, path: str, more: dict[str, Any], param: str, code: str, words: str
) -> None:
    prompt: dict[str, Any] = {"prompt": "ba"}
    if path.startswith("chat"):
        turns = [{"role": "user", "content": "ba"}, {"role": "assistant", "content": "lo"}]
        prompt = {"messages": turns if "continue_final_message" in more else turns[:1]}
    with server.client() as client:
        answer = client.post(f"/v1/{path}", json={"model": "sum", **prompt, **more})
    error = error_body(answer)
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code), answer.text
    assert words in error["message"]


def test_without_a_template_a_conversation_is_its_text(server: LiveServer, base: Path) -> None:
    """A lone user turn as it is, else the turns as paragraphs."""
    settings = {"model": "base", "temperature": 0, "max_tokens": 8}
    with server.client() as client:
        for turns in (["ba lo"], ["ba", "lo", "mi"]):
            roles = ["user", "assistant", "user"]
            messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
            chat = client.post("/v1/chat/completions", json={**settings, "messages": messages}).json()
            raw = client.post("/v1/completions", json={**settings, "prompt": "\n\n".join(turns)}).json()
            assert chat["choices"][0]["message"]["content"] == raw["choices"][0]["text"]
            assert chat["usage"] == raw["usage"]
