"""Trajectories and tries: the packed row against the obvious definitions, files, and every bad input."""

import dataclasses
import doctest
import gzip
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import NAMED, ancestor_mask, shared_data, trie_subtree_end
from hypothesis import given
from hypothesis import strategies as st

import treegrpo
from treegrpo import tree as tree_module
from treegrpo import trie as trie_module
from treegrpo.tree import Segment, Trajectory, build_forest, build_tree, load, save, token_trie

REPOSITORY = Path(__file__).resolve().parent.parent
NAN = math.nan
# Few distinct tokens, so that random lists share prefixes, repeat, and are prefixes of one another.
TOKEN_LISTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=10)
FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def trajectories(draw, groups=("a", "b", "")):
    """Random trajectories of several groups with every field in use, completions that are empty included."""
    made = []
    for ids in draw(TOKEN_LISTS):
        n = len(ids)
        mask = [0, *draw(st.lists(st.integers(0, 1), min_size=n - 1, max_size=n - 1))]
        logprobs = [draw(FLOAT32) if trained or draw(st.booleans()) else NAN for trained in mask]
        first = mask.index(1) if 1 in mask else n
        later = draw(st.sets(st.integers(first, n - 1))) if first < n else set()
        steps = sorted({first, *later} - {n})
        made.append(
            Trajectory(
                token_ids=[draw(st.sampled_from((0, 255, 256, 2**31 - 1))) if i > 5 else t for i, t in enumerate(ids)],
                loss_mask=mask,
                reward=draw(st.none() | st.floats(allow_nan=False, allow_infinity=False)),
                logprobs=draw(st.sampled_from((logprobs, None))),
                group=draw(st.sampled_from(groups)),
                tree=draw(st.integers(0, 3)),
                steps=draw(st.sampled_from((steps, None))),
                info=draw(st.none() | st.dictionaries(st.text(), st.integers() | st.text() | st.none(), max_size=2)),
            )
        )
    return made


def make(ids, **fields):
    return Trajectory(ids, [0] * len(ids), **fields)


def arrays(token_lists):
    return [np.array(ids) for ids in token_lists]


def leaf_rows(trie):
    return np.split(trie.leaf_tokens, trie.leaf_offsets[1:-1])


def check_trie(trie, token_lists):
    """Every field against its definition, by walking paths."""
    num = trie.num_tokens
    dtypes = [trie.tokens.dtype, trie.subtree_end.dtype, trie.prev.dtype, trie.position.dtype, trie.leaf_tokens.dtype]
    assert dtypes == [np.int64, np.int32, np.int32, np.int32, np.int64]
    paths = []
    for t in range(num):
        assert -1 <= trie.prev[t] < t
        paths.append((paths[trie.prev[t]] if trie.prev[t] >= 0 else []) + [t])
    assert trie.position.tolist() == [len(path) - 1 for path in paths]
    for row, ids in zip(leaf_rows(trie), token_lists, strict=True):
        assert trie.tokens[row].tolist() == list(ids)
        assert row.tolist() == paths[row[-1]]
    assert sorted({t for row in leaf_rows(trie) for t in row.tolist()}) == list(range(num))
    walked = np.zeros((num, num), bool)
    for t, path in enumerate(paths):
        walked[t, path] = True
    i, j = np.arange(num)[:, None], np.arange(num)[None]
    assert ((j <= i) & (i < trie.subtree_end[None])).tolist() == walked.tolist()
    assert trie.num_pairs == walked.sum()
    return paths


def test_worked_example():
    trie = token_trie(arrays(NAMED["worked_example"]))
    assert trie.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert trie.subtree_end.tolist() == [6, 6, 5, 4, 5, 6]
    assert trie.prev.tolist() == [-1, 0, 1, 2, 2, 1]
    assert trie.position.tolist() == [0, 1, 2, 3, 3, 2]
    assert [row.tolist() for row in leaf_rows(trie)] == [[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 5]]


