"""The OpenAI dialect."""

from wemm.server.openai.routes import error_body, error_response, router

__all__ = ["error_body", "error_response", "router"]
