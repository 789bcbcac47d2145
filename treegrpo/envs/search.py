"""Question answering with a search tool, in Search-R1's format (arXiv 2503.09516)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from treegrpo.envs.retrievers import Document, Retriever, RetrieverError
from treegrpo.envs.tags import TagEnv, Tags, check_template

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SearchEnv", "Tags", "search_prompt"]

logger = logging.getLogger(__name__)


def search_prompt(tags: Tags | None = None) -> str:
    """The default prompt_template: explains the tags, ends in `{question}`."""
    tags = tags or Tags()
    return (
        "You answer a question and may look facts up first. "
        f"Begin every step by reasoning between <{tags.think}> and </{tags.think}>. "
        f"If a fact is missing, write <{tags.search}> your query </{tags.search}>; "
        f"passages come back between <{tags.information}> and </{tags.information}>, "
        "and you reason again about what they say. You may search several times. "
        f"Once you know enough, write only the short answer between <{tags.answer}> and </{tags.answer}>.\n"
        "Question: {question}\n"
    )


class SearchEnv(TagEnv):
    """A question, a retriever, and an answer: `<search> query </search>` brings passages back in an information block.

    >>> from treegrpo.envs.retrievers import Document
    >>> class Echo:
    ...     def search(self, query, topk=None):
    ...         return [Document("7", f"about {query}", 1.0)]
    >>> env = SearchEnv(Echo(), prompt_template="{question}")
    >>> env.reset({"question": "who ?"})
    'who ?'
    >>> env.step("<think> t </think> <search> Ada </search>").observation
    '\\n<information>Doc 1: about Ada</information>\\n'
    >>> env.step("<answer> Ada </answer>").done, env.queries, env.retrieved
    (True, ['Ada'], [('7',)])

    A retriever that fails gives an error observation, counted; any other exception of it is a bug and goes through.
    """

    def __init__(
        self,
        retriever: Retriever,
        *,
        topk: int | None = None,
        tokenizer: Any = None,
        tags: Tags | None = None,
        prompt_template: str | None = None,
        chat: bool = False,
        observation_template: str = "\n<{information}>{content}</{information}>\n",
        document_template: str = "Doc {i}: {text}",
        document_separator: str = "\n",
        empty_text: str = "Nothing found.",
        error_text: str = "That step held no query in search tags and no answer in answer tags. Write one.",
        failure_text: str = "The search failed. Try again.",
        max_observation_chars: int = 8000,
    ) -> None:
        """`topk` None leaves the count to the retriever. With `tokenizer` its special tokens are taken out of what is
        found, as tags are. Templates are of str.format; `document_template` takes i (from 1), id, text and score. A
        tokenizer that splits at spaces needs spaces around the tags:
        `observation_template=" <{information}> {content} </{information}> "`. Longer observations than
        max_observation_chars are cut and counted in `num_truncated`. ValueError where a template has a wrong field.
        """
        tags = tags or Tags()
        check_template("document_template", document_template, ["i", "id", "text", "score"], ["text"])
        super().__init__(
            tags=tags,
            tokenizer=tokenizer,
            prompt_template=search_prompt(tags) if prompt_template is None else prompt_template,
            chat=chat,
            observation_template=observation_template,
            error_text=error_text,
            max_observation_chars=max_observation_chars,
        )
        self.retriever = retriever
        self.topk = topk
        self.document_template = document_template
        self.document_separator = document_separator
        self.empty_text = empty_text
        self.failure_text = failure_text
        self.retrieved: list[tuple[str, ...]] = []
        """Ids of the documents each of `queries` brought, best first."""

    def reset(self, row):
        self.retrieved = []
        return super().reset(row)

    def call(self, text: str) -> tuple[str, bool]:
        try:
            documents = self.retriever.search(text, self.topk)
        except RetrieverError as error:
            logger.warning("search %r failed: %s", text[:80], error)
            self.retrieved.append(())
            return self.failure_text, True
        self.retrieved.append(tuple(document.id for document in documents))
        if not documents:
            return self.empty_text, False
        return self.document_separator.join(self._show(i, d) for i, d in enumerate(documents, 1)), False

    def fork(self) -> Self:
        twin = super().fork()
        twin.retrieved = list(self.retrieved)
        return twin

    def _show(self, i: int, document: Document) -> str:
        return self.document_template.format(i=i, id=document.id, text=document.text, score=document.score)