@pytest.mark.parametrize("module", [tree_module, trie_module])
def test_docstring_examples(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", NAMED)
def test_named_forests(name):
    trie = token_trie(arrays(NAMED[name]))
    check_trie(trie, NAMED[name])
    assert trie.subtree_end.tolist() == trie_subtree_end(NAMED[name]).tolist()
    i, j = np.arange(trie.num_tokens)[:, None], np.arange(trie.num_tokens)[None]
    assert np.array_equal((j <= i) & (i < trie.subtree_end[None]), ancestor_mask(trie.subtree_end))


@given(TOKEN_LISTS)
def test_random_tries(token_lists):
    trie = token_trie(arrays(token_lists))
    paths = check_trie(trie, token_lists)
    # exact: no two nodes spell the same prefix, and children come in ascending token order
    spelled = [tuple(trie.tokens[path].tolist()) for path in paths]
    assert spelled == sorted(set(spelled))
    shuffled = token_trie(arrays(token_lists[::-1]))
    assert shuffled.tokens.tolist() == trie.tokens.tolist()
    assert shuffled.subtree_end.tolist() == trie.subtree_end.tolist()


@given(TOKEN_LISTS, TOKEN_LISTS)
def test_owners_stand_side_by_side(left, right):
    owners = np.repeat([3, 7], [len(left), len(right)])
    both = token_trie(arrays(left + right), owners)
    check_trie(both, left + right)
    a, b = token_trie(arrays(left)), token_trie(arrays(right))
    assert both.tokens.tolist() == [*a.tokens, *b.tokens]
    assert both.subtree_end.tolist() == [*a.subtree_end, *(b.subtree_end + a.num_tokens)]


def test_sorting_is_by_token_value_not_by_byte():
    trie = token_trie(arrays([[256], [1], [2**31 - 1], [65536], [255]]))
    assert trie.tokens.tolist() == [1, 255, 256, 65536, 2**31 - 1]


@given(trajectories())
def test_forest_round_trips_bit_for_bit(rows):
    forest = build_forest(rows)
    assert [tree.group for tree in forest] == list(dict.fromkeys(t.group for t in rows))
    for tree in forest:
        mine = [t for t in rows if t.group == tree.group]
        assert tree.to_trajectories() == mine
        check_trie(tree.trie, [t.token_ids for t in mine])
        alone = build_tree(mine)
        for f in dataclasses.fields(alone.trie):
            left, right = getattr(alone.trie, f.name), getattr(tree.trie, f.name)
            assert left.dtype == right.dtype
            assert left.tolist() == right.tolist()
        assert tree.num_leaves == len(mine)
        assert tree.num_chain_tokens == sum(t.num_tokens for t in mine)
        assert tree.num_chain_pairs == sum(n * (n + 1) // 2 for n in (t.num_tokens for t in mine))


@given(trajectories(groups=("g",)))
def test_segments_are_maximal_unbranched_runs(rows):
    tree = build_tree(rows)
    trie, segments = tree.trie, tree.segments()
    assert [s.start for s in segments] + [tree.num_tokens] == [0] + [s.end for s in segments]
    children = [np.flatnonzero(trie.prev == t).tolist() for t in range(tree.num_tokens)]
    ends = [int(row[-1]) for row in leaf_rows(trie)]
    for index, s in enumerate(segments):
        for t in range(s.start, s.end - 1):
            assert children[t] == [t + 1]
            assert t not in ends
        assert s.leaves == tuple(leaf for leaf, end in enumerate(ends) if end == s.end - 1)
        assert len(children[s.end - 1]) != 1 or s.leaves, "a run that could be longer"
        assert [segments[c].start for c in s.children] == children[s.end - 1]
        assert all(segments[c].parent == index and segments[c].depth == s.depth + 1 for c in s.children)
        if s.parent < 0:
            assert (s.depth, trie.prev[s.start]) == (0, -1)


def test_segments_of_the_worked_example():
    tree = build_tree([make(ids) for ids in NAMED["worked_example"]])
    assert tree.segments() == [
        Segment(0, 2, -1, (1, 4), (), 0),
        Segment(2, 3, 0, (2, 3), (), 1),
        Segment(3, 4, 1, (), (0,), 2),
        Segment(4, 5, 1, (), (1,), 2),
        Segment(5, 6, 0, (), (2,), 1),
    ]


def test_equal_tokens_merge_whatever_the_leaf_says():
    a = Trajectory([1, 2, 3], [0, 0, 1], reward=1.0, logprobs=[NAN, NAN, -1.0], tree=0)
    b = Trajectory([1, 2, 3], [0, 1, 0], reward=0.0, logprobs=[NAN, -2.0, NAN], tree=1)
    tree = build_tree([a, b])
    assert tree.num_tokens == 3
    assert tree.to_trajectories() == [a, b]


def test_trajectories_are_frozen_copies():
    ids = np.array([1, 2, 3])
    t = Trajectory(ids, [0, 1, 1], logprobs=[NAN, -0.1, -0.2])
    ids[0] = 9
    assert t.token_ids.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        t.token_ids[0] = 9
    with pytest.raises(dataclasses.FrozenInstanceError):
        t.reward = 1.0
    assert (t.token_ids.dtype, t.loss_mask.dtype, t.logprobs.dtype) == (np.int64, np.bool_, np.float32)
    assert pickle.loads(pickle.dumps(t)) == t


def test_equality_is_bit_for_bit():
    t = Trajectory([1, 2], [0, 1], reward=0.0, logprobs=[NAN, -0.0], steps=[1], info={"k": 1})
    assert t == dataclasses.replace(t)
    for change in (
        {"token_ids": [1, 3]},
        {"loss_mask": [0, 0]},
        {"reward": -0.0},
        {"reward": None},
        {"logprobs": [NAN, 0.0]},
        {"logprobs": [-1.0, -0.0]},
        {"group": "other"},
        {"tree": 1},
        {"steps": None},
        {"info": None},
    ):
        assert t != dataclasses.replace(t, **change), change


@given(trajectories())
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_files_round_trip_bit_for_bit(tmp_path_factory, name, rows):
    path = tmp_path_factory.getbasetemp() / name
    save(path, rows)
    assert load(path) == rows
    first = path.read_bytes()
    save(path, rows)
    assert path.read_bytes() == first
    opener = gzip.open if name.endswith(".gz") else open
    with opener(path, "rt") as stream:
        for line in stream:
            json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    save(path, [make([1])])
    before = path.read_bytes()
    for bad in ({"k": NAN}, {"k": (1, 2)}, {1: 2}, {"k": object()}):
        with pytest.raises(ValueError, match=r"trajectory 1 \(group 'g'\): info would not survive JSON"):
            save(path, [make([1]), make([2], group="g", info=bad)])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl.gz"]


def test_other_names_on_a_line_go_to_info(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"token_ids":[1,2],"loss_mask":[0,1],"trial":3,"info":{"k":1}}\n')
    assert load(path) == [Trajectory([1, 2], [0, 1], info={"trial": 3, "k": 1})]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_ids": []}, "token_ids is empty"),
        ({"token_ids": [1, -2, 3]}, r"token_ids\[1\] is -2; give ids from 0"),
        ({"token_ids": [1, 2, 2**31]}, r"token_ids\[2\] is 2147483648"),
        ({"token_ids": [1.0, 2.0, 3.0]}, "token_ids is 1-dimensional float64; give a flat list of integers"),
        ({"token_ids": [[1, 2, 3]]}, "token_ids is 2-dimensional"),
        ({"token_ids": [1, [2], 3]}, "token_ids is not a flat list"),
        ({"token_ids": None}, "token_ids is 0-dimensional"),
        ({"token_ids": [1, True, 3]}, r"token_ids\[1\] is True; give a number"),
        ({"steps": [True, 2]}, r"steps\[0\] is True"),
        ({"logprobs": [NAN, -1.0, False]}, r"logprobs\[2\] is False"),
        ({"loss_mask": [0, 1]}, "loss_mask has 2 entries for 3 token_ids; give one entry per token"),
        ({"loss_mask": [0, 2, 1]}, r"loss_mask\[1\] is 2; give 1 where"),
        ({"loss_mask": [1, 1, 1]}, r"loss_mask\[0\] is 1, .* set loss_mask\[0\] to 0"),
        ({"reward": NAN}, "reward is nan; give a finite number"),
        ({"reward": -math.inf}, "reward is -inf"),
        ({"reward": 10**400}, "reward is 1000"),
        ({"reward": "1"}, "reward is '1'"),
        ({"logprobs": [NAN, -1.0]}, "logprobs has 2 entries"),
        ({"logprobs": [NAN, NAN, -1.0]}, r"logprobs\[1\] is nan; .* logprobs=None to have them recomputed"),
        ({"logprobs": [-math.inf, -1.0, -1.0]}, r"logprobs\[0\] is -inf"),
        ({"logprobs": ["a", "b", "c"]}, "logprobs is 1-dimensional <U1; give a flat list of numbers"),
        ({"steps": [1, 1]}, r"steps\[1\] is 1; give the start of each step once"),
        ({"steps": [1, 3]}, r"steps\[1\] is 3; give indices from 0 to 2"),
        ({"steps": [-1]}, r"steps\[0\] is -1"),
        ({"steps": [2]}, r"loss_mask\[1\] is 1, but that token comes before the first step"),
        ({"steps": []}, r"loss_mask\[1\] is 1, but that token comes before the first step"),
        ({"tree": 0.5}, "tree is 0.5"),
        ({"info": [1]}, "info is a list"),
    ],
)
def test_bad_trajectories_are_refused(fields, message):
    good = {"token_ids": [1, 2, 3], "loss_mask": [0, 1, 1], "group": "task 7"}
    Trajectory(**good)
    with pytest.raises(ValueError, match="Trajectory of group 'task 7': .*" + message):
        Trajectory(**good | fields)


