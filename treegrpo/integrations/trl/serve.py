"""TRL's `vllm_mode="server"` for trees: what is asked of the server, in place of `VLLMGeneration.generate`.

TRL gathers the contexts of all processes into one request of the main process, and takes three things for granted that
neither trees nor agents keep: that every process brings as many contexts and asks as often, that the rows of a group
are the same context, and that a context has room for ``max_completion_length`` tokens more (vLLM's server refuses a
request that could run over its ``max_model_len``). Here each context has its own room, and a process that is done goes
along with the requests of the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from accelerate.utils import broadcast_object_list, gather_object
from trl.extras.profiling import profiling_context

if TYPE_CHECKING:
    from trl import GRPOTrainer

# as many as TRL's client keeps connections
CONCURRENCY = 64


class Served:
    """The server as the processes of a trainer ask it: each of their calls is one exchange between all of them."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self._trainer, self._generation = trainer, trainer.vllm_generation
        self._accelerator = trainer.accelerator
        length = None
        if self._accelerator.is_main_process:
            length = int(self._generation.vllm_client.get_server_info()["model_config"]["max_model_len"])
        (self.max_model_length,) = broadcast_object_list([length], from_process=0)

    def generate(
        self, contexts: list[list[int]], num_generations: int, limits: Sequence[int] | None, *, may_be_full: bool
    ) -> tuple[list[list[int]], list[list[float | None]]]:
        """One completion of every context, and the log-probs of its tokens.

        Args:
            num_generations: contexts that follow each other and are the same where nothing changed them.
            limits: tokens each may have at most; None: `max_completion_length`.
            may_be_full: whether a context as long as the server allows gets an empty completion, as tools' answers
                may make one; else it is an error.

        Raises:
            ValueError: a context is too long for the server.
            RuntimeError: a request failed; on all processes.
        """
        own = []
        for number, context in enumerate(contexts):
            limit = self._generation.max_completion_length if limits is None else limits[number]
            room = max(self.max_model_length - len(context), 0)
            # None is refused by all processes together
            own.append((context, min(room if limit is None else limit, room) if room or may_be_full else None))
        found = self._exchange(own, num_generations) or []
        return [ids for ids, _ in found], [logprobs for _, logprobs in found]

    def finish(self) -> None:
        """This process asks no more: takes part in what the others ask until none does."""
        if self._accelerator.num_processes > 1:
            while self._exchange(None, 1) is not None:
                pass

    def _exchange(self, own: list[tuple[list[int], int | None]] | None, num_generations: int) -> list | None:
        """Completions of this process's rows, (context, limit) each; None where no process has any."""
        asked = gather_object([own])
        if all(rows is None for rows in asked):
            return None
        rows = [row for rows in asked for row in rows or []]
        for context, limit in rows:
            if limit is None:
                raise ValueError(
                    f"a prompt of {len(context)} tokens leaves no room in the vLLM server's max_model_len="
                    f"{self.max_model_length}: start it with a greater --max-model-len, or leave such prompts out"
                )
        result: list | str | None = None
        if self._accelerator.is_main_process:
            try:
                result = self._ask(rows, num_generations)
            except Exception as error:
                # the others wait for an answer
                result = f"{type(error).__name__}: {error}"
        (result,) = broadcast_object_list([result], from_process=0)
        if isinstance(result, str):
            raise RuntimeError(f"the vLLM server did not answer a request for completions: {result}")
        begin = sum(len(rows or []) for rows in asked[: self._accelerator.process_index])
        return result[begin : begin + len(own or [])]

    def _ask(self, rows: list[tuple[list[int], int]], num_generations: int) -> list[tuple[list[int], list]]:
        """Completions of rows of all processes: rows that are the same in one prompt, prompts that may have as many
        tokens in one request."""
        generation = self._generation
        kwargs = dict(generation.generation_kwargs)
        most = kwargs.pop("max_tokens", None)
        requests: dict[tuple[int, int], list[int]] = {}
        found: list = [([], [])] * len(rows)
        for first, number in _runs(rows, num_generations):
            limit = rows[first][1] if most is None else min(rows[first][1], most)
            if limit > 0:
                requests.setdefault((number, limit), []).append(first)

        def send(request: tuple[tuple[int, int], list[int]]) -> None:
            (number, limit), firsts = request
            output = generation.vllm_client.generate(
                prompts=[rows[first][0] for first in firsts],
                n=number,
                max_tokens=limit,
                repetition_penalty=generation.repetition_penalty,
                temperature=generation.temperature,
                top_p=generation.top_p,
                top_k=generation.top_k,
                min_p=0.0 if generation.min_p is None else generation.min_p,
                logprobs=generation.logprobs,
                structured_outputs_regex=generation.structured_outputs_regex,
                generation_kwargs=kwargs,
            )
            places = [first + i for first in firsts for i in range(number)]
            for place, ids, logprobs in zip(places, output["completion_ids"], output["logprobs"], strict=True):
                found[place] = ids, [top[0] for top in logprobs]

        if requests:
            with (
                profiling_context(self._trainer, "vLLM.generate"),
                ThreadPoolExecutor(min(CONCURRENCY, len(requests))) as pool,
            ):
                list(pool.map(send, requests.items()))
        return found


def _runs(rows: list, num_generations: int) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of groups whose rows are the same; of others each row alone."""
    for first in range(0, len(rows), num_generations):
        group = rows[first : first + num_generations]
        if all(row == group[0] for row in group):
            yield first, len(group)
        else:
            yield from ((first + i, 1) for i in range(len(group)))
