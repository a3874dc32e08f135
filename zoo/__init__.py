"""Models, data and training recipes that the experiments and the tests use. Not in the library's wheel."""
