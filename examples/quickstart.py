"""A model in one file: `cd examples && uvicorn quickstart:app`."""

from asgi_app import serve
from engine.functions import model


@model(max_batch_size=32, input={"x": ("FP32", [4])}, output={"y": ("FP32", [4])})
def double(x):
    return 2 * x  # x is a batch: a numpy array of shape [rows, 4]


app = serve(double)
