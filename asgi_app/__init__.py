"""The HTTP front: `asgi_app:app` is a plain ASGI 3 application; `python -m asgi_app` launches it."""

from .app import app

__all__ = ["app"]
