"""Messages to tokens: the shared tau-bench file exactly, other templates, and templates that must be refused."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from treegrpo.convert import convert_records, read_records, tokenize_conversation

DATA = Path(os.environ.get("TREEGRPO_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / "tau_bench_airline").is_dir(), reason=f"no tau-bench data in {DATA}")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}<call>{{ c['function']['name'] }}{{ c['function']['arguments'] }}</call>{%"
    " endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Closes a run of tool messages once, as Qwen's own templates do.
GROUPED_TOOLS = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{% if loop.first or messages[loop.index0 - 1]['role'] !="
    " 'tool' %}<|im_start|>user"
    "{% endif %}\n<r>{{ m['content'] }}</r>{% if loop.last or messages[loop.index0 + 1]['role'] != 'tool'"
    " %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Shows the content of the last assistant message only, as templates that drop old reasoning do.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] != 'assistant' or loop.last %}{{"
    " m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADLESS = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
HEADLESS += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "two and two?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2}'}}]},
    {"role": "tool", "content": "4"},
    {"role": "tool", "content": "four"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "thanks"},
]


def byte_tokenizer(template: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=template)


def trained_text(tokenizer, token_ids, loss_mask) -> list[str]:
    mask = np.concatenate([[0], np.asarray(loss_mask, int), [0]])
    begins, ends = np.flatnonzero(np.diff(mask) == 1), np.flatnonzero(np.diff(mask) == -1)
    return [tokenizer.decode(token_ids[a:b]) for a, b in zip(begins, ends, strict=True)]


@needs_data
def test_tau_bench_equals_the_shared_tokens_exactly():
    from transformers import AutoTokenizer

    from treegrpo import load

    folder = DATA / "tau_bench_airline"
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizers" / "qwen")
    converted = convert_records(read_records(folder / "trajectories.jsonl.gz"), tokenizer)
    with gzip.open(folder / "tokens.jsonl.gz", "rt") as file:
        expected = [json.loads(line) for line in file]
    assert len(converted) == len(expected) == 200
    for trajectory, row in zip(converted, expected, strict=True):
        assert trajectory.token_ids.tolist() == row["token_ids"]
        assert trajectory.loss_mask.astype(int).tolist() == row["loss_mask"]
        assert (trajectory.group, trajectory.reward, trajectory.info["trial"]) == (
            row["group"],
            row["reward"],
            row["trial"],
        )
    assert [t.token_ids.tolist() for t in load(folder / "tokens.jsonl.gz")] == [row["token_ids"] for row in expected]


@pytest.mark.parametrize("template", [CHATML, GROUPED_TOOLS], ids=["chatml", "grouped_tools"])
def test_trains_what_the_assistant_sampled(template):
    tokenizer = byte_tokenizer(template)
    (trajectory,) = convert_records([{"messages": TALK, "group": "g", "reward": 1}], tokenizer)
    first = '<call>add{"a": 2}</call><|im_end|>' if template is CHATML else "<|im_end|>"
    assert trained_text(tokenizer, trajectory.token_ids, trajectory.loss_mask) == [first, "four<|im_end|>"]
    clean = [{**message, "content": message["content"] or ""} for message in TALK]
    assert tokenizer.decode(trajectory.token_ids) == tokenizer.apply_chat_template(clean, tokenize=False)
    assert trajectory.num_steps == 2
    assert all(trajectory.loss_mask[step] and not trajectory.loss_mask[step - 1] for step in trajectory.steps)


def test_equal_messages_give_equal_tokens():
    tokenizer = byte_tokenizer(CHATML)
    other = [*TALK[:5], {"role": "assistant", "content": "it is 4"}]
    a, b = (
        tokenize_conversation([{**m, "content": m["content"] or ""} for m in talk], tokenizer)[0]
        for talk in (TALK, other)
    )
    shared = len(tokenize_conversation([{**m, "content": m["content"] or ""} for m in TALK[:5]], tokenizer)[0])
    assert a[:shared] == b[:shared] and a != b


def test_opening_assistant_message_is_context():
    tokenizer = byte_tokenizer(CHATML)
    messages = [
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
    ]
    token_ids, mask = tokenize_conversation(messages, tokenizer)
    assert trained_text(tokenizer, token_ids, mask) == ["yes<|im_end|>"]


def test_template_that_forgets_is_refused():
    with pytest.raises(ValueError, match=r"record 0 \(group g\).*not prefix-stable.*messages\["):
        convert_records([{"messages": TALK, "group": "g"}], byte_tokenizer(FORGETFUL))


def test_template_without_generation_prompt_is_refused():
    with pytest.raises(ValueError, match="generation prompt"):
        convert_records([{"messages": TALK, "group": "g"}], byte_tokenizer(HEADLESS))


def test_template_that_raises_names_the_record():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"record 0.*roles must alternate"):
        convert_records([{"messages": TALK, "group": "g"}], byte_tokenizer(template))


def test_tau_bench_own_format(tmp_path):
    """A JSON list with traj, task_id and trial, as tau-bench writes it."""
    path = tmp_path / "gpt-4o-airline.json"
    path.write_text(json.dumps([{"task_id": 7, "trial": 2, "reward": 1.0, "info": {}, "traj": TALK}]))
    (trajectory,) = convert_records(read_records(path), byte_tokenizer(CHATML))
    assert (trajectory.group, trajectory.tree, trajectory.reward, trajectory.info) == ("7", 2, 1.0, {"trial": 2})


def test_parse_arguments_gives_the_template_objects():
    template = CHATML.replace("{{ c['function']['arguments'] }}", "{{ c['function']['arguments'] | tojson }}")
    tokenizer = byte_tokenizer(template)
    (trajectory,) = convert_records([{"messages": TALK, "group": "g"}], tokenizer, parse_arguments=True)
    assert '<call>add{"a": 2}</call>' in tokenizer.decode(trajectory.token_ids)


@pytest.mark.parametrize("calls", ["x", ["x"], 5, [{"function": "f"}], [{"function": None}], {"function": {}}])
def test_malformed_tool_calls_are_named(calls):
    messages = [TALK[0], {"role": "assistant", "tool_calls": calls}]
    with pytest.raises(
        ValueError, match=r"record 0 \(group g\): messages\[1\]: tool_calls is .*: give a list of objects"
    ):
        convert_records([{"messages": messages, "group": "g"}], byte_tokenizer(CHATML), parse_arguments=True)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"group": "g"}, "none of the fields messages"),
        ({"messages": TALK}, "none of the fields group"),
        ({"messages": [], "group": "g"}, "non-empty list"),
        ({"messages": [{"content": "x"}], "group": "g"}, "with a role"),
        ({"messages": TALK, "group": "g", "reward": "abc"}, r"record 0 \(group g\): reward is 'abc'"),
        ({"messages": TALK, "group": "g", "reward": [1]}, r"record 0 \(group g\): reward is \[1\]"),
        ({"messages": TALK, "group": "g", "reward": float("nan")}, "reward is nan"),
        ({"messages": TALK, "group": "g", "reward": 10**400}, "reward is 1000"),
        ({"messages": [*TALK, {"role": "user", "content": "\ud800"}], "group": "g"}, r"messages\[\d\] holds half of a"),
        ({"messages": TALK, "group": "g", "trial": "x"}, r"record 0 \(group g\): tree or trial is 'x': give a whole"),
        ({"messages": TALK, "group": "g", "tree": 1.5}, "tree or trial is 1.5"),
    ],
)
def test_bad_records(record, message):
    with pytest.raises(ValueError, match=message):
        convert_records([record], byte_tokenizer(CHATML))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": \n', "line 2: not valid JSON"),
        ('[{"a": 1},', "not a valid JSON list"),
        ("[3]", "record 0: a trajectory is a JSON object"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_records(path)


def test_lines_end_where_json_lines_end(tmp_path):
    """U+2028 and U+0085 may stand in a JSON string as they are."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": "p\u2028q\u0085r"}\r\n\n{"a": 2}\n', encoding="utf-8")
    assert read_records(path) == [{"a": "p\u2028q\u0085r"}, {"a": 2}]


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 50)[:-9])
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz, line \d+: the compressed data is damaged"):
        read_records(path)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: not valid JSON"):
        read_records(path)
