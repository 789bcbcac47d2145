"""TreeGRPOTrainer with TRL's vllm_mode="server": against a stand-in that answers as vLLM's server does, and against
vLLM itself where it is installed."""

import json
import math
import os
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

trl = pytest.importorskip("trl")
pytest.importorskip("requests", reason="TRL's client of vLLM's server needs it")
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from server_process import ENV  # noqa: E402
from trl import GRPOTrainer  # noqa: E402
from trl_agents import CALL, Counter, Script, save_agent  # noqa: E402
from trl_served import standin, trainer_side, vllm  # noqa: E402
from trl_tiny import make, options, parameters  # noqa: E402

from treegrpo.integrations.trl import TreeGRPOConfig, TreeGRPOTrainer, use_tree_op  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
SHAPE = dict(num_trees=2, num_expansions=2, num_rounds=2, num_generations=10, per_device_train_batch_size=20)
STEPS = dict(max_step_tokens=3, max_completion_length=24, per_device_eval_batch_size=10)
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    # heads of 32: vLLM's attention for CPUs has no narrower ones
    return save_agent(tmp_path_factory.mktemp("agent"), hidden_size=128)


@pytest.fixture(scope="module", params=["standin", pytest.param("vllm", marks=needs_vllm)])
def server(request, agent, tmp_path_factory):
    weights = tmp_path_factory.mktemp("weights")
    if request.param == "standin":
        with standin(agent[0], weights, 256) as served:
            yield served
    else:
        with vllm(agent[0], weights, 1024, tmp_path_factory.mktemp("server")) as served:
            yield served


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)


def questions(number=8):
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": f"question {i}"}] for i in range(number)]})


def sums(completion_ids, **columns):
    return [float(sum(ids) % 7) for ids in completion_ids]


def served_trainer(server, agent, out, monkeypatch, kind=TreeGRPOTrainer, **changes):
    trainer_side(server.folder, lambda *args: monkeypatch.setattr(*args, raising=False))
    arguments = dict(rewards=sums, train_dataset=questions(), processing_class=agent[1], max_steps=3)
    arguments |= dict(learning_rate=1e-2, vllm_importance_sampling_correction=True) | server.arguments()
    if not {"environment_factory", "tools"} & set(changes):
        arguments["rollout_func"] = None
    if kind is TreeGRPOTrainer:
        arguments = arguments | dict(config=TreeGRPOConfig)
    return make(kind, agent[0], out, **arguments | changes)


