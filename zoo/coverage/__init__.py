"""Inference and verification on every model of torchvision, timm and transformers that runs here; see `python -m zoo.coverage -h`."""
