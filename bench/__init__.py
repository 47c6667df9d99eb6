"""The measurements behind docs/performance.md. ``python -m bench --help`` says how to run them."""