def scored(trainer, prompts=2):
    """What TRL keeps of one generation batch."""
    trainer.model.train()
    number = trainer.num_generations
    return trainer._generate_and_score_completions(
        [trainer.train_dataset[i // number] for i in range(prompts * number)]
    )


def rows_of(output):
    """(prompt, completion, recorded log-probs) of every row."""
    for row, kept in enumerate(output["prompt_mask"].bool()):
        length = int(output["completion_mask"][row].sum())
        recorded = output["sampling_per_token_logps"][row, :length]
        yield output["prompt_ids"][row][kept], output["completion_ids"][row][:length], recorded


def logprobs_of(model, prompt, completion):
    with torch.no_grad():
        logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, completion[:, None])[:, 0]


def check_recorded(agent, output):
    """Log-probs are the model's, of each row's own context."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(agent[0], dtype="float32").eval()
    for prompt, completion, recorded in rows_of(output):
        assert (logprobs_of(plain, prompt, completion) - recorded).abs().max() < 2e-4


@pytest.mark.parametrize(
    "changes",
    [dict(SHAPE, **STEPS, selection="entropy"), dict(SHAPE, **STEPS, advantage_estimator="at2po")],
    ids=["entropy", "at2po"],
)
def test_trees(changes, server, agent, tmp_path, monkeypatch):
    trainer = served_trainer(server, agent, tmp_path, monkeypatch, **changes)
    output = scored(trainer)
    check_recorded(agent, output)
    rows, shared = list(rows_of(output)), 0
    for row, steps in enumerate(trainer._grown.steps):
        for step in steps[1:]:
            same = [r for r in range(row // 5 * 5, row) if rows[r][1][:step].tolist() == rows[row][1][:step].tolist()]
            assert all((rows[r][2][:step] == rows[row][2][:step]).all() for r in same), "sampled once, recorded once"
            shared += bool(same)
    assert shared > 4 and trainer._grown.num_sampled < sum(len(ids) for _, ids, _ in rows)
    before = parameters(trainer)
    trainer.train()
    assert max(float((p - before[name]).abs().max()) for name, p in parameters(trainer).items()) > 1e-3
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert len(history) == 3 and all(math.isfinite(row["loss"]) for row in history)
    assert trainer.evaluate(questions(2))["eval_completions/mean_length"] > 1
    # the server has the weights of every step
    assert all(row["sampling/sampling_logp_difference/max"] < 2e-4 for row in history), history


def test_a_branch_asks_for_the_room_that_is_left(server, agent, tmp_path, monkeypatch):
    """vLLM refuses what could run over its max_model_len, which prompts and whole completions just fit in."""
    prompt = len(agent[1].apply_chat_template(questions()[0]["prompt"], add_generation_prompt=True)["input_ids"])
    most = server.max_model_length - prompt
    shape = dict(num_trees=2, num_expansions=4, num_generations=10, per_device_train_batch_size=10)
    shape |= dict(max_step_tokens=50, max_completion_length=most)
    trainer = served_trainer(server, agent, tmp_path, monkeypatch, **shape)
    begun = len(server.standin.requests) if server.standin else 0
    output = scored(trainer, prompts=1)
    check_recorded(agent, output)
    assert max(trainer._grown.steps[row][-1] for row in range(10)) >= 50
    if server.standin:
        asked = {body["max_tokens"] for body in server.standin.requests[begun:]}
        assert asked > {most} and all((most - limit) % 50 == 0 for limit in asked)


def test_chains_are_asked_for_and_trained_as_trl_does(server, agent, tmp_path, monkeypatch):
    settings = dict(num_generations=4, per_device_train_batch_size=8, max_completion_length=12)
    ours = served_trainer(server, agent, tmp_path / "ours", monkeypatch, **settings)
    ours.train()
    history = [row for row in ours.state.log_history if "loss" in row]
    assert len(history) == 3 and all(row["sampling/sampling_logp_difference/max"] < 2e-4 for row in history)
    if server.standin:
        requests, number = server.standin.requests, len(server.standin.requests)
        theirs = served_trainer(server, agent, tmp_path / "theirs", monkeypatch, kind=GRPOTrainer, **settings)
        theirs.train()
        assert requests[number - 3 : number] == requests[number:]


def test_a_prompt_without_room_is_named(server, agent, tmp_path, monkeypatch):
    long = Dataset.from_dict({"prompt": [[{"role": "user", "content": "a" * server.max_model_length}]] * 2})
    trainer = served_trainer(server, agent, tmp_path, monkeypatch, **SHAPE, **STEPS, train_dataset=long)
    with pytest.raises(
        ValueError, match=rf"a prompt of \d+ tokens .* max_model_len={server.max_model_length}.*--max-model-len"
    ):
        scored(trainer)
    settings = dict(generation_kwargs={"min_tokens": -1} if server.standin is None else {"logprobs": 3})
    trainer = served_trainer(server, agent, tmp_path, monkeypatch, num_generations=4, **settings)
    with pytest.raises(RuntimeError, match="vLLM server did not answer"):
        scored(trainer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(generation_kwargs={"seed": 5}), "generation_kwargs seed=5 with num_expansions: .*leave it out"),
        (dict(generation_kwargs={"n": 2}), "generation_kwargs n=2 with num_expansions"),
        (dict(generation_kwargs={"logprobs": 3}), "generation_kwargs logprobs=3 with num_expansions"),
        (dict(generation_kwargs={"structured_outputs": {"regex": "a"}}), "max_step_tokens=3 with .*structured_outputs"),
        (dict(per_device_train_batch_size=6, gradient_accumulation_steps=5), "tears groups"),
    ],
)
def test_refusals_come_before_a_server_is_waited_for(settings, message, agent, tmp_path, monkeypatch):
    address = dict(use_vllm=True, vllm_mode="server", vllm_server_base_url="http://127.0.0.1:9")
    begun = time.monotonic()
    with pytest.raises(ValueError, match=message):
        make(
            TreeGRPOTrainer, "no such model", tmp_path, config=TreeGRPOConfig, rewards=sums, rollout_func=None,
            **SHAPE | STEPS | address | settings,
        )  # fmt: skip
    assert time.monotonic() - begun < 20


def test_async_rows_through_our_op(server, agent, tmp_path, monkeypatch):
    """AsyncGRPOTrainer's own rollouts from the server: its packed rows have the log-probs that were recorded there."""
    pytest.importorskip("aiohttp")
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer

    trainer_side(server.folder, lambda *args: monkeypatch.setattr(*args, raising=False))
    tests = Path(__file__).resolve().parent
    if not torch.cuda.is_available():
        # it asks for the GPU's name, to reckon with its FLOP/s
        monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *args: 1e12)
    # its rollouts run in a process of their own, which imports the rewards
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tests), str(tests.parent), str(tests.parent / "kernels")]))
    names = options(tmp_path, num_generations=4, per_device_train_batch_size=8, max_completion_length=12)
    del names["shuffle_dataset"]
    args = AsyncGRPOConfig(
        **names | dict(max_steps=3, learning_rate=1e-7, optim="sgd"),
        vllm_server_base_url=server.url,
        vllm_server_timeout=60.0,
    )
    path, tokenizer = agent
    made = AsyncGRPOTrainer(str(path), sums, args=args, train_dataset=questions(), processing_class=tokenizer)
    use_tree_op()
    made.train()
    history = [row for row in made.state.log_history if "loss" in row]
    assert len(history) == 3 and any(row["grad_norm"] > 0 for row in history)
    for row in history:
        assert row["ratio"] == pytest.approx(1, abs=1e-4) and abs(row["kl"]) < 1e-6, row


