"""Trees grown through TRL with vLLM itself, in the trainer's process: `pytest tests/test_trl_vllm.py` where both are
installed (a GPU, or vLLM built for CPUs). What vLLM records is held against the model's own log-probs."""

import math
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytest.importorskip("trl")
pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

CALL = '<tool_call>\\n\\{"name": "look", "arguments": \\{"word": "[a-f]{3}"\\}\\}\\n</tool_call>'
SETTINGS = {
    # steps of three tokens, continued where the policy was least sure
    "entropy": dict(max_step_tokens=3, max_completion_length=24, selection="entropy"),
    "at2po": dict(max_step_tokens=3, max_completion_length=24, advantage_estimator="at2po"),
    # what a random model says is a call or an answer
    "tools": dict(vllm_structured_outputs_regex=f"({CALL}|it is [0-9]{{3}})", max_completion_length=600),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_trees_through_vllm(name, tmp_path):
    """In a process of its own: vLLM keeps a process group, and its memory."""
    # its thread of statistics looks up addresses while the environment changes, which can end in a segfault
    quiet = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"} | quiet
    done = subprocess.run(
        [sys.executable, __file__, name, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "all held" in done.stdout


def logprobs_of(model, prompt, completion):
    import torch

    with torch.no_grad():
        logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, completion[:, None])[:, 0]


def run(name, folder):
    import trl.generation.vllm_generation as generation
    from datasets import Dataset
    from trl_agents import Counter, save_agent
    from trl_tiny import make, parameters

    from treegrpo.integrations.trl import TreeGRPOConfig, TreeGRPOTrainer

    # TRL says neither: vLLM would sample in bfloat16, and compile for a minute
    whole = generation.LLM
    generation.LLM = lambda **options: whole(**options, dtype="float32", enforce_eager=True)
    # heads of 32: vLLM's attention for CPUs has no narrower ones
    # nearly uniform with tools, so that it calls them about every second time
    path, tokenizer = save_agent(folder / "agent", hidden_size=128, initializer_range=0.02 if name == "tools" else 0.2)
    questions = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"question {i}"}] for i in range(8)]})
    has_tools = name == "tools"
    trainer = make(
        TreeGRPOTrainer,
        path,
        folder / "run",
        config=TreeGRPOConfig,
        rewards=None if has_tools else lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
        **(dict(environment_factory=Counter) if has_tools else dict(rollout_func=None)),
        processing_class=tokenizer,
        train_dataset=questions,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=2048,
        vllm_gpu_memory_utilization=0.2,
        # a grammar's log-probs are of the tokens it allows, and no trainer's
        vllm_importance_sampling_correction=not has_tools,
        **dict(num_trees=2, num_expansions=2, num_rounds=2, num_generations=10, per_device_train_batch_size=20),
        max_steps=3,
        learning_rate=1e-2,
        **SETTINGS[name],
    )
    trainer.model.train()
    output = trainer._generate_and_score_completions([trainer.train_dataset[i // 10] for i in range(20)])
    grown, recorded = trainer._grown, output["sampling_per_token_logps"]
    plain = type(trainer.model).from_pretrained(path, dtype="float32").to(recorded.device).eval()
    shared = 0
    for row in range(20):
        prompt = output["prompt_ids"][row][output["prompt_mask"][row].bool()]
        length = int(output["completion_mask"][row].sum())
        ids = output["completion_ids"][row][:length]
        if not has_tools:
            assert (logprobs_of(plain, prompt, ids) - recorded[row, :length]).abs().max() < 2e-4
        base = row // 5 * 5
        for step in grown.steps[row][1:]:
            same = [r for r in range(base, row) if output["completion_ids"][r][:step].tolist() == ids[:step].tolist()]
            assert all((recorded[r, :step] == recorded[row, :step]).all() for r in same), "sampled once, recorded once"
            shared += bool(same)
    assert shared > 4 and grown.num_sampled < int((output["completion_mask"] * output.get("tool_mask", 1)).sum())
    if has_tools:
        looked = [environment.looked for environment in trainer.environments]
        assert any(looked) and len(set(map(tuple, looked))) > 4
    before = parameters(trainer)
    trainer.train()
    assert max(float((p - before[n]).abs().max()) for n, p in parameters(trainer).items()) > 1e-3
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert len(history) == 3 and all(math.isfinite(row["loss"]) for row in history)
    if not has_tools:
        # vLLM has the weights of every step
        assert all(row["sampling/sampling_logp_difference/max"] < 2e-4 for row in history), history


if __name__ == "__main__":
    from pathlib import Path

    run(sys.argv[1], Path(sys.argv[2]))
    print("all held", flush=True)
    # threads of process groups may outlive the interpreter
    os._exit(0)
