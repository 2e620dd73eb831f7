"""The official clients of a server, closed together."""

import contextlib
from typing import Any

import anthropic
import httpx2
import openai


class Clients(contextlib.ExitStack):
    """Made once each; `url` is where the server listens."""

    url: str

    def http(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=120)

    def openai(self, **options: Any) -> openai.OpenAI:
        base = f"{self.url}/v1"
        made = openai.OpenAI(**{"base_url": base, "api_key": "none", "max_retries": 0, **options})
        return self.enter_context(made)

    def anthropic(self, **options: Any) -> anthropic.Anthropic:
        made = anthropic.Anthropic(
            **{"base_url": self.url, "api_key": "none", "max_retries": 0, **options}
        )
        return self.enter_context(made)
