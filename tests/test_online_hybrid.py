"""A hybrid model sampled and trained in one process: what is trained is what was sampled."""

from __future__ import annotations

import json

import models as zoo
import pytest
import torch
import transformers
from boxes import EchoEnv, online_config
from packaging.version import Version
from transformers import AutoTokenizer

from treegrpo.envs.base import StepResult
from treegrpo.trainer import Trainer

pytestmark = [
    pytest.mark.usefixtures("one_thread", "own_cache"),
    pytest.mark.skipif(Version(transformers.__version__) < Version("5.17"), reason="hybrid models are refused"),
]


class ShortSteps(EchoEnv):
    """Many words end a step, and the prompt is the observation."""

    stop = ("i", "ro")

    def reset(self, row):
        self.text = row["prompt"]
        return self.text

    def step(self, action, *, is_last=False):
        return StepResult(done=is_last, observation=None if is_last else self.text, num_tool_calls=int(not is_last))


def test_the_language_model_of_a_published_hybrid_is_sampled_and_trained(box, tmp_path):
    """As Qwen publishes them, with a vision model in the same folder; states are continued from turn to turn."""
    tokenizer = AutoTokenizer.from_pretrained(box)
    text = {**zoo.COMMON, **zoo.HYBRID["qwen3_5_text"], "initializer_range": 0.4, "vocab_size": len(tokenizer)}
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
    images = dict(image_token_id=len(tokenizer), video_token_id=len(tokenizer) + 1)
    config = transformers.AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision, **images)
    torch.manual_seed(0)
    published = tmp_path / "published"
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(published)
    tokenizer.save_pretrained(published)
    questions = [json.loads(line)["question"] for line in (box / "train.jsonl").read_text().splitlines()]
    prompts = [question for question in questions if len(tokenizer(question).input_ids) == 4][:6]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    own = {
        "dataset": str(tmp_path / "prompts.jsonl"),
        "env": "test_online_hybrid:ShortSteps",
        "max_turns": 3,
        "max_steps": 2,
    }
    unset = {"retriever": "", "prompt_template": None, "observation_template": None, "document_template": None}
    trainer = Trainer(online_config(published, tmp_path / "run", **unset, **own))
    history = trainer.train()
    assert trainer.policy.config.model_type == "qwen3_5_text" and len(history) == 2
    for row in history:
        # seen: 3e-6; of a state lost or another's, 0.1 and more
        assert row["sampling/sampling_logp_difference/max"] < 3e-5 and row["grad_norm"] > 1
        # a step continues from the state of its parent: what is new is the observation, and a token for each step
        calls = row["rollout/tool_calls"]
        assert calls > 20 and row["rollout/prefilled_tokens"] <= 3 * 3 + row["rollout/steps"] + 4 * calls
        assert row["batch/packing_ratio"] > 1.3
