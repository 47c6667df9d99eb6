"""The programs here are checked by tests/test_typing.py, not collected: some are wrong on purpose."""

collect_ignore_glob = ["*.py"]
