"""mlx-lm's HTTP server with pairs."""

from __future__ import annotations

from collections.abc import Sequence
from http.server import ThreadingHTTPServer

import mlx_lm.server
from mlx_lm.utils import maybe_set_recommended_wired_limit

from kvpred_mlx.generation.stream import stream_generate
from kvpred_mlx.serving.generator import PairGenerator, PairPromptCache, PairProvider
from kvpred_mlx.serving.handler import PairHandler
from kvpred_mlx.serving.served import ServedPair
from kvpred_mlx.serving.settings import ServerSettings

BACKLOG = 128  # connections that wait to be accepted; socketserver's 5 loses some of eight clients' at once


class Server(ThreadingHTTPServer):
    """http.server's threads, with room for clients that connect at the same time."""

    request_queue_size = BACKLOG


def serve(served: Sequence[ServedPair], settings: ServerSettings) -> None:
    """Serve OpenAI's completions and chat completions until interrupted (see docs/serving.md).

    Args:
        served: the pairs; the first answers requests that name none.

    Raises:
        OSError: the address cannot be listened on.
    """
    maybe_set_recommended_wired_limit()
    # Requests that cannot be batched: the pair's own announces the prompt and drafts with the auxiliary.
    mlx_lm.server.stream_generate = stream_generate  # type: ignore[assignment]
    for tokenizer in (pair.tokenizer for pair in served):
        if settings.use_default_chat_template and tokenizer.chat_template is None:
            tokenizer.chat_template = tokenizer.default_chat_template
    provider = PairProvider(served, settings)
    generator = PairGenerator(provider, PairPromptCache(settings.prompt_cache_size))
    try:
        mlx_lm.server._run_http_server(settings.host, settings.port, generator, Server, PairHandler)
    finally:
        generator.stop_and_join()
