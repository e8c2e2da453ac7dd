"""transformers' OpenAI-compatible server for one model that decodes with jacobi_hf.

transformers' own handlers read requests, build prompts and write answers. This package adds a model that is loaded
before the server starts, knobs and seeds of each request, refusals that name the field, generations that end when
their client leaves, stop strings that are cut off as the OpenAI API defines them, and errors as JSON objects of that
API.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import HTTPException
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import get_response_template

from jacobi_hf.serving.disconnect import CancelOnDisconnect
from jacobi_hf.serving.errors import add_error_handlers
from jacobi_hf.serving.generation import Generations, OneQueue
from jacobi_hf.serving.handlers import Chat, Completion

if TYPE_CHECKING:
    from types import FrameType

    from fastapi import FastAPI
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")
PATIENCE = 5  # seconds that connections have to end when the server stops


def build_app(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    compiled: bool = False,
    max_length: int | None = None,
) -> FastAPI:
    """Return the server as an ASGI application.

    Args:
        model: model of a registered class, on its device, in eval mode. Its generation config holds the decoding of
            requests that name none.
        tokenizer: the model's tokenizer.
        name: name of the model in requests and answers.
        compiled: whether steps are compiled, and recorded as CUDA graphs on a GPU.
        max_length: most tokens of prompt and answer together; requests for more are refused. None for no limit.
    """
    models = _OneModel(model, tokenizer, name)
    generations = Generations(compiled=compiled, max_length=max_length)
    state = OneQueue(generations)
    app: FastAPI = build_server(
        models,
        Chat(models, state),
        completion_handler=Completion(models, state),
        response_handler=None,
        transcription_handler=None,
        systemone_handler=None,
        generation_state=state,
    )
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", None) in PATHS]
    app.add_api_route("/v1/models/{model_id:path}", models.retrieve, methods=["GET"])
    app.state.generations = generations
    app.add_middleware(CancelOnDisconnect)
    add_error_handlers(app)
    return app


class Server(uvicorn.Server):
    """Uvicorn server of an application that `build_app` returned; on SIGINT and SIGTERM it ends all generations.

    Args:
        app: the application.
    """

    def __init__(self, app: FastAPI) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=PATIENCE))
        self._generations: Generations = app.state.generations

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End all generations, then the server; called on SIGINT and SIGTERM."""
        self._generations.stop()
        super().handle_exit(sig, frame)


class _OneModel(ModelManager):
    """transformers' model manager for one model that is loaded already."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        super().__init__()
        self.force_model = name
        self.model = model
        self.tokenizer = tokenizer
        if tokenizer.chat_template and not _fits(get_response_template(tokenizer, model), tokenizer):
            tokenizer.response_template = _plain_text_template(tokenizer)

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        return self.model, self.tokenizer

    def retrieve(self, model_id: str) -> dict[str, Any]:
        """Return the entry of one model in the list of models.

        Raises:
            HTTPException: another model is served.
        """
        self.check_name(model_id)
        return self.get_gen_models()[0]

    def check_name(self, name: Any) -> None:
        """Raise `HTTPException` if a request names another model."""
        if name != self.force_model:
            raise HTTPException(404, f"the model {name!r} is not served here; {self.force_model!r} is.")

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": ""}]


def _fits(template: dict[str, Any] | None, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether transformers can parse answers with its response template.

    The template belongs to the kind of model and not to its chat template. If its anchor does not occur in the prompt,
    transformers would treat the prompt as a part of the answer.
    """
    if template is None or "start_anchor" not in template:
        return True
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], add_generation_prompt=True, tokenize=False
    )
    anchors = template["start_anchor"]
    return any(anchor in prompt for anchor in ([anchors] if isinstance(anchors, str) else anchors))


def _plain_text_template(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return a response template that takes the whole answer, up to a special token, as text."""
    ends = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    content = {"content": "text", "content_args": {"strip": False}, "close": ends}
    return {"start_anchor_pattern": r"\Z", "defaults": {"role": "assistant"}, "fields": {"content": content}}
