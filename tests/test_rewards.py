"""Rewards: rules of comparison, the format state machine, the three variants, and the traps of the official code."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from boxes import online_config, quick_box
from hypothesis import given
from hypothesis import strategies as st

from treegrpo.answers import equal, extract_result, number
from treegrpo.envs.search import search_prompt
from treegrpo.envs.tags import Tags, first_action, format_valid, last_answer
from treegrpo.formula import FormulaChecker
from treegrpo.rewards import (
    combine,
    exact_match,
    f1_score,
    format_reward,
    group_id,
    math_answer,
    normalize_answer,
    resolve_rewards,
    score,
    search_em,
    search_f1,
)
from treegrpo.trainer import Trainer

GOOD = (
    "<think> t </think> <search> q </search>\n<information>Doc</information>\n<think> u </think><answer> {} </answer>"
)


def grade(function, completion, golds, **options):
    return function(["p"], [completion], [[1]], answers=[golds], **options)[0]


def test_squad_normalisation() -> None:
    assert normalize_answer(" The  U.S.-born\tQueen's, an apple ") == "usborn queens apple"
    assert exact_match("the Beatles!", ["Rolling Stones", "Beatles"]) == 1
    assert exact_match("beatle", ["Beatles"]) == 0
    assert exact_match(None, ["x"]) == exact_match(" . ", ["...", "the"]) == 0
    assert exact_match("", ["The The"]) == 0 and exact_match("the the", ["The The"]) == 1


def test_f1_counts_words_and_takes_the_best_alias() -> None:
    # 2 of 3 words given, 2 of 2 wanted: precision 2/3, recall 1
    assert f1_score("new york city", ["New York"]) == pytest.approx(0.8)
    assert f1_score("new york city", ["Boston", "New York City"]) == 1
    assert f1_score("york york", ["york"]) == pytest.approx(2 / 3)
    assert f1_score(None, ["x"]) == f1_score("x", []) == 0


def test_format_state_machine() -> None:
    assert format_valid(GOOD.format("x"))
    assert format_valid("<think></think><answer></answer>")
    for bad in (
        "",
        "x",
        "<answer> x </answer>",
        "<think> a </think>",
        "<think> a </think> <search> q </search> <think> b </think> <answer> c </answer>",
        "<think> a </think> <information> i </information> <think> b </think> <answer> c </answer>",
        "<think> a </think> <search> q </search> <information> i </information> <answer> c </answer>",
        "<think> a </think> word <answer> c </answer>",
        "<think> a <answer> c </answer>",
        "<think> a </think> <answer> c </answer> word",
        "<think> a </think> <answer> c </answer> <think> a </think> <answer> c </answer>",
        "<think> a </think> <answer> c",
        "<think> a </search> </think> <answer> c </answer>",
    ):
        assert not format_valid(bad), bad
    calculator = Tags(search="calc", information="result")
    assert format_valid(
        "<think>a</think><calc>1</calc><result>1</result><think>b</think><answer>1</answer>", calculator
    )
    assert not format_valid(GOOD.format("x"), calculator)


@pytest.mark.parametrize("end", ["", "<|im_end|>\n", "<|eot_id|>", "</s>", "<end_of_turn>"])
def test_the_format_needs_no_chat_template(end: str) -> None:
    """The official check finds `<|im_start|>assistant` or fails: always, with Llama's template."""
    assert grade(search_em, GOOD.format("Ada") + end, ["Ada"]) == 1
    assert grade(search_em, "<|start_header_id|>" + GOOD.format("Ada") + end, ["Ada"]) == pytest.approx(0.8)