def test_a_group_is_a_string():
    with pytest.raises(ValueError, match=r"group is 7, not a string: pass str"):
        make([1], group=7)


def test_empty_and_mixed_groups_are_refused():
    with pytest.raises(ValueError, match="no trajectories"):
        build_tree([])
    with pytest.raises(ValueError, match="no trajectories"):
        build_forest([])
    with pytest.raises(ValueError, match=r"2 groups \('a', 'b', ...\): use build_forest"):
        build_tree([make([1], group="a"), make([1], group="b")])
    with pytest.raises(ValueError, match=r"trajectories\[1\] is a list"):
        build_forest([make([1]), [1, 2]])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"token_ids":[1,2', "not JSON .*: mend or delete the line"),
        ("[1, 2]", "a JSON list, not an object"),
        ("[" * 100_000, "not JSON"),
        ('{"token_ids":[1,2],"loss_mask":[0,1],"reward":1,"reward":0}', "not JSON .'reward' stands there twice"),
        (b"\xff\xfe", "not JSON"),
        ('{"token_ids":[1,2]}', "loss_mask is missing"),
        ('{"loss_mask":[1,2]}', "token_ids is missing"),
        ('{"token_ids":[1,2],"loss_mask":[0]}', "loss_mask has 1 entries for 2 token_ids"),
        ('{"token_ids":[1,2],"loss_mask":[0,1],"reward":NaN,"group":"g7"}', "group 'g7': reward is nan"),
        ('{"token_ids":[1,2],"loss_mask":[0,1],"reward":1e999,"group":"g7"}', "group 'g7': reward is inf"),
        ('{"token_ids":[1,2],"loss_mask":[0,1],"logprobs":[null,null]}', r"logprobs\[1\] is nan"),
        ('{"token_ids":[1,2],"loss_mask":[0,1],"logprobs":5}', "logprobs is 0-dimensional"),
        ('{"token_ids":[1,2],"loss_mask":[0,1],"logprob":[0,0]}', "unknown name 'logprob': rename it to 'logprobs'"),
        ('{"token_ids":[1,2],"loss_mask":[0,1],"info":5,"trial":1}', "info is a JSON int"),
        ('{"token_ids":[1,2],"loss_mask":[0,1],"info":{"trial":2},"trial":1}', "'trial' stands both on the line and"),
        ('{"token_ids":[1,2],"loss_mask":[0,1],"group":7}', "group is 7, not a string"),
    ],
)
def test_a_bad_line_names_file_line_and_cure(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    save(path, [make([1]), make([2])])
    with open(path, "ab") as stream:
        stream.write(line if isinstance(line, bytes) else line.encode())
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 3: .*{message}"):
        load(path)


def test_a_cut_gz_file_is_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    save(path, [make(list(range(1000))) for _ in range(50)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz, line \d+: the compressed data is damaged"):
        load(path)
    path.write_bytes(b"not gzip at all")
    with pytest.raises(ValueError, match="compressed data is damaged"):
        load(path)


def test_a_missing_reward_loads(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"token_ids":[1,2],"loss_mask":[0,1]}\n')
    [t] = load(path)
    assert t.reward is None


def test_tau_bench_counts():
    folder = shared_data("tau_bench_airline")
    if folder is None:
        pytest.skip("no tau_bench_airline data (set TREEGRPO_DATA to the folder that holds it)")
    forest = build_forest(load(folder / "tokens.jsonl.gz"))
    stats = json.loads((folder / "stats.json").read_text())
    assert len(forest) == stats["overall"]["groups"]
    for tree in forest:
        want, trie = stats["groups"][tree.group], tree.trie
        assert tree.num_leaves == want["sequences"]
        assert tree.num_tokens == want["tree_tokens"]
        assert tree.num_chain_tokens == want["chain_tokens"]
        assert tree.num_pairs == want["tree_pairs"]
        assert tree.num_chain_pairs == want["chain_pairs"]
        assert int(trie.position.max()) + 1 == want["max_depth"]
        num_children = np.bincount(trie.prev[trie.prev >= 0], minlength=tree.num_tokens)
        assert (num_children > 1).sum() == want["forks"]
        assert num_children.max() == want["max_branching"]
        assert sum(not s.children for s in tree.segments()) == want["leaves"]
        assert np.mean([t.reward for t in tree.trajectories]) == pytest.approx(want["reward_mean"], abs=1e-6)
        trained = np.zeros(tree.num_tokens, bool)
        trained[trie.leaf_tokens[np.concatenate([t.loss_mask for t in tree.trajectories])]] = True
        assert trained.sum() == want["tree_loss_tokens"]


def test_trees_need_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; import treegrpo;"
        "tree = treegrpo.build_tree([treegrpo.Trajectory([1, 2], [0, 1]), treegrpo.Trajectory([1, 3], [0, 1])]);"
        "calls = treegrpo.split_calls(tree.to_trajectories()); print(tree.num_tokens, len(calls))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (run.stdout.strip(), run.stderr) == ("3 2", "")


def test_public_names_resolve():
    assert {"Trajectory", "build_tree", "build_forest", "load", "save", "pack", "TreeBatch"} <= set(dir(treegrpo))
    assert treegrpo.build_tree is build_tree
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        treegrpo.nothing  # noqa: B018