class Opened(Counter):
    """Begins each episode with an observation of its own."""

    number = 0

    def reset(self, **row):
        super().reset(**row)
        Opened.number += 1
        return f"episode {Opened.number}"


@pytest.fixture
def spoken(agent, tmp_path_factory):
    """A stand-in that speaks from a script."""
    with standin(agent[0], tmp_path_factory.mktemp("weights"), 4096, tokenizer=agent[1], speak=Script().speak) as made:
        yield made


AGENTS = dict(environment_factory=Counter, rewards=None, max_completion_length=600)


def test_tools(spoken, agent, tmp_path, monkeypatch):
    """Every branch has the state of its own path, and what is recorded lies where it was sampled."""
    trainer = served_trainer(spoken, agent, tmp_path, monkeypatch, **SHAPE | AGENTS)
    output = scored(trainer)
    check_agents(trainer, output, agent[1])
    for row, steps in enumerate(trainer._grown.steps):
        recorded = output["sampling_per_token_logps"][row]
        assert all(recorded[step : step + 3].tolist() == [-1 / 64, -2 / 64, -3 / 64] for step in steps)
        assert (recorded[output["tool_mask"][row] == 0] == 0).all()
    sizes = [len(body["prompt"]) for body in spoken.standin.requests]
    # the chains of all prompts in one request, each prompt alone
    assert sizes[0] == 4 and all(body["n"] == 1 for body in spoken.standin.requests)
    # at the first step's first batch, which came before training began
    assert spoken.standin.updates == 1
    trainer.train()
    assert spoken.standin.updates == 3


@needs_vllm
@pytest.mark.parametrize("server", ["vllm"], indirect=True)
def test_tools_under_a_grammar(server, tmp_path, monkeypatch):
    """What a random model says is a call or an answer; this one, nearly uniform, calls about every second time."""
    agent = save_agent(tmp_path / "flat", hidden_size=128, initializer_range=0.02)
    call = '<tool_call>\\n\\{"name": "look", "arguments": \\{"word": "[a-f]{3}"\\}\\}\\n</tool_call>'
    settings = dict(vllm_structured_outputs_regex=f"({call}|it is [0-9]{{3}})")
    # a grammar's log-probs are of the tokens it allows, and no trainer's
    settings |= dict(vllm_importance_sampling_correction=False)
    trainer = served_trainer(server, agent, tmp_path, monkeypatch, **SHAPE | AGENTS | settings)
    output = scored(trainer)
    check_agents(trainer, output, agent[1])
    looked = [environment.looked for environment in trainer.environments]
    assert any(looked) and len(set(map(tuple, looked))) > 2
    trainer.train()
    assert all(math.isfinite(row["loss"]) for row in trainer.state.log_history if "loss" in row)


def check_agents(trainer, output, tokenizer, speak=None):
    for row, environment in enumerate(trainer.environments):
        length = int(output["completion_mask"][row].sum())
        ids = output["completion_ids"][row][:length].tolist()
        mask = output["tool_mask"][row][:length].tolist()
        said = tokenizer.decode([token for token, own in zip(ids, mask, strict=True) if own])
        assert environment.looked == CALL.findall(said)
        if speak is not None:
            prompt = output["prompt_ids"][row][output["prompt_mask"][row].bool()].tolist()
            for start in (i for i in range(length) if mask[i] and (i == 0 or not mask[i - 1])):
                end = next((i for i in range(start, length) if not mask[i]), length)
                assert tokenizer.decode(ids[start:end]) == speak(tokenizer.decode(prompt + ids[:start]))


