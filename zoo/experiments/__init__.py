"""Experiments on sets of checkpoints: ``python -m zoo.experiments NAME [--quick]``.

A *setting* is an architecture with its width, its data and its recipe. Its *networks* differ by their seeds; they are trained
once into a cache directory (``--runs``) and read from there afterwards. An *experiment* is a list of units of work, each of
which gives raw rows of numbers; a picture; and a page. Picture and page are made of the rows alone.
"""
