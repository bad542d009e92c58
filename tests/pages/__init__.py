"""The generated parts of the documentation; the command ``python -m tests.pages`` updates them."""
