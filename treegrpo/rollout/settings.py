"""The settings of sampled rollouts: the fields `treegrpo train` adds when `rollouts` is an engine, not a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Where prompts come from, how trees are grown, and what earns a reward."""

    dataset: str = ""
    """Prompts: .jsonl, .json or Search-R1's .parquet, with question or prompt and what the rewards need (answers)."""
    tokenizer: str | None = None
    """Folder of the tokenizer; None: the model's folder."""
    env: str = "search"
    """search (questions and a retriever), calculator (GSM8K and a calculator), or module:Class, a class with tools as
    TRL's environment_factory takes them."""
    retriever: str = ""
    """For env=search: bm25:CORPUS.jsonl (indexed on this machine) or http://host:port/retrieve (Search-R1's server)."""
    topk: int = 3
    """Documents per search."""
    prompt_template: str | None = None
    """Text of a prompt with {question} in it; None: instructions for the environment's format."""
    observation_template: str | None = None
    """What a search puts behind the step, with {information} (the tag) and {content}; None: tags on their own lines."""
    document_template: str | None = None
    """One retrieved document, with {i}, {id}, {text}, {score}; None: "Doc {i}: {text}"."""
    reward_funcs: tuple[str, ...] = ()
    """Names in treegrpo.rewards or module:function of TRL's signature; empty: search_em for search, math_answer for
    calculator, the class's own get_reward otherwise."""
    reward_weights: tuple[float, ...] = ()
    """A weight per reward function; empty: 1 each."""

    num_trees: int = 2
    """M: chains a prompt's group begins with. With num_expansions=0 these are all, and the group is plain GRPO's."""
    num_expansions: int = 2
    """N: branches grown on each tree in each round."""
    num_rounds: int = 1
    """L: rounds of expansion. A prompt gets M (L N + 1) leaves."""
    selection: Literal["uniform", "entropy"] = "uniform"
    """Where branches start: any agent step, or the steps the policy was least sure of."""
    root_eligible: bool = True
    """Branches may start at the prompt."""
    with_replacement: bool = True
    """Draw steps with replacement, as the published code does."""
    max_turns: int = 4
    """Agent steps that may use tools; one more, without, must answer."""
    max_step_tokens: int = 256
    """Sampled tokens of one agent step."""
    max_context_length: int | None = None
    """Prompt and everything after it; None: what the model was made for."""
    top_p: float = 1.0
    """Nucleus sampling; 1 keeps all tokens."""
    token_budget: int | None = None
    """Sampled tokens of one prompt's group: branches then start one after another, and only while it is not spent."""
    max_generated_tokens: int | None = None
    """Sampled tokens of the whole run: it ends with the step that reaches them."""
    max_concurrency: int = 256
    """Branches sampled at the same time."""
    tool_timeout: float = 30.0
    """Seconds until a tool counts as failed."""
    overlap_rollouts: bool = False
    """Sample the next step's trees while this one trains: one step off-policy, corrected by the weights below."""
    zero_std_groups: Literal["keep", "refill"] = "keep"
    """Groups whose rewards are all equal teach nothing: keep them, or sample other prompts in their place."""
    max_refills: int = 3
    """Rounds of zero_std_groups=refill; what is then still equal is kept."""
    save_rollouts: bool = False
    """Keep each step's trajectories under output_dir/rollouts (`treegrpo inspect` draws them, replay: reads them)."""

    vllm_gpu_memory_utilization: float | None = None
    """For rollouts=vllm (TRL's name): share of the GPU's memory for its weights and cache; None: 0.4. The rest is the
    trainer's."""
    vllm_importance_sampling_correction: bool | None = None
    """Weight the loss by trainer / sampler probability (TRL's name; any engine). None: yes for sampled rollouts where
    the two can differ (another engine, or overlap_rollouts), no for replayed ones."""
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "sequence_mask"
    )
    """Weight per token or per trajectory; outside the clip range cut it, or drop the token or trajectory."""
    vllm_importance_sampling_clip_min: float | None = None
    """Lower end of that range."""
    vllm_importance_sampling_clip_max: float | None = 3.0
    """Upper end."""

    eval_dataset: str | None = None
    """Prompts to evaluate on; one chain each, its mean reward is eval_reward."""
    eval_steps: int = 0
    """Evaluate before the first step, every so many steps, and at the end; 0 never. The best checkpoint is kept as
    output_dir/best."""
    eval_rows: int | None = None
    """Only the first so many rows."""
    eval_temperature: float = 0.0
    """Sampling temperature there; 0 is greedy."""


AT_LEAST = {
    **dict.fromkeys(("topk", "num_trees", "num_rounds", "max_turns", "max_step_tokens", "max_concurrency"), 1),
    **dict.fromkeys(("max_context_length", "token_budget", "max_generated_tokens", "eval_rows"), 1),
    **dict.fromkeys(("num_expansions", "max_refills", "eval_steps", "eval_temperature"), 0),
    **dict.fromkeys(("vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max"), 0),
    "vllm_gpu_memory_utilization": 0,
}