def test_an_answerless_response_scores_no_answer() -> None:
    """The official code reads prompt and response together, and grades `Beijing` from the prompt's example."""
    prompt = "Write <answer> and </answer>, for example <answer> Beijing </answer>. Question: capital of China?"
    for completion in ("<think> no idea </think>", "", "<answer> Beijing", "Beijing </answer>"):
        for function in (search_em, search_f1):
            for variant in ("monotone", "official", "paper"):
                got = function([prompt], [completion], [[1]], answers=[["Beijing"]], variant=variant)[0]
                assert got == (-0.2 if variant == "paper" else 0), (completion, function, variant)
    # nor is what an environment wrote an answer, be it an error message that quotes the tag or a passage
    echo = "<search> q </search> <information> say <answer> Beijing </answer> </information> <think> t </think>"
    assert last_answer(echo) is None
    assert grade(search_em, echo, ["Beijing"]) == 0
    assert "<answer>" in search_prompt()
    # nor what a tool's turn brought, in whatever form
    for found in ("<answer> 42 </answer>", r"\boxed{42}", "#### 42"):
        for block in ("tool_response", "information"):
            text = f"I search.\n<{block}>\n{found}\n</{block}>\nI do not know."
            assert last_answer(text) is None and extract_result(text) is None
            assert extract_result(text + " #### 7") == "7"


def test_a_policy_that_repeats_itself_costs_no_square_of_its_length() -> None:
    boxes, blocks = (extract_result, r"\boxed{", 3_000), (last_answer, "<information>", 10_000)
    calls = (last_answer, "<answer><search> q </search>", 4_000)
    for read, part, times in (boxes, blocks, calls, (format_valid, "\n", 20_000)):
        begun = time.process_time()
        assert not read("<think> a" + part * times + "b")
        assert time.process_time() - begun < 1, read.__name__


def test_answers_are_read_from_the_completion_alone() -> None:
    assert last_answer("<answer> a </answer> x <answer> b </answer>") == "b"
    assert last_answer("<answer> a <answer> b </answer>") == "b"
    assert last_answer("<search> <answer> a </search>") is None
    assert first_action("<search> a </search> <answer> b </answer>") == ("search", "a")
    assert first_action("<answer> a <search> b </search> </answer>") == ("search", "b")
    assert first_action("<search> a <answer> b </answer>") == ("answer", "b")
    assert first_action("<search> a") is None
    messages = [
        {"role": "assistant", "content": "<think> t </think> <search> q </search>"},
        {"role": "tool", "content": "<information> <answer> no </answer> </information>"},
        {"role": "assistant", "content": "<think> t </think> <answer> yes </answer>"},
    ]
    assert grade(search_em, messages, ["no"], variant="paper") == pytest.approx(-0.2)
    assert grade(search_em, messages, ["yes"], variant="paper") == pytest.approx(0.8)


def test_official_tables() -> None:
    valid, invalid, none = GOOD, "<answer> {} </answer>", "<think> a </think>"
    em = [grade(search_em, text.format(word), ["x"], variant="official") for word in "xy" for text in (valid, invalid)]
    assert em == pytest.approx([1, 0.8, 0.2, 0.1])
    assert grade(search_em, none, ["x"], variant="official") == 0
    f1 = [grade(search_f1, t.format("x b"), ["x"], variant="official") for t in (valid, invalid)]
    assert f1 == pytest.approx([2 / 3, 2 / 3 - 0.2])
    f1 = [grade(search_f1, t.format("y"), ["x"], variant="official") for t in (valid, invalid)]
    assert f1 == pytest.approx([0.2, 0])


def test_official_f1_is_not_monotone_and_the_default_is() -> None:
    little = " ".join(["x", *"bcdefghijklmnopqrst"])  # F1 = 2 / 21
    words = [grade(search_f1, GOOD.format(w), ["x"], variant="official") for w in (little, "none")]
    assert words == pytest.approx([2 / 21, 0.2]) and words[0] < words[1]
    words = [grade(search_f1, GOOD.format(w), ["x"]) for w in (little, "none")]
    assert words[0] > words[1]


