"""A small decoder that imitates the careless teacher: what reinforcement learning starts from. Made once and cached.

    folder = warm_start(seed=0)       # model, tokenizer, corpus.jsonl, train.jsonl, validation.jsonl, heldout.jsonl

The folder loads in plain transformers. It is named after everything it depends on, written under a temporary name and
renamed, so a half-written one is never used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from treegrpo.box.demonstrations import Carelessness, demonstrations
from treegrpo.box.world import SPLITS, World, build_world, write_corpus, write_questions
from treegrpo.files import cache_home
from treegrpo.rollout.order import EpochOrder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPECIAL = ("<pad>", "<eos>", "<unk>")
TAGS = ("think", "search", "information", "answer")
# Words of demonstrations that stand on no page and in no question.
MARKS = ("|", ":", ",", ".", "of", "done")

# How a run reads this world: the words of a question, pages between tags, one page a search.
ROLLOUT_SETTINGS = {
    "env": "search",
    "topk": 1,
    "prompt_template": "{question}",
    "observation_template": " <{information}> {content} </{information}> ",
    "document_template": "{text}",
    "max_turns": 4,
    "max_step_tokens": 32,
}


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What a warm start depends on."""

    world_seed: int = 0
    seed: int = 0
    """Of weights and demonstrations."""
    num_steps: int = 1200
    batch_size: int = 16
    """Demonstrations per step."""
    learning_rate: float = 2e-3
    carelessness: Carelessness = field(default_factory=Carelessness)
    hidden_size: int = 128
    intermediate_size: int = 512
    num_hidden_layers: int = 4

    @property
    def key(self) -> str:
        """Names the cache folder; 4 is the layout's version."""
        text = json.dumps([4, dataclasses.asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def warm_start(
    settings: WarmStart | None = None,
    *,
    folder: Path | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Path:
    """The folder of a warm start; trained now (minutes) if it is not cached.

    Args:
        folder: where to keep them; default `treegrpo/box` in $XDG_CACHE_HOME or ~/.cache.
        progress: called as progress(step, steps, loss).
    """
    settings = settings or WarmStart()
    home = folder or cache_home() / "box"
    path = home / settings.key
    if path.is_dir():
        return path
    home.mkdir(parents=True, exist_ok=True)
    world = build_world(settings.world_seed)
    tokenizer = build_tokenizer(world)
    model = train(tokenizer, settings, progress)
    temporary = Path(tempfile.mkdtemp(prefix=f".{settings.key}.", dir=home))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_corpus(world, temporary / "corpus.jsonl")
        for split in SPLITS:
            write_questions(questions(world, split, settings.seed), temporary / f"{split}.jsonl")
        (temporary / "warm_start.json").write_text(json.dumps(dataclasses.asdict(settings), indent=1))
        if not path.exists():
            os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def questions(world: World, split: str, seed: int) -> list[Any]:
    """Questions of a split, shuffled: for training two of two hops to each of one and of three, for the others all of
    two hops first, then the rest (so that the first rows of a file are two-hop questions)."""
    rng = random.Random(f"questions/{split}/{seed}")
    pools = {hops: world.questions(split, hops) for hops in (1, 2, 3)}
    for pool in pools.values():
        rng.shuffle(pool)
    if split != "train":
        return [*pools[2], *pools[1], *pools[3]]
    size = min(len(pools[1]), len(pools[2]) // 2, len(pools[3]))
    mixed = [*pools[1][:size], *pools[2][: 2 * size], *pools[3][:size]]
    rng.shuffle(mixed)
    return mixed


def build_tokenizer(world: World) -> Any:
    """One token a word; a transformers tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tags = [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]
    words = list(dict.fromkeys([*SPECIAL, *tags, *MARKS, *world.words()]))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=512
    )


def build_model(settings: WarmStart, vocab_size: int) -> PreTrainedModel:
    """About a million parameters, Llama's architecture, random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from treegrpo.models import seeded

    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.hidden_size // 32,
        num_key_value_heads=settings.hidden_size // 32,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with seeded(settings.seed):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def train(
    tokenizer: Any, settings: WarmStart, progress: Callable[[int, int, float], None] | None = None
) -> PreTrainedModel:
    """Supervised training on the teacher's own tokens: AdamW, warm-up and linear decay, one pass over the
    demonstrations."""
    model = build_model(settings, len(tokenizer)).train()
    rows = [
        _encode(tokenizer, demonstration)
        for demonstration in demonstrations(
            settings.world_seed,
            settings.num_steps * settings.batch_size,
            seed=settings.seed,
            carelessness=settings.carelessness,
        )
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    smooth = 0.0
    for step, batch in enumerate(_batches(rows, settings)):
        scale = min(1.0, (step + 1) / 50, (settings.num_steps - step) / (0.3 * settings.num_steps))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * scale
        length = max(len(ids) for ids, _ in batch)
        input_ids = torch.zeros(len(batch), length, dtype=torch.long)
        labels = torch.full((len(batch), length), -100)
        for i, (ids, is_own) in enumerate(batch):
            input_ids[i, : len(ids)] = ids
            labels[i, : len(ids)] = torch.where(is_own, ids, -100)
        hidden = model.model(input_ids=input_ids).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        is_target = targets != -100
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[is_target]), targets[is_target])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        value = float(loss.detach())
        smooth = value if step == 0 else 0.95 * smooth + 0.05 * value
        if progress is not None:
            progress(step + 1, settings.num_steps, smooth)
    return model.eval()


def _encode(tokenizer: Any, demonstration: list[tuple[str, bool]]) -> tuple[torch.Tensor, torch.Tensor]:
    ids, is_own = [], []
    for text, own in demonstration:
        part = tokenizer.encode(text, add_special_tokens=False)
        ids += part
        is_own += [own] * len(part)
    return torch.tensor(ids), torch.tensor(is_own)


def _batches(rows: list, settings: WarmStart):
    """Batches of like lengths, so that little is padding: sorted within blocks of 32 batches, in random order."""
    size, block = settings.batch_size, 32 * settings.batch_size
    for begin in range(0, len(rows), block):
        part = sorted(rows[begin : begin + block], key=lambda row: len(row[0]))
        batches = [part[i : i + size] for i in range(0, len(part), size)]
        order = EpochOrder(len(batches), seed=settings.seed + begin, shuffle=True)
        yield from (batches[order[i]] for i in range(len(batches)))
