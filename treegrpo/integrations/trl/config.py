"""GRPOConfig with what a tree adds: how it is grown, who is compared with whom, how it is packed."""

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from treegrpo.advantages import ESTIMATORS, SCALES, estimator_options, parse_options
from treegrpo.loss import SHARED_TOKENS
from treegrpo.rollout.nodes import SELECTIONS, SearchOptions

TRL_EPS = 1e-4
"""What TRL adds to a standard deviation."""


@dataclass
class TreeGRPOConfig(GRPOConfig):
    """TRL's `GRPOConfig`, all its arguments and defaults, and those of trees; unchanged it trains as `GRPOConfig` does.

    Works with `TrlParser` and `HfArgumentParser`: `--num_trees 2 --advantage_options norm=none eps=1e-6`.

    Raises `ValueError` naming the field and the cure.
    """

    num_trees: int | None = field(
        default=None,
        metadata={
            "help": "M: chains a prompt's group begins with, each the first branch of a tree. None: "
            "num_generations / (num_rounds * num_expansions + 1)."
        },
    )
    num_expansions: int = field(
        default=0,
        metadata={"help": "N: branches each round adds to every tree. 0: no trees are grown, groups are TRL's chains."},
    )
    num_rounds: int = field(
        default=1,
        metadata={
            "help": "L: rounds of expansion. num_generations must be num_trees * (num_rounds * num_expansions + 1)."
        },
    )
    selection: str = field(
        default="uniform",
        metadata={
            "help": "Where branches start: 'uniform', any agent step (Tree-GRPO), or 'entropy', the steps the policy "
            "was least sure of (AT2PO), which needs a back-end that records log-probs (vLLM).",
            "choices": list(SELECTIONS),
        },
    )
    root_eligible: bool = field(default=True, metadata={"help": "Whether branches may start at the prompt."})
    with_replacement: bool = field(
        default=True, metadata={"help": "Whether a round may draw a step twice before each was drawn once."}
    )
    max_step_tokens: int | None = field(
        default=None,
        metadata={
            "help": "A model turn of more sampled tokens counts as several steps of this many, where branches may "
            "start too. None: a turn is one step."
        },
    )
    advantage_estimator: str | None = field(
        default=None,
        metadata={
            "help": "Who is compared with whom (treegrpo.advantages). None: 'tree_grpo' where trees are grown, TRL's "
            "own advantages otherwise.",
            "choices": list(ESTIMATORS),
        },
    )
    advantage_options: list[str] | None = field(
        default=None,
        metadata={
            "help": "Options of the estimator as name=value, such as baseline=parent norm=none eps=1e-6; eps is TRL's "
            "1e-4 unless given."
        },
    )
    shared_tokens: str = field(
        default="per_leaf",
        metadata={
            "help": "What a token shared by c completions of a group counts: 'per_leaf' once in each (TRL's loss), "
            "'mean' 1/c in each, 'once' 1/c in each and in the loss's denominators too.",
            "choices": list(SHARED_TOKENS),
        },
    )
    token_budget: int | None = field(
        default=None,
        metadata={
            "help": "Unique tokens of one packed row: a micro-batch of more becomes several rows, whole groups where "
            "they fit. None: one row. The result does not depend on it."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in dict(num_trees=1, max_step_tokens=1, token_budget=1).items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name}={value!r}: give an integer, at least {least}, or None")
        for name, valid in dict(shared_tokens=SHARED_TOKENS, advantage_estimator=(None, *ESTIMATORS)).items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}={getattr(self, name)!r}: use one of {', '.join(map(repr, valid))}")
        self.search_options()  # refuses what makes no sense in itself
        branches = self.num_rounds * self.num_expansions + 1
        leaves = branches * (self.num_trees or self.num_generations // branches)
        if leaves != self.num_generations:
            shape = f"num_rounds={self.num_rounds} and num_expansions={self.num_expansions}"
            if self.num_trees is None:
                cure = f"give a multiple of {branches}, the leaves of one tree"
            else:
                shape = f"num_trees={self.num_trees}, {shape}"
                cure = f"set num_generations={leaves}, their num_trees * (num_rounds * num_expansions + 1) leaves"
            raise ValueError(f"num_generations={self.num_generations} does not fit {shape}: {cure}")
        self.estimator()
        self._refuse_inexact_shares()

    @property
    def grows_trees(self) -> bool:
        """Whether prompts get trees rather than chains."""
        return self.num_expansions * self.num_rounds > 0

    def search_options(self) -> SearchOptions:
        """The trees' shape as treegrpo.rollout takes it; what bounds a turn is TRL's to say."""
        branches = max(self.num_rounds * self.num_expansions + 1, 1)
        return SearchOptions(
            num_trees=self.num_trees or max(self.num_generations // branches, 1),
            num_expansions=self.num_expansions,
            num_rounds=self.num_rounds,
            selection=self.selection,
            root_eligible=self.root_eligible,
            with_replacement=self.with_replacement,
            temperature=self.temperature,
            top_p=self.top_p,
        )

    def estimator(self) -> tuple[str, dict[str, Any]] | None:
        """The name and options for `compute_advantages`; None where advantages are TRL's own."""
        name = self.advantage_estimator or ("tree_grpo" if self.grows_trees else None)
        if name is None:
            if self.advantage_options:
                raise ValueError("advantage_options need advantage_estimator: name one, or leave them out")
            return None
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"advantage_estimator={name!r} compares one reward a completion, but multi_objective_aggregation="
                f"{self.multi_objective_aggregation!r} makes advantages itself: use 'sum_then_normalize'"
            )
        options: dict[str, Any] = {"eps": TRL_EPS, **parse_options(name, self.advantage_options or [])}
        if not {"norm", "scale_rewards"} & set(options):
            if "scale_rewards" in estimator_options(name):
                options["scale_rewards"] = self.scale_rewards
            elif self.scale_rewards != SCALES[0]:
                raise ValueError(
                    f"scale_rewards={self.scale_rewards!r} means nothing to advantage_estimator={name!r}: leave it at"
                    f" {SCALES[0]!r} and give advantage_options norm=..."
                )
        return name, options

    def _refuse_inexact_shares(self) -> None:
        if self.shared_tokens == "per_leaf":
            return
        why = f"shared_tokens={self.shared_tokens!r} cannot be exact with"
        if self.use_adaptive_entropy:
            raise ValueError(f"{why} use_adaptive_entropy, which measures completions token by token: turn it off")
        if self.entropy_coef != 0.0 and self.top_entropy_quantile < 1.0:
            raise ValueError(f"{why} entropy_coef and top_entropy_quantile together: set one of them to its default")
