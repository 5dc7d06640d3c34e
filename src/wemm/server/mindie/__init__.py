"""The dialects of MindIE Service: its own, TGI, vLLM and Triton bodies, and its management plane."""

from wemm.server.mindie.errors import error_body, error_response, is_mindie_path
from wemm.server.mindie.management import management_router
from wemm.server.mindie.routes import router

__all__ = ["error_body", "error_response", "is_mindie_path", "management_router", "router"]
