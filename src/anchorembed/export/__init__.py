"""From a trained model to what other software loads.

Read `run` (written, reloaded, compared, kept), `check` (what is compared), `folder` (sentence-transformers'), `gguf`
(llama.cpp's), `graph` (tokens to vectors as one graph), `onnx` and `openvino` (which run it).
"""
