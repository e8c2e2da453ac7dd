"""Failures of the server as error objects of the OpenAI API."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from fastapi import FastAPI


class FailedError(Exception):
    """A generation that failed, with an HTTP status and a message for the client.

    transformers puts the text of an exception into a JSON string without escaping it, when a stream breaks off. So the
    text of this exception is escaped already, and `read` reverses that.

    Args:
        status: HTTP status.
        message: what the client reads.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(json.dumps(f"{status} {message}")[1:-1])
        self.status = status
        self.message = message

    @classmethod
    def read(cls, text: str) -> FailedError:
        """Return the failure that the last event of a broken stream describes."""
        status, _, message = text.partition(" ")
        return cls(int(status), message) if status.isdigit() else cls(500, text)


def error_object(status: int, message: str) -> dict[str, Any]:
    """Return the error object of the OpenAI API for an HTTP status and a message."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def add_error_handlers(app: FastAPI) -> None:
    """Let an application answer every failure with an error object."""
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _not_an_object)
    app.add_exception_handler(Exception, _unexpected)


async def _http_error(_: Any, error: Any) -> JSONResponse:
    body = error_object(error.status_code, str(error.detail))
    return JSONResponse(body, error.status_code, headers=error.headers)


async def _not_an_object(_: Any, error: Any) -> JSONResponse:
    reason = error.errors()[0]["msg"]
    return JSONResponse(error_object(400, f"the body is no JSON object: {reason}."), 400)


async def _unexpected(_: Any, error: Exception) -> JSONResponse:
    return JSONResponse(error_object(500, f"the server failed: {type(error).__name__}."), 500)
