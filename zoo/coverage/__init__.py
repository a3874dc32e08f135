"""Inference and verification on every model of torchvision, timm and transformers that runs here.

Run it with `python -m zoo.coverage`; `-h` lists the options.
"""
