"""Runs the test suites of other projects with kl-plugins attached; their tests are not part of this repository."""