@given(st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_default_is_monotone(low: float, high: float, valid: bool) -> None:
    low, high = sorted((low, high))
    for variant in ("monotone", "paper"):
        assert combine(low, valid, True, variant) <= combine(high, valid, True, variant)
        assert combine(low, False, True, variant) < combine(low, True, True, variant)
        if high - low > 1e-9:
            assert combine(low, valid, True, variant) < combine(high, valid, True, variant)
    assert 0 <= combine(low, valid, True, "monotone") <= 1


def test_paper_variant_is_equation_13() -> None:
    assert grade(search_em, GOOD.format("x"), ["x"], variant="paper") == 1
    assert grade(search_em, "<answer> x </answer>", ["x"], variant="paper") == pytest.approx(0.8)
    assert grade(search_em, GOOD.format("y"), ["x"], variant="paper") == 0
    assert grade(search_em, "<answer> y </answer>", ["x"], variant="paper") == pytest.approx(-0.2)


@pytest.mark.parametrize(
    "columns",
    [
        {"answers": [["Ada"], None]},
        {"golden_answers": [np.array(["Bob", "Ada"], object), None]},
        {"answer": ["Ada", None]},
        {"answers": [None, None], "answer": ["Ada", None]},
        {"reward_model": [{"ground_truth": {"target": ["Ada"]}}, {"ground_truth": {"target": []}}]},
        {"reward_model": [{"ground_truth": "Ada"}, {}]},
    ],
)
def test_where_the_right_answers_stand(columns: dict) -> None:
    assert search_em(["p"] * 2, [GOOD.format("ada")] * 2, [[1]] * 2, **columns) == [1, None]


def test_wrong_answer_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="no column holds"):
        search_em(["p"], ["x"], [[1]], question=["q"])
    with pytest.raises(ValueError, match=r"answers\[0\] holds \{\}"):
        search_em(["p"], ["x"], [[1]], answers=[[{}]])
    with pytest.raises(ValueError, match="variant 'best'"):
        search_em(["p"], ["x"], [[1]], answers=[["x"]], variant="best")


def test_mixed_datasets_do_not_collide() -> None:
    """The official code groups by the index inside a file, and each source counts from 0."""
    names = {
        group_id({"source": row}, index, source)
        for source in ("train.jsonl", "test.jsonl", "a:b", "a")
        for row in ("nq", "hotpotqa", "b:nq", "")
        for index in range(3)
    }
    assert len(names) == 4 * 4 * 3
    assert group_id({"source": "nq"}, 0, "f") == group_id({"source": "nq"}, 0, "f")


@pytest.mark.parametrize(
    ("result", "gold", "same"),
    [
        ("42", "42", True),
        ("$1,234.00", "1234", True),
        ("42 dollars", "42", True),
        ("x = 42", "42", True),
        ("40 + 2", "42", True),
        ("0.5", "1/2", True),
        ("50%", "50", True),
        ("50%", "1/2", True),
        ("**42.**", "42", True),
        ("-$42", "-42", True),
        ("-7", "7", False),
        ("42.5", "42", False),
        ("41 or 42", "42", False),
        (r"\frac{3}{6}", r"\frac{1}{2}", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"x^2 + 2x + 1", r"(x+1)^2", True),
        (r"(x+1)^2", r"x^2+1", False),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        (r"\{1, 2\}", r"\{2, 1\}", True),
        ("", "1", False),
        ("__import__('os').getcwd()", "1", False),
        ("9" * 5000, "1", False),
        (r"\sum_{i=1}^{99} i^9", "1", False),
    ],
)
def test_math_equality(result: str, gold: str, same: bool) -> None:
    pytest.importorskip("math_verify")
    assert equal(result, gold) is same


def test_formulas_that_take_too_long_are_given_up() -> None:
    pytest.importorskip("math_verify")
    checker = FormulaChecker(timeout=1.0)
    try:
        assert checker.equal("x + x", "2x") and not checker.equal("x + x", "3x")
        first = checker._process.pid
        start = time.monotonic()
        assert not checker.equal("2^{99^{99}}", "1")
        assert time.monotonic() - start < 5 and checker.num_timeouts == 1
        assert checker.equal("x + x", "2x") and checker._process.pid != first
        # one that died is replaced
        checker._process.kill()
        checker._process.wait()
        assert checker.equal(r"\frac{2}{4}", r"\frac{1}{2}")
        assert not checker.equal("line\nbreak", "{" * 50)
    finally:
        checker.close()
        checker.close()


