"""The HTTP front: `asgi_app:app` is a plain ASGI 3 application; `python -m asgi_app` launches it.

`serve` makes an application of Python functions.
"""

from .app import app, serve

__all__ = ["app", "serve"]
