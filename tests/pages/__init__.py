"""The generated parts of the documentation: ``python -m tests.pages`` brings them up to date."""