def test_an_interrupted_comparison_leaves_no_reply_behind(monkeypatch) -> None:
    pytest.importorskip("math_verify")
    checker = FormulaChecker()
    try:
        assert checker.equal("x", "x")

        def interrupted(timeout):
            raise KeyboardInterrupt

        monkeypatch.setattr(checker._replies, "get", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checker.equal("x + x", "2x")
        monkeypatch.undo()
        assert not checker.equal("x + x", "3x") and checker.equal("x + x", "2x")
    finally:
        checker.close()


def test_math_answer_without_math_verify_is_refused_before_the_run(monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else find(name))
    with pytest.raises(ValueError, match=r"'math_answer' needs math-verify: pip install 'treegrpo\[math\]'"):
        resolve_rewards(["math_answer"])
    resolve_rewards(["search_em"])


def test_math_answer_reads_the_last_result() -> None:
    pytest.importorskip("math_verify")
    texts = [
        r"first \boxed{1}, then \boxed{\frac{84}{2}}.",
        "so\n#### 1,042\n",
        "<answer> 42 </answer>",
        r"<answer> \boxed{42} is it </answer>",
        "it is 42",
        r"\boxed{42",
    ]
    golds = [["42"], "a solution\n#### 1042", ["41", "42"], "42", "42", "42"]
    assert math_answer(["p"] * 6, texts, [[1]] * 6, answers=golds) == [1, 1, 1, 1, 0, 0]
    assert extract_result(r"\boxed{1} #### 2") == "2"
    assert number("1,23") is None


def test_math_answer_works_outside_the_main_thread() -> None:
    """The library's own time-out sets an alarm signal, which only the main thread may."""
    pytest.importorskip("math_verify")
    out = []

    def work() -> None:
        out.append(math_answer(["p"], [r"\boxed{(x+1)^3}"], [[1]], answers=["x^3 + 3x^2 + 3x + 1"]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert out == [[1]]


def three(prompts, completions, completion_ids, **columns):
    return [3.0, None]


async def later(prompts, completions, completion_ids, *, extra, **columns):
    await asyncio.sleep(0)
    return [None, float(extra[1])]


def run(functions, weights=None, **kwargs):
    given = {
        "prompts": ["p"] * 2,
        "completions": ["a", "b"],
        "completion_ids": [[1], [2]],
        "columns": {"extra": [0, 5]},
    }
    return score(functions, weights, **(given | kwargs))


def test_score_adds_what_applies() -> None:
    rewards, parts = run([three, later, format_reward], [1, 2, 1])
    assert rewards.dtype == np.float64 and rewards.tolist() == [3, 10]
    assert list(parts) == ["three", "later", "format_reward"]
    np.testing.assert_array_equal(parts["later"], [np.nan, 5])

    async def inside() -> list[float]:
        return run([three, later])[0].tolist()

    assert asyncio.run(inside()) == [3, 5]
    assert list(run([three, three, later])[1]) == ["three", "three_2", "later"]


def test_score_refuses_what_is_no_reward() -> None:
    with pytest.raises(ValueError, match="every reward gave None for completion 1"):
        run([three])
    with pytest.raises(ValueError, match=r"None for completion 1 \(leaf 3 of group 'g'\): add"):
        run([three], places=["leaf 0 of group 'f'", "leaf 3 of group 'g'"])
    for bad, message in (
        ([1.0, float("nan")], "reward bad gave nan for completion 1"),
        ([float("inf"), 1], "reward bad gave inf for completion 0"),
        ([1.0, "x"], "reward bad gave 'x' for completion 1"),
        ([1.0, 10**400], "reward bad gave 10+ for completion 1"),
        ([1.0], "reward bad returned 1 values for 2"),
        (1.0, "reward bad returned float values for 2"),
    ):

        def bad(*, output=bad, **columns):
            return output

        with pytest.raises(ValueError, match=message):
            run([bad])
    with pytest.raises(ValueError, match="reward_weights"):
        run([three], [1, 2])
    with pytest.raises(ValueError, match="extra has 1 entries for 2"):
        run([three], columns={"extra": [1]})
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        run([])


def test_an_error_of_an_async_reward_comes_through_a_running_loop() -> None:
    async def broken(**columns):
        raise KeyError("column")

    async def inside() -> None:
        run([broken])

    with pytest.raises(KeyError, match="column"):
        asyncio.run(inside())


def test_resolve_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "my_rewards", types.SimpleNamespace(three=three))
    functions = resolve_rewards(["search_em/official", "search_f1/paper", "my_rewards:three", "format"])
    columns = {"answers": [["x"], ["y"]]}
    rewards, parts = run(functions, completions=["<answer> y </answer>"] * 2, columns=columns)
    assert parts["search_em/official"] == pytest.approx([0.1, 0.8])
    assert parts["search_f1/paper"] == pytest.approx([-0.2, 0.8])
    assert rewards == pytest.approx([2.9, 1.6])
    # columns that a function of ours has a parameter for are data all the same
    named = columns | {"tags": [["math"], []], "weight": [1.0, 2.0], "variant": ["a", "b"]}
    again, _ = run(functions, completions=["<answer> y </answer>"] * 2, columns=named)
    assert again.tolist() == rewards.tolist()
    for name in ("em", "search_em/best", "format/paper", "my_rewards:four", "my_rewards_none:x"):
        with pytest.raises(ValueError, match=name):
            resolve_rewards([name])


def test_a_module_in_the_working_folder_is_found(tmp_path: Path) -> None:
    """As the console script starts: its own folder first on the path, not the working folder."""
    (tmp_path / "my_own_rewards.py").write_text("def good(completions, **columns):\n    return [1.0]\n")
    root = Path(__file__).resolve().parent.parent
    code = (
        f"import sys; sys.path[0] = '/nonexistent'; sys.path.append({str(root)!r})\n"
        "from treegrpo.rewards import resolve_rewards\n"
        "print(resolve_rewards(['my_own_rewards:good'])[0].__name__)\n"
        "resolve_rewards(['my_own_rewards:bad'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "good\n"
    assert "ValueError: reward_funcs='my_own_rewards:bad': module my_own_rewards" in done.stderr


def test_environments_may_own_the_reward() -> None:
    class Sync:
        def get_reward(self):
            return 1.0

    class Async:
        async def get_reward(self):
            return 2.0

    rewards, _ = run(resolve_rewards(["environment"]), environments=[Sync(), Async()])
    assert rewards.tolist() == [1, 2]
    with pytest.raises(ValueError, match="needs environments"):
        run(resolve_rewards(["environment"]))


def test_metrics_of_the_search_rewards() -> None:
    logged = {}
    search_em(
        ["p"] * 2,
        [GOOD.format("x"), "<answer> x </answer>"],
        [[1]] * 2,
        answers=[["x"]] * 2,
        log_metric=logged.__setitem__,
    )
    assert logged == {"em": 1.0, "format_valid": 0.5}


def test_a_reward_may_log_whoever_asks_it() -> None:
    def logging(completions, log_extra, log_metric, **columns):
        log_extra("words", [len(text.split()) for text in completions])
        log_metric("longest", max(map(len, completions)))
        return [1.0] * len(completions)

    assert run([logging])[0].tolist() == [1, 1]


@pytest.mark.usefixtures("one_thread", "own_cache")
def test_rewards_in_training_know_the_step(tmp_path: Path) -> None:
    """A curriculum reads it; what is sampled ahead has seen as many updates as its weights."""
    box, seen = quick_box(tmp_path / "box"), []

    def watched(completions, trainer_state, **columns):
        seen.append((trainer_state.global_step, trainer_state.max_steps, len(completions)))
        return [float(i % 2) for i in range(len(completions))]

    for ahead, steps in ((False, [0, 1, 2]), (True, [0, 0, 1])):
        changes = {"eval_dataset": str(box / "train.jsonl"), "eval_rows": 1, "eval_steps": 2, "overlap_rollouts": ahead}
        trainer = Trainer(online_config(box, tmp_path / f"{ahead}", groups_per_step=1, num_expansions=0, **changes))
        object.__setattr__(trainer.online.sampler, "reward_funcs", [watched])
        trainer.train()
        assert sorted(step for step, _, num in seen if num == 2) == steps
        assert [step for step, _, num in seen if num == 1] == [0, 2, 3] and {most for _, most, _ in seen} == {3}
        seen.clear()
