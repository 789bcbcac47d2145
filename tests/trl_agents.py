"""A tokenizer of bytes with a chat template that knows tools, a tiny model for it, and an agent that speaks from a
script in the model's place: what tests of tree rollouts through TRL need."""

import random
import re

import tokenizers
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config
from trl.chat_template_utils import qwen3_chat_template

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END = 2
CALL = re.compile(r'"word": "(\w+)"')


def save_agent(path, **changes):
    """Bytes are the vocabulary, behind three special tokens; TRL knows how to read Qwen3's template."""
    symbols = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    words = {token: i for i, token in enumerate([*SPECIAL, *sorted(symbols)])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
    tokenizer.add_special_tokens({"additional_special_tokens": [SPECIAL[1]]})
    tokenizer.chat_template = qwen3_chat_template
    tokenizer.save_pretrained(path)
    shape = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        pad_token_id=0,
        eos_token_id=END,
        **shape | {"initializer_range": 0.2} | changes,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path, tokenizer


class Counter:
    """An environment whose answers tell how often it was asked: a branch with a sibling's state would miscount."""

    def reset(self, **row):
        self.looked = []

    def look(self, word: str) -> str:
        """Looks a word up.

        Args:
            word: What to look up.
        """
        self.looked.append(word)
        return f"{word} is number {len(self.looked)}"

    def get_reward(self):
        return float(sum(map(ord, "".join(self.looked))) % 5)


class Script:
    """Calls the tool up to three times with random words, then answers; the same draws give the same words."""

    def __init__(self, seed=0):
        self.draw = random.Random(seed)
        self.contexts = []

    def speak(self, context: str) -> str:
        self.contexts.append(context)
        answers = context.count("<tool_response>")
        if answers < self.draw.randrange(1, 4):
            word = "".join(self.draw.choice("abcdef") for _ in range(3))
            return f'<tool_call>\n{{"name": "look", "arguments": {{"word": "{word}"}}}}\n</tool_call><|im_end|>'
        return f"it is {self.draw.randrange(1000)}<|im_end|>"

    def generate(self, tokenizer):
        """In place of a model's `generate`: rows padded on the left -> rows with what the script says behind them."""

        def generate(input_ids, attention_mask, generation_config):
            said = []
            for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
                context = tokenizer.decode([token for token, kept in zip(ids, mask, strict=True) if kept])
                said.append(tokenizer.encode(self.speak(context), add_special_tokens=False))
            longest = max(map(len, said))
            new = torch.tensor([own + [0] * (longest - len(own)) for own in said], device=input_ids.device)
            return torch.cat([input_ids, new], 1)

        return generate


class FakeVLLM:
    """Stands where TRL builds its VLLMGeneration in this process: ids in, ids and log-probs out, as TRL 1.16 asks."""

    script = tokenizer = None

    def __init__(self, **options):
        self.options, self.synced, self.sizes = options, 0, []
        self.llm = self.llm_engine = self.model_config = self
        self.max_model_len = 4096

    def sync_weights(self):
        self.synced += 1

    def generate(self, prompts, images, num_generations, profiler=None):
        assert images is None and num_generations == 1
        self.sizes.append(len(prompts))
        said = [self.tokenizer.encode(self.script.speak(self.tokenizer.decode(ids))) for ids in prompts]
        # 1 / 64 of a token's place: a value that tells where it was recorded
        return prompts, said, [[[-(i + 1) / 64] for i in range(len(own))] for own in said], None
