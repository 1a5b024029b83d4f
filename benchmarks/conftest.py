"""For pytest: importing ``__main__`` to look for doctests would import it twice."""

collect_ignore = ["__main__.py"]