def test_tools_fill_the_context(agent, tmp_path, monkeypatch):
    """Where a tool's answer leaves no room in the server a completion ends, as it does with vLLM in the process."""
    context = len(served_prompt(agent)) + 150
    with standin(agent[0], tmp_path, context, tokenizer=agent[1], speak=Script().speak) as spoken:
        for settings in (SHAPE, dict(num_generations=4, per_device_train_batch_size=8)):
            trainer = served_trainer(spoken, agent, tmp_path, monkeypatch, **settings | AGENTS)
            output = scored(trainer)
            check_agents(trainer, output, agent[1])
            lengths = output["completion_mask"].sum(1)
            assert 100 < lengths.max() <= 150 + 60


def served_prompt(agent):
    from transformers.utils import get_json_schema

    tools = [get_json_schema(Counter.look)]
    return agent[1].apply_chat_template(questions()[0]["prompt"], tools=tools, add_generation_prompt=True)["input_ids"]


def test_chains_whose_environments_begin_unlike(spoken, agent, tmp_path, monkeypatch):
    """TRL would continue the first row's prompt for a whole group."""
    settings = AGENTS | dict(environment_factory=Opened, num_generations=4, per_device_train_batch_size=8)
    trainer = served_trainer(spoken, agent, tmp_path, monkeypatch, **settings)
    output = scored(trainer)
    check_agents(trainer, output, agent[1])
    first = {tuple(prompt) for body in spoken.standin.requests for prompt in body["prompt"]}
    assert {tuple(prompt.tolist()) for prompt, _, _ in rows_of(output)} <= first


def unlike(context):
    """Agents of the second process's questions look three times, the others' once; a function of the context."""
    number, answers = int(context.split("question ")[1][0]), context.count("<tool_response>")
    if answers < (3 if number in (1, 3) else number == 0):
        word = "".join("abcdef"[(len(context) + i * number + answers) % 6] for i in range(3))
        return f'<tool_call>\n{{"name": "look", "arguments": {{"word": "{word}"}}}}\n</tool_call><|im_end|>'
    return f"it is {len(context) + number}<|im_end|>"


def two_processes(server, agent, out, **arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = Path(__file__).resolve().parent
    paths = [str(tests.parent), str(tests.parent / "kernels"), str(tests)]
    environment = os.environ | ENV | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    said = json.dumps([server.url, str(server.folder), server.max_model_length, str(agent[0]), str(out), arguments])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    done = subprocess.run([*command, __file__, said], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("all held") == 2


@pytest.mark.slow
@pytest.mark.parametrize("trees", [True, False])
def test_two_processes_with_unlike_numbers_of_turns(trees, agent, tmp_path):
    """The main process speaks to the server for both; each has the answers to its own contexts."""
    settings = SHAPE | dict(per_device_train_batch_size=10)
    if not trees:
        settings = dict(num_generations=4, per_device_train_batch_size=4)
    with standin(agent[0], tmp_path, 4096, tokenizer=agent[1], speak=unlike) as spoken:
        two_processes(spoken, agent, tmp_path, **settings, max_completion_length=600, tools=True)
    assert spoken.standin.updates == 2


@pytest.mark.slow
def test_two_processes_by_steps(server, agent, tmp_path):
    two_processes(server, agent, tmp_path, **SHAPE | STEPS | dict(per_device_train_batch_size=10))


def worker(url, folder, length, path, out, arguments):
    import tokenizers  # noqa: F401
    from transformers import PreTrainedTokenizerFast
    from trl_served import Server

    torch.set_num_threads(1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    has_tools, server = arguments.pop("tools", False), Server(url, folder, length)
    if has_tools:
        arguments |= dict(environment_factory=Counter, rewards=None, vllm_importance_sampling_correction=True)
    with pytest.MonkeyPatch.context() as patch:
        trainer = served_trainer(server, (path, tokenizer), out, patch, **arguments | dict(max_steps=2))
        trainer.model.train()
        number, process = trainer.num_generations, trainer.accelerator.process_index
        assert trainer.accelerator.num_processes == 2
        output = trainer._generate_and_score_completions([trainer.train_dataset[process]] * number)
        if has_tools:
            check_agents(trainer, output, tokenizer, unlike)
            looked = {len(environment.looked) for environment in trainer.environments}
            assert looked == {3 if process else 1}
        else:
            check_recorded((path,), output)
        trainer.train()
        history = [row for row in trainer.state.log_history if "loss" in row]
        assert all(math.isfinite(row["loss"]) for row in history)
        if not has_tools:
            assert all(row["sampling/sampling_logp_difference/max"] < 2e-4 for row in history), history


if __name__ == "__main__":
    worker(*json.loads(sys.argv[1]))
    print("all held", flush=True)
    # threads of process groups may outlive the interpreter
    torch.distributed.barrier()
    os._exit(0)
